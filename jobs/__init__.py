"""The jobs: config in, one call into the library, one JSON summary out.

Standard output's last line is the summary; everything else goes to standard error. Exit codes: 0 done; 1 failed or
stopped; 2 bad config or input; 3 finished but not reconciled.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pipeline.config import JobConfig, load
from pipeline.errors import ConfigError, PipelineError, RunError

if TYPE_CHECKING:
    from pipeline.cluster import Node

Config = TypeVar("Config", bound=JobConfig)

NUM_STARTS = 3
ANSWER_WITHIN_S = 10
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}


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
        resume = config_type.model_fields.get("resume")
        again = " with --resume auto" if resume is not None and resume.default is False else ""
        summary = {"status": "stopped", "message": f"{stop}; what is done stays, run the same command{again} to go on"}
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
    """Connect to the cluster that RAY_ADDRESS names (`ray job submit` sets it), or a local one; yields its nodes.

    Raises ConfigError for an address that is none, RunError where no cluster answers or a local one does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    from pipeline.cluster import Node

    address = os.environ.get("RAY_ADDRESS", "local")  # left out, Ray would join a neighbour's local cluster
    try:
        _start_ray() if address == "local" else _join_ray(address)
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


def _join_ray(address: str) -> None:
    import ray

    try:
        _refuse_silence(address)
        ray.init(address, **_QUIET)
    except ValueError as error:
        raise ConfigError(
            f"RAY_ADDRESS: expected host:port of a cluster's head, got {address!r}: {error}; unset it for a local Ray"
        ) from error
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:  # nobody there, of another version, or closed
        raise RunError(
            f"RAY_ADDRESS: expected a Ray cluster to join at {address!r}, got {type(error).__name__}: {error}; start "
            "it (`ray start --head`), name another, or unset RAY_ADDRESS for a local Ray"
        ) from error


def _refuse_silence(address: str) -> None:
    """Raise OSError where nothing listens at a host:port: Ray itself would try for many minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_WITHIN_S).close()


def _start_ray() -> None:
    """Start a local Ray, anew where it came too late: on a busy machine its node can miss Ray's fixed 30 s."""
    import ray

    for starts_left in reversed(range(NUM_STARTS)):
        children = _children()
        try:
            with _in_another_process_group():
                ray.init("local", include_dashboard=False, **_QUIET)
            return
        except Exception as error:
            with contextlib.suppress(Exception):
                ray.shutdown()
            for pid in _children() - children:  # half a cluster, which none but us knows of
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not starts_left:
                raise RunError(
                    f"expected a local Ray to start, it failed {NUM_STARTS} times, the last time with: {error} Is the "
                    "machine overloaded, its memory or the disk of /tmp/ray full? Run the same command again to go on"
                ) from error
            print(f"Ray did not start, trying again: {error}", file=sys.stderr)


@contextlib.contextmanager
def _in_another_process_group() -> Iterator[None]:
    """Who is started meanwhile does not get the signals that `timeout` sends to all of the job's process group: without
    its Ray a job could not end in order."""
    group = os.getpgrp()
    with contextlib.suppress(PermissionError):  # leads a session
        os.setpgid(0, 0)
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):  # nobody else was in that group, or is left in it
            os.setpgid(0, group)


def _children() -> set[int]:
    pids: set[int] = set()
    for listing in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # of a thread that has ended since
            pids.update(map(int, listing.read_text().split()))
    return pids
