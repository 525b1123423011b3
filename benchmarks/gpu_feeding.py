"""How many images a second one process can hand to a GPU, whose part is stood in for: no GPU is needed.

    python -m benchmarks.gpu_feeding --images ../shared/data/imagenet-sample-700.tar
        [--num-images 10000] [--sources packed loose] [--rounds 3]

    fused       an actor that fetches too
    split       an actor whose shards tasks have fetched; these are ready beforehand, and lie in memory
    alone       decoding, of shards that are fetched, without the rest

In the place of nvJPEG, the resizing kernel and the network are waits as long as an H200 takes for them (RESULTS.md),
during which the interpreter is free; nvJPEG takes one call at a time. With "a GPU that takes no time" they are left
out, and what remains is the interpreter's own limit. All else is what an actor does, down to the tables' files. The set
is the sample's images over and over; all in one process, alternating, medians over the rounds.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.inference_speed import list_images, publish_bundle, spread
from benchmarks.running import run_job
from pipeline.data import images, nvjpeg
from pipeline.data.loader import Batch, LoadLog
from pipeline.data.manifest import Shard
from pipeline.data.transforms import Preprocessing
from pipeline.inference.blocks import PreparedShard
from pipeline.inference.config import PredictConfig
from pipeline.inference.layout import Layout
from pipeline.inference.plan import Plan, make_plan
from pipeline.inference.predictor import Predictor
from pipeline.inference.run import resolve_inputs
from pipeline.inference.shard import fetch_shard, load_shard, predict_shard, prepare_images
from pipeline.inference.workers import SHARDS_AT_ONCE

_NVJPEG_IMAGES_PER_S = 10_700
_KERNEL_IMAGES_PER_S = 124_000
_NETWORK_IMAGES_PER_S = 24_000  # ResNet-50
_BATCH_SIZE = 256
_BATCHES_AT_ONCE = 2
_SHARD_SIZE = 500
_SHARDS_IN_MEMORY = 7
_LAYOUT = Layout("fused", "cpu", num_actors=1, cpus_per_actor=4, gpus_per_actor=0, decode="gpu")
Work = Callable[[Shard], None]


class StandIn:
    """A GPU that waits and gives tensors of the right number; `waits` is what it takes of the time an H200 takes."""

    def __init__(self) -> None:
        self.waits = 1.0
        self._nvjpeg = threading.Lock()
        self._image = torch.empty((3, 375, 500), dtype=torch.uint8)

    def decode_jpegs(self, encoded: Sequence[bytes | memoryview], device: torch.device) -> list[torch.Tensor]:
        """For `nvjpeg._decode_jpegs`."""
        for data in encoded:
            images.as_tensor(data)
        with self._nvjpeg:
            self._wait(len(encoded) / _NVJPEG_IMAGES_PER_S)
        return [self._image.view(self._image.shape) for _ in encoded]

    def apply_to_all(self, preprocessing: Preprocessing, decoded: Sequence[torch.Tensor]) -> torch.Tensor:
        """For `Preprocessing.apply_to_all`; small, for a CPU stacks them where a GPU would."""
        for image in decoded:
            preprocessing.resized_size(*image.shape[1:])
            image.stride()
        self._wait(len(decoded) / _KERNEL_IMAGES_PER_S)
        return torch.empty((len(decoded), 3, 8, 8), dtype=torch.uint8)

    def predict(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For a network."""
        self._wait(len(pixels) / _NETWORK_IMAGES_PER_S)
        return torch.zeros(len(pixels), 1000), torch.zeros(len(pixels), 2048)

    def _wait(self, seconds: float) -> None:
        if self.waits:
            time.sleep(self.waits * seconds)


def stand_in_predictor(plan: Plan, stand_in: StandIn) -> Predictor:
    """Several batches at once, as on a GPU."""
    predictor = Predictor(plan.run, plan.manifest)
    predictor._programs, predictor._batches_at_once = [stand_in.predict], _BATCHES_AT_ONCE
    return predictor


