"""Images from a table of URIs in CSV or Parquet, and labels by URI from one."""

import csv
import gzip
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.sources import (
    IMAGE_SCHEMA,
    TABLE_ROWS,
    LabelKind,
    LabelTable,
    bare_etags,
    parts,
    readable,
    require_columns,
)
from pipeline.errors import ManifestError

_BY_RANK: tuple[LabelKind, ...] = ("names", "text", "ids")  # what labels of several kinds are


@dataclass(slots=True)
class TableSource:
    """The rows of a CSV (with a header; `.csv.gz` too) or Parquet table, one image each; or of all such below a prefix.

    Relative names are joined to `root`. An integer label is a class id, a string a class name.
    """

    uri: str
    uri_column: str = "uri"
    label_column: str | None = None
    size_column: str | None = None
    etag_column: str | None = None
    root: str | None = None
    is_packed: bool = field(default=False, init=False)
    label_kind: LabelKind = field(default="text", init=False)
    _kinds: dict[LabelKind, str] = field(default_factory=dict, init=False)
    skipped: Counter[str] = field(default_factory=Counter, init=False)

    def __post_init__(self) -> None:
        self.uri = storage.normalise(self.uri)

    def batches(self) -> Iterator[pa.RecordBatch]:
        named = dict(
            zip(
                IMAGE_SCHEMA.names,
                [self.uri_column, self.size_column, self.etag_column, self.label_column],
                strict=True,
            )
        )
        for table in parts(self.uri, (".parquet", ".csv", ".csv.gz")):
            for batch in _read_table(table, [column for column in named.values() if column]):
                columns = [self._column(batch, table, name, column) for name, column in named.items()]
                columns[0] = absolute(columns[0], self.root, table)
                yield pa.record_batch(columns, schema=IMAGE_SCHEMA)

    def _column(self, batch: pa.RecordBatch, table: str, name: str, column: str | None) -> pa.Array:
        wanted = IMAGE_SCHEMA.field(name).type
        if column is None:
            return pa.nulls(len(batch), wanted)
        values = batch.column(column)
        if name == "label":
            values, self.label_kind = label_text(values, table, column, self._kinds)
        try:
            cast = values.cast(wanted)
        except pa.ArrowException as error:
            raise ManifestError(
                f"{table!r}: expected column {column!r} as {wanted}, got {values.type}: {error}"
            ) from error
        return bare_etags(cast) if name == "etag" else cast

    def describe(self) -> dict[str, Any]:
        return {"source": "table", "uri": self.uri, "uri_column": self.uri_column, "label_column": self.label_column}


def read_labels(uri: str, *, uri_column: str = "uri", label_column: str = "label", root: str) -> LabelTable:
    """Labels by URI, and their kind, from a CSV or Parquet table, which must fit memory (some 200 bytes a row).

    Relative names lie below `root`. Raises ManifestError.
    """
    labels: dict[str, str] = {}
    source = TableSource(uri, uri_column=uri_column, label_column=label_column, root=root)
    for batch in source.batches():
        for image, label in zip(batch["uri"].to_pylist(), batch["label"].to_pylist(), strict=True):
            if labels.setdefault(image, label) != label:
                raise ManifestError(f"{uri!r}: expected one label for {image!r}, got {labels[image]!r} and {label!r}")
    return LabelTable(labels, source.label_kind)


def label_text(labels: pa.Array, table: str, column: str, kinds: dict[LabelKind, str]) -> tuple[pa.Array, LabelKind]:
    """Labels as text, with what kind of label their type, and that of the tables before, makes them.

    `kinds` are those met so far, each with a table that has it; it is added to. Raises ManifestError for other types,
    and for strings in one typed table and integers in another; a CSV's text may be either.
    """
    type_ = labels.type.value_type if pa.types.is_dictionary(labels.type) else labels.type
    kind: LabelKind
    if pa.types.is_integer(type_):
        kind = "ids"
    elif pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        kind = "text" if table.endswith((".csv", ".csv.gz")) else "names"
    elif pa.types.is_null(type_):
        kind = "text"
    else:
        raise ManifestError(f"{table!r}: expected strings or integers in label column {column!r}, got {labels.type}")
    if labels.null_count < len(labels):  # a column without labels says nothing, whatever its type
        kinds.setdefault(kind, table)
    if {"ids", "names"} <= kinds.keys():
        raise ManifestError(
            f"expected labels of one kind in column {column!r}, got integers in {kinds['ids']!r} and strings in "
            f"{kinds['names']!r}; give them one type"
        )
    return labels.cast(type_).cast(pa.string()), next((one for one in _BY_RANK if one in kinds), kind)


def absolute(names: pa.Array, root: str | None, table: str) -> pa.Array:
    """URIs from a table's names: URIs stay, local paths become `file://`, relative names go below `root`.

    Raises ManifestError for a missing name, and for a relative one without a `root`.
    """
    if names.null_count or pc.any(pc.equal(names, "")).as_py():
        raise ManifestError(f"{table!r}: expected a uri in every row, got {names.null_count or 'some'} empty ones")
    is_uri = pc.match_substring(names, "://")
    if pc.all(is_uri).as_py():
        return names
    if root is not None:
        below = pc.binary_join_element_wise(storage.normalise(root), names, "/")
        return pc.if_else(pc.or_(is_uri, pc.starts_with(names, "/")), _local(names, is_uri), below)
    is_relative = pc.invert(pc.or_(is_uri, pc.starts_with(names, "/")))
    if pc.any(is_relative).as_py():
        name = names.filter(is_relative)[0].as_py()
        raise ManifestError(f"{table!r}: expected URIs, got the relative name {name!r}; set the root it lies below")
    return _local(names, is_uri)


def _local(names: pa.Array, is_uri: pa.Array) -> pa.Array:
    return pc.if_else(is_uri, names, pc.binary_join_element_wise("file://", names, ""))


def _read_table(table: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with readable(table, "a CSV or Parquet table"), storage.open_file(table) as file:
        if table.endswith(".parquet"):
            yield from stream_parquet(file, table, columns)
            return
        stream = gunzipped(file) if table.endswith(".gz") else file
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        require_columns(table, columns, next(csv.reader(text), []))
        text.detach().seek(0)
        yield from stream_csv(stream, columns)


def stream_csv(
    stream: IO[bytes], columns: list[str], column_names: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Batches of `columns` as strings, empty ones null; `column_names` where the table has no header."""
    convert = pyarrow.csv.ConvertOptions(
        include_columns=columns,
        column_types=dict.fromkeys(columns, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
    )
    yield from pyarrow.csv.open_csv(
        stream,
        read_options=pyarrow.csv.ReadOptions(column_names=column_names),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),  # names may hold newlines
        convert_options=convert,
    )


def gunzipped(file: IO[bytes]) -> IO[bytes]:
    """What the gzip file holds."""
    return cast("IO[bytes]", gzip.GzipFile(fileobj=file))


def stream_parquet(file: IO[bytes], uri: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches of `columns`, read page by page, not by whole row groups. Raises ManifestError for a missing one."""
    table = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    require_columns(uri, columns, table.schema_arrow.names)
    yield from table.iter_batches(TABLE_ROWS, columns=columns)
