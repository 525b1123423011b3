import pytest

from pipeline.data import spool as spool_module
from pipeline.data.manifest import write_manifest
from pipeline.data.spool import Selection
from pipeline.errors import ManifestError
from tests.manifests import Row, Rows, fresh, some_rows, uris_of


def test_a_duplicate_uri_is_named() -> None:
    rows = some_rows(20)
    with pytest.raises(ManifestError, match=r"twice: 's3://bucket/0007\.jpg';"):
        write_manifest(fresh(), Rows([*rows, rows[7]]), shard_size=5)


def test_equal_hashes_of_different_uris_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = spool_module.hash_uris
    monkeypatch.setattr(spool_module, "hash_uris", lambda uris, seed=None: whole(uris, seed) % 5)
    assert write_manifest(fresh(), Rows(some_rows(50)), shard_size=5).num_images == 50
    with pytest.raises(ManifestError, match="0003"):
        write_manifest(fresh(), Rows([*some_rows(50), some_rows(4)[3]]), shard_size=5)


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
