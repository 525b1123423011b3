"""Writing and reading the tables, with the readers that people use."""

import hashlib

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import ObjectNotFoundError
from pipeline.tables import open_table
from pipeline.tables.schemas import schema
from pipeline.tables.writing import encode, shard_path, write_shard


def predictions(uris: list[str]) -> pa.Table:
    return pa.table(
        {
            "uri": uris,
            "etag": [None] * len(uris),
            "label_id": [1] * len(uris),
            "label": ["cat"] * len(uris),
            "score": [0.75] * len(uris),
            "topk_label_ids": [[1, 0]] * len(uris),
            "topk_scores": [[0.75, 0.25]] * len(uris),
            "model": ["net/1"] * len(uris),
        },
        schema=schema("predictions", lineage={"manifest_digest": "abc"}),
    )


def embeddings(values: np.ndarray, embedding_type: str) -> pa.Table:
    target = schema("embeddings", embedding_type=embedding_type)
    uris = [f"file:///{index}.jpg" for index in range(len(values))]
    columns = {"uri": uris, "etag": ["e"] * len(uris), "embedding": list(values), "model": ["net/1"] * len(uris)}
    return pa.table(columns, schema=target)


@pytest.fixture
def output(tmp_path) -> str:
    return storage.normalise(str(tmp_path / "out"))


def local(uri: str) -> str:
    return uri.removeprefix("file://")


@given(st.lists(st.text(), max_size=5))
def test_equal_tables_give_equal_bytes(uris):
    assert encode(predictions(uris)) == encode(predictions(uris))


def test_a_written_file_is_described_by_what_is_there(output):
    [written] = write_shard(output, "r1", 3, {"predictions": predictions(["a", "b"])})
    data = storage.read(storage.join(output, written.path))
    assert written.path == shard_path("predictions", "r1", 3) == "predictions/run_id=r1/00000003.parquet"
    assert (written.num_rows, written.num_bytes) == (2, len(data))
    assert written.sha256 == hashlib.sha256(data).hexdigest()


def test_a_table_is_read_back_whole_or_by_run(output):
    write_shard(output, "r1", 0, {"predictions": predictions(["a"])})
    write_shard(output, "r2", 0, {"predictions": predictions(["b", "c"])})
    everything = open_table(f"{output}/predictions")
    assert sorted(everything.to_table(columns=["uri", "run_id"]).to_pylist(), key=str) == [
        {"uri": "a", "run_id": "r1"},
        {"uri": "b", "run_id": "r2"},
        {"uri": "c", "run_id": "r2"},
    ]
    assert open_table(f"{output}/predictions", run_id="r2").count_rows(filter=ds.field("score") > 0.5) == 2
    for of_one in (open_table(f"{output}/predictions", "r2"), open_table(f"{output}/predictions/run_id=r2")):
        assert of_one.to_table()["run_id"].to_pylist() == ["r2", "r2"]
        assert of_one.count_rows(filter=ds.field("run_id") == "r2") == 2


def test_lineage_travels_in_the_schema(output):
    write_shard(output, "r1", 0, {"predictions": predictions(["a"])})
    assert open_table(f"{output}/predictions", "r1").schema.metadata[b"manifest_digest"] == b"abc"


def test_files_left_by_a_killed_writer_are_not_read(output):
    write_shard(output, "r1", 0, {"predictions": predictions(["a"])})
    storage.write(f"{output}/predictions/run_id=r1/.00000000.parquet.0a1b.part", b"half a file")
    assert open_table(f"{output}/predictions").count_rows() == 1


@pytest.mark.parametrize("run_id", [None, "nothing"])
def test_a_table_that_is_not_there_is_said_so(output, run_id):
    with pytest.raises(ObjectNotFoundError, match="expected Parquet files of a table"):
        open_table(f"{output}/predictions", run_id)


def test_duckdb_and_polars_read_predictions_without_help(output):
    write_shard(output, "r1", 0, {"predictions": predictions(["a", "b"])})
    pattern = f"{local(output)}/predictions/**/*.parquet"
    query = f"select label, count(*), max(run_id) from read_parquet('{pattern}', hive_partitioning=true) group by label"
    assert duckdb.sql(query).fetchall() == [("cat", 2, "r1")]
    assert pl.read_parquet(pattern).select("uri", "topk_label_ids")["topk_label_ids"].to_list() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("embedding_type", ["float32", "float16"])
def test_duckdb_and_polars_read_embeddings_of_either_type(output, embedding_type):
    values = np.arange(6, dtype=embedding_type).reshape(2, 3) / 8
    write_shard(output, "r1", 0, {"embeddings": embeddings(values, embedding_type)})
    pattern = f"{local(output)}/embeddings/**/*.parquet"
    from_duckdb = [row[0] for row in duckdb.sql(f"select embedding from '{pattern}' order by uri").fetchall()]
    from_polars = pl.read_parquet(pattern).sort("uri")["embedding"].to_list()
    from_arrow = open_table(f"{output}/embeddings").to_table()["embedding"].to_pylist()
    assert from_duckdb == from_polars == from_arrow == values.tolist()


@pytest.mark.parametrize("order", [("float16", "float32"), ("float32", "float16")])
def test_of_runs_of_both_types_no_embedding_loses_a_bit(output, order):
    values = np.array([[0.1, 0.2]], np.float32)
    for number, embedding_type in enumerate(order):
        write_shard(output, f"r{number}", 0, {"embeddings": embeddings(values.astype(embedding_type), embedding_type)})
    table = open_table(f"{output}/embeddings").to_table().sort_by("run_id")
    assert table["embedding"].to_pylist() == [values.astype(each)[0].tolist() for each in order]


@pytest.mark.s3
def test_tables_are_written_to_and_read_from_a_real_object_store(s3_uri):
    write_shard(s3_uri, "r1", 0, {"predictions": predictions(["a", "b"])})
    assert open_table(f"{s3_uri}/predictions", "r1").to_table()["uri"].to_pylist() == ["a", "b"]
    with pytest.raises(ObjectNotFoundError):
        open_table(f"{s3_uri}/embeddings")
