"""Classification end to end, fetch to committed tables, beside what one writes without this package, on this machine.

    python -m benchmarks.inference_speed --images ../shared/data/imagenet-sample-700.tar --daft-python PATH
        [--architectures resnet18 resnet50] [--num-images 5000] [--rounds 3] [--peers …] [--int8] [--store s3://bucket]

    torch_loop, daft_loop, ray_data_loop    benchmarks/peers: float32, torchvision's eval transform, batches of 100
    ours                                    manifest, bundle, jobs.compile, then jobs.predict as its users run it
    ours, int8                              with --int8: the same in 8-bit integers
    ours, packed                            with --store: the same from packed shards that jobs.pack made
    ours, store / ours, packed, store       with --store, an empty prefix: both from there, tables and records there too

The set is the sample's images over and over under new names (hard links). Within a round each runs once; figures are
medians over the rounds. All are whole commands in processes of their own, with the same seeded random weights.

    start-up    seconds from the command to the end of the first batch. Ours does not tell when that is: it is taken as
                the beginning of the first shard and the first batch's share of that shard's seconds.
    images/s    the steady state. A peer's begins with the end of its first batch, which is not counted; ours with the
                beginning of the first shard, all images counted, so that it bears its first batch. Both end when the
                output is written: the peers' table, our last commit.
    whole       seconds from the command to its exit

Compiling is done beforehand, once per bundle and kind of machine, and told apart. On random weights the best class is a
matter of rounding, so ours runs with `agreement.min_top1` 0, and the labels of the two sides are not compared here:
that is benchmarks/exactness.py. Shards are of 250 images: of 5,000 images five shards of 1,000 would leave one of two
actors idle for a sixth of the time.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchvision import models

from benchmarks.running import predict, run_command, run_job
from pipeline import storage
from pipeline.data.transforms import Preprocessing
from pipeline.models.bundle import Architecture, pack
from pipeline.models.catalog import Network
from pipeline.models.registry import publish

PEERS = ("torch_loop", "daft_loop", "ray_data_loop")
OURS = "ours"
_PEERS_FOLDER = Path(__file__).parent / "peers"
_ANY_LABEL = "0"  # the least top-1 agreement


@dataclass(frozen=True, slots=True)
class Timed:
    """One run of one contestant."""

    images_per_s: float
    start_up_s: float
    whole_s: float


Contestant = Callable[[str, Path], Timed]
"""An architecture and a folder that is there no more to the times of a run that writes to it."""


def main() -> None:
    arguments = _parse()
    with tempfile.TemporaryDirectory(prefix="inference-speed-") as folder:
        root = Path(folder)
        spread(arguments.images, root / "images", arguments.num_images)
        manifests = make_sets(root, arguments)
        precisions = ("auto", "int8") if arguments.int8 else ("auto",)
        for name in arguments.architectures:
            publish_bundle(name, root)
        compile_s = {name: compile_bundle(name, root, precisions) for name in arguments.architectures}
        contestants = choose_contestants(root, manifests, arguments)
        figures = {name: measure(name, contestants, root, arguments.rounds) for name in arguments.architectures}
    for name in arguments.architectures:
        print(to_markdown(name, figures[name]))
    told = {"num_images": arguments.num_images, "shard_size": arguments.shard_size, "num_cpus": os.cpu_count()}
    print(json.dumps({**told, "rounds": arguments.rounds, "compile_s": compile_s, "figures": figures}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="tar of JPEGs")
    parser.add_argument("--num-images", type=int, default=5000, help="images of the set made from them")
    parser.add_argument("--architectures", nargs="+", default=["resnet18", "resnet50"], help="torchvision's names")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="which of them run")
    parser.add_argument("--int8", action="store_true", help="ours in 8-bit integers too, on x86 CPUs")
    parser.add_argument("--daft-python", help="interpreter that has daft; without it daft_loop is left out")
    parser.add_argument("--store", help="URI of an empty prefix, for the set as loose objects and as packed shards")
    parser.add_argument("--shard-size", type=int, default=250, help="images in a shard")
    arguments = parser.parse_args()
    if "daft_loop" in arguments.peers and arguments.daft_python is None:
        print("daft_loop is left out: no --daft-python was given", file=sys.stderr)
        arguments.peers = [peer for peer in arguments.peers if peer != "daft_loop"]
    num_cpus = os.cpu_count() or 1
    if arguments.num_images < num_cpus * arguments.shard_size:
        parser.error(f"expected at least a shard of {arguments.shard_size} images for each of {num_cpus} CPUs")
    return arguments


# --- what all begin with -------------------------------------------------------------------------------------------


def spread(archive: Path, folder: Path, num_images: int) -> None:
    """`num_images` JPEGs in one folder: the archive's, over and over under new names."""
    originals = folder.with_name("originals")
    with tarfile.open(archive) as tar:
        tar.extractall(originals, [member for member in tar if member.name.endswith(".JPEG")], filter="data")
    paths = sorted(originals.rglob("*.JPEG"))
    folder.mkdir()
    for number in range(num_images):
        copy, index = divmod(number, len(paths))
        (folder / f"{copy:03d}-{paths[index].name}").hardlink_to(paths[index])


