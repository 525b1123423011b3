"""An Azure container, also that of the emulator Azurite: what is read, headed and listed has one etag.

AZURE_STORAGE_USE_EMULATOR=true AZURE_STORAGE_ACCOUNT_NAME=… AZURE_STORAGE_ACCOUNT_KEY=… TEST_AZURE_CONTAINER=…
"""

import os
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.errors import ObjectExistsError, ObjectNotFoundError
from pipeline.tables import open_table

pytestmark = pytest.mark.skipif(
    "TEST_AZURE_CONTAINER" not in os.environ, reason="needs a container of Azure or its emulator: set the environment"
)
NAMES = ["%41.jpg", "50% off/?.jpg", "a/b.jpg", "a/c/d.jpg", "tag#1.jpg", "what?.jpg", "x y.jpg", "ünï—日本.jpg"]


@pytest.fixture
def root() -> str:
    return f"az://{os.environ['TEST_AZURE_CONTAINER']}/{uuid4().hex}"


def test_objects_are_written_listed_read_and_removed_under_one_etag(root: str) -> None:
    for name in NAMES:
        storage.write(storage.join(root, name), name.encode(), if_absent=True)
    listed = list(storage.list_objects(root))
    assert [info.uri for info in listed] == [storage.join(root, name) for name in NAMES]
    for info, name in zip(listed, NAMES, strict=True):
        assert storage.head(info.uri) == info
        found = storage.read_object(info.uri)
        assert (found.data, found.etag) == (name.encode(), info.etag)
        with storage.open_file(info.uri) as file:
            assert file.read() == name.encode()
    assert storage.list_folders(root) == ["50% off", "a"]
    assert len(list(storage.list_objects(storage.join(root, "50% off")))) == 1
    with pytest.raises(ObjectExistsError):
        storage.write(storage.join(root, "a/b.jpg"), b"", if_absent=True)
    storage.delete_folder(storage.join(root, "a"))
    storage.delete(storage.join(root, "a/b.jpg"))
    with pytest.raises(ObjectNotFoundError):
        storage.read(storage.join(root, "a/b.jpg"))
    assert len(list(storage.list_objects(root))) == len(NAMES) - 2


def test_a_table_is_opened(root: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"uri": ["a"]}), sink)
    storage.write(f"{root}/predictions/run_id=r/00000000.parquet", sink.getvalue().to_pybytes())
    assert open_table(f"{root}/predictions", "r").to_table()["uri"].to_pylist() == ["a"]
