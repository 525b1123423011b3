"""The jobs: config in, one call into the library, one JSON summary out.

Standard output's last line is the summary; everything else goes to standard error. Exit codes: 0 done; 1 failed or
stopped; 2 bad config or input; 3 finished but not reconciled.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pipeline.config import JobConfig, load
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.cluster import Node

Config = TypeVar("Config", bound=JobConfig)


class Stopped(BaseException):
    """SIGTERM or SIGINT came: what is committed stays, the same command goes on from there."""


def run_job(config_type: type[Config], main: Callable[[Config], dict[str, Any]]) -> NoReturn:
    """Run `main` on the command line's config, print its summary, exit with the contract's code."""
    _handle_signals()
    try:
        config = load(config_type, sys.argv[1:])
        with _stdout_kept_for_the_summary():
            summary = main(config)
        code = 0
    except PipelineError as error:
        summary = {"status": "failed", "error": type(error).__name__, "message": str(error), **error.details}
        code = error.exit_code
    except Stopped as stop:
        summary = {"status": "stopped", "message": f"{stop}; what is committed stays, run the same command to go on"}
        code = 1
    except Exception as error:
        traceback.print_exc()
        summary = {"status": "failed", "error": type(error).__name__, "message": str(error)}
        code = 1
    if code:
        print(f"{summary.get('error', summary['status'])}: {summary['message']}", file=sys.stderr)
    print(json.dumps(summary), flush=True)
    sys.exit(code)


def _handle_signals() -> None:
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:  # being stopped already
        return
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)


def _stop(signal_number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: let the cleaning up finish
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Stopped(f"stopped by {signal.Signals(signal_number).name}")


@contextlib.contextmanager
def _stdout_kept_for_the_summary() -> Iterator[None]:
    """Send what libraries and their child processes print to standard error meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def connected_ray() -> Iterator["list[Node]"]:
    """Connect to the cluster that RAY_ADDRESS names (`ray job submit` sets it), or a local one; yields its nodes."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    from pipeline.cluster import Node

    address = os.environ.get("RAY_ADDRESS", "local")  # left out, Ray would join a neighbour's local cluster
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level="error", **options)
    except SystemExit as exit_request:  # what Ray makes of a SIGTERM while it starts
        raise Stopped("stopped while Ray was starting") from exit_request
    finally:
        _handle_signals()  # Ray puts in its own, which ends the process midway
    try:
        yield [
            Node(cpus=int(node["Resources"].get("CPU", 0)), gpus=int(node["Resources"].get("GPU", 0)))
            for node in ray.nodes()
            if node["Alive"]
        ]
    finally:
        ray.shutdown()
        _handle_signals()
