"""From a shard to the encoded bytes of its images: loose objects, a packed Parquet row group, a range of a tar.

An image that cannot be had is yielded as the ImageError that says why. Its message is the same in every run: no request
ids, no times.
"""

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.manifest import Shard
from pipeline.errors import AccessDeniedError, ImageError, ObjectNotFoundError, StorageError

_TAR_CHUNK_BYTES = 8 << 20
_TAR_CHUNKS_AT_ONCE = 2  # and as many again read ahead
_PACKED_ROWS = 32


@dataclass(frozen=True, slots=True)
class _Image:
    uri: str
    size: int | None
    etag: str | None


def read_shard(
    shard: Shard, images: pa.Table, *, allowed_roots: Sequence[str], max_bytes: int, concurrency: int = 32
) -> Iterator[bytes | ImageError]:
    """The encoded bytes of every image of `shard`, or why they cannot be had, in the order of `images`.

    Streams: at most `2 * concurrency` loose images are held ahead of the reader, or some 32 MB of a tar. The errors
    have stage `fetch`: `not_found`, `access_denied`, `changed` (another size or etag than the manifest's),
    `too_large` (loose, over `max_bytes`), `not_allowed` (outside `allowed_roots`), `storage_error` (the store failed,
    after its retries), `unreadable` (a damaged packed source). Nothing is raised for an image.
    """
    columns = (images[name].to_pylist() for name in ("uri", "size", "etag"))
    rows = [_Image(*row) for row in zip(*columns, strict=True)]
    if shard.source is None:
        fetch = partial(_fetch, allowed_roots=allowed_roots, max_bytes=max_bytes)
        yield from storage.map_concurrently(fetch, rows, concurrency)
        return
    error = None if _is_allowed(shard.source, allowed_roots) else _not_allowed(shard.source)
    read_source = _read_tar if shard.source_row_group is None else _read_row_group
    found = iter(()) if error else read_source(shard)
    yield from _matched(rows, found, shard.source, error)


def _fetch(image: _Image, allowed_roots: Sequence[str], max_bytes: int) -> bytes | ImageError:
    if not _is_allowed(image.uri, allowed_roots):
        return _not_allowed(image.uri)
    try:
        size = storage.head(image.uri).size if image.size is None else image.size
        if size > max_bytes:
            return ImageError(
                "fetch", "too_large", f"expected at most {max_bytes} bytes in {image.uri!r}, found {size}"
            )
        found = storage.read_object(image.uri)
    except Exception as error:
        return _as_image_error(error, image.uri)
    if image.etag is not None and found.etag is not None and image.etag != found.etag:
        return _changed(image.uri, f"etag {image.etag}", f"etag {found.etag}")
    return _of_expected_size(image, found.data)


def _matched(
    rows: list[_Image], found: Iterator[tuple[str, bytes]], source: str, error: ImageError | None
) -> Iterator[bytes | ImageError]:
    """`found` against the manifest's rows, in the same order, perhaps fewer; after an error, one for each row left."""
    done = 0
    try:
        for uri, data in found:
            if done == len(rows):
                return
            if uri == rows[done].uri:
                done += 1
                yield _of_expected_size(rows[done - 1], data)
    except Exception as exception:
        error = exception if isinstance(exception, ImageError) else _as_image_error(exception, source)
    for row in rows[done:]:
        yield error or ImageError("fetch", "not_found", f"expected an image at {row.uri!r}, found none in {source!r}")


# --- packed sources ------------------------------------------------------------------------------------------------


def _read_row_group(shard: Shard) -> Iterator[tuple[str, bytes]]:
    assert shard.source is not None
    _refuse_changed(shard, storage.head(shard.source).etag)
    with storage.open_file(shard.source) as file:
        table = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        batches = table.iter_batches(_PACKED_ROWS, row_groups=[shard.source_row_group], columns=["uri", "bytes"])
        for batch in batches:
            for uri, data in zip(batch["uri"], batch["bytes"], strict=True):
                yield uri.as_py(), data.as_py()


def _read_tar(shard: Shard) -> Iterator[tuple[str, bytes]]:
    assert shard.source is not None
    assert shard.source_start is not None
    assert shard.source_end is not None
    _refuse_changed(shard, storage.head(shard.source).etag)  # a shorter one would answer ranges with errors
    starts = range(shard.source_start, shard.source_end, _TAR_CHUNK_BYTES)
    chunks = storage.map_concurrently(partial(_read_chunk, shard), starts, _TAR_CHUNKS_AT_ONCE)
    with tarfile.open(fileobj=_Chained(chunks), mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() else None
            if content is not None:
                yield storage.join(shard.source, member.name), content.read()


def _read_chunk(shard: Shard, start: int) -> bytes:
    assert shard.source is not None
    assert shard.source_end is not None
    found = storage.read_object(shard.source, start, min(start + _TAR_CHUNK_BYTES, shard.source_end))
    _refuse_changed(shard, found.etag)
    return found.data


class _Chained(io.RawIOBase):
    """The chunks one after the other, as a file to read forward."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        taken: list[memoryview] = []
        while size > 0:
            if not self._rest:
                chunk = next(self._chunks, b"")
                if not chunk:
                    break
                self._rest = memoryview(chunk)
            taken.append(self._rest[:size])
            self._rest = self._rest[size:]
            size -= len(taken[-1])
        return b"".join(taken)


# --- what went wrong -----------------------------------------------------------------------------------------------


def _is_allowed(uri: str, allowed_roots: Sequence[str]) -> bool:
    return any(storage.is_under(uri, root) for root in allowed_roots)


def _not_allowed(uri: str) -> ImageError:
    return ImageError("fetch", "not_allowed", f"{uri!r} is not under a root that the config allows")


def _changed(uri: str, expected: str, found: str) -> ImageError:
    return ImageError("fetch", "changed", f"expected {uri!r} with {expected}, as in the manifest, found {found}")


def _refuse_changed(shard: Shard, etag: str | None) -> None:
    if shard.source_etag is not None and etag is not None and shard.source_etag != etag:
        assert shard.source is not None
        raise _changed(shard.source, f"etag {shard.source_etag}", f"etag {etag}")


def _of_expected_size(image: _Image, data: bytes) -> bytes | ImageError:
    if image.size is not None and image.size != len(data):
        return _changed(image.uri, f"{image.size} bytes", f"{len(data)}")
    return data


def _as_image_error(error: Exception, uri: str) -> ImageError:
    if isinstance(error, ObjectNotFoundError):
        return ImageError("fetch", "not_found", f"expected an object at {uri!r}, found none")
    if isinstance(error, AccessDeniedError):
        return ImageError("fetch", "access_denied", f"the credentials do not allow reading {uri!r}")
    if isinstance(error, StorageError):
        return ImageError("fetch", "storage_error", f"the store failed on {uri!r}")
    return ImageError("fetch", "unreadable", f"{uri!r} cannot be read: {type(error).__name__}")
