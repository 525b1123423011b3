import json
from collections.abc import Generator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import ReconcileError, RunError
from pipeline.inference.commit import (
    Receipt,
    commit,
    committed_shard_ids,
    read_receipts,
    refusing_unshared,
    uncommit,
)
from pipeline.inference.run import run_uri
from pipeline.tables.writing import WrittenFile

counts = st.integers(0, 10**6)
receipts = st.builds(
    Receipt,
    shard_id=counts,
    num_images=counts,
    num_predicted=counts,
    num_errors=counts,
    errors=st.dictionaries(st.text(), counts),
    files=st.lists(st.builds(WrittenFile, path=st.text(), num_rows=counts, num_bytes=counts, sha256=st.text())),
    seconds=st.dictionaries(st.text(), st.floats(0, 1e6)),
    attempt=st.integers(1, 3),
)


def receipt(shard_id: int, **changes) -> Receipt:
    fields = {"num_images": 3, "num_predicted": 2, "num_errors": 1, "errors": {}, "files": [], "seconds": {}}
    return Receipt(shard_id, **{**fields, **changes})


@pytest.fixture
def run(tmp_path) -> str:
    return run_uri(storage.normalise(str(tmp_path)), "a-run")


@given(receipts)
def test_a_receipt_survives_its_json(original):
    assert Receipt.from_json(original.to_json()) == original


def test_nothing_is_committed_before_the_first_commit(run):
    assert committed_shard_ids(run) == set()


def test_committed_shards_are_found_again_with_their_receipts(run):
    for shard_id in (7, 0, 123):
        commit(run, receipt(shard_id))
    assert committed_shard_ids(run) == {0, 7, 123}
    assert [found.shard_id for found in read_receipts(run, {0, 7, 123})] == [0, 7, 123]


def test_the_first_commit_of_a_shard_stays(run):
    commit(run, receipt(1, num_predicted=2))
    commit(run, receipt(1, num_predicted=3))
    assert next(read_receipts(run, {1})).num_predicted == 2


def test_a_stray_file_among_the_commits_is_named(run):
    storage.write(storage.join(run, "commits", "notes.txt"), b"")
    with pytest.raises(ReconcileError, match=r"notes\.txt"):
        committed_shard_ids(run)


def test_a_shard_written_with_other_bytes_by_a_twin_counts_no_more(run):
    files = [[WrittenFile("predictions/1", 2, 10, sha256)] for sha256 in ("abc", "def")]
    commit(run, receipt(1, files=files[0]))
    commit(run, receipt(1, files=files[0]))
    with pytest.raises(RunError, match="shard 1 was also written, with other bytes"):
        commit(run, receipt(1, files=files[1]))
    assert committed_shard_ids(run) == set()


def test_a_shard_that_is_uncommitted_counts_no_more(run):
    for shard_id in range(3):
        commit(run, receipt(shard_id))
    uncommit(run, {0, 2, 5})
    assert committed_shard_ids(run) == {1}


def test_files_that_only_their_node_sees_are_refused_before_they_are_committed(tmp_path):
    closed: list[bool] = []

    def receipts() -> Generator[Receipt, None, None]:
        try:
            for shard_id, node in enumerate(["here", "here", "there", "here"]):
                yield receipt(shard_id, node=node, files=[WrittenFile(f"errors/{shard_id}", 2, 10, "abc")])
        finally:
            closed.append(True)

    (tmp_path / "errors").mkdir()
    (tmp_path / "errors/0").touch()  # one a node is looked for
    shared = refusing_unshared(receipts(), f"file://{tmp_path}")
    assert [next(shared).shard_id, next(shared).shard_id] == [0, 1]
    with pytest.raises(RunError, match=r"expected .*errors/2', which a node has written, found none: the output is"):
        next(shared)
    assert closed


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", json.dumps({"shard_id": 1}).encode()])
def test_a_damaged_commit_is_named(run, damage):
    storage.write(storage.join(run, "commits", "00000001.json"), damage)
    with pytest.raises(ReconcileError, match=r"00000001\.json"):
        list(read_receipts(run, {1}))


@pytest.mark.s3
def test_commits_on_a_real_object_store_are_put_once(s3_uri):
    run = run_uri(s3_uri, "a-run")
    commit(run, receipt(1, num_predicted=2))
    commit(run, receipt(1, num_predicted=3))
    assert committed_shard_ids(run) == {1}
    assert next(read_receipts(run, {1})).num_predicted == 2
