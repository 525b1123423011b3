"""Joining a Ray cluster or starting one."""

import signal
import subprocess
import time
from typing import Any

import pytest
import ray

from pipeline.cluster import Node, connected_ray, in_words, results_of
from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError, RunError


@pytest.mark.ray
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
    with connected_ray(ClusterConfig()) as nodes:
        assert [node.cpus for node in nodes] == [2]
    assert capsys.readouterr().err.count("Ray did not start, trying again: The current node timed out") == 2
    assert [process.wait(10) for process in late] == [-signal.SIGKILL] * 2


@pytest.fixture
def joining_local_ray(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """To connect is to use the tests' own Ray, which is no Ray of the job's own."""
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)


@pytest.mark.ray
def test_what_a_job_asks_for_is_waited_for_until_it_is_free_and_then_let_go(
    joining_local_ray: None, full_cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):  # the second time it is free, unless the first still has it
        with connected_ray(ClusterConfig(cpus=2)) as nodes:
            assert nodes == [Node(cpus=2)]
    assert " s: cluster.cpus and cluster.gpus ask for 2 CPUs; free now: nothing. Waiting goes on" in caplog.text


@pytest.mark.ray
def test_a_ray_of_the_jobs_own_does_not_grow(joining_local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    told = "2 CPUs and 1 GPU asked for, but a Ray of this machine's own has 2 CPUs; set RAY_ADDRESS"
    with pytest.raises(ConfigError, match=told), connected_ray(ClusterConfig(cpus=2, gpus=1)):
        pass


def test_a_local_ray_that_never_starts_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(address: str, **options: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    told = "it failed 3 times, the last time with: The current node timed out"
    with pytest.raises(RunError, match=told), connected_ray(ClusterConfig()):
        pass


class Stopped(BaseException):
    """A job's handler was called."""


def test_a_stop_while_ray_starts_is_left_to_the_handlers_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(number: int, frame: object) -> None:
        raise Stopped

    def init(address: str, **options: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("Ray's handler was left in place"))
        raise SystemExit(1)  # as that handler does

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stopped), connected_ray(ClusterConfig()):
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
    with pytest.raises(error, match=told), connected_ray(ClusterConfig()):
        pass


@pytest.mark.ray
def test_results_come_in_order_and_with_them_what_a_call_raises(local_ray: None) -> None:
    @ray.remote(num_cpus=0)
    def inverse(number: int) -> float:
        return 1 / number

    assert results_of([inverse.remote(number) for number in (4, 1, 2)]) == [0.25, 1, 0.5]
    with pytest.raises(ZeroDivisionError):
        results_of([inverse.remote(1), inverse.remote(0)])


@pytest.mark.ray
def test_a_signal_is_heard_while_results_are_waited_for(local_ray: None) -> None:
    class Stop(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stop

    @ray.remote(num_cpus=0)
    def work() -> None:
        time.sleep(30)

    waited_for = work.remote()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    start = time.monotonic()
    try:
        with pytest.raises(Stop):
            results_of([waited_for])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        ray.cancel(waited_for, force=True)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("cpus", "gpus", "words"),
    [
        (1, 0, "1 CPU"),
        (2, 1, "2 CPUs and 1 GPU"),
        (0, 1 / 3, "0.333 GPUs"),
        (0, 0, "nothing"),
        (1536, 8, "1536 CPUs and 8 GPUs"),
    ],
)
def test_resources_are_told_in_words(cpus: float, gpus: float, words: str) -> None:
    assert in_words(cpus, gpus) == words
