"""Training beside a loop in the style of torchvision's reference: ResNet-18 at 176 pixels on CPUs, or on a GPU.

    python -m benchmarks.training_speed --images ../shared/data/imagenet-sample-700.tar [--steps 12] [--rounds 3]
        [--device cuda --architecture resnet50 --size 224 --batch 256 --threads 16 --copies 100 --synthetic]

    ours        packed shards (shorter side 256), uint8, channels_last, the training loop itself, no Ray around it
    reference   DataLoader with a process to a thread of ours over loose files, PIL, NCHW: references/classification;
                float32, on a GPU under autocast in the same precision

The same images (`--copies` of each), batch, augmentation (random-resized crop, flip) and optimizer. The two alternate;
each round is timed from the step after `--warm-up` on; medians and their ratio are printed, with what ours says it is
bound by.
`--synthetic` adds ours on pixels that are there already: what the loop could do if data cost nothing.
"""

import argparse
import json
import statistics
import tarfile
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms

from jobs.manifest import LabelsConfig, ManifestConfig, SourceConfig
from jobs.manifest import main as make_manifest
from jobs.pack import PackConfig
from jobs.pack import main as pack
from pipeline import storage
from pipeline.data.pack import Reencode
from pipeline.data.training_set import TrainingSet
from pipeline.training.bound import idle_share, verdict
from pipeline.training.config import TrainConfig
from pipeline.training.feed import batches_of, make_loader
from pipeline.training.loop import Trainee
from pipeline.training.run import TrainingRun, make_run
from pipeline.training.worker import Worker

_SPARE_STEPS = 16
"""Nobody asks for their batches: else, decoded ahead, the last would leave the last steps the cores to themselves."""


@dataclass(frozen=True, slots=True)
class Ours:
    """What the loop did, and what binds it."""

    images_per_s: float
    data_wait_share: float
    verdict: str


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        unpack(root, arguments.images, arguments.copies)
        run = _run(root, arguments)
        rates: dict[str, list[float]] = {"reference": [], "ours": [], "synthetic": []}
        seen: list[Ours] = []
        for _ in range(arguments.rounds):
            rates["reference"].append(_reference(root / "images", arguments))
            seen.append(_ours(run, arguments))
            rates["ours"].append(seen[-1].images_per_s)
            if arguments.synthetic:
                rates["synthetic"].append(_synthetic(run, arguments))
            print({name: round(values[-1], 1) for name, values in rates.items() if values}, flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items() if values}
    result = {
        "images_per_s": {name: round(value, 1) for name, value in medians.items()},
        "ours / reference": round(medians["ours"] / medians["reference"], 2),
        "data_wait_share": round(statistics.median(ours.data_wait_share for ours in seen), 4),
        "verdict": seen[-1].verdict,
        "precision": arguments.precision,
        "threads": arguments.threads,
    }
    if arguments.synthetic:
        result["ours / synthetic"] = round(medians["ours"] / medians["synthetic"], 3)
    print(json.dumps(result))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="tar of nXXXXXXXX_name.JPEG")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=2, help="steps not timed: what was decoded ahead goes first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, help="that decode for ours; unset: as data.decode_processes")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--synthetic", action="store_true", help="also on pixels that are there already")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--architecture", default="resnet18", help="torchvision's name")
    parser.add_argument("--size", type=int, default=176, help="pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--copies", type=int, default=1, help="of each image, to fill an epoch")
    arguments = parser.parse_args()
    if not 0 < arguments.warm_up < arguments.steps:
        parser.error(f"expected --warm-up between 1 and {arguments.steps - 1}, got {arguments.warm_up}")
    return arguments


