"""Time and peak memory of making a large manifest from a table of URIs, and of planning and resuming a run over it.

    python -m benchmarks.manifest_scale --num-images 10000000 --format parquet

Each step runs in a process of its own, so that its peak (ru_maxrss) is its own. Figures in RESULTS.md.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.manifest import Manifest, Shard, write_manifest
from pipeline.data.transforms import Preprocessing
from pipeline.data.uri_table import TableSource
from pipeline.inference.commit import Receipt, commit, read_receipts
from pipeline.inference.config import PredictConfig
from pipeline.inference.layout import Layout
from pipeline.inference.plan import Plan, make_plan, record_run
from pipeline.inference.run import resolve_inputs
from pipeline.models import registry
from pipeline.models.bundle import Architecture, pack

ROWS_AT_ONCE = 100_000
SHARDS_READ = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num-images", type=int, default=10_000_000)
    parser.add_argument("--format", choices=("parquet", "csv"), default="parquet")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="manifest-scale-") as folder:
        table = f"{folder}/table.{arguments.format}"
        manifest = f"{folder}/manifest"
        measure("draw the table", lambda: draw_table(table, arguments.num_images))
        measure("make", lambda: make(table, manifest))
        measure("make again: nothing to do", lambda: make(table, manifest))
        measure("stream all shards", lambda: stream_shards(manifest))
        measure(f"read {SHARDS_READ} shards", lambda: read_shards(manifest))
        measure("make a bundle", lambda: make_bundle(folder))
        measure("plan a run", lambda: plan_run(folder))
        measure("commit nine shards of ten", lambda: commit_most(folder))
        measure("plan its resumption", lambda: plan_run(folder))
        measure("add up its receipts", lambda: add_up(folder))
        size = sum(file.stat().st_size for file in Path(manifest).iterdir())
        print(
            json.dumps(
                {"step": "on disk", "mb": round(size / 1e6), "table_mb": round(Path(table).stat().st_size / 1e6)}
            )
        )


def measure(step: str, function: Callable[[], int]) -> None:
    """Run `function`, which returns a number of images, in a fresh process; print seconds, images/s and peak memory."""
    process = multiprocessing.get_context("fork").Process(target=_measured, args=(step, function))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def _measured(step: str, function: Callable[[], int]) -> None:
    start = time.perf_counter()
    num_images = function()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    figures = {"seconds": round(seconds, 1), "images_per_s": round(num_images / seconds), "peak_mb": round(peak / 1e6)}
    print(json.dumps({"step": step, **figures}), flush=True)


def draw_table(path: str, num_images: int) -> int:
    generator = np.random.default_rng(0)
    writer = None
    for start in range(0, num_images, ROWS_AT_ONCE):
        numbers = range(start, min(start + ROWS_AT_ONCE, num_images))
        etags = generator.bytes(16 * len(numbers)).hex()
        labels = generator.integers(0, 1000, len(numbers)).tolist()
        table = pa.table(
            {
                "uri": [
                    f"s3://bucket/photos/{label:04d}/{n:010d}.jpg" for n, label in zip(numbers, labels, strict=True)
                ],
                "label": [f"class-{label:04d}" for label in labels],
                "bytes": generator.integers(10_000, 200_000, len(numbers)),
                "etag": [etags[n * 32 : n * 32 + 32] for n in range(len(numbers))],
            }
        )
        if writer is None:
            kind = pq.ParquetWriter if path.endswith(".parquet") else pyarrow.csv.CSVWriter
            writer = kind(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return num_images


def make(table: str, manifest: str) -> int:
    source = TableSource(table, label_column="label", size_column="bytes", etag_column="etag")
    return write_manifest(manifest, source, shard_size=1000).num_images


def stream_shards(manifest: str) -> int:
    return sum(shard.num_images for shard in Manifest.open(manifest).shards())


def read_shards(manifest: str) -> int:
    opened = Manifest.open(manifest)
    every = max(1, opened.num_shards // SHARDS_READ)
    return sum(opened.images(shard).num_rows for shard in opened.shards() if shard.shard_id % every == 0)


def make_bundle(folder: str) -> int:
    from pipeline.models.catalog import build  # torch, which the driver of a run does without

    network = build("cifar_resnet8", 10)
    bundle, weights = pack(
        network,
        name="net",
        version="1",
        architecture=Architecture(name="cifar_resnet8"),
        classes=[str(label) for label in range(10)],
        preprocessing=Preprocessing(resize_size=32, crop_size=32),
    )
    registry.publish(f"{folder}/registry", bundle, weights)
    return 1


def plan_of(folder: str) -> Plan:
    config = PredictConfig(
        manifest=f"{folder}/manifest", registry=f"{folder}/registry", bundles=["net"], output=f"{folder}/tables"
    )
    layout = Layout("fused", "cpu", num_actors=1, cpus_per_actor=2, gpus_per_actor=0)
    plan = make_plan(config, *resolve_inputs(config), layout)
    record_run(plan, config)
    return plan


def plan_run(folder: str) -> int:
    return sum(shard.num_images for shard in plan_of(folder).pending_shards())


def commit_most(folder: str) -> int:
    plan = plan_of(folder)
    shards = (shard for shard in plan.pending_shards() if shard.shard_id % 10)
    return sum(storage.map_concurrently(lambda shard: _commit(plan, shard), shards))


def _commit(plan: Plan, shard: Shard) -> int:
    commit(plan.run.uri, Receipt(shard.shard_id, shard.num_images, shard.num_images, 0, {}, [], {"total": 1.0}))
    return shard.num_images


def add_up(folder: str) -> int:
    plan = plan_of(folder)
    return sum(receipt.num_images for receipt in read_receipts(plan.run.uri, plan.committed))


if __name__ == "__main__":
    main()
