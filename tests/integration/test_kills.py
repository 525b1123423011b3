"""Kill anything at any moment, run the same command again: no row lost, none twice, the same bytes.

Kills strike `python -m jobs.predict`, its network compiled, on a cluster of two nodes: SIGKILL of the driver, of an
actor, of a raylet with its node, SIGTERM of the job; one in four while the run starts, the others when a random number
of its shards is committed. A run that has ended is started again until it ends well; then `jobs.verify` proves it and
every table file is compared with an undisturbed run's. Runs follow one another until `KILLS` (environment; default 4)
kills have struck.

    KILLS=60 python -m pytest -s tests/integration/test_kills.py
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jobs.demo_images import draw_set
from tests.integration.kills import descendants, kill, raylet_of
from tests.worlds import list_images, make_bundle, run_job

pytestmark = [pytest.mark.slow, pytest.mark.ray]

NUM_IMAGES = 2_000
SHARD_SIZE = 50
NUM_SHARDS = NUM_IMAGES // SHARD_SIZE
VICTIMS = ("driver", "actor", "node", "sigterm")


def strike(victim: str, driver: subprocess.Popen, cluster: Any, rng: random.Random) -> bool:
    """Kill `victim`; False where it is not there (yet)."""
    node = rng.choice(sorted(cluster.worker_nodes, key=raylet_of))
    if victim == "driver":
        driver.kill()
    elif victim == "sigterm":
        driver.terminate()
    elif victim == "node":
        workers = list(descendants(raylet_of(node)))
        cluster.remove_node(node, allow_graceful=False)
        kill(workers)
        cluster.add_node(num_cpus=1)
    else:
        below = descendants(raylet_of(node))
        actors = [pid for pid, command in below.items() if command.startswith("ray::") and "Predict" in command]
        kill(actors[:1])
        return bool(actors)
    return True


class Strikes:
    """Kills that strike runs of a command one after the other, of each victim in turn, until there were enough."""

    def __init__(self, cluster: Any, rng: random.Random, *, enough: int, start_s: float) -> None:
        self._cluster, self._rng, self._enough, self._start_s = cluster, rng, enough, start_s
        self.by_victim: Counter[str] = Counter()
        self.num_midway = 0
        """Of these, when some shards were committed, and others not."""

    @property
    def are_enough(self) -> bool:
        return self.by_victim.total() >= self._enough

    def strike_while_it_runs(self, driver: subprocess.Popen, commits: Path) -> None:
        """Strike until there were enough, or the driver has ended."""
        while not self.are_enough and driver.poll() is None:
            victim = VICTIMS[self.by_victim.total() % len(VICTIMS)]
            self._await_the_moment(driver, commits)
            while driver.poll() is None:
                num_commits = count(commits)
                if strike(victim, driver, self._cluster, self._rng):
                    self.by_victim[victim] += 1
                    self.num_midway += 0 < num_commits < NUM_SHARDS
                    print(f"kill {self.by_victim.total()}: {victim}, with {num_commits} of {NUM_SHARDS} committed")
                    break
                time.sleep(0.05)
            if victim in ("driver", "sigterm"):
                return

    def _await_the_moment(self, driver: subprocess.Popen, commits: Path) -> None:
        there_are = count(commits)
        if there_are == 0 and self._rng.random() < 0.25:
            time.sleep(self._rng.uniform(0, self._start_s))
            return
        num_commits = there_are + self._rng.randrange(max(1, (NUM_SHARDS - there_are) // 2))
        while count(commits) < num_commits and driver.poll() is None:
            time.sleep(0.02)


def count(commits: Path) -> int:
    return len(list(commits.glob("*.json")))


def digests(output: Path) -> dict[str, str]:
    files = sorted(output.glob("*/run_id=*/*.parquet"))
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.timeout(7200)
def test_after_any_kills_a_rerun_gives_the_bytes_of_an_undisturbed_run(tmp_path, two_nodes, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", two_nodes.address)
    draw_set(tmp_path / "images", num_images=NUM_IMAGES, seed=3, num_broken=20)
    list_images(tmp_path / "images", tmp_path / "manifest", shard_size=SHARD_SIZE)
    make_bundle(tmp_path / "registry")
    run_job("compile", registry=tmp_path / "registry", bundle="tiny", agreement__min_top1=0)
    log = tmp_path / "stderr.log"

    def start(output: Path) -> subprocess.Popen:
        fields = {"manifest": tmp_path / "manifest", "registry": tmp_path / "registry", "output": output}
        fields |= {"bundles": "tiny", "run_id": "killed", "compute.actors": 2, "compute.cpus_per_actor": 1}
        fields |= {"compute.compile": "always", "compute.agreement.min_top1": 0}
        flags = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
        tables = ["--tables.names", "predictions", "--tables.names", "embeddings"]
        with log.open("ab") as stderr:
            command = [sys.executable, "-m", "jobs.predict", *flags, *tables]
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)

    started_at = time.monotonic()
    undisturbed = start(tmp_path / "undisturbed")
    while not count(tmp_path / "undisturbed/_runs/killed/commits") and undisturbed.poll() is None:
        time.sleep(0.02)
    start_s = time.monotonic() - started_at
    assert undisturbed.wait(1000) == 0, log.read_text()[-3000:]
    expected = digests(tmp_path / "undisturbed")
    assert len(expected) == 3 * NUM_SHARDS

    rng = random.Random(int(os.environ.get("KILLS_SEED", "0")))
    strikes = Strikes(two_nodes, rng, enough=int(os.environ.get("KILLS", "4")), start_s=start_s)
    output = tmp_path / "disturbed"
    num_runs = 0
    while not strikes.are_enough:
        shutil.rmtree(output, ignore_errors=True)
        code = None
        while code != 0:
            driver = start(output)
            strikes.strike_while_it_runs(driver, output / "_runs/killed/commits")
            code = driver.wait(1000)
            # A SIGTERM before the job has begun, or after it has ended, ends the bare interpreter.
            assert code in (0, 1, -signal.SIGKILL, -signal.SIGTERM), log.read_text()[-5000:]
        assert run_job("verify", output=output, run_id="killed")["status"] == "verified"
        assert digests(output) == expected
        num_runs += 1
    assert strikes.num_midway > 0
    print(f"{dict(strikes.by_victim)}, {strikes.num_midway} midway, over {num_runs} runs, all byte-identical")