def unpack(root: Path, images: str, copies: int) -> None:
    """Loose files in ten class folders, those to train on `copies` times: what the classes mean costs no time."""
    with tarfile.open(images) as tar:
        for number, member in enumerate(member for member in tar if member.name.endswith(".JPEG")):
            content = tar.extractfile(member)
            assert content is not None
            part = "evaluation" if number % 50 == 0 else "images"
            path = root / part / f"class{number % 10}" / Path(member.name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
            for copy in range(1, copies if part == "images" else 1):
                path.with_name(f"{copy}-{path.name}").hardlink_to(path)


def packed_run(root: Path, packed: str, **fields: Any) -> TrainingRun:
    """A run over what `unpack` left in `root`, packed to `packed` unless it is there already."""
    for part in ("images", "evaluation"):
        source = SourceConfig(uri=str(root / part))
        make_manifest(
            ManifestConfig(source=source, output=str(root / f"{part}-list"), labels=LabelsConfig(kind="folders"))
        )
    if not storage.exists(storage.join(storage.normalise(packed), "manifest.json")):
        reencode = Reencode(shorter_side=256)
        pack(PackConfig(manifest=str(root / "images-list"), output=packed, shard_size=100, reencode=reencode))
    config = TrainConfig(
        train=packed,
        evaluate_on=str(root / "evaluation-list"),
        output=str(root / "runs"),
        registry=str(root / "registry"),
        run_id="speed",
        name="speed",
        version="1",
        evaluation={"preprocessing": {"resize_size": 256, "crop_size": 224}},
        **{"architecture": {"name": "resnet18"}, **fields},
    )
    return make_run(config)


def _run(root: Path, arguments: argparse.Namespace) -> TrainingRun:
    run = packed_run(
        root,
        str(root / "packed"),
        architecture={"name": arguments.architecture},
        steps=arguments.steps + _SPARE_STEPS,
        batch_size=arguments.batch,
        augment={"size": arguments.size},
        data={"decode_processes": arguments.processes},
        compute={"precision": arguments.precision},
    )
    return run.model_copy(update={"device": arguments.device})


def _ours(run: TrainingRun, arguments: argparse.Namespace) -> Ours:
    worker = Worker(num_threads=arguments.threads, device=torch.device(arguments.device))
    images = TrainingSet.open(run.config.train)
    trainee = Trainee(run, worker, images)
    num_images, start, wait_s = 0, 0.0, 0.0
    with closing(storage.run_ahead(batches_of(run, worker, make_loader(run, worker, images), 0), 3)) as batches:
        for number in range(arguments.steps):
            if number == arguments.warm_up:
                _settle(arguments)
                num_images, start, wait_s = 0, time.perf_counter(), 0.0
            wait_start = time.perf_counter()
            batch = next(batches)
            wait_s += time.perf_counter() - wait_start
            trainee.train_step(batch, 0.01)
            num_images += len(batch.labels)
        launched = time.perf_counter()
        _settle(arguments)
        ended = time.perf_counter()
    elapsed_s, lag_s, num_steps = ended - start, ended - launched, arguments.steps - arguments.warm_up
    rate, idle = num_images / elapsed_s, idle_share(wait_s, lag_s, elapsed_s, num_steps)
    said = verdict(rate, idle, lag_s / elapsed_s * num_steps, on_gpu=arguments.device == "cuda")
    return Ours(rate, wait_s / elapsed_s, said)


def _synthetic(run: TrainingRun, arguments: argparse.Namespace) -> float:
    worker = Worker(num_threads=arguments.threads, device=torch.device(arguments.device))
    images = TrainingSet.open(run.config.train)
    trainee = Trainee(run, worker, images)
    loader = make_loader(run, worker, images)
    batch = next(iter(loader.batches(range(1), rank=0, world_size=1, size_at=lambda _: arguments.size)))
    start = 0.0
    for number in range(arguments.steps):
        if number == arguments.warm_up:
            _settle(arguments)
            start = time.perf_counter()
        trainee.train_step(batch, 0.01)
    _settle(arguments)
    return float((arguments.steps - arguments.warm_up) * len(batch.labels) / (time.perf_counter() - start))


def _settle(arguments: argparse.Namespace) -> None:
    """What the GPU was given is done."""
    if arguments.device == "cuda":
        torch.cuda.synchronize()


class _Files(Dataset[tuple[torch.Tensor, int]]):
    """torchvision's ImageFolder with the reference's training preset, spelled out."""

    def __init__(self, root: Path, size: int) -> None:
        self._paths = sorted(root.rglob("*.JPEG"))
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
                transforms.ConvertImageDtype(torch.float32),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path = self._paths[index]
        with Image.open(path) as image:
            return self._transform(image.convert("RGB")), int(path.parent.name.removeprefix("class"))


def _reference(root: Path, arguments: argparse.Namespace) -> float:
    device = torch.device(arguments.device)
    network = models.get_model(arguments.architecture, num_classes=10).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    criterion = torch.nn.CrossEntropyLoss()
    loader: Any = DataLoader(
        _Files(root, arguments.size),
        arguments.batch,
        shuffle=True,
        num_workers=arguments.threads,
        drop_last=True,
        pin_memory=device.type == "cuda",
    )
    number, num_images, start = 0, 0, 0.0
    while number < arguments.steps:
        for images, labels in loader:
            is_mixed = device.type == "cuda" and arguments.precision == "bfloat16"
            with torch.autocast("cuda", torch.bfloat16, enabled=is_mixed):
                loss = criterion(network(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            number += 1
            if number == arguments.warm_up:
                _settle(arguments)
                start = time.perf_counter()
            if number > arguments.warm_up:
                num_images += len(labels)
            if number == arguments.steps:
                break
    _settle(arguments)
    return num_images / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
