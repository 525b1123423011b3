import errno
import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.data import readers
from pipeline.data.manifest import Manifest, Shard, write_manifest
from pipeline.data.packed import PackedSource, WebDatasetSource
from pipeline.data.readers import ImageRef, fetch_image, read_shard, refusing_outages
from pipeline.data.sources import PrefixSource, Source
from pipeline.data.spool import Selection
from pipeline.errors import ImageError, StorageError

EVERYWHERE = [f"{scheme}://" for scheme in storage.SCHEMES]
MAX_BYTES = 1 << 20


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}" if request.param == "file" else str(request.getfixturevalue("s3_uri"))


def manifest_of(
    source: Source, shard_size: int = 100, limit: int | None = None, sample: float | None = None
) -> Manifest:
    selection = Selection(limit=limit, sample=sample)
    return write_manifest(f"memory://{uuid4().hex}", source, shard_size=shard_size, selection=selection)


def read_all(manifest: Manifest, allowed_roots: Sequence[str] = EVERYWHERE) -> list[tuple[str, bytes | ImageError]]:
    found = []
    for shard in manifest.shards():
        images = manifest.images(shard)
        contents = read_shard(shard, images, allowed_roots=allowed_roots, max_bytes=MAX_BYTES)
        found += list(zip(images["uri"].to_pylist(), contents, strict=True))
    return found


def kinds(found: list[tuple[str, bytes | ImageError]]) -> list[str]:
    return [content.error if isinstance(content, ImageError) else "ok" for _, content in found]


def messages(found: list[tuple[str, bytes | ImageError]]) -> list[str]:
    return [content.message for _, content in found if isinstance(content, ImageError)]


# --- loose images --------------------------------------------------------------------------------------------------


def test_loose_images_come_whole_and_in_manifest_order(root: str) -> None:
    names = [f"{number:03d} %#?ü.jpg" for number in range(150)] + ["new\nline.jpg", "empty.jpg"]
    contents = {storage.join(root, name): b"" if name == "empty.jpg" else name.encode() for name in names}
    for uri, content in contents.items():
        storage.write(uri, content)
    manifest = manifest_of(PrefixSource(root), shard_size=60)
    assert read_all(manifest) == sorted(contents.items())


def test_what_cannot_be_had_is_an_error_in_its_place_and_harms_nothing_else(root: str) -> None:
    for number in range(6):
        storage.write(f"{root}/{number}.jpg", b"12345")
    manifest = manifest_of(PrefixSource(root))
    storage.delete(f"{root}/1.jpg")
    storage.write(f"{root}/2.jpg", b"54321")
    storage.write(f"{root}/4.jpg", b"123456")
    found = read_all(manifest)
    assert kinds(found) == ["ok", "not_found", "changed", "ok", "changed", "ok"]
    assert all(isinstance(error, bytes) or error.stage == "fetch" for _, error in found)
    assert messages(found) == messages(read_all(manifest))
    assert repr(f"{root}/1.jpg") in messages(found)[0]


def test_a_size_is_checked_where_the_etag_is_unknown(tmp_path: Path) -> None:
    storage.write(f"file://{tmp_path}/a.jpg", b"12345")
    images = pa.table(
        {
            "uri": [f"file://{tmp_path}/a.jpg"] * 3,
            "size": pa.array([None, 5, 6], pa.int64()),
            "etag": pa.nulls(3, pa.string()),
            "label": pa.nulls(3, pa.int32()),
        }
    )
    found = list(
        read_shard(Shard(0, "images-00000.parquet", 0, 3, 11), images, allowed_roots=EVERYWHERE, max_bytes=MAX_BYTES)
    )
    assert found[:2] == [b"12345", b"12345"]
    assert isinstance(found[2], ImageError)
    assert (found[2].error, found[2].message.endswith("found 5")) == ("changed", True)


@pytest.mark.parametrize(("size", "error"), [(5, "changed"), (None, "too_large")])
def test_of_what_is_larger_than_was_told_or_allowed_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None, error: str
) -> None:
    (tmp_path / "grown.jpg").write_bytes(b"123456789")
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("was read"))
    image = ImageRef(f"file://{tmp_path}/grown.jpg", size, None)
    found = fetch_image(image, allowed_roots=EVERYWHERE, max_bytes=8)
    assert isinstance(found, ImageError)
    assert (found.error, found.message.rpartition(" ")[2]) == (error, "9")


def test_images_outside_the_allowed_roots_are_not_read(tmp_path: Path) -> None:
    for name in ("in/1.jpg", "out/2.jpg"):
        storage.write(f"file://{tmp_path}/{name}", b"1")
    manifest = manifest_of(PrefixSource(f"file://{tmp_path}"))
    assert kinds(read_all(manifest, [f"file://{tmp_path}/in"])) == ["ok", "not_allowed"]
    assert kinds(read_all(manifest, ["s3://"])) == ["not_allowed", "not_allowed"]


