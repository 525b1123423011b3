"""Being told what workers warn of, and where the cluster has nothing free for them."""

import logging
import time
from typing import Any

import pytest
import ray

from pipeline import cluster
from pipeline.cluster import start_here
from pipeline.witness import Witness, arrive, heard


@pytest.mark.ray
def test_work_that_waits_for_a_full_cluster_is_told_and_work_that_has_begun_is_not(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster, "BEGIN_WITHIN_S", 0.1)
    witness = start_here(Witness)
    asked = {"actors": "3 actors of 2 CPUs each", "decode": "tasks of 1 CPU each"}

    def told(within_s: float) -> str:
        caplog.clear()
        with heard(witness, asked):
            deadline = time.monotonic() + within_s
            while not caplog.text and time.monotonic() < deadline:
                time.sleep(0.05)
        return caplog.text

    assert "not begun within 0 s: 3 actors of 2 CPUs each, tasks of 1 CPU each; free in the cluster now: " in told(60)
    ray.get(witness.arrive.remote("decode"))
    assert "not begun within 0 s: 3 actors of 2 CPUs each; free" in told(60)
    ray.get(witness.arrive.remote("actors"))
    assert told(2) == ""


@pytest.mark.ray
def test_what_workers_warn_of_is_said_once_by_the_driver(local_ray: None, caplog: pytest.LogCaptureFixture) -> None:
    def work(witness: Any) -> None:
        arrive(witness, "tasks")
        logging.getLogger("pipeline.somewhere").warning("of %s bits", 16)
        logging.getLogger("pipeline.somewhere").info("not of interest")
        ray.get(witness.arrived.remote())  # behind the warning

    witness, task = start_here(Witness), ray.remote(work)
    with heard(witness, {"tasks": "a task of 1 CPU"}):
        ray.get([task.remote(witness) for _ in range(2)])
    assert [record.getMessage() for record in caplog.records if record.name == "pipeline.witness"] == ["of 16 bits"]


def test_a_block_that_ends_in_time_does_not_ask_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("pipeline.witness._tell_what_waits", lambda *arguments: asked.append(arguments))
    with heard(None, {}):
        pass
    assert asked == []
