import os
import threading
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import ObjectExistsError, StorageError


@pytest.mark.parametrize("name", ["plain.json", "new\nline.json", "deep/er.json"])
def test_put_if_absent_refuses_what_is_there_and_keeps_it(root: str, name: str) -> None:
    uri = storage.join(root, name)
    storage.write(uri, b"first", if_absent=True)
    with pytest.raises(ObjectExistsError, match=r"plain|line|er\.json"):
        storage.write(uri, b"second", if_absent=True)
    assert storage.read(uri) == b"first"
    storage.write(uri, b"third")
    assert storage.read(uri) == b"third"


@pytest.mark.parametrize("scheme", ["file", pytest.param("s3", marks=pytest.mark.s3)])
def test_of_many_racing_puts_if_absent_one_wins(scheme: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    root = f"file://{tmp_path}" if scheme == "file" else str(request.getfixturevalue("s3_uri"))
    uri = storage.join(root, "claimed")
    barrier = threading.Barrier(8)

    def claim(number: int) -> int | None:
        barrier.wait()
        try:
            storage.write(uri, b"%d" % number, if_absent=True)
        except ObjectExistsError:
            return None
        return number

    winners = [number for number in storage.map_concurrently(claim, range(8), 8) if number is not None]
    assert [b"%d" % number for number in winners] == [storage.read(uri)]


def test_temporary_files_are_not_listed_and_old_ones_are_swept(tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    storage.write(f"{root}/a/table.parquet", b"1")
    old, under_way = tmp_path / "a" / ".table.parquet.0123.part", tmp_path / "a" / ".table.parquet.4567.part"
    old.write_bytes(b"half")
    under_way.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert [found.uri for found in storage.list_objects(root)] == [f"{root}/a/table.parquet"]
    storage.sweep_temporary_files(root)
    storage.sweep_temporary_files(f"{root}/absent")
    assert sorted((tmp_path / "a").iterdir()) == [under_way, tmp_path / "a" / "table.parquet"]


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError):
        storage.write(f"file://{tmp_path}/taken", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_folder_is_deleted_with_all_below_it_and_nothing_beside(root: str) -> None:
    for name in ("gone/a", "gone/deep/er", "gone-not"):
        storage.write(storage.join(root, name), b"-")
    for _ in range(2):
        storage.delete_folder(storage.join(root, "gone"))
    assert [info.uri for info in storage.list_objects(root)] == [storage.join(root, "gone-not")]