def main() -> None:
    arguments = _parse()
    stand_in = StandIn()
    with tempfile.TemporaryDirectory(prefix="gpu-feeding-") as folder, ExitStack() as stack:
        manifests = make_sets(Path(folder), arguments)
        stack.enter_context(patch.object(nvjpeg, "require", lambda *_: None))
        stack.enter_context(patch.object(nvjpeg, "_decode_jpegs", stand_in.decode_jpegs))
        stack.enter_context(patch.object(Preprocessing, "apply_to_all", lambda *args: stand_in.apply_to_all(*args)))
        figures = {}
        for source in arguments.sources:
            plan = plan_of(Path(folder), manifests[source])
            figures[source] = measure(plan, stand_in, arguments.rounds)
            print(json.dumps({source: figures[source]}), file=sys.stderr, flush=True)
    print(json.dumps({"num_images": arguments.num_images, "rounds": arguments.rounds, "images_per_s": figures}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="tar of JPEGs")
    parser.add_argument("--num-images", type=int, default=10_000, help="images of the set made from them")
    parser.add_argument("--sources", nargs="+", choices=["packed", "loose"], default=["packed", "loose"])
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds")
    arguments = parser.parse_args()
    if arguments.num_images % _SHARD_SIZE:
        parser.error(f"expected --num-images in shards of {_SHARD_SIZE}")
    return arguments


def make_sets(root: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """The manifests, by source."""
    spread(arguments.images, root / "images", arguments.num_images)
    loose = list_images(str(root / "images"), str(root / "manifest"), "--shard_size", str(_SHARD_SIZE))
    if "packed" in arguments.sources:
        run_job("pack", "--manifest", loose, "--output", str(root / "packed"), "--shuffle_seed", "null")
    publish_bundle("resnet50", root)
    return {"loose": loose, "packed": str(root / "packed")}


def plan_of(root: Path, manifest: str) -> Plan:
    config = PredictConfig(
        manifest=manifest,
        registry=str(root / "registry"),
        bundles=["resnet50"],
        output=str(root / "tables"),
        compute={"compile": "never", "batch_size": _BATCH_SIZE},
    )
    return make_plan(config, *resolve_inputs(config), _LAYOUT)


def measure(plan: Plan, stand_in: StandIn, num_rounds: int) -> dict[str, dict[str, float]]:
    """Medians of images/s, of a GPU as fast as an H200 and of one that takes no time."""
    shards = list(plan.pending_shards())
    predictor = stand_in_predictor(plan, stand_in)
    contestants = {
        "fused": fused(plan, predictor),
        "split": split(plan, predictor, shards),
        "alone": decoding_alone(plan, predictor, shards),
    }
    rates: dict[tuple[float, str], list[float]] = {case: [] for case in product((1.0, 0.0), contestants)}
    for _, (waits, name) in product(range(num_rounds), rates):
        stand_in.waits = waits
        rates[waits, name].append(images_per_s(contestants[name], shards))
    medians = {case: round(statistics.median(found)) for case, found in rates.items()}
    kinds = {"an H200": 1.0, "a GPU that takes no time": 0.0}
    return {kind: {name: medians[waits, name] for name in contestants} for kind, waits in kinds.items()}


def images_per_s(work: Work, shards: Sequence[Shard]) -> float:
    start = time.perf_counter()
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for _ in pool.map(work, shards):
            pass
    return sum(shard.num_images for shard in shards) / (time.perf_counter() - start)


# --- what an actor does with a shard -------------------------------------------------------------------------------


def fused(plan: Plan, predictor: Predictor) -> Work:
    run, manifest = plan.run, plan.manifest
    options: dict[str, Any] = {"num_threads": run.num_threads, "isolated": False, "decoder": predictor.decoder}

    def work(shard: Shard) -> None:
        log = LoadLog()
        batches = load_shard(run, manifest, shard, predictor.preprocessings, log=log, **options)
        receipt = predict_shard(run, manifest, shard, batches, predictor, log=log)
        assert receipt.num_predicted == shard.num_images, receipt

    return work


def split(plan: Plan, predictor: Predictor, shards: Sequence[Shard]) -> Work:
    rows = prepared_rows(plan, predictor, shards)

    def work(shard: Shard) -> None:
        log = LoadLog()
        batches = decoded(plan, predictor, rows[shard.shard_id % len(rows)], log)
        receipt = predict_shard(plan.run, plan.manifest, shard, batches, predictor, log=log)
        assert receipt.num_predicted == shard.num_images, receipt

    return work


def decoding_alone(plan: Plan, predictor: Predictor, shards: Sequence[Shard]) -> Work:
    rows = prepared_rows(plan, predictor, shards)

    def work(shard: Shard) -> None:
        for _ in decoded(plan, predictor, rows[shard.shard_id % len(rows)], LoadLog()):
            pass

    return work


def prepared_rows(plan: Plan, predictor: Predictor, shards: Sequence[Shard]) -> list[Any]:
    """Some of the shards, as tasks hand them on."""
    rows = []
    for shard in shards[:_SHARDS_IN_MEMORY]:
        log = LoadLog()
        encoded = fetch_shard(plan.run, plan.manifest, shard)
        preprocessings = predictor.preprocessings
        prepared = prepare_images(plan.run, encoded, preprocessings, num_threads=1, isolated=False, log=log)
        rows.append(PreparedShard.row_of(shard, 1, prepared, log))
    return rows


def decoded(plan: Plan, predictor: Predictor, row: Any, log: LoadLog) -> Iterator[Batch]:
    prepared = PreparedShard.from_row(row)
    assert prepared.images is not None
    assert predictor.decoder is not None
    return predictor.decoder.batches(prepared.images, batch_size=plan.run.batch_size, log=log)


if __name__ == "__main__":
    main()
