"""A run of very many shards with a null network: seconds, commits/s and the driver's peak memory of each step.

    python -m benchmarks.scale --num-shards 100000 --images-per-shard 500
    python -m benchmarks.scale --flat 10000 100000 1000000

All but fetch, decode and forward is the real thing: manifest, plan, Ray Data, actors that write both tables of every
shard, commits, reconciling, resuming nine tenths done, verifying. Each step runs in a process of its own, so that its
peak (ru_maxrss) is its own. `--flat` instead gives the seconds per image of runs of several sizes, from the first
receipt on, with shards that take `--work-ms` each.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from benchmarks.manifest_scale import make_bundle, measure
from pipeline import storage
from pipeline.cluster import connected_ray
from pipeline.config import ClusterConfig
from pipeline.data.manifest import Shard, write_manifest
from pipeline.data.sources import IMAGE_SCHEMA
from pipeline.inference import flow, workers
from pipeline.inference.commit import Receipt
from pipeline.inference.config import PredictConfig
from pipeline.inference.layout import Layout
from pipeline.inference.outputs import ShardOutputs, build_tables
from pipeline.inference.plan import make_plan
from pipeline.inference.predictor import ModelOutput
from pipeline.inference.reconcile import find_faults
from pipeline.inference.run import Run, read_run, resolve_inputs
from pipeline.inference.turns import Turns
from pipeline.models.bundle import Bundle
from pipeline.tables.writing import write_shard
from pipeline.witness import arrive

ROWS_AT_ONCE = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-shards", type=int, default=100_000)
    parser.add_argument("--images-per-shard", type=int, default=500)
    parser.add_argument("--flat", type=int, nargs="*", help="sizes of runs, in images")
    parser.add_argument("--work-ms", type=float, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        measure("make a bundle", partial(make_bundle, folder))
        if arguments.flat:
            compare_sizes(folder, arguments.flat, arguments.images_per_shard, arguments.work_ms / 1000)
            return
        num_images = arguments.num_shards * arguments.images_per_shard
        measure("make the manifest", partial(make, folder, num_images, arguments.images_per_shard))
        measure("plan", partial(plan, folder))
        measure("run all shards", partial(run, folder))
        measure("withdraw a tenth of the commits", partial(withdraw, folder, arguments.num_shards // 10))
        measure("resume", partial(run, folder))
        measure("verify", partial(verify, folder))


def compare_sizes(folder: str, sizes: list[int], images_per_shard: int, work_s: float) -> None:
    for num_images in sizes:
        place = f"{folder}/{num_images}"
        Path(place).mkdir()
        Path(place, "registry").symlink_to(f"{folder}/registry")
        make(place, num_images, images_per_shard)
        measure(f"{num_images} images", partial(run, place, work_s))


@dataclass
class SyntheticSource:
    """Names of images that are not there."""

    num_images: int
    is_packed: bool = False
    label_kind: Literal["names", "ids", "text"] = "names"
    skipped: Counter[str] = field(default_factory=Counter)

    def batches(self) -> Iterator[pa.RecordBatch]:
        for start in range(0, self.num_images, ROWS_AT_ONCE):
            numbers = range(start, min(start + ROWS_AT_ONCE, self.num_images))
            columns = {
                "uri": [f"s3://bucket/photos/{number % 1000:04d}/{number:010d}.jpg" for number in numbers],
                "size": np.full(len(numbers), 110_000),
                "etag": [f"{number:032x}" for number in numbers],
                "label": pa.nulls(len(numbers), pa.string()),
            }
            yield pa.record_batch([pa.array(columns[name]) for name in IMAGE_SCHEMA.names], schema=IMAGE_SCHEMA)

    def describe(self) -> dict[str, Any]:
        return {"source": "synthetic"}


class NullFused:
    """`PredictFused` without images and network: every image gets the same answer."""

    work_s = 0.0

    def __init__(self, run: Run, attempts: Any) -> None:
        arrive(attempts, "actors")
        self._run, self._attempts = run, attempts
        self._manifest = workers.open_unchanged(run.manifest_uri, run.manifest_digest)
        bundles = [Bundle.load(model.uri) for model in run.models]
        self._predictor: Any = SimpleNamespace(bundles=bundles, software="{}", computed_in="{}")
        self._turns = Turns()

    def __call__(self, rows: workers.Row) -> workers.Row:
        shards = workers.shards_of(rows)
        return workers.receipt_rows(workers.attempt_each(self._attempts, "all", shards, self._take))

    def _take(self, shard: Shard, attempt: int) -> Receipt:
        start = time.time()
        with self._turns.take(begun=time.perf_counter()):
            time.sleep(self.work_s)
        count, outputs = shard.num_images, ShardOutputs({})
        answer = ModelOutput(
            np.zeros((count, 5), np.int32), np.full((count, 5), 0.2, np.float32), None, np.ones(count, np.bool_)
        )
        outputs.add(list(range(count)), [answer])
        tables = build_tables(self._run, self._manifest.images(shard), self._predictor, outputs)
        files = write_shard(self._run.output_uri, self._run.run_id, shard.shard_id, tables)
        return Receipt(
            shard.shard_id, count, count, 0, {}, files, _seconds(start), began_at=start, ended_at=time.time()
        )


def _seconds(start: float) -> dict[str, float]:
    return {"fetch": 0.0, "decode": 0.0, "predict": 0.0, "write": time.time() - start, "total": time.time() - start}


def config_of(folder: str) -> PredictConfig:
    places = {"manifest": "manifest", "registry": "registry", "output": "tables"}
    fields = {name: f"{folder}/{place}" for name, place in places.items()}
    return PredictConfig.model_validate(
        {"bundles": ["net"], "run_id": "scale", "compute": {"compile": "never"}, **fields}
    )


def make(folder: str, num_images: int, images_per_shard: int) -> int:
    return write_manifest(f"{folder}/manifest", SyntheticSource(num_images), shard_size=images_per_shard).num_images


def plan(folder: str) -> int:
    config = config_of(folder)
    layout = Layout("fused", "cpu", num_actors=1, cpus_per_actor=1, gpus_per_actor=0)
    planned = make_plan(config, *resolve_inputs(config), layout)
    return sum(shard.num_images for shard in planned.pending_shards())


def run(folder: str, work_s: float = 0.0) -> int:
    NullFused.work_s = work_s
    flow.PredictFused = NullFused  # type: ignore[attr-defined,assignment]
    config = config_of(folder)
    with connected_ray(ClusterConfig()) as nodes:
        summary = flow.predict(config, *resolve_inputs(config), nodes)
    commits = sorted(path.stat().st_mtime for path in Path(folder, "tables/_runs/scale/commits").iterdir())
    begun = commits[-summary["num_pending"]]
    rate = (summary["num_pending"] - 1) / (commits[-1] - begun)
    figures = {"commits_per_s": round(rate, 1), "duration_s": summary["duration_s"], "pending": summary["num_pending"]}
    images: int = summary["num_pending"] * summary["num_images"] // summary["num_shards"]
    print(json.dumps(figures | {"microseconds_per_image": round(1e6 * (commits[-1] - begun) / images, 1)}), flush=True)
    return images


def withdraw(folder: str, number: int) -> int:
    commits = sorted(Path(folder, "tables/_runs/scale/commits").iterdir())
    for path in random.Random(0).sample(commits, number):
        path.unlink()
    return number


def verify(folder: str) -> int:
    recorded = read_run(storage.normalise(f"{folder}/tables"), "scale")
    faults = list(find_faults(recorded))
    assert not faults, faults[:3]
    return recorded.num_images


if __name__ == "__main__":
    main()
