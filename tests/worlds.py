"""Small real things that several tests need: a bundle, a manifest, a job run as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from jobs.demo_images import CLASSES, draw_set
from pipeline import storage
from pipeline.data.manifest import Manifest, write_manifest
from pipeline.data.sources import PrefixSource
from pipeline.inference.commit import commit
from pipeline.inference.config import PredictConfig
from pipeline.inference.layout import Layout
from pipeline.inference.plan import Plan, make_plan, record_run
from pipeline.inference.run import Run, resolve_inputs

ONE_ACTOR = Layout("fused", "cpu", num_actors=1, cpus_per_actor=2, gpus_per_actor=0)


class JobFailedError(AssertionError):
    """A job ended with another exit code than expected."""


def make_bundle(
    registry: Path | str, name: str = "tiny", architecture: str = "cifar_resnet8", seed: int = 0, version: str = "1"
) -> str:
    """Publish a net with seeded random weights over the demo's classes; its URI."""
    import torch

    from pipeline.data.transforms import Preprocessing
    from pipeline.models import registry as registries
    from pipeline.models.bundle import Architecture, pack
    from pipeline.models.catalog import build

    torch.manual_seed(seed)
    bundle, weights = pack(
        build(architecture, len(CLASSES)).eval(),
        name=name,
        version=version,
        architecture=Architecture(name=architecture),
        classes=list(CLASSES),
        preprocessing=Preprocessing(resize_size=32, crop_size=32),
    )
    return registries.publish(storage.normalise(str(registry)), bundle, weights)


def make_manifest(images: Path | str, manifest: Path | str, *, shard_size: int, **fields: Any) -> None:
    """List a folder or prefix of images."""
    run_job("manifest", source__uri=images, output=manifest, shard_size=shard_size, **fields)


def run_job(job: str, *, expected_code: int = 0, env: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    """`python -m jobs.<job>` with `fields`; its summary. Lists are repeated flags, `__` in a name is a dot."""
    flags = [
        text
        for name, value in fields.items()
        for item in (value if isinstance(value, list) else [value])
        for text in (f"--{name.replace('__', '.')}", str(item))
    ]
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", *flags], capture_output=True, text=True, env=env, timeout=1000
    )
    if done.returncode != expected_code:
        raise JobFailedError(
            f"{job}: expected exit code {expected_code}, got {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
        )
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def list_images(images: Path, manifest: Path, *, shard_size: int) -> Manifest:
    """The manifest of a folder, labelled by its class folders, made in this process."""
    return write_manifest(str(manifest), PrefixSource(str(images), labels="folders"), shard_size=shard_size)


def make_world(root: Path, *, num_images: int = 30, num_broken: int = 3, shard_size: int = 8) -> None:
    """`images`, `manifest` and `registry` (bundles tiny and other) below `root`."""
    draw_set(root / "images", num_images=num_images, seed=5, num_broken=num_broken)
    list_images(root / "images", root / "manifest", shard_size=shard_size)
    make_bundle(root / "registry")
    make_bundle(root / "registry", name="other", seed=1)


def config_of(root: Path, **fields: Any) -> PredictConfig:
    """The config of a run over a world."""
    places = {"manifest": root / "manifest", "registry": root / "registry", "output": root / "tables"}
    return PredictConfig(**{"bundles": ["tiny"], **{name: str(place) for name, place in places.items()}, **fields})


def plan_of(root: Path, **fields: Any) -> Plan:
    """The plan of a run over a world, on the CPU."""
    config = config_of(root, **fields)
    return make_plan(config, *resolve_inputs(config), ONE_ACTOR)


def record(root: Path, **fields: Any) -> Run:
    """Begin a run over a world as its plan says, or go on with it; no shard is done."""
    plan = plan_of(root, **fields)
    record_run(plan, config_of(root, **fields))
    return plan.run


def run_without_ray(root: Path, **fields: Any) -> Run:
    """Do every shard of a run over a world in this process, and commit it; the run."""
    from pipeline.data.loader import LoadLog
    from pipeline.inference.predictor import Predictor
    from pipeline.inference.shard import load_shard, predict_shard

    plan = plan_of(root, **fields)
    run, manifest = plan.run, plan.manifest
    record_run(plan, config_of(root, **fields))
    predictor = Predictor(run, manifest)
    for shard in plan.pending_shards():
        log = LoadLog()
        batches = load_shard(run, manifest, shard, predictor.preprocessings, num_threads=2, isolated=False, log=log)
        commit(run.uri, predict_shard(run, manifest, shard, batches, predictor, log=log))
    return run


def run_with_ray(root: Path, **fields: Any) -> dict[str, Any]:
    """A run over a world, on the Ray that is connected; its summary."""
    from pipeline.cluster import Node
    from pipeline.inference.flow import predict

    config = config_of(root, **fields)
    return predict(config, *resolve_inputs(config), [Node(cpus=2)])


def files_of(root: Path, run_id: str) -> dict[str, bytes]:
    """The table files of a run over a world."""
    paths = sorted(root.glob(f"tables/*/run_id={run_id}/*.parquet"))
    return {f"{path.parent.parent.name}/{path.name}": path.read_bytes() for path in paths}


def have_tasks(monkeypatch: Any, num_tasks: int) -> None:
    """Have a run's shards be so many tasks."""
    monkeypatch.setattr("pipeline.inference.flow._ENOUGH_TASKS", num_tasks)
    monkeypatch.setattr("pipeline.inference.flow._TASKS_PER_PROCESSOR", 0)
