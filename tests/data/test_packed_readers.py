import errno
import io
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.data import readers
from pipeline.data.manifest import Shard
from pipeline.data.packed import PackedSource
from pipeline.data.readers import read_shard
from pipeline.errors import ImageError
from tests.reading import (
    CONTENTS,
    EVERYWHERE,
    MAX_BYTES,
    kinds,
    manifest_of,
    messages,
    pack_parquet,
    pack_tar,
    read_all,
)

PACKINGS = pytest.mark.parametrize("pack", [pack_parquet, pack_tar])


@PACKINGS
def test_packed_images_come_whole_and_in_manifest_order(pack, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_TAR_CHUNK_BYTES", 1000)  # so that members span several
    manifest = manifest_of(pack(root), shard_size=8)
    assert [shard.num_images for shard in manifest.shards()] == [8, 8, 4]
    found = read_all(manifest)
    assert [content for _, content in found] == list(CONTENTS.values())
    assert [uri.rpartition("/")[2] for uri, _ in found] == list(CONTENTS)


@PACKINGS
def test_a_part_of_packed_images_is_read_where_the_manifest_has_a_part(pack, tmp_path: Path) -> None:
    manifest = manifest_of(pack(f"file://{tmp_path}"), shard_size=8, sample=0.5, limit=6)
    found = read_all(manifest)
    assert 0 < len(found) <= 6
    assert all(content == CONTENTS[uri.rpartition("/")[2]] for uri, content in found)


@PACKINGS
def test_a_packed_source_that_changed_is_one_error_an_image(pack, root: str) -> None:
    source = pack(root)
    manifest = manifest_of(source, shard_size=8)
    storage.write(source.uri, storage.read(source.uri) + b" ")
    found = read_all(manifest)
    assert kinds(found) == ["changed"] * 20
    assert len(set(messages(found))) == 1


@PACKINGS
def test_a_packed_source_that_is_gone_is_one_error_an_image(pack, root: str) -> None:
    source = pack(root)
    manifest = manifest_of(source, shard_size=8)
    storage.delete(source.uri)
    assert kinds(read_all(manifest)) == ["not_found"] * 20


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), "storage_error"),
        (OSError("Couldn't deserialize thrift"), "unreadable"),  # pyarrow's way to tell of damage
    ],
)
def test_a_disk_that_fails_is_no_damaged_source(tmp_path: Path, monkeypatch, failure: OSError, kind: str) -> None:
    class Failing(io.FileIO):
        def readinto(self, buffer) -> int:
            if self.tell() < 100_000:
                raise failure
            return super().readinto(buffer)

        def read(self, size: int = -1) -> bytes:
            if self.tell() < 100_000:
                raise failure
            return super().read(size)

    rows = {"uri": ["a", "b"], "bytes": [b"x" * 100_000, b"y" * 200_000]}
    pq.write_table(pa.table(rows), tmp_path / "0.parquet", compression="none", use_dictionary=False)
    manifest = manifest_of(PackedSource(str(tmp_path / "0.parquet")))
    really_open = storage.open_file
    monkeypatch.setattr(
        storage, "open_file", lambda uri: Failing(uri[7:]) if uri.startswith("file://") else really_open(uri)
    )
    assert kinds(read_all(manifest)) == [kind] * 2


@PACKINGS
def test_a_packed_source_outside_the_allowed_roots_is_not_read(pack, tmp_path: Path) -> None:
    manifest = manifest_of(pack(f"file://{tmp_path}"), shard_size=8)
    assert kinds(read_all(manifest, ["s3://"])) == ["not_allowed"] * 20


@PACKINGS
def test_a_damaged_packed_source_gives_what_it_can_and_an_error_for_each_other(pack, tmp_path: Path) -> None:
    source = pack(f"file://{tmp_path}")
    manifest = manifest_of(source, shard_size=8)
    path = Path(source.uri.removeprefix("file://"))
    status = path.stat()
    damaged = bytearray(path.read_bytes())
    damaged[25_000:60_000] = b"\xff" * 35_000  # behind the first row group
    path.write_bytes(damaged)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the etag stays
    found = read_all(manifest)
    assert len(found) == 20
    assert found[1][1] == CONTENTS["01.jpg"]
    assert {"unreadable", "not_found"} & set(kinds(found))
    assert messages(found) == messages(read_all(manifest))


@pytest.mark.parametrize("size", [None, 3])
def test_a_null_in_a_packed_table_is_the_error_of_its_row_alone(tmp_path: Path, size: int | None) -> None:
    rows = {"uri": ["a", "b", "c"], "bytes": [b"aaa", None, b"ccc"], "size": pa.array([size] * 3, pa.int64())}
    pq.write_table(pa.table(rows), tmp_path / "0.parquet")
    found = read_all(manifest_of(PackedSource(str(tmp_path / "0.parquet"))))
    assert kinds(found) == ["ok", "unreadable", "ok"]
    assert messages(found) == ["expected the bytes of 'b', found null"]


@pytest.mark.parametrize("uris", [[1, 2], [b"1", b"2"]])
def test_uris_of_a_packed_table_may_be_of_any_type_a_manifest_takes(tmp_path: Path, uris: list[int | bytes]) -> None:
    pq.write_table(pa.table({"uri": uris, "bytes": [b"x", b"y"]}), tmp_path / "0.parquet")
    assert read_all(manifest_of(PackedSource(str(tmp_path / "0.parquet")))) == [("1", b"x"), ("2", b"y")]


@PACKINGS
def test_a_packed_image_over_the_byte_limit_is_an_error_and_harms_no_other(pack, tmp_path: Path) -> None:
    manifest = manifest_of(pack(f"file://{tmp_path}"))
    found: list[str] = []
    for shard in manifest.shards():
        read = read_shard(shard, manifest.images(shard), allowed_roots=EVERYWHERE, max_bytes=700 * 17)
        found += [content.error if isinstance(content, ImageError) else "ok" for content in read]
    assert found == ["ok"] * 18 + ["too_large"] * 2


@pytest.mark.parametrize(("mean_bytes", "expected"), [(0, 32), (110_000, 32), (64 << 20, 4), (1 << 30, 1)])
def test_fewer_packed_images_are_held_ahead_where_they_are_large(mean_bytes: int, expected: int) -> None:
    assert readers.packed_ahead(Shard(0, "images-00000.parquet", 0, 50, 50 * mean_bytes)) == expected


def test_a_tar_is_read_a_bounded_way_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_TAR_CHUNK_BYTES", 1024)
    monkeypatch.setattr(readers, "_PACKED_AHEAD", 1)
    manifest = manifest_of(pack_tar(f"file://{tmp_path}"))
    (shard,) = manifest.shards()
    begun: list[int] = []
    real = readers._read_chunk
    monkeypatch.setattr(readers, "_read_chunk", lambda shard, start: (begun.append(start), real(shard, start))[1])
    contents = read_shard(shard, manifest.images(shard), allowed_roots=EVERYWHERE, max_bytes=MAX_BYTES)
    assert next(contents) == b""
    time.sleep(0.5)  # as far as it goes
    assert len(begun) < 20 < shard.num_bytes // 1024
