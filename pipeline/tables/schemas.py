"""One explicit Arrow schema per table, with the run's lineage in its metadata.

    predictions   one row per image and model
    embeddings    one row per image and model, in the order of `predictions`
    errors        one row per image that could not be classified

Every image of the manifest is in those of the first two that a run writes, or in `errors`; rows in manifest order.
"""

from typing import Literal, get_args

import pyarrow as pa

TableName = Literal["predictions", "embeddings", "errors"]
TABLES: tuple[TableName, ...] = get_args(TableName)

EmbeddingType = Literal["float32", "float16"]

_PREDICTIONS = [
    pa.field("uri", pa.string(), nullable=False),
    pa.field("etag", pa.string()),
    pa.field("label_id", pa.int32(), nullable=False),
    pa.field("label", pa.string(), nullable=False),
    pa.field("score", pa.float32(), nullable=False),
    pa.field("topk_label_ids", pa.list_(pa.int32()), nullable=False),
    pa.field("topk_scores", pa.list_(pa.float32()), nullable=False),
    pa.field("model", pa.string(), nullable=False),
]
_ERRORS = [
    pa.field("uri", pa.string(), nullable=False),
    pa.field("etag", pa.string()),
    pa.field("stage", pa.string(), nullable=False),
    pa.field("error", pa.string(), nullable=False),
    pa.field("message", pa.string(), nullable=False),
]
_FLOATS: dict[EmbeddingType, pa.DataType] = {"float32": pa.float32(), "float16": pa.float16()}


def schema(
    table: TableName, *, embedding_type: EmbeddingType = "float32", lineage: dict[str, str] | None = None
) -> pa.Schema:
    """The schema of `table`; `lineage` (digests, versions) becomes its metadata.

    Embeddings are plain lists, which every Parquet reader and Delta Lake know; their dimension stands in the lineage.
    """
    fields = {"predictions": _PREDICTIONS, "embeddings": _embeddings(embedding_type), "errors": _ERRORS}[table]
    return pa.schema(fields, metadata=lineage)


def _embeddings(embedding_type: EmbeddingType) -> list[pa.Field]:
    return [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("embedding", pa.list_(_FLOATS[embedding_type]), nullable=False),
        pa.field("model", pa.string(), nullable=False),
    ]
