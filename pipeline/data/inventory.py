"""Images from an S3 Inventory report: its `manifest.json` with CSV or Parquet data files.

Source of the layout: Amazon S3 User Guide, "Locating your inventory list" and "Amazon S3 Inventory".
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.sources import IMAGE_SCHEMA, Filters, LabelKind, bare_etags, readable, require_columns, to_strings
from pipeline.data.uri_table import gunzipped, stream_csv, stream_parquet
from pipeline.errors import ManifestError

_COLUMNS = {  # ours: (CSV's name, Parquet's name)
    "bucket": ("Bucket", "bucket"),
    "key": ("Key", "key"),
    "size": ("Size", "size"),
    "etag": ("ETag", "e_tag"),
    "is_latest": ("IsLatest", "is_latest"),
    "is_delete_marker": ("IsDeleteMarker", "is_delete_marker"),
}


@dataclass(slots=True)
class InventorySource:
    """The images an inventory lists, latest versions only; `uri` is that of its `manifest.json`.

    Globs match the key. The data files are read from `data/` beside the report's dated folder, where S3 puts them.
    """

    uri: str
    filters: Filters = field(default_factory=Filters)
    is_packed: bool = field(default=False, init=False)
    label_kind: LabelKind = field(default="names", init=False)

    def __post_init__(self) -> None:
        self.uri = storage.normalise(self.uri)

    @property
    def skipped(self) -> Counter[str]:
        return self.filters.skipped

    def batches(self) -> Iterator[pa.RecordBatch]:
        report = self._report()
        config_uri = self.uri.rsplit("/", 2)[0]
        for data_file in report["files"]:
            uri = storage.join(config_uri, "data", data_file["key"].rsplit("/", 1)[-1])
            for batch in _read_data_file(uri, report["fileFormat"], report["fileSchema"]):
                rows = [row for row in batch.to_pylist() if self._is_wanted(row)]
                yield pa.record_batch(
                    [
                        to_strings(f"s3://{row['bucket']}/{row['key']}" for row in rows),
                        [row.get("size") for row in rows],
                        bare_etags(pa.array([row.get("etag") for row in rows], pa.string())),
                        pa.nulls(len(rows), pa.string()),
                    ],
                    schema=IMAGE_SCHEMA,
                )

    def _report(self) -> dict[str, Any]:
        with readable(self.uri, "the manifest.json of an S3 Inventory"):
            text = storage.read(self.uri)
        try:
            report: dict[str, Any] = json.loads(text)
            is_inventory = report["fileFormat"] in ("CSV", "Parquet") and bool(report["fileSchema"])
            is_inventory = is_inventory and all(isinstance(data_file["key"], str) for data_file in report["files"])
        except (ValueError, KeyError, TypeError):
            is_inventory = False
        if not is_inventory:
            raise ManifestError(
                f"expected the manifest.json of an S3 Inventory in CSV or Parquet (ORC is not read) at {self.uri!r}"
            )
        return report

    def _is_wanted(self, row: dict[str, Any]) -> bool:
        if row.get("is_latest") is False or row.get("is_delete_marker"):
            self.skipped["not_latest"] += 1
            return False
        return self.filters.accepts(row["key"], row.get("size"))

    def describe(self) -> dict[str, Any]:
        return {"source": "inventory", "uri": self.uri, **self.filters.describe()}


def _read_data_file(uri: str, file_format: str, file_schema: str) -> Iterator[pa.RecordBatch]:
    """Batches of the columns we use that the inventory has, under our names and types."""
    is_csv = file_format == "CSV"
    with readable(uri, f"a {file_format} data file of an S3 Inventory"), storage.open_file(uri) as file:
        batches: Iterator[pa.RecordBatch]
        if is_csv:
            there = [name.strip() for name in file_schema.split(",")]
            columns = _columns_there(uri, there, 0)
            batches = stream_csv(gunzipped(file), list(columns), there)
        else:
            columns = _columns_there(uri, pq.read_schema(file).names, 1)
            batches = stream_parquet(file, uri, list(columns))
        for batch in batches:
            table = batch.select(list(columns)).rename_columns(list(columns.values()))
            yield _decoded(table) if is_csv else table


def _columns_there(uri: str, there: list[str], style: int) -> dict[str, str]:
    require_columns(uri, [_COLUMNS["bucket"][style], _COLUMNS["key"][style]], there)
    return {names[style]: ours for ours, names in _COLUMNS.items() if names[style] in there}


def _decoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A CSV batch, all text, with keys decoded (they are URL-encoded in CSV alone), sizes and flags in their types."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    columns["key"] = pa.array([unquote_plus(key or "") for key in columns["key"].to_pylist()])
    if "size" in columns:
        columns["size"] = columns["size"].cast(pa.int64())
    for flag in {"is_latest", "is_delete_marker"} & columns.keys():
        columns[flag] = columns[flag].cast(pa.bool_())
    return pa.RecordBatch.from_pydict(columns)
