"""What the networks said of a shard, batch by batch, and the tables made of it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import ImageError
from pipeline.inference.predictor import ModelOutput, Predictor
from pipeline.inference.run import Run
from pipeline.tables.schemas import TableName, schema
from pipeline.tables.writing import errors_table


class ShardOutputs:
    """The outputs of a shard's batches, and the images that have none.

    `rows` are the positions predicted, batch by batch; `by_batch` holds a `ModelOutput` per bundle for each batch;
    `errors` are the other images, by position.
    """

    def __init__(self, errors: dict[int, ImageError]) -> None:
        self.errors = errors
        self.rows: list[npt.NDArray[np.int64]] = []
        self.by_batch: list[list[ModelOutput]] = []

    @property
    def num_predicted(self) -> int:
        return sum(len(rows) for rows in self.rows)

    def add(self, rows: list[int], outputs: list[ModelOutput]) -> None:
        """Take in a batch; an image that some bundle answers with NaN or infinity becomes an error."""
        is_finite = np.logical_and.reduce([output.is_finite for output in outputs])
        positions = np.asarray(rows)
        for row in positions[~is_finite]:
            self.errors[int(row)] = ImageError(
                "predict", "not_finite", "expected finite logits and embeddings, the network gave others"
            )
        self.rows.append(positions[is_finite])
        self.by_batch.append([output if is_finite.all() else output.select(is_finite) for output in outputs])


def build_tables(run: Run, images: pa.Table, predictor: Predictor, outputs: ShardOutputs) -> dict[TableName, pa.Table]:
    """The tables of a shard of `images` (manifest columns), rows in manifest order, an image's models side by side."""
    rows = np.concatenate(outputs.rows) if outputs.rows else np.empty(0, np.int64)
    assert len(rows) + len(outputs.errors) == images.num_rows
    lineage = {**run.lineage, "software": predictor.software, "computed_in": predictor.computed_in}
    by_model = [[by_bundle[index] for by_bundle in outputs.by_batch] for index in range(len(predictor.bundles))]
    predicted = images.take(pa.array(rows))
    tables: dict[TableName, pa.Table] = {}
    if "predictions" in run.tables.names:
        target = schema("predictions", lineage=lineage)
        parts = [
            _predictions(predicted, run.models[index].name, predictor.bundles[index].classes, batches, target)
            for index, batches in enumerate(by_model)
        ]
        tables["predictions"] = _interleaved(parts)
    if "embeddings" in run.tables.names:
        target = schema("embeddings", embedding_type=run.tables.embedding_type, lineage=lineage)
        parts = [
            _embeddings(predicted, run.models[index].name, batches, target) for index, batches in enumerate(by_model)
        ]
        tables["embeddings"] = _interleaved(parts)
    tables["errors"] = errors_table(images, outputs.errors, lineage)
    return tables


def _predictions(
    images: pa.Table, model: str, classes: Sequence[str], outputs: list[ModelOutput], target: pa.Schema
) -> pa.Table:
    label_ids = _concatenate([output.label_ids for output in outputs], np.int32)
    scores = _concatenate([output.scores for output in outputs], np.float32)
    best = label_ids[:, 0] if len(label_ids) else np.empty(0, np.int32)
    return pa.table(
        {
            "uri": images["uri"],
            "etag": images["etag"],
            "label_id": best,
            "label": pa.array(classes, pa.string()).take(pa.array(best)),
            "score": scores[:, 0] if len(scores) else np.empty(0, np.float32),
            "topk_label_ids": _lists(label_ids),
            "topk_scores": _lists(scores),
            "model": pa.repeat(pa.scalar(model), images.num_rows),
        },
        schema=target,
    )


def _embeddings(images: pa.Table, model: str, outputs: list[ModelOutput], target: pa.Schema) -> pa.Table:
    element = target.field("embedding").type.value_type.to_pandas_dtype()
    embeddings = _concatenate([output.embeddings for output in outputs if output.embeddings is not None], element)
    return pa.table(
        {
            "uri": images["uri"],
            "etag": images["etag"],
            "embedding": _lists(embeddings),
            "model": pa.repeat(pa.scalar(model), images.num_rows),
        },
        schema=target,
    )


def _interleaved(parts: list[pa.Table]) -> pa.Table:
    """Tables of equal length as one: the first row of each, then the second."""
    if len(parts) == 1:
        return parts[0]
    order = np.arange(len(parts) * len(parts[0])).reshape(len(parts), -1).T.ravel()
    return pa.concat_tables(parts).take(pa.array(order))


def _lists(values: npt.NDArray[np.generic]) -> pa.Array:
    """A 2-D array as a column of plain lists, without copying through Python objects."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * (values.shape[1] if values.ndim == 2 else 0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))


def _concatenate(parts: Sequence[npt.NDArray[np.generic]], element: npt.DTypeLike) -> npt.NDArray[np.generic]:
    return np.concatenate(parts) if parts else np.empty((0, 0), element)