def make_sets(root: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """The manifests that ours runs over, by contestant."""
    shard_size = ("--shard_size", str(arguments.shard_size))
    manifests = {OURS: list_images(str(root / "images"), str(root / "manifest"), *shard_size)}
    if arguments.store is None:
        return manifests
    store = storage.normalise(arguments.store)
    upload(root / "images", storage.join(store, "images"))
    in_store = list_images(storage.join(store, "images"), storage.join(store, "manifest"), *shard_size)
    places = {f"{OURS}, packed": str(root / "packed"), f"{OURS}, packed, store": storage.join(store, "packed")}
    for place in places.values():
        run_job("pack", "--manifest", manifests[OURS], "--output", place, "--shuffle_seed", "null")  # the same shards
    return {**manifests, f"{OURS}, store": in_store, **places}


def list_images(images: str, manifest: str, *flags: str) -> str:
    """Where the manifest of a prefix now lies."""
    run_job("manifest", "--source.uri", images, "--output", manifest, *flags)
    return manifest


def upload(folder: Path, prefix: str) -> None:
    """The folder's files as loose objects."""
    paths = sorted(folder.iterdir())
    for _ in storage.map_concurrently(lambda path: storage.write(f"{prefix}/{path.name}", path.read_bytes()), paths):
        pass


def publish_bundle(architecture: str, root: Path) -> None:
    """A bundle with the peers' weights, seeded and random."""
    torch.manual_seed(0)
    network = Network(models.get_model(architecture).eval(), "fc")
    bundle, weights = pack(
        network,
        name=architecture,
        version="1",
        architecture=Architecture(name=architecture),
        classes=[f"class-{index:04d}" for index in range(network.num_classes)],
        preprocessing=Preprocessing(resize_size=256, crop_size=224),
    )
    publish(str(root / "registry"), bundle, weights)


def compile_bundle(architecture: str, root: Path, precisions: Sequence[str] = ("auto",)) -> dict[str, float]:
    """Each jobs.compile's seconds."""
    places = ("--registry", str(root / "registry"), "--bundle", architecture, "--manifest", str(root / "manifest"))
    return {
        precision: round(
            run_job("compile", *places, "--agreement.min_top1", _ANY_LABEL, "--precision", precision).seconds, 1
        )
        for precision in precisions
    }


# --- the contestants -----------------------------------------------------------------------------------------------


def choose_contestants(root: Path, manifests: dict[str, str], arguments: argparse.Namespace) -> dict[str, Contestant]:
    """By name, in the order of a round."""
    pythons = dict.fromkeys(PEERS, sys.executable) | {"daft_loop": arguments.daft_python}
    peers = {name: partial(run_peer, name, pythons[name], root / "images") for name in arguments.peers}
    registry = str(root / "registry")
    ours = {name: partial(run_ours, manifest, registry, "auto") for name, manifest in manifests.items()}
    if arguments.int8:
        ours[f"{OURS}, int8"] = partial(run_ours, manifests[OURS], registry, "int8")
    return {**peers, **ours}


def run_peer(name: str, python: str, images: Path, architecture: str, output: Path) -> Timed:
    ran = run_command([python, str(_PEERS_FOLDER / f"{name}.py"), str(images), str(output), architecture])
    told = ran.summary
    return Timed(told["images_per_s"], told["start_up_s"], ran.seconds)


def run_ours(manifest: str, registry: str, precision: str, architecture: str, output: Path) -> Timed:
    """Tables and records lie where the images do."""
    is_local = storage.split(storage.normalise(manifest))[0] == "file"
    tables = str(output) if is_local else f"{manifest}-{output.name}"
    places = ("--manifest", manifest, "--registry", registry, "--bundles", architecture, "--output", tables)
    ran = predict(*places, "--compute.agreement.min_top1", _ANY_LABEL, "--compute.precision", precision)
    num_images, num_shards = ran.summary["num_images"], ran.summary["num_shards"]
    first_batch = ran.summary["batch_size"] / (num_images / num_shards)
    start_up_s = ran.begun_s + min(1.0, first_batch) * (ran.first_receipt_s - ran.begun_s)
    return Timed(num_images / (ran.committed_s - ran.begun_s), start_up_s, ran.ended_s)


# --- figures -------------------------------------------------------------------------------------------------------


def measure(architecture: str, contestants: dict[str, Contestant], root: Path, num_rounds: int) -> dict[str, Any]:
    """Medians of each contestant, and every round's images/s."""
    timed: dict[str, list[Timed]] = {name: [] for name in contestants}
    for number in range(num_rounds):
        for index, (name, run) in enumerate(contestants.items()):
            output = root / f"{architecture}-{number}-{index}"
            timed[name].append(run(architecture, output))
            shutil.rmtree(output, ignore_errors=True)
            print(f"round {number + 1} of {num_rounds}: {architecture}, {name}: {timed[name][-1]}", file=sys.stderr)
    return {name: medians_of(runs) for name, runs in timed.items()}


def medians_of(runs: list[Timed]) -> dict[str, Any]:
    medians = {field: round(statistics.median(getattr(run, field) for run in runs), 2) for field in Timed.__slots__}
    return {**medians, "rounds": [round(run.images_per_s, 2) for run in runs]}


def to_markdown(architecture: str, figures: dict[str, Any]) -> str:
    """The figures as the table of RESULTS.md; the ratios are to ours on local loose files."""
    ours = figures[OURS]["images_per_s"]
    lines = [f"| {architecture} | images/s | ratio | start-up | whole |", "|---|---|---|---|---|"]
    for name, found in figures.items():
        rate = found["images_per_s"]
        ratio = f"{rate / ours:.2f} of ours" if name.startswith(OURS) else f"ours is {ours / rate:.2f}x"
        lines.append(f"| {name} | {rate:.1f} | {ratio} | {found['start_up_s']:.1f} s | {found['whole_s']:.1f} s |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
