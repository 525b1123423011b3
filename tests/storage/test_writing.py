import errno
import os
import shutil
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import ObjectExistsError, StorageError
from pipeline.storage import writing


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


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTEMPTY, errno.EACCES])
def test_deleting_a_folder_goes_on_where_a_file_came_or_went(tmp_path: Path, monkeypatch, number: int) -> None:
    storage.write(f"file://{tmp_path}/gone/a", b"-")
    rmtree, errors = shutil.rmtree, [OSError(number, "meanwhile"), OSError(number, "again")]

    def interrupted(path: str) -> None:
        if errors:
            raise errors.pop()
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(StorageError) if number == errno.EACCES else nullcontext():
        storage.delete_folder(f"file://{tmp_path}/gone")
    assert (tmp_path / "gone").exists() == (number == errno.EACCES)


def test_a_large_object_is_written_in_parts_each_within_its_own_time(own_store, monkeypatch) -> None:
    monkeypatch.setattr(writing, "_BYTES_IN_TIME", 12 << 20)
    monkeypatch.setattr(writing, "_PART_BYTES", 5 << 20)
    monkeypatch.setattr(writing, "REQUEST_S", 0.5)
    data = os.urandom((12 << 20) + 1)
    own_store.answer = lambda number, status: time.sleep(0.7 if number == 2 else 0.2) or status
    storage.write(f"{own_store.uri}/large.bin", data)
    assert own_store.objects["large.bin"] == data
    assert sorted(own_store.asked) == ["POST uploadId", "POST uploads", *["PUT partNumber"] * 4]  # one again
    storage.write(f"{own_store.uri}/small.bin", data[:-1])
    assert own_store.asked[-1] == "PUT"


@pytest.mark.parametrize("is_large", [False, True])
def test_a_write_that_takes_too_long_tells_size_time_and_remedy(own_store, monkeypatch, is_large) -> None:
    monkeypatch.setattr(writing, "REQUEST_S", 0.2)
    own_store.answer = lambda number, status: time.sleep(0.5) or status
    monkeypatch.setattr(writing, "_BYTES_IN_TIME", 0 if is_large else 100 << 20)
    with pytest.raises(
        StorageError, match=r"x.bin'.* its 6\.0 MB in time, got a time-out after [01] s;.*smaller shards"
    ):
        storage.write(f"{own_store.uri}/x.bin", b"x" * 6_000_000, if_absent=not is_large)


def test_a_put_if_absent_whose_answer_was_lost_knows_its_own_object(own_store) -> None:
    own_store.answer = lambda number, status: 500 if number == 0 else status
    storage.write(f"{own_store.uri}/claim.json", b"mine", if_absent=True)
    assert own_store.objects == {"claim.json": b"mine"}
    with pytest.raises(ObjectExistsError):  # by an earlier write, of whomever
        storage.write(f"{own_store.uri}/claim.json", b"mine", if_absent=True)


def test_a_put_if_absent_that_timed_out_knows_its_own_object(own_store, monkeypatch) -> None:
    monkeypatch.setattr(writing, "REQUEST_S", 0.5)
    own_store.answer = lambda number, status: time.sleep(1 if number == 0 else 0) or status
    storage.write(f"{own_store.uri}/claim.json", b"mine", if_absent=True)
    assert own_store.objects == {"claim.json": b"mine"}


def test_a_put_if_absent_whose_answer_was_lost_does_not_take_anothers_object_for_its_own(own_store) -> None:
    own_store.objects["claim.json"] = b"another's"
    own_store.answer = lambda number, status: 500 if number == 0 else status
    with pytest.raises(ObjectExistsError):
        storage.write(f"{own_store.uri}/claim.json", b"mine", if_absent=True)


def test_a_large_put_if_absent_has_more_time(own_store, monkeypatch) -> None:
    monkeypatch.setattr(writing, "REQUEST_S", 0.3)
    monkeypatch.setattr(writing, "_BYTES_IN_TIME", 100)
    own_store.answer = lambda number, status: time.sleep(0.6) or status
    storage.write(f"{own_store.uri}/weights", b"x" * 500, if_absent=True)
    assert own_store.asked == ["PUT"]
