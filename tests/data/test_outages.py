from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.data import readers
from pipeline.data.manifest import Manifest, Shard
from pipeline.data.outages import refusing_outages
from pipeline.data.readers import read_shard
from pipeline.data.sources import PrefixSource
from pipeline.errors import ImageError, StorageError
from tests.reading import CONTENTS, EVERYWHERE, MAX_BYTES, manifest_of, pack_tar


def guarded(manifest: Manifest, *, accept_lost_shards: bool = False) -> Iterator[bytes | ImageError]:
    """The images of a manifest's only shard."""
    [shard] = manifest.shards()
    images = manifest.images(shard)
    encoded = read_shard(shard, images, allowed_roots=EVERYWHERE, max_bytes=MAX_BYTES, concurrency=1)
    return refusing_outages(encoded, shard, images, max_storage_errors=10, accept_lost_shards=accept_lost_shards)


def manifest_of_forty(folder: Path) -> Manifest:
    for number in range(40):
        storage.write(f"file://{folder}/{number:02d}.jpg", b"1")
    return manifest_of(PrefixSource(f"file://{folder}"))


@pytest.mark.parametrize("accept_lost_shards", [False, True])
def test_a_folder_that_goes_in_the_middle_of_a_shard_is_an_outage(tmp_path: Path, accept_lost_shards: bool) -> None:
    contents = guarded(manifest_of_forty(tmp_path / "photos"), accept_lost_shards=accept_lost_shards)
    assert [next(contents) for _ in range(20)] == [b"1"] * 20
    (tmp_path / "photos").rename(tmp_path / "unmounted")
    if accept_lost_shards:
        assert len(list(contents)) == 20
        return
    expected = r"(18|19|20) of its 40 images cannot be fetched, nor now one that was: .*Is the folder mounted"
    with pytest.raises(StorageError, match=expected):
        list(contents)


def test_many_images_that_are_gone_are_errors_where_their_neighbours_are_there(tmp_path: Path) -> None:
    manifest = manifest_of_forty(tmp_path)
    for number in range(10, 30):
        storage.delete(f"file://{tmp_path}/{number}.jpg")
    assert sum(isinstance(content, ImageError) for content in guarded(manifest)) == 20


def test_a_shard_that_a_store_never_gives_becomes_errors_where_lost_shards_are_accepted() -> None:
    images = pa.table({"uri": ["s3://bucket/a.jpg"], "size": [1], "etag": ["e"]})
    lost, shard = ImageError("fetch", "storage_error", "the store failed"), Shard(0, "images-00000.parquet", 0, 1, 1)

    def refusing(**accepting: bool) -> list[bytes | ImageError]:
        return list(refusing_outages(iter([lost]), shard, images, max_storage_errors=10, **accepting))

    with pytest.raises(StorageError, match="images that it never gives become rows"):
        refusing(accept_lost_shards=False)
    assert refusing(accept_lost_shards=True) == [lost]


def test_a_failing_store_is_told_with_its_cause(tmp_path: Path) -> None:
    uris = [f"file://{tmp_path}/\0{number}.jpg" for number in range(30)]  # no file system takes these
    images = pa.table({"uri": uris, "size": [1] * 30, "etag": pa.nulls(30, pa.string())})
    shard = Shard(0, "images-00000.parquet", 0, 30, 30)
    encoded = read_shard(shard, images, allowed_roots=EVERYWHERE, max_bytes=MAX_BYTES)
    with pytest.raises(StorageError, match=r"the store failed on .*\(ValueError: embedded null byte\)\. Nothing of"):
        list(refusing_outages(encoded, shard, images, max_storage_errors=10, accept_lost_shards=False))


def test_a_tar_that_goes_in_the_middle_of_a_shard_is_an_outage(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(readers, "_TAR_CHUNK_BYTES", 1024)
    monkeypatch.setattr(readers, "_PACKED_AHEAD", 1)
    contents = guarded(manifest_of(pack_tar(f"file://{tmp_path}")))
    assert [next(contents) for _ in range(4)] == list(CONTENTS.values())[:4]
    (tmp_path / "packed.tar").unlink()
    with pytest.raises(StorageError, match="of its 20 images cannot be fetched, nor now one that was"):
        list(contents)
