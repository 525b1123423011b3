"""Small labelled sets, and training runs over them, for tests of training."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from jobs.demo_images import draw_set
from pipeline import storage
from pipeline.data.manifest import Manifest, write_manifest
from pipeline.data.pack import encode, pack_images
from pipeline.data.packed import PackedSource
from pipeline.data.readers import read_shard
from pipeline.data.training_set import TrainingSet
from pipeline.training.config import TrainConfig
from pipeline.training.loop import train
from pipeline.training.run import TrainingRun, make_run
from pipeline.training.worker import Worker
from tests.worlds import list_images


def make_sets(root: Path, *, num_train: int = 48, num_evaluation: int = 20, num_broken: int = 0) -> None:
    """Manifests `train` and `evaluation` below `root`, of small drawn images in classes."""
    for number, (name, num_images) in enumerate({"train": num_train, "evaluation": num_evaluation}.items()):
        draw_set(root / f"{name}-images", num_images=num_images, seed=number, num_broken=num_broken)
        list_images(root / f"{name}-images", root / name, shard_size=7)


def make_square_sets(root: Path, *, num_images: int = 24, side: int = 32) -> None:
    """The same manifests, of noise PNGs of one size in two classes."""
    noise = np.random.default_rng(0)
    for name in ("train", "evaluation"):
        for number in range(num_images):
            path = root / f"{name}-images" / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (side, side, 3), np.uint8)).save(path)
        list_images(root / f"{name}-images", root / name, shard_size=7)


def pack_set(manifest_uri: Path | str, packed: Path) -> None:
    """The images of a manifest as packed shards, and the manifest of these, both below `packed`."""
    loose = Manifest.open(str(manifest_uri))
    for shard in loose.shards():
        images = loose.images(shard)
        encoded = read_shard(shard, images, allowed_roots=["file://"], max_bytes=1 << 20)
        table = pack_images(images, encoded, lambda data: data, {}).table
        storage.write(f"file://{packed}/data/{shard.shard_id:08d}.parquet", encode(table))
    write_manifest(str(packed), PackedSource(f"{packed}/data"), shard_size=7, classes=loose.classes)


def make_loose_and_packed_sets(root: Path, *, num_images: int) -> None:
    """Manifests `train` and `packed` below `root`, of the same noise PNGs of ten pixels a side."""
    make_square_sets(root, num_images=num_images, side=10)
    pack_set(root / "train", root / "packed")


def train_config(root: Path, **fields: Any) -> TrainConfig:
    """The config of a short training over `make_sets`."""
    places = {"train": "train", "evaluate_on": "evaluation", "output": "runs", "registry": "registry"}
    defaults = {
        **{field: str(root / place) for field, place in places.items()},
        "run_id": "first",
        "name": "shapes",
        "version": "1",
        "architecture": {"name": "cifar_resnet8"},
        "evaluation": {"preprocessing": {"resize_size": 32, "crop_size": 32}},
        "augment": {"crop": "center", "size": 32},
        "batch_size": 8,
        "epochs": 2,
    }
    return TrainConfig(**{**defaults, **fields})


def train_here(config: TrainConfig, worker: Worker | None = None) -> TrainingRun:
    """Train in this process, without Ray."""
    run = make_run(config).model_copy(update={"device": "cpu"})
    train(run, worker or Worker(), TrainingSet.open(config.train), TrainingSet.open(config.evaluate_on))
    return run


def train_together(run: TrainingRun, world_size: int) -> None:
    """Train on `world_size` processes over Gloo."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_be_a_rank, args=(run.model_dump_json(), world_size, f"{folder}/rendezvous"), nprocs=world_size)


def _be_a_rank(rank: int, run_json: str, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    run = TrainingRun.model_validate_json(run_json)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    worker = replace(Worker(), rank=rank, world_size=world_size)
    train(run, worker, TrainingSet.open(run.config.train), TrainingSet.open(run.config.evaluate_on))
    # A replica keeps the group's threads past its destruction (torch 2.15), and one that lets go of a tensor while the
    # interpreter ends aborts the process (pytorch/pytorch#179291), so it ends without.
    os._exit(0)
