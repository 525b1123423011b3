"""Reading the tables back, as pyarrow datasets; DuckDB, Polars and Spark read the same files without help."""

import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow.fs import FSSpecHandler, PyFileSystem

from pipeline import storage
from pipeline.errors import ObjectNotFoundError
from pipeline.tables.schemas import TABLES


def open_table(uri: str, run_id: str | None = None) -> ds.Dataset:
    """The table at `uri` (`<output>/predictions`, `<output>/embeddings` or `<output>/errors`) as a pyarrow dataset.

    All runs, with a `run_id` column, or the one named. Of each run a file's footer is read, for embeddings may be
    float16 in one and float32 in another, and are float32 then; nothing else is before the dataset is scanned:
    `open_table(…).to_table(columns=["uri", "label"], filter=ds.field("score") < 0.5)`.
    Raises ObjectNotFoundError where there is no such table or run, naming what is there.
    """
    location = storage.normalise(uri)
    if run_id is not None:
        location = storage.join(location, f"run_id={run_id}")
    scheme, path = storage.split(location)
    files = PyFileSystem(FSSpecHandler(storage.filesystem(scheme)))
    base = path.rpartition("/run_id=")[0] or path  # below the folder of one run nothing names it
    partitioning = ds.partitioning(pa.schema([("run_id", pa.string())]), flavor="hive")
    try:
        dataset = ds.dataset(
            path, filesystem=files, format="parquet", partitioning=partitioning, partition_base_dir=base
        )
    except FileNotFoundError as error:
        raise ObjectNotFoundError(_missing(location)) from error
    if not dataset.files:
        raise ObjectNotFoundError(_missing(location))
    fragments = list(dataset.get_fragments())
    of_each_run = {str(fragment.partition_expression): fragment for fragment in fragments}
    schemas = storage.map_concurrently(lambda fragment: fragment.physical_schema, of_each_run.values())
    schema = pa.unify_schemas([dataset.schema, *schemas], promote_options="permissive")
    return ds.FileSystemDataset(fragments, schema, dataset.format, files)


def _missing(location: str) -> str:
    return (
        f"expected Parquet files of a table at {location!r}, found none; "
        f"a table is <output>/{{{','.join(TABLES)}}} of a predict run"
    )
