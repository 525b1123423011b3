"""The second pass of making a manifest: labels into class ids, images into shards, shards into Parquet files."""

import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.packed import PLACE_SCHEMA
from pipeline.data.sources import IMAGE_SCHEMA
from pipeline.errors import ManifestError

SHARDS_PER_FILE = 100  # a footer is read for every shard: it must stay small
_BYTES_PER_FILE = 64 << 20  # in memory, before compression
_SHARDS_PER_ROW_GROUP = 10_000
_MAX_CLASS_ID = 2**31 - 1

LABELLED_SCHEMA = IMAGE_SCHEMA.set(IMAGE_SCHEMA.get_field_index("label"), pa.field("label", pa.int32()))
SHARD_SCHEMA = pa.schema(
    [
        pa.field("shard_id", pa.int32(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("num_images", pa.int32(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        *PLACE_SCHEMA,
    ]
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of a manifest: its images are row group `row_group` of `file`.

    `num_bytes` sums the sizes that are known. A packed shard lies in row group `source_row_group` of the Parquet table
    `source`, or in the bytes [source_start, source_end) of the tar `source`; for loose images all of these are None.
    """

    shard_id: int
    file: str
    row_group: int
    num_images: int
    num_bytes: int
    source: str | None = None
    source_row_group: int | None = None
    source_start: int | None = None
    source_end: int | None = None
    source_etag: str | None = None


@dataclass(frozen=True, slots=True)
class Labelling:
    """How label text becomes class ids: its place in `classes`, or the number it spells where `are_ids`."""

    classes: list[str] | None
    are_ids: bool

    @classmethod
    def of(
        cls, labels: Counter[str], kind: Literal["names", "ids", "text"], classes: Sequence[str] | None
    ) -> "Labelling":
        """The labelling for the distinct `labels` of a source. Raises ManifestError for one that has no class id."""
        names = sorted(labels)
        known = list(classes) if classes is not None else None
        distinct = set(known or ())
        if known is not None and len(distinct) < len(known):
            raise ManifestError(f"expected every class once, got {Counter(known).most_common(1)[0][0]!r} twice")
        if kind == "text":
            is_number = all(re.fullmatch("0|[1-9][0-9]*", name) for name in names)
            kind = "ids" if is_number and not (known and set(names) <= distinct) else "names"
        if kind == "ids" and names:
            _refuse_ids_outside(names, _MAX_CLASS_ID + 1 if known is None else len(known))
            return cls(known, are_ids=True)
        if known is not None and (strangers := [name for name in names if name not in distinct]):
            raise ManifestError(f"expected labels among the {len(known)} classes given, got {strangers[0]!r}")
        return cls(names or None if known is None else known, are_ids=False)

    def ids(self, labels: pa.Array) -> pa.Array:
        """Class ids, int32, of label text; null stays null."""
        if self.are_ids:
            return labels.cast(pa.int32())
        return pc.index_in(labels, value_set=pa.array(self.classes or [], pa.string()))


def _refuse_ids_outside(names: Iterable[str], num_classes: int) -> None:
    for name in names:
        if not 0 <= int(name) < num_classes:
            raise ManifestError(f"expected class ids from 0 to {num_classes - 1}, got {name}")


@dataclass(frozen=True, slots=True)
class CutShard:
    """A shard on its way to disk: its images (`LABELLED_SCHEMA`) and its values for `PLACE_SCHEMA`'s columns."""

    images: pa.Table
    place: dict[str, Any]


def cut(batches: Iterable[pa.RecordBatch], labelling: Labelling, shard_size: int) -> Iterator[CutShard]:
    """Images in order, cut every `shard_size`, and wherever a packed source ends; packed row groups stay whole."""
    for (_, row_group), of_one_place in groupby(batches, key=_place_of):
        for rows in _cut_every(shard_size if row_group is None else sys.maxsize, of_one_place):
            images = rows.select(IMAGE_SCHEMA.names)
            images = images.set_column(3, LABELLED_SCHEMA.field("label"), labelling.ids(images["label"]))
            yield CutShard(images.cast(LABELLED_SCHEMA), _place(rows))


def _place_of(batch: pa.RecordBatch) -> tuple[str | None, int | None]:
    if "source" not in batch.schema.names:
        return None, None
    return batch["source"][0].as_py(), batch["source_row_group"][0].as_py()


def _cut_every(num_rows: int, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    rest: pa.Table | None = None
    for batch in batches:
        table = pa.Table.from_batches([batch])
        rest = table if rest is None else pa.concat_tables([rest, table])
        num_full = len(rest) - len(rest) % num_rows
        for start in range(0, num_full, num_rows):
            yield rest.slice(start, num_rows)
        rest = rest.slice(num_full)
    if rest is not None and len(rest):
        yield rest


def _place(rows: pa.Table) -> dict[str, Any]:
    if "source" not in rows.column_names:
        return dict.fromkeys(PLACE_SCHEMA.names)
    place = {name: rows[name][0].as_py() for name in PLACE_SCHEMA.names}
    return place | {
        "source_start": pc.min(rows["source_start"]).as_py(),
        "source_end": pc.max(rows["source_end"]).as_py(),
    }


@dataclass(slots=True)
class Totals:
    """Counts and the digest of the shards seen so far."""

    num_images: int = 0
    num_shards: int = 0
    num_bytes: int = 0
    _sha256: Any = field(default_factory=hashlib.sha256)

    def add(self, shard: CutShard) -> int:
        """Count `shard` in; returns its bytes, as far as its images' sizes are known."""
        num_bytes = pc.sum(shard.images["size"]).as_py() or 0
        self.num_images += len(shard.images)
        self.num_shards += 1
        self.num_bytes += num_bytes
        self._sha256.update(json.dumps([len(shard.images), shard.place], sort_keys=True).encode())
        for column in shard.images.combine_chunks().columns:
            for data in _bytes_of(column.combine_chunks()):
                self._sha256.update(data)
        return num_bytes

    def digest(self, classes: list[str] | None) -> str:
        """SHA-256 of everything counted in and of the class names, in hex."""
        whole = self._sha256.copy()
        whole.update(json.dumps(classes).encode())
        return str(whole.hexdigest())


def _bytes_of(column: pa.Array) -> Iterator[bytes]:
    """A column's content, whatever its buffers look like: which are null, numbers or lengths, characters."""
    yield column.is_null().cast(pa.uint8()).to_numpy(zero_copy_only=False).tobytes()
    if pa.types.is_string(column.type):
        filled = pc.fill_null(column, "")
        yield pc.binary_length(filled).to_numpy().astype("<i8").tobytes()
        _, offsets, characters = filled.buffers()
        span = np.frombuffer(offsets, np.int32)[[filled.offset, filled.offset + len(filled)]]
        yield (characters or pa.py_buffer(b""))[span[0] : span[1]].to_pybytes()
    else:
        yield pc.fill_null(column, 0).to_numpy().astype("<i8").tobytes()


def digest_of(shards: Iterable[CutShard], classes: list[str] | None) -> str:
    """The digest that a manifest of these shards has."""
    totals = Totals()
    for shard in shards:
        totals.add(shard)
    return totals.digest(classes)


def shards_file(tag: str) -> str:
    """The name of the file that says where each shard is."""
    return f"shards-{tag}.parquet"


def write_files(
    shards: Iterable[CutShard], put: Callable[[str, bytes], None], on_progress: Callable[[int], None], *, tag: str
) -> Totals:
    """Hand `put` the image files one by one, then that of the shards, each whole; returns what went in."""
    totals = Totals()
    index = io.BytesIO()
    pending: list[Shard] = []
    with pq.ParquetWriter(index, SHARD_SCHEMA, compression="zstd") as writer:
        for number, group in enumerate(_files(shards)):
            name = f"images-{tag}-{number:05d}.parquet"
            for row_group, shard in enumerate(group):
                shard_id, num_bytes = totals.num_shards, totals.add(shard)
                pending.append(Shard(shard_id, name, row_group, len(shard.images), num_bytes, **shard.place))
            put(name, _images_file(group))
            on_progress(totals.num_images)
            if len(pending) >= _SHARDS_PER_ROW_GROUP:
                writer.write_table(pa.Table.from_pylist([asdict(shard) for shard in pending], SHARD_SCHEMA))
                pending.clear()
        writer.write_table(pa.Table.from_pylist([asdict(shard) for shard in pending], SHARD_SCHEMA))
    put(shards_file(tag), index.getvalue())
    return totals


def _files(shards: Iterable[CutShard]) -> Iterator[list[CutShard]]:
    group: list[CutShard] = []
    num_bytes = 0
    for shard in shards:
        group.append(shard)
        num_bytes += shard.images.nbytes
        if len(group) == SHARDS_PER_FILE or num_bytes >= _BYTES_PER_FILE:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _images_file(shards: list[CutShard]) -> bytes:
    file = io.BytesIO()
    with pq.ParquetWriter(
        file, LABELLED_SCHEMA, compression="zstd", use_dictionary=["label"], write_statistics=False
    ) as writer:
        for shard in shards:
            writer.write_table(shard.images, row_group_size=len(shard.images))
    return file.getvalue()
