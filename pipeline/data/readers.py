"""From a shard to the encoded bytes of its images: loose objects, a packed Parquet row group, a range of a tar.

An image that cannot be had is yielded as the ImageError that says why. Its message is the same in every run: no request
ids, no times.
"""

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from pipeline import storage
from pipeline.config import Section
from pipeline.data.manifest import Shard
from pipeline.errors import (
    AccessDeniedError,
    ImageError,
    ObjectNotFoundError,
    ObjectTooLargeError,
    StorageError,
    first_line,
)

BYTES_AHEAD = 256 << 20  # of one shard, where the manifest tells sizes
_TAR_CHUNK_BYTES = 4 << 20
_TAR_CHUNKS_AT_ONCE = 4  # and as many again read ahead
_PACKED_AHEAD = 32  # images, and so many are taken from a row group at once
_PACKED_READ_BYTES = 4 << 20  # of a request: the first image waits for a larger one, all wait for many small ones
_Found: TypeAlias = tuple[str, bytes | ImageError]
"""A packed image's uri, and its bytes or why they cannot be had."""


class ReadLimits(Section):
    """Which images are read, and how hard."""

    max_pixels: int = Field(100_000_000, ge=1)
    """Images with more pixels than this are refused before they are decoded."""
    allowed_roots: list[str] = Field([f"{scheme}://" for scheme in storage.SCHEMES], min_length=1)
    """URI prefixes the manifest's images may lie under; others become `fetch/not_allowed` errors."""
    fetch_concurrency: int = Field(32, ge=1, le=512)
    """Requests in flight for a shard, of which an actor may work on two; or per training worker."""
    max_bytes: int = Field(1 << 30, ge=1)
    """Images larger than this, in bytes, are refused, loose ones before they are fetched."""

    @field_validator("allowed_roots")
    @classmethod
    def _in_one_spelling(cls, roots: list[str]) -> list[str]:
        return [root if root.endswith("://") else storage.normalise(root) for root in roots]


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image as a manifest's row names it: where it is, and what is known of its content."""

    uri: str
    size: int | None
    etag: str | None


def image_refs(images: pa.Table) -> list[ImageRef]:
    """The rows of a manifest's shard."""
    columns = (images[name].to_pylist() for name in ("uri", "size", "etag"))
    return [ImageRef(*row) for row in zip(*columns, strict=True)]


def read_shard(
    shard: Shard, images: pa.Table, *, allowed_roots: Sequence[str], max_bytes: int, concurrency: int = 32
) -> Iterator[bytes | ImageError]:
    """The encoded bytes of every image of `shard`, or why they cannot be had, in the order of `images`.

    Streams: at most `2 * concurrency` loose images and, where the manifest tells sizes, 256 MB are held ahead of the
    reader, or twice `packed_ahead` and some 32 MB. The errors have stage `fetch`: `not_found`, `access_denied`,
    `changed` (another size or etag than the manifest's), `too_large` (over `max_bytes`), `not_allowed` (outside
    `allowed_roots`), `storage_error` (the store failed, after its retries), `unreadable` (a damaged packed source).
    Nothing is raised for an image.
    """
    rows = image_refs(images)
    if shard.source is None:
        fetch = partial(fetch_image, allowed_roots=allowed_roots, max_bytes=max_bytes)
        yield from storage.map_concurrently(
            fetch, rows, concurrency, size_of=lambda image: image.size or 0, max_size=BYTES_AHEAD
        )
        return
    error = None if _is_allowed(shard.source, allowed_roots) else _not_allowed(shard.source)
    read_source = _read_tar if shard.source_row_group is None else _read_row_group
    found = iter(()) if error else storage.run_ahead(read_source(shard, max_bytes), packed_ahead(shard))
    yield from _matched(rows, found, shard.source, error)


