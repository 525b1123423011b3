"""The contract that every job keeps: exit codes, the summary, the signals."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import Field

from jobs import run_job, what_stays
from jobs.evaluate import EvaluateConfig
from jobs.pack import PackConfig
from pipeline.config import JobConfig
from pipeline.errors import ManifestError, PipelineError, ReconcileError, RunError
from pipeline.inference.config import PredictConfig
from pipeline.training.config import TrainConfig


class Example(JobConfig):
    """An example."""

    count: int = Field(1, ge=0)
    """How many."""


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def finish(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    def run(main: Callable[[Example], dict[str, Any]], *flags: str) -> tuple[int, Any, str]:
        """(exit code, summary, what stood on standard error) of a job with these command-line flags."""
        monkeypatch.setattr(sys, "argv", ["job", *flags])
        with pytest.raises(SystemExit) as ended:
            run_job(Example, main)
        written = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, json.loads(written.out), written.err

    return run


def test_a_job_that_is_done_prints_its_summary_and_exits_with_0(finish: Callable[..., Any]) -> None:
    code, summary, _ = finish(lambda config: {"status": "done", "count": config.count}, "--count", "3")
    assert (code, summary) == (0, {"status": "done", "count": 3})


def test_what_a_library_prints_goes_to_standard_error(finish: Callable[..., Any]) -> None:
    def chatty(config: Example) -> dict[str, Any]:
        os.write(1, b"from C\n")
        os.system("echo from a child")
        return {"status": "done"}

    code, summary, errors = finish(chatty)
    assert (code, summary, errors) == (0, {"status": "done"}, "from C\nfrom a child\n")


def test_a_bad_config_exits_with_2_before_the_job_begins(finish: Callable[..., Any]) -> None:
    code, summary, errors = finish(lambda config: pytest.fail("it began"), "--count", "-1")
    assert (code, summary["error"]) == (2, "ConfigError")
    assert "count" in summary["message"]
    assert summary["message"] in errors


@pytest.mark.parametrize(("error", "code"), [(ManifestError, 2), (RunError, 1), (ReconcileError, 3)])
def test_an_error_decides_the_exit_code_and_adds_its_details(
    finish: Callable[..., Any], error: type[PipelineError], code: int
) -> None:
    def fail(config: Example) -> dict[str, Any]:
        raise error("expected rows, got none", num_missing=7)

    expected = {"status": "failed", "error": error.__name__, "message": "expected rows, got none", "num_missing": 7}
    assert finish(fail)[:2] == (code, expected)


def test_an_unforeseen_error_exits_with_1_and_its_traceback(finish: Callable[..., Any]) -> None:
    code, summary, errors = finish(lambda config: {"status": str(1 // (config.count - 1))})
    assert (code, summary["error"]) == (1, "ZeroDivisionError")
    assert "Traceback" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_job_cleanly(finish: Callable[..., Any], number: signal.Signals) -> None:
    cleaned_up = []

    def stopped(config: Example) -> dict[str, Any]:
        try:
            signal.raise_signal(number)
            signal.pause()
        finally:
            signal.raise_signal(number)  # the impatient ask twice
            cleaned_up.append(True)
        return {}

    code, summary, _ = finish(stopped)
    assert (code, summary["status"], cleaned_up) == (1, "stopped", [True])
    assert summary["message"] == f"stopped by {number.name}; nothing is kept of it, run the same command to begin anew"


@pytest.mark.parametrize(
    ("config_type", "told"),
    [
        (PredictConfig, "what is done stays, run the same command to go on"),
        (PackConfig, "what is done stays, run the same command to go on"),
        (TrainConfig, "what is done stays, run the same command with --resume auto to go on"),
        (EvaluateConfig, "nothing is kept of it, run the same command to begin anew"),
    ],
)
def test_a_stopped_job_tells_what_stays_of_it(config_type: type[JobConfig], told: str) -> None:
    assert what_stays(config_type) == told


def test_help_names_the_command_that_was_typed():
    told = subprocess.run([sys.executable, "-m", "jobs.predict", "--help"], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("usage: python -m jobs.predict [--config FILE]")


USE_RAY = """
import sys, time
from jobs import run_job
from pipeline.cluster import connected_ray
from pipeline.config import ClusterConfig, JobConfig

class Example(JobConfig):
    "An example."

def main(config):
    with connected_ray(ClusterConfig()):
        import ray
        try:
            print("ready", file=sys.stderr, flush=True)
            time.sleep(300)
        finally:
            print("one", ray.get(ray.remote(lambda: 1).remote()), file=sys.stderr, flush=True)

run_job(Example, main)
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_signal_to_the_whole_process_group_leaves_a_job_the_ray_it_started() -> None:
    own_ray = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = ["timeout", "300", sys.executable, "-c", USE_RAY]  # which has the job in a group of its own
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    job = subprocess.Popen(command, env=own_ray, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
    assert job.stderr.readline() == "ready\n"
    os.killpg(job.pid, signal.SIGTERM)
    out, errors = job.communicate(timeout=100)
    assert errors.startswith("one 1\n"), errors
    assert json.loads(out.splitlines()[-1])["status"] == "stopped"
