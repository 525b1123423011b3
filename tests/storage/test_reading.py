import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import ObjectNotFoundError, ObjectTooLargeError, StorageError


def test_a_read_and_a_listing_agree_on_the_etag(root: str) -> None:
    for name in ("plain.jpg", "new\nline.jpg"):
        uri = storage.join(root, name)
        storage.write(uri, b"one")
        (listed,) = (found for found in storage.list_objects(root) if found.uri == uri)
        assert storage.head(uri) == listed
        if not root.startswith("memory"):
            assert storage.read_object(uri).etag == listed.etag is not None
        storage.write(uri, b"another")
        assert root.startswith("memory") or storage.read_object(uri).etag != listed.etag


def test_ranges_are_half_open(root: str) -> None:
    for name in ("plain.bin", "new\nline.bin"):
        uri = storage.join(root, name)
        storage.write(uri, b"0123456789")
        assert storage.read(uri, 2, 5) == b"234"
        assert storage.read(uri, 7) == b"789"
        assert storage.read(uri, None, 3) == b"012"
        assert storage.read(uri, 8, 20) == b"89"


def test_an_object_that_is_larger_than_its_reader_takes_is_refused(root: str) -> None:
    for name in ("plain.bin", "new\nline.bin"):
        uri = storage.join(root, name)
        storage.write(uri, b"0123456789")
        assert storage.read_object(uri, max_bytes=10).data == b"0123456789"
        with pytest.raises(ObjectTooLargeError, match=r"expected at most 9 bytes at .*, found 10") as refused:
            storage.read_object(uri, max_bytes=9)
        assert refused.value.details == {"size": 10}


def test_a_file_that_comes_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.bin").write_bytes(b"0123456789")
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, start: read(descriptor, min(size, 3), start))
    uri = f"file://{tmp_path}/large.bin"
    assert (storage.read(uri), storage.read(uri, 2, 7), storage.read(uri, 8, 20)) == (b"0123456789", b"23456", b"89")


def test_ranges_that_hold_nothing_are_empty_and_negative_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "ten.bin").write_bytes(b"0123456789")
    uri = f"file://{tmp_path}/ten.bin"
    assert (storage.read(uri, 10), storage.read(uri, 20, 30), storage.read(uri, 5, 2)) == (b"", b"", b"")
    with pytest.raises(StorageError):
        storage.read(uri, -3)


def test_a_file_that_shrinks_while_it_is_read_ends_where_it_ends(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "ten.bin").write_bytes(b"0123456789")
    read = os.pread

    def shrinking(descriptor: int, size: int, start: int) -> bytes:
        os.truncate(tmp_path / "ten.bin", 4)
        return read(descriptor, size, start)

    monkeypatch.setattr(os, "pread", shrinking)
    assert storage.read(f"file://{tmp_path}/ten.bin") == b"0123"


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="needs a file that tells no size")
def test_a_file_that_tells_no_size_is_read_to_its_end() -> None:
    data = storage.read("file:///proc/cpuinfo")
    assert data.startswith(b"processor")
    assert data.endswith(b"\n")


def test_an_open_file_seeks_and_reads_as_a_local_one_does(root: str) -> None:
    uri = storage.join(root, "big.bin")
    data = bytes(range(256)) * 1024
    storage.write(uri, data)
    with storage.open_file(uri) as file:
        assert file.seek(-10, os.SEEK_END) == len(data) - 10
        assert file.read() == data[-10:]
        file.seek(70_000)
        assert file.read(100_000) == data[70_000:170_000]
        file.seek(5, os.SEEK_CUR)
        assert file.read(1) == data[170_005:170_006]


@pytest.mark.s3
def test_an_object_that_changes_under_an_open_file_is_noticed(s3_uri: str) -> None:
    uri = storage.join(s3_uri, "changing.bin")
    storage.write(uri, b"a" * 300_000)
    with storage.open_file(uri) as file:
        file.read(10)
        storage.write(uri, b"b" * 300_000)
        with pytest.raises(StorageError, match="changed"):
            file.read(200_000)


@pytest.mark.parametrize("touch", [storage.read, storage.head, storage.open_file, lambda uri: storage.read(uri, 1, 2)])
@pytest.mark.parametrize("name", ["gone.jpg", "no/such/folder.jpg", "gone\n.jpg"])
def test_a_missing_object_is_named(root: str, name: str, touch: Callable[[str], object]) -> None:
    storage.write(storage.join(root, "there.jpg"), b"1")
    uri = storage.join(root, name)
    with pytest.raises(ObjectNotFoundError) as caught:
        touch(uri)
    assert repr(uri) in str(caught.value)
    assert not storage.exists(uri)
    storage.delete(uri)


def test_a_folder_is_not_an_object(root: str) -> None:
    storage.write(storage.join(root, "folder/image.jpg"), b"1")
    assert not storage.exists(storage.join(root, "folder"))
    with pytest.raises(ObjectNotFoundError):
        storage.read(storage.join(root, "folder"))
