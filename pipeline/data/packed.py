"""Images that lie inside larger objects: Parquet tables with the bytes in a column, WebDataset tars.

An image's `uri` stays its own, any name that no other image has; `PLACE_SCHEMA` tells where its bytes are.

Source of the tar layout: WebDataset, "The WebDataset Format" (files that share all up to the first dot of their base
name make one sample; `.cls` holds the class).
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.sources import (
    IMAGE_SCHEMA,
    LISTED_ROWS,
    TABLE_ROWS,
    Filters,
    LabelKind,
    bare_etags,
    parts,
    readable,
    require_columns,
    to_strings,
)
from pipeline.data.uri_table import label_text
from pipeline.errors import ManifestError

PLACE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("source_row_group", pa.int32()),
        pa.field("source_start", pa.int64()),
        pa.field("source_end", pa.int64()),
        pa.field("source_etag", pa.string()),
    ]
)
PACKED_SCHEMA = pa.schema([*IMAGE_SCHEMA, *PLACE_SCHEMA])
_BLOCK_BYTES = 512  # of a tar
_TARS_AT_ONCE = 8
_TAIL_BYTES = 1 << 16


@dataclass(slots=True)
class PackedSource:
    """Packed Parquet shards, one or all below a prefix: columns `uri`, `bytes`, perhaps `label`, `size`, `etag`.

    A row group is a shard. The bytes are not read.
    """

    uri: str
    is_packed: bool = field(default=True, init=False)
    label_kind: LabelKind = field(default="names", init=False)
    _kinds: dict[LabelKind, str] = field(default_factory=dict, init=False)
    skipped: Counter[str] = field(default_factory=Counter, init=False)

    def __post_init__(self) -> None:
        self.uri = storage.normalise(self.uri)

    def batches(self) -> Iterator[pa.RecordBatch]:
        for part in parts(self.uri, (".parquet",)):
            with readable(part, "a packed Parquet shard"):
                yield from self._batches_of(part)

    def _batches_of(self, part: str) -> Iterator[pa.RecordBatch]:
        etag = storage.head(part).etag
        with storage.open_file(part) as file:
            table = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
            there = table.schema_arrow.names
            require_columns(part, ["uri", "bytes"], there)
            columns = [name for name in IMAGE_SCHEMA.names if name in there]
            for row_group in range(table.num_row_groups):
                place = [part, row_group, None, None, etag]
                for batch in table.iter_batches(TABLE_ROWS, columns=columns, row_groups=[row_group]):
                    yield self._with_place(batch, part, place)

    def _with_place(self, batch: pa.RecordBatch, part: str, place: list[Any]) -> pa.RecordBatch:
        images = {name: pa.nulls(len(batch), IMAGE_SCHEMA.field(name).type) for name in IMAGE_SCHEMA.names}
        images |= dict(zip(batch.schema.names, batch.columns, strict=True))
        if "label" in batch.schema.names:
            images["label"], self.label_kind = label_text(images["label"], part, "label", self._kinds)
        if images["uri"].null_count:
            raise ManifestError(f"{part!r}: expected a uri in every row, got {images['uri'].null_count} empty ones")
        images = {name: images[name].cast(IMAGE_SCHEMA.field(name).type) for name in IMAGE_SCHEMA.names}
        images["etag"] = bare_etags(images["etag"])
        where = [pa.repeat(pa.scalar(value, a.type), len(batch)) for value, a in zip(place, PLACE_SCHEMA, strict=True)]
        return pa.record_batch([*images.values(), *where], schema=PACKED_SCHEMA)

    def describe(self) -> dict[str, Any]:
        return {"source": "packed", "uri": self.uri}


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    size: int
    label: str | None
    start: int  # of its header, and
    end: int  # of its padded data: the range a tar reader needs


@dataclass(slots=True)
class WebDatasetSource:
    """The images in WebDataset tars, one tar or all below a prefix; an image is `<tar uri>/<member name>`.

    Only headers and `.cls` members are read, by ranges. Classes are ids where all of them are numbers.
    """

    uri: str
    filters: Filters = field(default_factory=Filters)
    is_packed: bool = field(default=True, init=False)
    label_kind: LabelKind = field(default="text", init=False)

    def __post_init__(self) -> None:
        self.uri = storage.normalise(self.uri)

    @property
    def skipped(self) -> Counter[str]:
        return self.filters.skipped

    def batches(self) -> Iterator[pa.RecordBatch]:
        tars = parts(self.uri, (".tar",))
        for tar, etag, members, num_others in storage.map_concurrently(_walk, tars, _TARS_AT_ONCE):
            if num_others:
                self.skipped["not_a_file"] += num_others
            accepted = (member for member in members if self.filters.accepts(member.name, member.size))
            yield from iter(partial(_next_batch, accepted, tar, etag), None)

    def describe(self) -> dict[str, Any]:
        return {"source": "webdataset", "uri": self.uri, **self.filters.describe()}


def _next_batch(members: Iterator[_Member], tar: str, etag: str | None) -> pa.RecordBatch | None:
    page = list(islice(members, LISTED_ROWS))
    if not page:
        return None
    count = len(page)
    columns = [
        to_strings(storage.join(tar, member.name) for member in page),
        [member.size for member in page],
        pa.nulls(count, pa.string()),
        to_strings(member.label for member in page),
        pa.repeat(pa.scalar(tar), count),
        pa.nulls(count, pa.int32()),
        [member.start for member in page],
        [member.end for member in page],
        pa.repeat(pa.scalar(etag, pa.string()), count),
    ]
    return pa.record_batch(columns, schema=PACKED_SCHEMA)


def _walk(tar: str) -> tuple[str, str | None, list[_Member], int]:
    """The files of a tar but its `.cls`, whose text becomes their sample's label; how many links and the like."""
    etag = storage.head(tar).etag
    members: list[_Member] = []
    labels: dict[str, str | None] = {}
    num_others = 0
    try:
        with (
            readable(tar, "a WebDataset tar"),
            storage.open_file(tar) as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            for entry in archive:
                key, extension = _key_and_extension(entry.name)
                if not entry.isreg():
                    num_others += not entry.isdir()
                    continue
                if extension == "cls":
                    content = archive.extractfile(entry)
                    assert content is not None
                    labels[key] = content.read().decode().strip() or None
                    continue
                end = entry.offset_data + -(-entry.size // _BLOCK_BYTES) * _BLOCK_BYTES
                members.append(_Member(entry.name, entry.size, None, entry.offset, end))
            _require_end(file, archive.offset)
    except tarfile.TarError as error:
        raise ManifestError(f"expected a WebDataset tar at {tar!r}, got one that cannot be read: {error}") from error
    return tar, etag, [_labelled(member, labels) for member in members], num_others


def _require_end(file: IO[bytes], end: int) -> None:
    """Raises TarError where the archive does not end at `end`, with zeros alone, a block or more.

    tarfile takes a header that is damaged or cut for the end, and does not look behind it.
    """
    file.seek(end)
    found = file.read(_BLOCK_BYTES)
    if len(found) < _BLOCK_BYTES or any(found):
        raise tarfile.ReadError(f"expected a member or the archive's end at byte {end}, got neither; make it anew")
    while found:
        if found.count(0) != len(found):
            raise tarfile.ReadError(
                f"expected nothing behind the archive's end at byte {end}, got more, as where tars were joined by cat; "
                "make it anew, or keep them apart"
            )
        found = file.read(_TAIL_BYTES)


def _labelled(member: _Member, labels: dict[str, str | None]) -> _Member:
    key, _ = _key_and_extension(member.name)
    return _Member(member.name, member.size, labels.get(key), member.start, member.end)


def _key_and_extension(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()
