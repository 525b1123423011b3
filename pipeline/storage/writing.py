"""Writing objects whole, and removing them."""

import errno
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import obstore

from pipeline.errors import ObjectNotFoundError, StorageError
from pipeline.storage.concurrency import map_concurrently
from pipeline.storage.listing import list_objects
from pipeline.storage.names import TEMPORARY_SUFFIX, split
from pipeline.storage.stores import call_s3, filesystem, is_for_obstore, obstore_of, translated

_LONGEST_WRITE_S = 3600


def write(uri: str, data: bytes, *, if_absent: bool = False) -> None:
    """Write the object whole: one PUT, or for `file` a temporary file and a rename, so that no reader sees a part.

    Raises ObjectExistsError where `if_absent` and it is there, AccessDeniedError, StorageError.
    """
    scheme, path = split(uri)
    try:
        with translated(uri):
            if scheme == "file":
                _write_file(Path(path), data, if_absent)
            elif not _put_by_obstore(scheme, path, data, if_absent):
                _put_by_fsspec(scheme, path, data, if_absent)
    except ObjectNotFoundError as error:
        raise StorageError(f"cannot write {uri!r}: its bucket, or a folder on the way, is not there") from error


def delete(uri: str) -> None:
    """Remove the object; one that is not there is no error."""
    scheme, path = split(uri)
    with translated(uri), suppress(FileNotFoundError):
        if scheme == "file":
            os.unlink(path)
        elif scheme == "s3":  # whose names obstore does not know all
            call_s3("delete_object", path)
        else:
            filesystem(scheme).rm_file(path)


def delete_folder(uri: str) -> None:
    """Remove every object below `uri`; none there is no error."""
    scheme, path = split(uri)
    if scheme == "file":
        with translated(uri), suppress(FileNotFoundError):
            shutil.rmtree(path)
        return
    for _ in map_concurrently(delete, [info.uri for info in list_objects(uri)]):
        pass


def sweep_temporary_files(uri: str) -> None:
    """Remove what writers killed over an hour ago left under a `file` prefix; object stores never have any.

    Younger ones may be somebody's write under way; readers pass them over.
    """
    scheme, path = split(uri)
    if scheme != "file":
        return
    for leftover in Path(path).rglob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(FileNotFoundError):
            if leftover.stat().st_mtime < time.time() - _LONGEST_WRITE_S:
                leftover.unlink()


def _write_file(path: Path, data: bytes, if_absent: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _link(temporary, path) if if_absent else os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(file: Path, to: Path) -> None:
    """Give a whole file its name, unless there is one of that name: what else does both is no single step."""
    try:
        os.link(file, to)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        raise StorageError(
            f"cannot write 'file://{to}' only where it is not there yet: expected a file system with hard links, got "
            f"{error.strerror}; use another, or the object store itself where this is one that is mounted"
        ) from error


def _put_by_obstore(scheme: str, path: str, data: bytes, if_absent: bool) -> bool:
    """Whether obstore takes the name, and so has written the object."""
    bucket, _, key = path.partition("/")
    if is_for_obstore(scheme, key):
        with suppress(ValueError):
            obstore.put(
                obstore_of(scheme, bucket), key, data, mode="create" if if_absent else "overwrite", use_multipart=False
            )
            return True
    return False


def _put_by_fsspec(scheme: str, path: str, data: bytes, if_absent: bool) -> None:
    if scheme == "s3":
        call_s3("put_object", path, Body=data, **({"IfNoneMatch": "*"} if if_absent else {}))
        return
    files = filesystem(scheme)
    if if_absent and files.exists(path):
        raise FileExistsError(path)
    files.pipe_file(path, data)
