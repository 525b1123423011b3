"""Reading objects: whole, in ranges, or as a seekable file."""

import io
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, TypeAlias

import fsspec.asyn
import obstore

from pipeline.errors import ObjectNotFoundError, ObjectTooLargeError, StorageError
from pipeline.storage.names import split
from pipeline.storage.objects import ObjectInfo, StoredObject, clean_etag, file_etag
from pipeline.storage.stores import OBSTORE_ALONE, call_s3, filesystem, is_for_obstore, obstore_of, translated

_UNTOLD_BYTES = 1 << 20
_Found: TypeAlias = tuple[bytes | obstore.Bytes, str | None]
"""What an object holds, and the etag it was read under."""
_Refuse: TypeAlias = Callable[[int], None]
"""Told the size of the whole object, raises ObjectTooLargeError where it is too large."""


def read(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """The object's bytes, or its bytes [start, end).

    Raises ObjectNotFoundError, AccessDeniedError, StorageError.
    """
    return read_object(uri, start, end).data


def read_object(
    uri: str, start: int | None = None, end: int | None = None, *, max_bytes: int | None = None
) -> StoredObject:
    """The object's bytes, or its bytes [start, end), with the etag they were read under.

    Raises ObjectNotFoundError, AccessDeniedError, StorageError; ObjectTooLargeError, before anything is read, where the
    whole object has more than `max_bytes`.
    """
    data, etag = _read(uri, start, end, max_bytes)
    return StoredObject(bytes(data), etag)


def head(uri: str) -> ObjectInfo:
    """Size and etag of one object. Raises as `read`."""
    scheme, path = split(uri)
    with translated(uri):
        if scheme == "file":
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(path)
            return ObjectInfo(uri, status.st_size, file_etag(status))
        if scheme == "s3":
            found = call_s3("head_object", path)
            return ObjectInfo(uri, found["ContentLength"], clean_etag(found["ETag"]))
        if scheme in OBSTORE_ALONE:
            bucket, _, key = path.partition("/")
            meta = obstore.head(obstore_of(scheme, bucket), key)
            return ObjectInfo(uri, meta["size"], clean_etag(meta["e_tag"]))
        info = filesystem(scheme).info(path)
        if info["type"] == "directory":
            raise IsADirectoryError(path)
        return ObjectInfo(uri, info["size"], clean_etag(info.get("etag")))


def exists(uri: str) -> bool:
    """Whether the object (not a folder) is there."""
    try:
        head(uri)
    except ObjectNotFoundError:
        return False
    return True


def open_file(uri: str) -> IO[bytes]:
    """A seekable binary file over the object, for readers that want parts of it. Raises as `read`.

    Each larger read is one request for just that range; an object that changes under the reader raises StorageError.
    """
    scheme, path = split(uri)
    with translated(uri):
        return open(path, "rb") if scheme == "file" else io.BufferedReader(_RangedReads(head(uri)), 1 << 16)


class _RangedReads(io.RawIOBase):
    """A seekable raw file whose reads are requests for ranges of one object."""

    def __init__(self, info: ObjectInfo) -> None:
        self._info, self._position = info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._info.size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._info.size)
        if end <= self._position:
            return 0
        data, etag = _read(self._info.uri, self._position, end)
        if etag != self._info.etag or len(data) != end - self._position:
            raise StorageError(f"{self._info.uri!r}: changed while it was read")
        buffer[: len(data)] = memoryview(data)
        self._position = end
        return len(data)


def _read(uri: str, start: int | None, end: int | None, max_bytes: int | None = None) -> _Found:
    """`read_object`, of a large object without the copy that makes it bytes."""
    scheme, path = split(uri)

    def refuse_larger(size: int) -> None:
        if max_bytes is not None and size > max_bytes:
            raise ObjectTooLargeError(f"expected at most {max_bytes} bytes at {uri!r}, found {size}", size=size)

    with translated(uri):
        if scheme == "file":
            return _read_file(path, start, end, refuse_larger)
        bucket, _, key = path.partition("/")
        if is_for_obstore(scheme, key):
            with suppress(ValueError):  # a name that obstore refuses
                return _read_obstore(scheme, bucket, key, start, end, refuse_larger)
        if scheme == "s3":
            return _read_s3fs(bucket, key, start, end, refuse_larger)
        if max_bytes is not None:
            refuse_larger(filesystem(scheme).size(path))
        return filesystem(scheme).cat_file(path, start=start, end=end), None


def _read_file(path: str, start: int | None, end: int | None, refuse: _Refuse) -> _Found:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would keep the reader waiting, a device never end
        raise FileNotFoundError(f"{path} is no regular file")
    descriptor = os.open(path, os.O_RDONLY)  # not `open`: at each of its dozen system calls threads queue to go on
    try:
        status = os.fstat(descriptor)
        refuse(status.st_size)
        whole = status.st_size or sys.maxsize  # 0 is also that of files that tell none, as those of /proc
        at_once = status.st_size or _UNTOLD_BYTES
        return _read_range(descriptor, start or 0, whole if end is None else end, at_once), file_etag(status)
    finally:
        os.close(descriptor)


def _read_range(descriptor: int, start: int, end: int, at_once: int) -> bytes:
    parts = []
    while start < end and (part := os.pread(descriptor, min(end - start, at_once), start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def _read_obstore(scheme: str, bucket: str, key: str, start: int | None, end: int | None, refuse: _Refuse) -> _Found:
    options: Any = {}
    if start is not None or end is not None:
        options["range"] = (start or 0, end) if end is not None else {"offset": start or 0}
    result = obstore.get(obstore_of(scheme, bucket), key, options=options)
    refuse(result.meta["size"])
    return result.bytes(), clean_etag(result.meta["e_tag"])


def _read_s3fs(bucket: str, key: str, start: int | None, end: int | None, refuse: _Refuse) -> _Found:
    files = filesystem("s3")
    byte_range = (
        {} if start is None and end is None else {"Range": f"bytes={start or 0}-{'' if end is None else end - 1}"}
    )

    async def get() -> _Found:
        response = await files._call_s3("get_object", Bucket=bucket, Key=key, **byte_range)
        async with response["Body"]:
            told = response.get("ContentRange", "").rpartition("/")[2]
            refuse(int(told) if told else response["ContentLength"])
            return await response["Body"].read(), clean_etag(response["ETag"])

    found: _Found = fsspec.asyn.sync(files.loop, get)
    return found
