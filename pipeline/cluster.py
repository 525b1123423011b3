"""The Ray cluster: joining one or starting one, and what it offers.

Ray is imported where it is used: who only asks for types need not wait for it.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ConfigError, RunError

if TYPE_CHECKING:
    from pipeline.config import ClusterConfig  # pydantic's import, which workers that count do without

Device = Literal["cpu", "cuda"]

NUM_STARTS = 3
ANSWER_WITHIN_S = 10
BEGIN_WITHIN_S = 50.0
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Node:
    """What one node of the cluster offers."""

    cpus: int
    gpus: int = 0


def num_fitting(nodes: Sequence[Node], cpus: int, *, use_gpu: bool) -> int:
    """How many processes of so many CPUs, and a GPU each where they use one, find a place."""
    return sum(min(node.cpus // cpus, node.gpus) if use_gpu else node.cpus // cpus for node in nodes)


def choose_device(nodes: Sequence[Node], asked: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device of the networks. Raises ConfigError where `cuda` is asked of a cluster without GPUs."""
    has_gpus = any(node.gpus for node in nodes)
    if asked == "cuda" and not has_gpus:
        raise ConfigError("compute.device: cuda asked for, but no node of the cluster has a GPU; use cpu or auto")
    if asked == "auto":
        return "cuda" if has_gpus else "cpu"
    return asked


def default_batch_size(device: Device) -> int:
    """Images per forward pass: on a CPU few enough that a ResNet's maps stay near it, on a GPU enough to fill it."""
    return 256 if device == "cuda" else 16


# --- joining and starting ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected_ray(awaited: "ClusterConfig") -> Iterator[list[Node]]:
    """Connect to the cluster that RAY_ADDRESS names (`ray job submit` sets it), or a local one; yields its nodes.

    Waits first until what is `awaited` is free, and then lets it go: who comes in between may take it. Raises
    ConfigError for an address that is none and for a local one that never has as much, RunError where no cluster
    answers or a local one does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    address = os.environ.get("RAY_ADDRESS", "local")  # left out, Ray would join a neighbour's local cluster
    try:
        with _signal_handlers_kept():
            start_ray() if address == "local" else _join_ray(address)
    except SystemExit:  # what Ray makes of a SIGTERM while it starts
        signal.raise_signal(signal.SIGTERM)
        raise
    try:
        if awaited.cpus or awaited.gpus:
            _wait_until_free(awaited, can_grow=address != "local")
        yield _nodes()
    finally:
        ray.shutdown()


def _nodes() -> list[Node]:
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(cpus=int(each.get("CPU", 0)), gpus=int(each.get("GPU", 0))) for each in resources]


def _wait_until_free(awaited: "ClusterConfig", *, can_grow: bool) -> None:
    """Have a placement group for a moment: what it lacks, an autoscaler brings.

    `ray.autoscaler.sdk.request_resources` would take the place of other jobs' requests, and outlive its own.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    nodes = _nodes()
    there = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    in_short = in_words(awaited.cpus, awaited.gpus)
    if not can_grow and (awaited.cpus > there[0] or awaited.gpus > there[1]):
        raise ConfigError(
            f"cluster: {in_short} asked for, but a Ray of this machine's own has {in_words(*there)}; set RAY_ADDRESS "
            "to a cluster's, or ask for less"
        )
    group = placement_group([{"GPU": 1}] * awaited.gpus + [{"CPU": 1}] * awaited.cpus)
    begun = told = time.monotonic()
    try:
        while not group.wait(1):  # hears no signal meanwhile
            if (now := time.monotonic()) - told >= BEGIN_WITHIN_S:
                told = now
                logger.warning(
                    f"not begun within {now - begun:.0f} s: cluster.cpus and cluster.gpus ask for {in_short}; free "
                    f"now: {free_in_words()}. Waiting goes on: nodes may be on their way. If not, other jobs hold "
                    "what is missing, or the cluster never grows so large: stop these, or ask for less"
                )
    finally:
        remove_placement_group(group)


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Ray puts in its own, which end the process midway. What is ignored since, by who is stopping, stays so."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if handler is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


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
            "it (`ray start --head`), set RAY_AUTH_MODE=token where it asks for one, name another, or unset "
            "RAY_ADDRESS for a local Ray"
        ) from error


def _refuse_silence(address: str) -> None:
    """Raise OSError where nothing listens at a host:port: Ray itself would try for many minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_WITHIN_S).close()


def start_ray(**options: Any) -> None:
    """Start a local Ray, anew where it came too late: on a busy machine its node can miss Ray's fixed 30 s.

    `options` are ray.init's. Raises RunError after `NUM_STARTS`.
    """
    import ray

    for starts_left in reversed(range(NUM_STARTS)):
        children = _children()
        try:
            with _in_another_process_group():
                ray.init("local", include_dashboard=False, **_QUIET, **options)
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


# --- actors, calls and words ------------------------------------------------------------------------------------------


def start_here(actor: type, **options: Any) -> Any:
    """A handle on a new actor on the driver's node, with which it lives and dies; it takes no CPU; `options` are Ray's.

    Not merely where it can be had: a raylet that does not know that node yet would start it on its own, for others to
    kill.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=here, **options).remote()


def results_of(refs: Sequence[Any]) -> list[Any]:
    """What remote calls return, in their order, or what the first of them raises that did.

    As `ray.get`, which hears no signal until it has them all and then loses what the handler raised (Ray 2.60).
    """
    return [future.result() for future in [ref.future() for ref in refs]]


def free_in_words() -> str:
    """What is free in the cluster now."""
    import ray

    free = ray.available_resources()
    return in_words(free.get("CPU", 0), free.get("GPU", 0))


def in_words(cpus: float, gpus: float) -> str:
    """Resources as messages name them."""
    parts = [
        f"{round(number, 3):g} {name}{'s' * (number != 1)}" for number, name in ((cpus, "CPU"), (gpus, "GPU")) if number
    ]
    return " and ".join(parts) or "nothing"


def nodes_in_words(nodes: Sequence[Node]) -> str:
    """What each node offers, as messages name it."""
    return ", ".join(f"{node.cpus} CPUs + {node.gpus} GPUs" for node in nodes)
