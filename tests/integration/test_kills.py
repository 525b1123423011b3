"""Kill anything at any moment, run the same command again: no row lost, none twice, the same bytes.

Kills strike `python -m jobs.predict`, its network compiled, on a cluster of two nodes: SIGKILL of the driver, SIGTERM
of the job, SIGKILL of an actor, of a raylet with its node. The first that meets every second start comes at a random
moment while it gets ready, the others when a random number of shards is committed, up to all of them. The command is
started again until it ends well; then `jobs.verify` proves the run and every table file is compared with an undisturbed
run's. Runs follow one another until `KILLS` (environment; default 4) kills have struck.

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
VICTIMS = ("driver", "sigterm", "actor", "node")  # in this order no start loses more workers than a shard may
ENDS = ("driver", "sigterm")


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
    """Kills that strike starts of a command one after the other, of each victim in turn, until there were enough."""

    def __init__(self, cluster: Any, rng: random.Random, *, enough: int, start_s: float) -> None:
        self._cluster, self._rng, self._start_s = cluster, rng, start_s
        self.enough = enough
        self.num_starts = 0
        self.by_victim: Counter[str] = Counter()
        self.num_midway = 0
        """Of these, when their start had committed some shards and not yet all."""

    @property
    def are_enough(self) -> bool:
        return self.by_victim.total() >= self.enough

    def strike_while_it_runs(self, driver: subprocess.Popen, commits: Path) -> bool:
        """Strike until there were enough, or the driver has ended; whether a strike ended it."""
        self.num_starts += 1
        num_before = count(commits)
        if self.num_starts % 2 == 0 and not self.are_enough:
            time.sleep(self._rng.uniform(0, self._start_s))
        else:
            self._await_commits(driver, commits)
        while not self.are_enough and driver.poll() is None:
            victim = VICTIMS[self.by_victim.total() % len(VICTIMS)]
            num_commits = count(commits)
            if strike(victim, driver, self._cluster, self._rng):
                self.by_victim[victim] += 1
                self.num_midway += num_before < num_commits < NUM_SHARDS
                print(f"kill {self.by_victim.total()}: {victim}, with {num_commits} of {NUM_SHARDS} committed")
                if victim in ENDS:
                    return True
                self._await_commits(driver, commits)
            time.sleep(0.02)
        return False

    def _await_commits(self, driver: subprocess.Popen, commits: Path) -> None:
        num_commits = self._rng.randint(min(count(commits) + 1, NUM_SHARDS), NUM_SHARDS)
        while not self.are_enough and driver.poll() is None and count(commits) < num_commits:
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
            assert strikes.num_starts <= 2 * strikes.enough + 2, "expected kills to find their victims"
            driver = start(output)
            was_ended = strikes.strike_while_it_runs(driver, output / "_runs/killed/commits")
            code = driver.wait(1000)
            # A SIGTERM before the job has begun, or after it has ended, ends the bare interpreter.
            ends = (0, 1, -signal.SIGKILL, -signal.SIGTERM) if was_ended else (0,)
            assert code in ends, log.read_text()[-5000:]
        assert run_job("verify", output=output, run_id="killed")["status"] == "verified"
        assert digests(output) == expected
        num_runs += 1
    assert strikes.num_midway > 0 or strikes.enough < len(VICTIMS)
    print(f"{dict(strikes.by_victim)}, {strikes.num_midway} midway, over {num_runs} runs, all byte-identical")
