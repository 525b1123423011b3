"""Writing one shard of each table: deterministic bytes under a deterministic name, each file whole at once."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ImageError
from pipeline.tables.schemas import TABLES, TableName, schema

_writers = ThreadPoolExecutor(len(TABLES), "write")  # kept: starting threads anew took as long as encoding


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A table file of one shard; `path` is relative to the run's output."""

    path: str
    num_rows: int
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: str, num_rows: int, data: bytes) -> "WrittenFile":
        """The record of a file that holds `data`."""
        return cls(path, num_rows, len(data), hashlib.sha256(data).hexdigest())


def table_folder(table: TableName, run_id: str) -> str:
    """Where a run's files of `table` lie below the output."""
    return f"{table}/run_id={run_id}"


def shard_path(table: TableName, run_id: str, shard_id: int) -> str:
    """Where a shard of `table` lies below the output: the same at every attempt, so writing twice is writing once."""
    return f"{table_folder(table, run_id)}/{shard_id:08d}.parquet"


def write_shard(output_uri: str, run_id: str, shard_id: int, tables: Mapping[TableName, pa.Table]) -> list[WrittenFile]:
    """Write each table's file of one shard, all at once: what takes long is the store's answer. Raises StorageError."""

    def write(table: TableName) -> WrittenFile:
        path = shard_path(table, run_id, shard_id)
        data = encode(tables[table])
        storage.write(storage.join(output_uri, path), data)
        return WrittenFile.of(path, tables[table].num_rows, data)

    return list(storage.map_concurrently(write, tables, len(tables), pool=_writers))


def errors_table(images: pa.Table, errors: Mapping[int, ImageError], lineage: dict[str, str]) -> pa.Table:
    """The `errors` table of a shard of `images` (manifest columns): a row for each of `errors`, given by position."""
    rows = sorted(errors)
    failed = images.take(pa.array(rows, pa.int64()))
    return pa.table(
        {
            "uri": failed["uri"],
            "etag": failed["etag"],
            "stage": pa.array([errors[row].stage for row in rows], pa.string()),
            "error": pa.array([errors[row].error for row in rows], pa.string()),
            "message": pa.array([errors[row].message for row in rows], pa.string()),
        },
        schema=schema("errors", lineage=lineage),
    )


def encode(table: pa.Table) -> bytes:
    """The table as one Parquet file of one row group: equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", use_dictionary=["label", "model", "error", "stage"]
    ) as writer:
        writer.write_table(table, row_group_size=max(table.num_rows, 1))
    data: bytes = sink.getvalue().to_pybytes()
    return data
