"""The images of a manifest in random order, as a source to make another manifest of.

    shards ──► blocks, hashed and cut into buckets ──► one local file ──► bucket after bucket, each sorted by hash

Images stand in the order of a hash of their uri under a seed: the same for the same images, however they were listed.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.data.sources import IMAGE_SCHEMA, TABLE_ROWS, LabelKind
from pipeline.data.spool import hash_uris, naming_full_disk
from pipeline.errors import ManifestError

_BUCKET_BITS = 6  # 64 buckets: one of 10 million images is some 25 MB
_NUM_BUCKETS = 1 << _BUCKET_BITS
_SHARDS_AT_ONCE = 8
_HASHED_SCHEMA = pa.schema([*IMAGE_SCHEMA, pa.field("hash", pa.uint64())])


@dataclass(slots=True)
class ShuffledSource:
    """The loose images of `manifest` in an order drawn by `seed`, their labels as class ids.

    Memory is that of a 64th of the images; the local temporary folder takes some 30 to 100 bytes an image meanwhile.
    Raises ManifestError where the images are packed: each shard would then read its images from all packs.
    """

    manifest: Manifest
    seed: int
    is_packed: bool = field(default=False, init=False)
    label_kind: LabelKind = field(default="ids", init=False)
    skipped: Counter[str] = field(default_factory=Counter, init=False)

    def __post_init__(self) -> None:
        first = next(self.manifest.shards())
        if first.source is not None:
            raise ManifestError(
                f"expected a manifest of loose images to shuffle, got packed ones in {first.source!r} at "
                f"{self.manifest.uri!r}; keep their order (without a shuffle seed), or start from the loose images"
            )

    def batches(self) -> Iterator[pa.RecordBatch]:
        with tempfile.TemporaryDirectory(prefix="shuffle-") as folder:
            path = f"{folder}/images.arrow"
            with naming_full_disk(Path(folder)):
                self._scatter(path)
            yield from _gather(path)

    def _scatter(self, path: str) -> None:
        """Write the images to `path`; batch `k` is of bucket `k` modulo their number."""
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, _HASHED_SCHEMA, options=options) as writer:
            for block in self._blocks():
                hashes = hash_uris(block["uri"], self.seed)
                order = np.argsort(hashes)
                ends = np.searchsorted(hashes[order] >> (64 - _BUCKET_BITS), np.arange(_NUM_BUCKETS), side="right")
                hashed = block.append_column("hash", pa.array(hashes)).take(order).combine_chunks()
                [batch] = hashed.to_batches()
                for start, end in pairwise([0, *ends.tolist()]):
                    writer.write_batch(batch.slice(start, end - start))

    def _blocks(self) -> Iterator[pa.Table]:
        """The images in order, some `TABLE_ROWS` at a time: shards alone would make small batches."""
        block: list[pa.Table] = []
        for images in storage.map_concurrently(self.manifest.images, self.manifest.shards(), _SHARDS_AT_ONCE):
            block.append(images.cast(IMAGE_SCHEMA))
            if sum(map(len, block)) >= TABLE_ROWS:
                yield pa.concat_tables(block)
                block.clear()
        if block:
            yield pa.concat_tables(block)

    def describe(self) -> dict[str, Any]:
        return {"source": "shuffled", "uri": self.manifest.uri, "digest": self.manifest.digest, "seed": self.seed}


def _gather(path: str) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(path) as file, pa.ipc.open_file(file) as reader:
        for bucket in range(_NUM_BUCKETS):
            batches = [reader.get_batch(index) for index in range(bucket, reader.num_record_batches, _NUM_BUCKETS)]
            images = pa.Table.from_batches(batches).sort_by([("hash", "ascending"), ("uri", "ascending")])
            yield from images.select(IMAGE_SCHEMA.names).to_batches(TABLE_ROWS)