@pytest.mark.s3
def test_denied_images_are_errors_and_their_neighbours_are_not(s3_uri: str) -> None:
    bucket = s3_uri.removeprefix("s3://")
    for name in ("a/1.jpg", "b/2.jpg"):
        storage.write(storage.join(s3_uri, name), b"1")
    manifest = manifest_of(PrefixSource(s3_uri))
    statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{bucket}/b/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    storage.filesystem("s3").call_s3("put_bucket_policy", Bucket=bucket, Policy=policy)
    assert kinds(read_all(manifest)) == ["ok", "access_denied"]
    storage.filesystem("s3").call_s3("delete_bucket_policy", Bucket=bucket)


def test_a_failing_store_is_an_error_whose_message_is_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(uri: str, *part: int, **limits: int) -> storage.StoredObject:
        if not uri.endswith(".jpg"):
            return real(uri, *part, **limits)
        raise StorageError(f"{uri}: 503 after 12.34 s, request id {uuid4()}")

    storage.write(f"file://{tmp_path}/a.jpg", b"1")
    manifest = manifest_of(PrefixSource(f"file://{tmp_path}"))
    real = storage.read_object
    monkeypatch.setattr(storage, "read_object", fail)
    assert kinds(read_all(manifest)) == ["storage_error"]
    assert messages(read_all(manifest)) == messages(read_all(manifest))


def test_reading_stays_a_bounded_way_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        storage.write(f"file://{tmp_path}/{number:03d}.jpg", b"1")
    manifest = manifest_of(PrefixSource(f"file://{tmp_path}"))
    (shard,) = manifest.shards()
    begun: list[str] = []
    lock = threading.Lock()
    real = storage.read_object

    def counted(uri: str, **limits: int) -> storage.StoredObject:
        with lock:
            begun.append(uri)
        return real(uri, **limits)

    images = manifest.images(shard)
    monkeypatch.setattr(storage, "read_object", counted)
    contents = read_shard(shard, images, allowed_roots=EVERYWHERE, max_bytes=MAX_BYTES, concurrency=4)
    assert [next(contents) for _ in range(10)] == [b"1"] * 10
    assert len(begun) <= 10 + 2 * 4


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


def test_memory_that_runs_out_is_no_error_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pread(*_: int) -> bytes:
        raise MemoryError

    (tmp_path / "a.jpg").write_bytes(b"1")
    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(MemoryError):
        fetch_image(ImageRef(f"file://{tmp_path}/a.jpg", 1, None), allowed_roots=EVERYWHERE, max_bytes=MAX_BYTES)


# --- packed images -------------------------------------------------------------------------------------------------

CONTENTS = {f"{number:02d}.jpg": Random(number).randbytes(700 * number) for number in range(20)}


def pack_parquet(root: str) -> Source:
    table = pa.table(
        {"uri": list(CONTENTS), "bytes": list(CONTENTS.values()), "size": [len(c) for c in CONTENTS.values()]}
    )
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=8)
    storage.write(f"{root}/packed.parquet", file.getvalue())
    return PackedSource(f"{root}/packed.parquet")


def pack_tar(root: str) -> Source:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, (name, content) in enumerate(CONTENTS.items()):
            for member, data in ((f"{'long/' * 30 * (number % 2)}{name}", content), (name.replace("jpg", "cls"), b"1")):
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    storage.write(f"{root}/packed.tar", file.getvalue())
    return WebDatasetSource(f"{root}/packed.tar")


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
    damaged[20_000:60_000] = b"\xff" * 40_000
    path.write_bytes(damaged)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the etag stays
    found = read_all(manifest)
    assert len(found) == 20
    assert isinstance(found[0][1], bytes) or pack is pack_parquet
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


def test_a_tar_that_goes_in_the_middle_of_a_shard_is_an_outage(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(readers, "_TAR_CHUNK_BYTES", 1024)
    monkeypatch.setattr(readers, "_PACKED_AHEAD", 1)
    contents = guarded(manifest_of(pack_tar(f"file://{tmp_path}")))
    assert [next(contents) for _ in range(4)] == list(CONTENTS.values())[:4]
    (tmp_path / "packed.tar").unlink()
    with pytest.raises(StorageError, match="of its 20 images cannot be fetched, nor now one that was"):
        list(contents)


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


def test_an_object_over_the_byte_limit_is_refused_before_it_is_fetched(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "large.jpg")
    storage.write(uri, b"x" * 100)
    images = pa.table(
        {"uri": [uri, uri], "size": pa.array([100, None], pa.int64()), "etag": pa.array([None] * 2, pa.string())}
    )
    shard = Shard(0, "images-00000.parquet", 0, 2, 100)
    found = list(read_shard(shard, images, allowed_roots=EVERYWHERE, max_bytes=99))
    assert [error.error for error in found if isinstance(error, ImageError)] == ["too_large", "too_large"]


def test_a_pipe_named_like_an_image_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    uri = f"file://{tmp_path}/pipe.jpg"
    images = pa.table({"uri": [uri], "size": pa.array([0], pa.int64()), "etag": pa.array([None], pa.string())})
    shard = Shard(0, "images-00000.parquet", 0, 1, 0)
    [found] = read_shard(shard, images, allowed_roots=EVERYWHERE, max_bytes=MAX_BYTES)
    assert isinstance(found, ImageError)
    assert found.error == "not_found"
