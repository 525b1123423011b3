"""Verification finds whatever is wrong, by name, and nothing where nothing is."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import ReconcileError
from pipeline.inference.commit import Receipt, committed_shard_ids, read_receipts
from pipeline.inference.reconcile import Totals, find_faults, reconcile
from pipeline.inference.run import Run, read_run
from pipeline.tables.writing import encode, table_folder
from tests.worlds import make_world, run_without_ray

OPTIONS = {"run_id": "r", "bundles": ["tiny", "other"], "tables": {"names": ["predictions", "embeddings"]}}


@pytest.fixture(scope="module")
def whole_world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    run_without_ray(root, **OPTIONS)
    return root


@pytest.fixture
def tables(whole_world):
    """The tables folder of a whole run, to damage; restored after the test."""
    folder, kept = whole_world / "tables", whole_world / "kept"
    shutil.copytree(folder, kept)
    yield folder
    shutil.rmtree(folder)
    kept.rename(folder)


def faults_of(tables: Path) -> list[str]:
    return list(find_faults(read_run(f"file://{tables}", "r")))


def rewrite(tables: Path, name: str, change) -> None:
    """Replace a table file of shard 1 by a changed one, and its digest in the commit, as a faulty writer would have."""
    import hashlib

    path = tables / name / "run_id=r" / "00000001.parquet"
    data = encode(change(pq.ParquetFile(path).read()))
    path.write_bytes(data)
    commit = tables / "_runs" / "r" / "commits" / "00000001.json"
    record = json.loads(commit.read_text())
    for file in record["files"]:
        if file["path"].startswith(name):
            file["sha256"] = hashlib.sha256(data).hexdigest()
    commit.write_text(json.dumps(record))


def test_a_whole_run_has_no_faults(tables):
    assert faults_of(tables) == []


def test_a_copy_of_a_run_is_judged_by_what_was_copied(tables, tmp_path):
    copy = shutil.copytree(tables, tmp_path / "copy")
    assert faults_of(copy) == []
    (copy / "_runs/r/commits/00000001.json").unlink()
    (copy / "predictions/run_id=r/00000002.parquet").unlink()
    assert faults_of(tables) == []
    assert [fault.partition(":")[0] for fault in faults_of(copy)] == [
        "shard 1",
        "predictions/run_id=r/00000002.parquet",
    ]


def test_a_missing_commit_is_named(tables):
    (tables / "_runs/r/commits/00000002.json").unlink()
    assert faults_of(tables) == ["shard 2: no commit; run the same command again"]


def test_a_commit_of_no_shard_is_named(tables):
    shutil.copy(tables / "_runs/r/commits/00000002.json", tables / "_runs/r/commits/00000099.json")
    assert faults_of(tables) == ["shard 99: committed, but not in the manifest"]


@pytest.mark.parametrize("name", ["predictions", "embeddings", "errors"])
def test_a_table_file_that_is_gone_is_named(tables, name):
    (tables / name / "run_id=r/00000000.parquet").unlink()
    assert faults_of(tables) == [f"{name}/run_id=r/00000000.parquet: committed, but gone"]


@pytest.mark.parametrize("name", ["predictions", "embeddings", "errors"])
def test_one_altered_byte_is_named(tables, name):
    path = tables / name / "run_id=r/00000001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    [fault] = faults_of(tables)
    assert fault.startswith(f"{name}/run_id=r/00000001.parquet: expected sha256")


@pytest.mark.parametrize("name", ["predictions", "embeddings"])
def test_a_lost_row_is_named_even_where_the_digest_agrees(tables, name):
    rewrite(tables, name, lambda table: table.slice(1))
    [fault] = faults_of(tables)
    assert fault.startswith(f"shard 1: {name}: 1 rows missing, first ('file://")


def test_a_double_row_is_named_even_where_the_digest_agrees(tables):
    rewrite(tables, "predictions", lambda table: table.take([0, *range(table.num_rows)]))
    [fault] = faults_of(tables)
    assert fault.startswith("shard 1: predictions: 1 rows too many")


def test_rows_out_of_order_are_named(tables):
    rewrite(tables, "predictions", lambda table: table.take([2, 3, 0, 1, *range(4, table.num_rows)]))
    assert faults_of(tables) == ["shard 1: predictions: rows out of the manifest's order"]


def test_an_image_in_predictions_and_errors_is_named(tables):
    uri = pq.ParquetFile(tables / "predictions/run_id=r/00000001.parquet").read()["uri"][0].as_py()

    def add(table):
        row = {"uri": uri, "etag": None, "stage": "decode", "error": "empty", "message": "-"}
        return type(table).from_pylist([row, *table.to_pylist()], schema=table.schema)

    rewrite(tables, "errors", add)
    assert any("predictions: 2 rows too many or in another table too" in fault for fault in faults_of(tables))


@pytest.mark.parametrize(
    "stray", ["predictions/run_id=r/00000077.parquet", "embeddings/run_id=r/copy of 0.parquet", "errors/run_id=r/x/y"]
)
def test_a_stray_file_is_named(tables, stray):
    path = tables / stray
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    [fault] = faults_of(tables)
    assert fault == f"file://{path}: a stray file, of no shard of this run"


def test_a_commit_whose_counts_are_not_the_tables_is_named(tables):
    commit = tables / "_runs/r/commits/00000001.json"
    commit.write_text(json.dumps({**json.loads(commit.read_text()), "num_predicted": 8, "num_errors": 0}))
    [fault] = faults_of(tables)
    assert fault.startswith("shard 1: its commit counts (8, 8, 0")


def test_a_damaged_commit_is_one_fault_among_others(tables):
    (tables / "_runs/r/commits/00000001.json").write_text("{")
    (tables / "_runs/r/commits/00000002.json").unlink()
    damaged, missing = faults_of(tables)
    assert damaged.startswith("shard 1: expected a commit at")
    assert missing == "shard 2: no commit; run the same command again"


def test_another_manifest_in_its_place_is_named(whole_world, tables):
    plan = tables / "_runs/r/plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "manifest_digest": "0" * 64}))
    [fault] = faults_of(tables)
    assert fault.startswith("manifest: expected digest 0000")


def reconciled(run: Run, receipts: Iterable[Receipt]) -> Totals:
    return reconcile(run, receipts, run.output_uri, [table_folder(name, run.run_id) for name in run.table_names])


def test_receipts_that_add_up_reconcile(tables):
    run = read_run(f"file://{tables}", "r")
    totals = reconciled(run, read_receipts(run.uri, committed_shard_ids(run.uri)))
    assert (totals.num_images, totals.num_predicted, totals.num_errors) == (30, 27, 3)
    assert totals.errors.total() == 3


def test_a_shard_without_a_receipt_does_not_reconcile(tables):
    run = read_run(f"file://{tables}", "r")
    with pytest.raises(ReconcileError, match=r"expected 30 images in 4 shards accounted for, got 22 in 3"):
        reconciled(run, read_receipts(run.uri, {1, 2, 3} - {1} | {0}))


def test_a_receipt_that_lost_an_image_does_not_reconcile(tables):
    run = read_run(f"file://{tables}", "r")
    lossy = Receipt(0, num_images=8, num_predicted=6, num_errors=1, errors={}, files=[], seconds={})
    with pytest.raises(ReconcileError, match="shard 0: expected 8 images accounted for"):
        reconciled(run, [lossy])


def test_files_that_only_another_node_has_do_not_reconcile(tables):
    run = read_run(f"file://{tables}", "r")
    shutil.rmtree(tables / "predictions")
    with pytest.raises(ReconcileError, match=r"predictions/run_id=r/0+\.parquet', found none\. .* not all nodes share"):
        reconciled(run, read_receipts(run.uri, committed_shard_ids(run.uri)))


def test_a_table_of_another_size_or_of_no_shard_does_not_reconcile_a_marker_does(tables):
    run = read_run(f"file://{tables}", "r")
    folder = tables / "predictions/run_id=r"
    (folder / "_SUCCESS").touch()
    reconciled(run, read_receipts(run.uri, committed_shard_ids(run.uri)))
    (folder / "copy.parquet").write_bytes(b"PAR1")
    with pytest.raises(ReconcileError, match=r"expected no such file at .*copy\.parquet', found 4 bytes"):
        reconciled(run, read_receipts(run.uri, committed_shard_ids(run.uri)))
    (folder / "copy.parquet").unlink()
    (folder / "00000002.parquet").write_bytes(b"PAR1")
    with pytest.raises(ReconcileError, match=r"expected \d+ bytes at .*2\.parquet', found 4 bytes"):
        reconciled(run, read_receipts(run.uri, committed_shard_ids(run.uri)))
