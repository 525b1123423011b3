"""Joining a Ray cluster or starting one, and being told where it has nothing free."""

import logging
import os
import signal
import subprocess
import time
from typing import Any

import pytest
import ray

from pipeline import cluster
from pipeline.cluster import Node, connected_ray, waiting_told
from pipeline.errors import ConfigError, RunError
from pipeline.inference.flow import start_attempts


def test_a_local_ray_that_comes_too_late_is_cleared_away_and_started_again(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    late: list[subprocess.Popen[bytes]] = []

    def init(address: str, **options: Any) -> None:
        if len(late) < 2:
            late.append(subprocess.Popen(["sleep", "600"]))
            raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # the session's Ray stands in for the third start's
    with connected_ray() as nodes:
        assert nodes == [Node(cpus=2)]
    assert capsys.readouterr().err.count("Ray did not start, trying again: The current node timed out") == 2
    assert [process.wait(10) for process in late] == [-signal.SIGKILL] * 2


def test_a_local_ray_that_never_starts_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(address: str, **options: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    told = "it failed 3 times, the last time with: The current node timed out"
    with pytest.raises(RunError, match=told), connected_ray():
        pass


class Stopped(BaseException):
    """A job's handler was called."""


def test_a_stop_while_ray_starts_is_left_to_the_handlers_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(number: int, frame: object) -> None:
        raise Stopped

    def init(address: str, **options: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(1))  # as Ray does
        raise SystemExit(1)  # as Ray's handler does

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stopped), connected_ray():
            pass
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("address", "error", "told"),
    [
        ("127.0.0.1:1", RunError, "expected a Ray cluster to join at '127.0.0.1:1', got ConnectionRefusedError"),
        ("no.such.host.invalid:6379", RunError, "expected a Ray cluster to join at .*, got gaierror"),
        ("nonsense", ConfigError, "expected host:port of a cluster's head, got 'nonsense'"),
    ],
)
def test_an_address_where_no_cluster_is_fails_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str, error: type[Exception], told: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(error, match=told), connected_ray():
        pass


@pytest.mark.ray
@pytest.mark.parametrize("has_begun", [False, True])
def test_work_that_waits_for_a_full_cluster_is_told_and_work_that_has_begun_is_not(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_begun: bool
) -> None:
    monkeypatch.setattr(cluster, "BEGIN_WITHIN_S", 0.1)
    attempts = start_attempts()
    if has_begun:
        ray.get(attempts.begin.remote("all", 0))
    ray.get(attempts.has_begun.remote())  # it has started, so that the answer comes in time
    with caplog.at_level(logging.WARNING), waiting_told(attempts, "3 actors of 2 CPUs each"):
        time.sleep(1)
    told = "3 actors of 2 CPUs each were asked for, the cluster has 2 CPUs and 0 GPUs free now"
    assert (told in caplog.text) == (not has_begun)
