"""Classification on a machine's GPUs, beside what bounds it and a stock Ray Data script.

    python -m benchmarks.gpu_speed --images ../shared/data/imagenet-sample-700.tar
        [--architectures resnet18 resnet50] [--sources packed loose] [--decoders cpu gpu] [--num-images 40000]
        [--forms auto fused] [--actors-per-gpu 1 2 4]

    ours            jobs.benchmark: each stage alone, then the whole; tasks of a CPU decode for the GPU's
                    actor (cpu), or fetch for it and it decodes on the GPU (gpu); in the fused form it does all itself
    ray_data_loop   benchmarks/peers: PIL in tasks, float32 tensors to an actor with the GPU

The set is the sample's images over and over under new names (hard links), as loose files and packed. GPUs are watched
with nvidia-smi while the whole is measured, from its first receipt to its last: their use in percent, watts, and joules
to an image. Weights are seeded and random, so `agreement.min_top1` is 0.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.inference_speed import compile_bundle, list_images, publish_bundle, spread
from benchmarks.running import run_command, run_job

_ANY_LABEL = "0"  # the least top-1 agreement
_REPORTS_EVERY_S = "0.2"
_PEER = Path(__file__).parent / "peers" / "ray_data_loop.py"
Figures = dict[str, Any]


class GpuWatch:
    """What nvidia-smi said of the machine's GPUs, five times a second, by `time.monotonic`."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float, float]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around what is to be watched."""
        fields = ["--query-gpu=utilization.gpu,power.draw", "--format=csv,noheader,nounits", "-lms", "200"]
        with subprocess.Popen(["nvidia-smi", *fields], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            threading.Thread(target=self._note, args=(process.stdout,), daemon=True).start()
            try:
                yield
            finally:
                process.terminate()

    def between(self, start: float, end: float) -> tuple[float, float] | None:
        """Mean use in percent and mean watts of a GPU; None where nothing was seen."""
        seen = [(use, watts) for at, use, watts in self._seen if start <= at <= end]
        return (mean(use for use, _ in seen), mean(watts for _, watts in seen)) if seen else None

    def _note(self, lines: Iterator[str]) -> None:
        for line in lines:
            use, watts = line.split(",")
            self._seen.append((time.monotonic(), float(use), float(watts)))


def main() -> None:
    arguments = _parse()
    figures: list[Figures] = []
    with tempfile.TemporaryDirectory(prefix="gpu-speed-") as folder:
        root = Path(folder)
        manifests = make_sets(root, arguments)
        compile_s = compile_bundles(root, arguments.architectures)
        for figures_of_one in measure(root, manifests, arguments):
            figures.append(figures_of_one)
            print(json.dumps(figures_of_one), flush=True)
    print(json.dumps({"num_images": arguments.num_images, "compile_s": compile_s, "figures": figures}))


def compile_bundles(root: Path, architectures: list[str]) -> dict[str, float]:
    """Seconds of each, all at once."""
    for architecture in architectures:
        publish_bundle(architecture, root)
    with ThreadPoolExecutor() as pool:
        seconds = pool.map(lambda architecture: compile_bundle(architecture, root)["auto"], architectures)
        return dict(zip(architectures, seconds, strict=True))


def measure(root: Path, manifests: dict[str, str], arguments: argparse.Namespace) -> Iterator[Figures]:
    """Ours from every source, with every decoder, form and number of actors, and the peer."""
    variants = [
        {"decode": decode, "form": form, "actors_per_gpu": actors}
        for decode, form, actors in product(arguments.decoders, arguments.forms, arguments.actors_per_gpu)
    ]
    for source in arguments.sources:
        for architecture, variant in product(arguments.architectures, variants):
            told = ours(root, manifests[source], architecture, variant, arguments)
            yield {"architecture": architecture, "source": source, **variant, **told}
        if source == arguments.sources[0] and not arguments.no_peer:
            for architecture in arguments.architectures:
                command = [sys.executable, str(_PEER), str(root / "peer-images"), str(root / "peer"), architecture]
                yield run_command(command).summary


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="tar of JPEGs")
    parser.add_argument("--num-images", type=int, default=40_000, help="images of the set made from them")
    parser.add_argument("--peer-images", type=int, default=8_000, help="images that the stock script gets")
    parser.add_argument("--shard-size", type=int, default=500, help="images in a shard")
    parser.add_argument("--architectures", nargs="+", default=["resnet18", "resnet50"], help="torchvision's names")
    parser.add_argument("--sources", nargs="+", choices=["packed", "loose"], default=["packed", "loose"])
    parser.add_argument("--decoders", nargs="+", choices=["cpu", "gpu"], default=["cpu", "gpu"])
    parser.add_argument("--forms", nargs="+", choices=["auto", "fused", "split"], default=["auto"])
    parser.add_argument("--actors-per-gpu", type=int, nargs="+", default=[1], help="actors that share a GPU")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    return parser.parse_args()


def make_sets(root: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """The manifests, by source; and the peer's folder."""
    spread(arguments.images, root / "images", arguments.num_images)
    (root / "peer-images").mkdir()
    for path in sorted((root / "images").iterdir())[: arguments.peer_images]:
        (root / "peer-images" / path.name).hardlink_to(path)
    shard_size = ("--shard_size", str(arguments.shard_size))
    loose = list_images(str(root / "images"), str(root / "manifest"), *shard_size)
    if "packed" in arguments.sources:
        run_job("pack", "--manifest", loose, "--output", str(root / "packed"), "--shuffle_seed", "null")
    return {"loose": loose, "packed": str(root / "packed")}


def ours(root: Path, manifest: str, architecture: str, compute: Figures, arguments: argparse.Namespace) -> Figures:
    """What jobs.benchmark tells, and the GPUs' use meanwhile."""
    flags = {
        "manifest": manifest,
        "registry": str(root / "registry"),
        "bundles": architecture,
        "output": str(root / "scratch"),
        "num_images": str(arguments.num_images),
        **{f"compute.{name}": str(value) for name, value in compute.items()},
        "measure_again": "false",
        "compute.compile": "always",
        "compute.agreement.min_top1": _ANY_LABEL,
        "progress_interval_s": _REPORTS_EVERY_S,
    }
    watch, start = GpuWatch(), time.monotonic()
    with watch.watching():
        ran = run_job("benchmark", *(word for name, value in flags.items() for word in (f"--{name}", value)))
    progress = [(at, json.loads(line)["progress"]) for at, line in ran.stderr if line.startswith('{"progress"')]
    working = [at for at, told in progress if told["images"]]
    verdict = ran.summary["verdict"]
    figures = {
        **verdict,
        "alone_images_per_s": ran.summary["alone_images_per_s"],
        "form": ran.summary["layout"]["form"],
    }
    seen = watch.between(start + working[0], start + working[-1])
    if seen is None:
        return figures
    use, watts = seen
    joules = round(watts * ran.summary["layout"]["num_gpus"] / verdict["images_per_s"], 4)
    return {**figures, "gpu_use_percent": round(use), "watts": round(watts), "joules_per_image": joules}


if __name__ == "__main__":
    main()
