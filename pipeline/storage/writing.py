"""Writing objects whole, and removing them."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, GenericError

from pipeline.errors import ObjectNotFoundError, StorageError
from pipeline.storage.concurrency import map_concurrently
from pipeline.storage.listing import list_objects
from pipeline.storage.names import TEMPORARY_SUFFIX, split
from pipeline.storage.stores import REQUEST_S, call_s3, filesystem, is_for_obstore, obstore_of, translated

_LONGEST_WRITE_S = 3600
_REMOVALS, _BETWEEN_REMOVALS_S = 20, 0.05
_BYTES_IN_TIME = 64 << 20  # what a request of `REQUEST_S` carries over a line of some 1 MB/s
_PARTS_AT_ONCE = 4
_PART_BYTES = _BYTES_IN_TIME // _PARTS_AT_ONCE
LARGEST_BYTES = 10_000 * _PART_BYTES
"""Of an object: S3 takes no more parts, other stores more or larger ones."""


def write(uri: str, data: bytes, *, if_absent: bool = False) -> None:
    """Write the object whole, so that no reader sees a part: one PUT, a large one in parts that become it at the end,
    or for `file` a temporary file and a rename.

    `if_absent` is one PUT always, of which S3 takes 5 GB. Raises ObjectExistsError where it is there then,
    AccessDeniedError, StorageError.
    """
    scheme, path = split(uri)
    try:
        with translated(uri), _timed(uri, len(data)):
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
    """Remove every object below `uri`; none there is no error, nor are others that come and go meanwhile."""
    scheme, path = split(uri)
    if scheme == "file":
        with translated(uri):
            _remove_tree(path)
        return
    for _ in map_concurrently(delete, [info.uri for info in list_objects(uri)]):
        pass


def _remove_tree(path: str) -> None:
    for tries_left in reversed(range(_REMOVALS)):  # each stops at the first file that came or went
        try:
            shutil.rmtree(path)
            return
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not os.path.lexists(path):
                return
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or not tries_left:
                raise
        time.sleep(_BETWEEN_REMOVALS_S)


def sweep_temporary_files(uri: str) -> None:
    """Remove what writers killed over an hour ago left under a `file` prefix; object stores never show any.

    Younger ones may be somebody's write under way; readers pass them over. Parts of an upload that was killed, which a
    bucket keeps unseen, are for its lifecycle rules (AbortIncompleteMultipartUpload).
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


@contextmanager
def _timed(uri: str, num_bytes: int) -> Iterator[None]:
    """What a write that took too long raises says so, which obstore's own first line does not."""
    start = time.monotonic()
    try:
        yield
    except GenericError as error:
        if "kind: Timeout" not in str(error):
            raise
        raise StorageError(
            f"cannot write {uri!r}: expected the store to take its {num_bytes / 1e6:,.1f} MB in time, got a time-out "
            f"after {time.monotonic() - start:,.0f} s; write less at once (packed: smaller shards) or on a faster line"
        ) from error


def _put_by_obstore(scheme: str, path: str, data: bytes, if_absent: bool) -> bool:
    """Whether obstore takes the name, and so has written the object."""
    bucket, _, key = path.partition("/")
    if is_for_obstore(scheme, key):
        with suppress(ValueError):
            (_create if if_absent else _overwrite)(scheme, bucket, key, data)
            return True
    return False


def _overwrite(scheme: str, bucket: str, key: str, data: bytes) -> None:
    if len(data) <= _BYTES_IN_TIME:
        obstore.put(obstore_of(scheme, bucket), key, data, use_multipart=False)
        return
    store = obstore_of(scheme, bucket, request_s=REQUEST_S, retry_s=2 * REQUEST_S)  # one part that is stuck goes again
    obstore.put(store, key, data, use_multipart=True, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)


def _create(scheme: str, bucket: str, key: str, data: bytes) -> None:
    """Put-if-absent. Where the first answer was lost the object may be there, by this very write, if it is equal."""
    request_s = REQUEST_S * max(1, -(-len(data) // _BYTES_IN_TIME))
    with suppress(GenericError):
        obstore.put(
            obstore_of(scheme, bucket, request_s=request_s, retry_s=0), key, data, mode="create", use_multipart=False
        )
        return
    store = obstore_of(scheme, bucket, request_s=request_s)
    try:
        obstore.put(store, key, data, mode="create", use_multipart=False)
    except AlreadyExistsError:
        if obstore.get(store, key).bytes().to_bytes() != data:
            raise


def _put_by_fsspec(scheme: str, path: str, data: bytes, if_absent: bool) -> None:
    if scheme == "s3":
        call_s3("put_object", path, Body=data, **({"IfNoneMatch": "*"} if if_absent else {}))
        return
    files = filesystem(scheme)
    if if_absent and files.exists(path):
        raise FileExistsError(path)
    files.pipe_file(path, data)