def fetch_image(image: ImageRef, *, allowed_roots: Sequence[str], max_bytes: int) -> bytes | ImageError:
    """The encoded bytes of one loose image, or why they cannot be had, as `read_shard` says."""
    if not _is_allowed(image.uri, allowed_roots):
        return _not_allowed(image.uri)
    if image.size is not None and image.size > max_bytes:
        return _too_large(image.uri, image.size, max_bytes)
    try:
        found = storage.read_object(image.uri, max_bytes=max_bytes if image.size is None else image.size)
    except MemoryError:
        raise
    except ObjectTooLargeError as error:
        size = error.details["size"]
        return _too_large(image.uri, size, max_bytes) if image.size is None else _of_other_size(image, size)
    except Exception as error:
        return _as_image_error(error, image.uri)
    if image.etag is not None and found.etag is not None and image.etag != found.etag:
        return _changed(image.uri, f"etag {image.etag}", f"etag {found.etag}")
    return _of_expected_size(image, found.data)


def _matched(
    rows: list[ImageRef], found: Iterator[_Found], source: str, error: ImageError | None
) -> Iterator[bytes | ImageError]:
    """`found` against the manifest's rows, in the same order, perhaps fewer; after an error, one for each row left."""
    done = 0
    try:
        for uri, content in found:
            if done == len(rows):
                return
            if uri == rows[done].uri:
                done += 1
                yield content if isinstance(content, ImageError) else _of_expected_size(rows[done - 1], content)
    except MemoryError:
        raise
    except Exception as exception:
        error = exception if isinstance(exception, ImageError) else _as_image_error(exception, source)
    for row in rows[done:]:
        yield error or ImageError("fetch", "not_found", f"expected an image at {row.uri!r}, found none in {source!r}")


# --- packed sources ------------------------------------------------------------------------------------------------


def packed_ahead(shard: Shard) -> int:
    """How many packed images are held ahead of the reader: 32, or as many of their mean size as 256 MB hold, or one."""
    return max(1, min(_PACKED_AHEAD, BYTES_AHEAD * shard.num_images // max(1, shard.num_bytes)))


def _read_row_group(shard: Shard, max_bytes: int) -> Iterator[_Found]:
    assert shard.source is not None
    _refuse_changed(shard, storage.head(shard.source).etag)
    with storage.open_file(shard.source) as file:
        table = pq.ParquetFile(file, buffer_size=_PACKED_READ_BYTES, pre_buffer=False)
        batches = table.iter_batches(packed_ahead(shard), row_groups=[shard.source_row_group], columns=["uri", "bytes"])
        for batch in batches:
            for uri, content in zip(batch["uri"].cast(pa.string()).to_pylist(), batch["bytes"], strict=True):
                yield uri, _of_row(uri, content.as_py(), max_bytes)


def _of_row(uri: str, content: bytes | None, max_bytes: int) -> bytes | ImageError:
    if content is None:
        return ImageError("fetch", "unreadable", f"expected the bytes of {uri!r}, found null")
    return content if len(content) <= max_bytes else _too_large(uri, len(content), max_bytes)


def _read_tar(shard: Shard, max_bytes: int) -> Iterator[_Found]:
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
                uri = storage.join(shard.source, member.name)
                yield uri, content.read() if member.size <= max_bytes else _too_large(uri, member.size, max_bytes)


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


def _too_large(uri: str, size: int, max_bytes: int) -> ImageError:
    return ImageError("fetch", "too_large", f"expected at most {max_bytes} bytes in {uri!r}, found {size}")


def _refuse_changed(shard: Shard, etag: str | None) -> None:
    if shard.source_etag is not None and etag is not None and shard.source_etag != etag:
        assert shard.source is not None
        raise _changed(shard.source, f"etag {shard.source_etag}", f"etag {etag}")


def _of_expected_size(image: ImageRef, data: bytes) -> bytes | ImageError:
    return data if image.size in (None, len(data)) else _of_other_size(image, len(data))


def _of_other_size(image: ImageRef, size: int) -> ImageError:
    return _changed(image.uri, f"{image.size} bytes", f"{size}")


def _as_image_error(error: Exception, uri: str) -> ImageError:
    if isinstance(error, ObjectNotFoundError):
        return ImageError("fetch", "not_found", f"expected an object at {uri!r}, found none")
    if isinstance(error, AccessDeniedError):
        return ImageError("fetch", "access_denied", f"expected to be allowed to read {uri!r}, was refused")
    if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno):  # pyarrow's own have no number
        cause = first_line(error).removeprefix(f"{uri!r}: ")
        return ImageError("fetch", "storage_error", f"the store failed on {uri!r}", cause)
    return ImageError("fetch", "unreadable", f"{uri!r} cannot be read: {type(error).__name__}")
