"""Packing a shard: the encoded bytes of its images, untouched or re-encoded, beside their labels in one Parquet file.

The file is one row group, small columns first: who lists images reads no bytes. What `packed.py` and `readers.py` read.
"""

import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field

from pipeline.config import Section
from pipeline.data.shards import LABELLED_SCHEMA
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError

if TYPE_CHECKING:
    from pipeline.data.loader import Decode

Convert: TypeAlias = Callable[[bytes], bytes]
"""From an image's encoded bytes to those that are packed. Raises ImageError."""

_PAGE_BYTES = 1 << 20  # pages are what readers stream: the first image is there when the first page is
_ROWS_BETWEEN_PAGES = 8  # the writer looks at the page's size only after so many; by default after 1,024
_MOST_PAGE_BYTES = 1 << 31  # more is no Parquet

FILE_SCHEMA = pa.schema([*LABELLED_SCHEMA, pa.field("bytes", pa.binary(), nullable=False)])


class Reencode(Section):
    """JPEG instead of the images' own encodings: upright, RGB, no larger than training needs."""

    shorter_side: int = Field(ge=2, le=8192)
    """Shorter side in pixels that larger images are shrunk to; smaller ones keep their size."""
    quality: int = Field(90, ge=1, le=100)
    """JPEG quality, on libjpeg's scale."""
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:2:0"
    """Chroma subsampling."""


@dataclass(frozen=True, slots=True)
class PackedImages:
    """A shard's images that could be packed, `table` (`FILE_SCHEMA`, in order), and by position those that could not.

    `seconds` tells the time spent waiting for bytes (`fetch`) and with them (`convert`).
    """

    table: pa.Table
    errors: dict[int, ImageError]
    seconds: dict[str, float]


def pack_images(
    images: pa.Table, encoded: Iterable[bytes | ImageError], convert: Convert, lineage: dict[str, str]
) -> PackedImages:
    """Pack a shard of `images` (manifest columns) whose bytes are `encoded`, in the same order.

    `uri`, `etag` and `label` stay the manifest's, `size` becomes that of the bytes packed; `lineage` goes into the
    schema's metadata. Memory is that of the shard's bytes.
    """
    rows: list[int] = []
    contents: list[bytes] = []
    errors: dict[int, ImageError] = {}
    convert_s, start = 0.0, time.perf_counter()
    for row, item in enumerate(encoded):
        convert_start = time.perf_counter()
        content = item if isinstance(item, ImageError) else _converted(item, convert)
        convert_s += time.perf_counter() - convert_start
        if isinstance(content, ImageError):
            errors[row] = content
        else:
            rows.append(row)
            contents.append(content)
    fetch_s = time.perf_counter() - start - convert_s
    assert len(rows) + len(errors) == images.num_rows
    packed = images.take(pa.array(rows, pa.int64()))
    columns = {name: packed[name] for name in LABELLED_SCHEMA.names}
    columns |= {"size": [len(content) for content in contents], "bytes": pa.array(contents, pa.binary())}
    table = pa.table(columns, schema=FILE_SCHEMA.with_metadata(lineage))
    return PackedImages(table, errors, {"fetch": fetch_s, "convert": convert_s})


def encode(table: pa.Table) -> bytes:
    """A packed shard as one Parquet file of one row group; images are compressed already. Equal tables, equal bytes."""
    sink = pa.BufferOutputStream()
    largest = max(table["size"].to_pylist(), default=0)
    pq.write_table(
        table,
        sink,
        row_group_size=max(table.num_rows, 1),
        data_page_size=_PAGE_BYTES,
        write_batch_size=_ROWS_BETWEEN_PAGES if _ROWS_BETWEEN_PAGES * largest < _MOST_PAGE_BYTES else 1,
        compression={"uri": "zstd", "etag": "zstd"},
        use_dictionary=["label"],
        write_statistics=False,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _converted(data: bytes, convert: Convert) -> bytes | ImageError:
    try:
        return convert(data)
    except ImageError as error:
        return error


# --- conversions -----------------------------------------------------------------------------------------------------


@contextmanager
def converting(reencode: Reencode | None, *, check: bool, max_pixels: int, isolated: bool) -> Iterator[Convert]:
    """What is done to each image's bytes: nothing, or they are decoded to `check` them, or to be encoded anew.

    `isolated` decodes in a child process. torch is imported only where something is decoded.
    """
    if reencode is None and not check:
        yield lambda data: data
        return
    from pipeline.data.decoders import guarded_decoder

    with guarded_decoder(isolated=isolated) as decoder:
        limited = partial(decoder.decode, max_pixels=max_pixels)
        yield partial(_checked, limited) if reencode is None else partial(_reencoded, limited, reencode)


def _checked(decode: "Decode", data: bytes) -> bytes:
    decode(data)
    return data


def _reencoded(decode: "Decode", options: Reencode, data: bytes) -> bytes:
    """The image as a JPEG of `options`; equal bytes give equal bytes. JPEG holds 65,500 pixels a side."""
    pixels = decode(data)
    if min(pixels.shape[1:]) > options.shorter_side:
        pixels = Preprocessing(resize_size=options.shorter_side, crop_size=options.shorter_side).resize(pixels)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    file = io.BytesIO()
    try:
        image.save(file, "JPEG", quality=options.quality, subsampling=options.subsampling)
    except Exception as error:  # whatever one image does to a library is that image's
        raise ImageError("encode", "failed", f"expected an image that JPEG can hold, got {image.size}") from error
    return file.getvalue()
