"""Sources of given rows, and what manifests hold, for tests."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pyarrow as pa

from pipeline.data.manifest import Manifest
from pipeline.data.sources import IMAGE_SCHEMA

Row = tuple[str, int | None, str | None, str | None]


@dataclass
class Rows:
    """A source of given rows, in batches of given length."""

    rows: Sequence[Row]
    rows_per_batch: int = 3
    label_kind: str = "names"
    is_packed: bool = False
    skipped: Counter[str] = field(default_factory=Counter)

    def batches(self) -> Iterator[pa.RecordBatch]:
        for start in range(0, len(self.rows), self.rows_per_batch):
            part = self.rows[start : start + self.rows_per_batch]
            yield pa.RecordBatch.from_arrays(
                [pa.array(column, f.type) for column, f in zip(zip(*part, strict=True), IMAGE_SCHEMA, strict=True)],
                schema=IMAGE_SCHEMA,
            )

    def describe(self) -> dict[str, Any]:
        return {"source": "rows"}


def some_rows(count: int, label: str | None = None) -> list[Row]:
    return [(f"s3://bucket/{number:04d}.jpg", number, f"{number:x}", label) for number in range(count)]


def fresh() -> str:
    return f"memory://{uuid4().hex}/manifest"


def images_of(manifest: Manifest) -> list[dict[str, Any]]:
    return [row for shard in manifest.shards() for row in manifest.images(shard).to_pylist()]


def uris_of(manifest: Manifest) -> list[str]:
    return [image["uri"] for image in images_of(manifest)]
