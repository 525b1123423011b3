"""The same job on clusters of several shapes: one CPU, several nodes, and handed in by `ray job submit`."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.inference.commit import committed_shard_ids, read_receipts
from pipeline.inference.run import read_run
from tests.worlds import make_world, run_job

pytestmark = [pytest.mark.slow, pytest.mark.ray]

NUM_SHARDS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_world(root, num_images=60, shard_size=5)
    return root


@pytest.fixture
def address(request) -> Iterator[str]:
    """The address of nodes of as many CPUs as the parameter says, the first of them the head."""
    from ray.cluster_utils import Cluster

    head, *others = request.param
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head, "include_dashboard": False})
    for cpus in others:
        cluster.add_node(num_cpus=cpus)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


def predict(world: Path, run_id: str, address: str, **fields: Any) -> dict[str, Any]:
    places = {name: world / name for name in ("manifest", "registry")}
    env = {**os.environ, "RAY_ADDRESS": address}
    return run_job("predict", **places, output=world / "tables", bundles="tiny", run_id=run_id, env=env, **fields)


@pytest.mark.parametrize("address", [[1]], indirect=True)
def test_a_cluster_of_one_cpu_refuses_at_once_what_does_not_fit_and_finishes_what_does(world, address):
    refusal = predict(world, "too-big", address, compute__actors=4, expected_code=2)
    assert "4 actors of 1 CPUs each do not fit this cluster, 1 do" in refusal["message"]
    assert not (world / "tables/_runs/too-big").exists()
    summary = predict(world, "one-cpu", address, cluster__cpus=1)
    assert (summary["status"], summary["num_predicted"], summary["num_errors"]) == ("done", 57, 3)
    assert run_job("verify", output=world / "tables", run_id="one-cpu")["status"] == "verified"


MEETING = """
import time
from pathlib import Path
import ray
from jobs import predict, run_job
from pipeline.inference import flow
from pipeline.inference.config import PredictConfig
from pipeline.inference.workers import PredictFused

class Meeting(PredictFused):
    def __call__(self, rows):
        here = Path(FOLDER) / ray.get_runtime_context().get_node_id()
        here.touch()
        while len(list(here.parent.iterdir())) < 3:
            time.sleep(0.05)
        return super().__call__(rows)

flow.PredictFused = Meeting
run_job(PredictConfig, predict.main)
"""


@pytest.mark.parametrize("address", [[0, 1, 1, 1]], indirect=True)
def test_several_nodes_share_the_shards(world, tmp_path, address):
    """Each waits for the others to have begun: work this short might else be done before the last has started."""
    flags = [f"--{name}={world / name}" for name in ("manifest", "registry")]
    flags += [f"--output={world / 'tables'}", "--bundles=tiny", "--run_id=shared"]
    script = MEETING.replace("FOLDER", repr(str(tmp_path)))
    env = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run([sys.executable, "-c", script, *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = read_run(f"file://{world}/tables", "shared")
    receipts = list(read_receipts(run.uri, committed_shard_ids(run.uri)))
    assert len(receipts) == NUM_SHARDS
    assert len({receipt.node for receipt in receipts}) == 3


def test_the_same_run_twice_at_once_ends_whole(world, local_ray):
    address = ray.get_runtime_context().gcs_address
    with ThreadPoolExecutor(2) as pool:
        options = {"compute__actors": 1, "compute__cpus_per_actor": 1}
        twins = [pool.submit(predict, world, "twins", address, **options) for _ in range(2)]
        assert [twin.result()["num_predicted"] for twin in twins] == [57, 57]
    assert run_job("verify", output=world / "tables", run_id="twins")["status"] == "verified"


@pytest.fixture
def job_server(tmp_path) -> Iterator[dict[str, str]]:
    """The environment of a cluster that takes jobs: its address, its token and this Python's programs."""
    address, agent = "http://127.0.0.1:8299", "--dashboard-agent-listen-port=8298"
    programs = str(Path(sys.executable).parent)
    env = {**os.environ, "RAY_API_SERVER_ADDRESS": address, "PATH": f"{programs}:{os.environ['PATH']}"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    start = ["ray", "start", "--head", "--block", "--num-cpus=2", "--port=6399", "--dashboard-port=8299", agent]
    with (tmp_path / "head.log").open("wb") as log:
        head = subprocess.Popen(start, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while subprocess.run(
            ["ray", "job", "submit", "--no-wait", "--", "true"], env=env, capture_output=True
        ).returncode:
            assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()  # its agent answers last
            time.sleep(1)
        yield env
    finally:
        head.terminate()
        head.wait(60)


def test_the_same_line_runs_under_ray_job_submit(world, job_server):
    places = {"manifest": world / "manifest", "registry": world / "registry", "output": world / "tables"}
    fields = [argument for name, place in places.items() for argument in (f"--{name}", str(place))]
    line = ["python", "-m", "jobs.predict", *fields, "--bundles", "tiny", "--run_id", "submitted"]
    submit = ["ray", "job", "submit", "--working-dir", ".", "--", *line]
    done = subprocess.run(submit, env=job_server, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"status"')))
    assert (summary["status"], summary["num_predicted"], summary["num_errors"]) == ("done", 57, 3)
    assert run_job("verify", output=world / "tables", run_id="submitted")["status"] == "verified"
