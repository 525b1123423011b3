"""Kill anything at any moment, run the same command again: no row lost, none twice, the same bytes.

Each kill strikes `python -m jobs.predict`, its network compiled, on a cluster of two nodes at a random moment: SIGKILL
of the driver, of an actor, of a raylet with its node, SIGTERM of the job. A run is started again until it ends by
itself; then `jobs.verify` proves it and every table file is compared with an undisturbed run's. Runs follow one another
until `KILLS` (environment; default 4) kills have struck.

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


def attempt(
    command: list[str], log: Path, *, strike_after_s: float | None = None, **strike_options: Any
) -> tuple[int, bool]:
    """One start of the command; (its exit code, whether the kill struck while it ran)."""
    struck = False
    with log.open("ab") as stderr:
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        if strike_after_s is not None:
            time.sleep(strike_after_s)
            while driver.poll() is None and not (struck := strike(driver=driver, **strike_options)):
                time.sleep(0.1)
        return driver.wait(timeout=1000), struck


def digests(output: Path) -> dict[str, str]:
    files = sorted(output.glob("*/run_id=*/*.parquet"))
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.timeout(7200)
def test_after_any_kills_a_rerun_gives_the_bytes_of_an_undisturbed_run(tmp_path, capsys, two_nodes, monkeypatch):
    cluster = two_nodes
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    rng = random.Random(int(os.environ.get("KILLS_SEED", "0")))
    num_kills = int(os.environ.get("KILLS", "4"))
    draw_set(tmp_path / "images", num_images=NUM_IMAGES, seed=3, num_broken=20)
    list_images(tmp_path / "images", tmp_path / "manifest", shard_size=SHARD_SIZE)
    make_bundle(tmp_path / "registry")
    run_job("compile", registry=tmp_path / "registry", bundle="tiny", agreement__min_top1=0)
    log = tmp_path / "stderr.log"

    def say(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    def command(output: Path) -> list[str]:
        fields = {"manifest": tmp_path / "manifest", "registry": tmp_path / "registry", "output": output}
        fields |= {"bundles": "tiny", "run_id": "killed", "compute.actors": 2, "compute.cpus_per_actor": 1}
        fields |= {"compute.compile": "always", "compute.agreement.min_top1": 0}
        flags = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
        tables = ["--tables.names", "predictions", "--tables.names", "embeddings"]
        return [sys.executable, "-m", "jobs.predict", *flags, *tables]

    start = time.monotonic()
    assert attempt(command(tmp_path / "undisturbed"), log)[0] == 0, log.read_text()[-3000:]
    whole_s = time.monotonic() - start
    expected = digests(tmp_path / "undisturbed")
    assert len(expected) == 3 * NUM_IMAGES // SHARD_SIZE

    strikes: Counter[str] = Counter()
    num_runs = 0
    while strikes.total() < num_kills:
        output = tmp_path / "disturbed"
        shutil.rmtree(output, ignore_errors=True)
        code = -1
        while code != 0:
            victim = VICTIMS[strikes.total() % len(VICTIMS)]
            after_s = rng.uniform(0, whole_s) if strikes.total() < num_kills else None
            code, struck = attempt(
                command(output), log, strike_after_s=after_s, victim=victim, cluster=cluster, rng=rng
            )
            strikes[victim] += struck
            num_commits = len(list(output.glob("_runs/killed/commits/*.json")))
            say(f"kill {strikes.total()}: {victim} struck={struck} after {after_s} s exit={code} commits={num_commits}")
            # A SIGTERM before the job has begun, or after it has ended, ends the bare interpreter.
            assert code in (0, 1, -signal.SIGKILL, -signal.SIGTERM), log.read_text()[-5000:]
        assert run_job("verify", output=output, run_id="killed")["status"] == "verified"
        assert digests(output) == expected
        num_runs += 1
    say(f"{dict(strikes)} over {num_runs} runs of {NUM_IMAGES} images, all byte-identical")
