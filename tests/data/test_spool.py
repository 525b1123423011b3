from pathlib import Path

import pytest

from pipeline.data import spool as spool_module
from pipeline.data.manifest import write_manifest
from pipeline.data.spool import Selection, spool
from pipeline.errors import ManifestError, StorageError
from tests.manifests import Row, Rows, fresh, some_rows, uris_of


def test_a_duplicate_uri_is_named() -> None:
    rows = some_rows(20)
    with pytest.raises(ManifestError, match=r"twice: 's3://bucket/0007\.jpg';"):
        write_manifest(fresh(), Rows([*rows, rows[7]]), shard_size=5)


def test_equal_hashes_of_different_uris_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = spool_module.hash_uris
    monkeypatch.setattr(spool_module, "hash_uris", lambda uris, seed=None: whole(uris, seed) % 5)
    monkeypatch.setattr(spool_module, "_SUSPECTS_AT_ONCE", 2)
    assert write_manifest(fresh(), Rows(some_rows(50)), shard_size=5).num_images == 50
    for number in range(5):  # of whatever hash
        with pytest.raises(ManifestError, match=f"000{number}"):
            write_manifest(fresh(), Rows([*some_rows(50), some_rows(5)[number]]), shard_size=5)


def test_a_source_that_is_there_twice_is_refused_by_some_of_its_uris_and_not_by_counting_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at: list[int] = []
    find = spool_module._find_twice

    def counted(spooled: spool_module.Spool, suspects: spool_module.Hashes) -> list[str]:
        looked_at.append(len(suspects))
        return find(spooled, suspects)

    monkeypatch.setattr(spool_module, "_find_twice", counted)
    monkeypatch.setattr(spool_module, "_SUSPECTS_AT_ONCE", 7)
    with pytest.raises(ManifestError, match=r"twice: .* and more; drop the repeated rows"):
        write_manifest(fresh(), Rows([*some_rows(50), *some_rows(50)]), shard_size=5)
    assert looked_at == [7]


def test_labels_that_are_no_classes_are_refused_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_MOST_LABELS", 40)
    rows: list[Row] = [(f"s3://bucket/{number}.jpg", None, None, f"a photo, no. {number}") for number in range(50)]
    assert write_manifest(fresh(), Rows(rows[:40]), shard_size=5).num_images == 40
    with pytest.raises(ManifestError, match=r"at most 40 classes, got more, such as 'a photo, no\. 0'.*do they tell"):
        write_manifest(fresh(), Rows(rows), shard_size=5)


@pytest.mark.parametrize(
    "uri", ["file:///etc/passwd", "s3://other/x.jpg", "s3://bucket-2/x.jpg", "s3://bucket", "http://host/x.jpg"]
)
def test_a_uri_outside_the_allowed_roots_is_named(uri: str) -> None:
    rows: list[Row] = [*some_rows(5), (uri, None, None, None)]
    with pytest.raises(ManifestError, match="allowed_roots") as caught:
        write_manifest(fresh(), Rows(rows), shard_size=5, selection=Selection(["s3://bucket/"]))
    assert repr(uri) in str(caught.value)


def test_a_path_cannot_climb_out_of_an_allowed_root() -> None:
    climbing: list[Row] = [("file:///data/a/../../etc/passwd", None, None, None)]
    with pytest.raises(ManifestError, match="etc/passwd"):
        write_manifest(fresh(), Rows(climbing), shard_size=5, selection=Selection(["file:///data"]))
    staying: list[Row] = [("file:///data/a/../b.jpg", None, None, None), ("file:///data/..b.jpg", None, None, None)]
    assert write_manifest(fresh(), Rows(staying), shard_size=5, selection=Selection(["file:///data"])).num_images == 2


def test_limit_takes_the_first() -> None:
    made = write_manifest(fresh(), Rows(some_rows(50)), shard_size=5, selection=Selection(limit=12))
    assert uris_of(made) == [row[0] for row in some_rows(12)]


def test_a_sample_is_the_same_in_any_order_and_about_as_large_as_asked() -> None:
    rows = some_rows(2000)
    sample = Selection(sample=0.25)
    forward = uris_of(write_manifest(fresh(), Rows(rows, 100), shard_size=500, selection=sample))
    backward = uris_of(write_manifest(fresh(), Rows(rows[::-1], 70), shard_size=500, selection=sample))
    assert sorted(forward) == sorted(backward)
    assert 400 < len(forward) < 600
    other = Selection(sample=0.25, seed=1)
    assert uris_of(write_manifest(fresh(), Rows(rows, 100), shard_size=500, selection=other)) != forward
    whole = write_manifest(fresh(), Rows(rows, 100), shard_size=500, selection=Selection(sample=1.0))
    assert whole.num_images == 2000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
@pytest.mark.parametrize("name", ["images.arrow", "hashes-07"])
def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(StorageError, match=rf"{tmp_path}: expected room .*No space left on device.*TMPDIR"):
        spool(Rows(some_rows(500)), Selection(), tmp_path)
