"""Kill a worker, the job, a node and the driver in the middle of epochs: the weights are an undisturbed run's."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import load
from pipeline.training import checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.run import make_run
from tests.integration.kills import descendants, kill, raylet_of
from tests.training_worlds import make_square_sets, train_together

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(2400)]

STEPS_PER_EPOCH = 60
NUM_STEPS = 3 * STEPS_PER_EPOCH
EVERY_STEPS = 13


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("training")
    make_square_sets(folder, num_images=960)
    return folder


@pytest.fixture(scope="module")
def undisturbed(root) -> dict[str, torch.Tensor]:
    """The weights that as many ranks come to without Ray."""
    train_together(make_run(load(TrainConfig, flags_of(root, "undisturbed"))), 2)
    return last_weights(root, "undisturbed")


def flags_of(root: Path, run_id: str, **more: Any) -> list[str]:
    fields = {"train": "train", "evaluate_on": "evaluation", "output": "runs", "registry": "registry"}
    flags = {
        **{name: root / folder for name, folder in fields.items()},
        "run_id": run_id,
        "name": run_id,
        "version": 1,
        "architecture.name": "cifar_resnet8",
        "evaluation.preprocessing.resize_size": 32,
        "evaluation.preprocessing.crop_size": 32,
        "augment.crop": "pad",
        "augment.size": 32,
        "batch_size": 16,
        "epochs": 3,
        "checkpoint.every_steps": EVERY_STEPS,
        "compute.num_workers": 2,
        "compute.cpus_per_worker": 1,
        "progress_interval_s": 0.2,
        **more,
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def start(root: Path, run_id: str, **more: Any) -> subprocess.Popen[bytes]:
    with (root / f"{run_id}.log").open("ab") as log, (root / f"{run_id}.out").open("wb") as out:
        command = [sys.executable, "-m", "jobs.train", *flags_of(root, run_id, **more)]
        return subprocess.Popen(command, stdout=out, stderr=log)


def finish(root: Path, run_id: str, driver: subprocess.Popen[bytes], *, expected_code: int = 0) -> dict[str, Any]:
    code = driver.wait(1000)
    stdout = (root / f"{run_id}.out").read_text()
    assert code == expected_code, stdout + (root / f"{run_id}.log").read_text()[-4000:]
    summary: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return summary


def last_weights(root: Path, run_id: str) -> dict[str, torch.Tensor]:
    state = checkpoint.read(f"file://{root}/runs/{run_id}", NUM_STEPS)
    weights: dict[str, torch.Tensor] = state["network"]
    return weights


def until_mid_epoch(root: Path, run_id: str, driver: subprocess.Popen[bytes], *, since: int) -> int:
    """Until a checkpoint after step `since` is there, and some steps more were done; its step."""
    deadline = time.monotonic() + 600
    while driver.poll() is None and time.monotonic() < deadline:
        steps = checkpoint.list_steps(f"file://{root}/runs/{run_id}")
        if steps and steps[-1] > since and steps[-1] % STEPS_PER_EPOCH:
            time.sleep(0.3)
            return steps[-1]
        time.sleep(0.05)
    raise AssertionError((root / f"{run_id}.log").read_text()[-4000:])


def workers_below(pid: int) -> list[int]:
    return [below for below, name in descendants(pid).items() if name.startswith("ray::") and "TrainWorker" in name]


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


def test_whatever_dies_the_weights_are_an_undisturbed_runs(root, undisturbed, two_nodes, monkeypatch):
    """A worker, the job by SIGTERM, a node, the driver: one after the other, in one run."""
    monkeypatch.setenv("RAY_ADDRESS", two_nodes.address)
    driver = start(root, "struck")
    since = until_mid_epoch(root, "struck", driver, since=0)
    kill(workers_below(raylet_of(next(iter(two_nodes.worker_nodes))))[:1])

    for attempt in range(3):  # where a checkpoint was due at that very step the stop has shown nothing
        since = until_mid_epoch(root, "struck", driver, since=since)
        time.sleep(0.1 * attempt)  # another part of the way to the next one
        driver.terminate()
        assert driver.wait(600) == 1
        since = checkpoint.list_steps(f"file://{root}/runs/struck")[-1]
        driver = start(root, "struck", resume="true")
        if since % EVERY_STEPS:
            break
    assert since % EVERY_STEPS, "expected a checkpoint of the step the stop came at"

    since = until_mid_epoch(root, "struck", driver, since=since)
    node = next(iter(two_nodes.worker_nodes))
    below = list(descendants(raylet_of(node)))
    two_nodes.remove_node(node, allow_graceful=False)
    kill(below)
    two_nodes.add_node(num_cpus=1)

    until_mid_epoch(root, "struck", driver, since=since)
    driver.kill()
    driver.wait(600)
    assert finish(root, "struck", start(root, "struck", resume="true"))["status"] == "done"
    assert largest_difference(undisturbed, last_weights(root, "struck")) <= 1e-6


@pytest.mark.usefixtures("jobs_share_ray")
def test_more_workers_than_the_cluster_has_are_refused_at_once(root):
    refused = start(root, "crowd", **{"compute.num_workers": 5})
    message = finish(root, "crowd", refused, expected_code=2)["message"]
    assert "5 workers of 1 CPU each do not fit this cluster, 2 do" in message
    assert not (root / "runs/crowd").exists()
