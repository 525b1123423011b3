import json
import os
import threading
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.data.manifest import Shard
from pipeline.data.readers import ImageRef, fetch_image, read_shard
from pipeline.data.sources import PrefixSource
from pipeline.errors import ImageError, StorageError
from tests.reading import EVERYWHERE, MAX_BYTES, kinds, manifest_of, messages, read_all


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


def test_memory_that_runs_out_is_no_error_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pread(*_: int) -> bytes:
        raise MemoryError

    (tmp_path / "a.jpg").write_bytes(b"1")
    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(MemoryError):
        fetch_image(ImageRef(f"file://{tmp_path}/a.jpg", 1, None), allowed_roots=EVERYWHERE, max_bytes=MAX_BYTES)


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
