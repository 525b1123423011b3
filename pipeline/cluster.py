"""The Ray cluster: joining one or starting one, what it offers, and hearing from its workers, or that there are none.

Ray is imported where it is used: who only asks for types need not wait for it.
"""

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
_LISTEN_EVERY_S = 5.0
_MOST_WARNINGS = 20  # of a run; all of them are in Ray's files
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Node:
    """What one node of the cluster offers."""

    cpus: int
    gpus: int = 0


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
                    f"now: {_free_in_words()}. Waiting goes on: nodes may be on their way. If not, other jobs hold "
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


# --- hearing from workers ---------------------------------------------------------------------------------------------


class Witness:
    """Knows what kinds of workers have begun and what they warn of; an actor, or what an actor is besides."""

    def __init__(self) -> None:
        self._arrived: set[str] = set()
        self._warnings: set[str] = set()
        self._unheard: list[str] = []

    def arrive(self, kind: str) -> None:
        """A worker of this kind has begun."""
        self._arrived.add(kind)

    def arrived(self) -> set[str]:
        """The kinds of which a worker has begun."""
        return self._arrived

    def warn(self, text: str) -> None:
        """Keep it for the driver, once, however many workers say it."""
        if text not in self._warnings and len(self._warnings) < _MOST_WARNINGS:
            self._warnings.add(text)
            self._unheard.append(text)

    def take_warnings(self) -> list[str]:
        """Those kept since the last time."""
        taken, self._unheard = self._unheard, []
        return taken


class _Forwarding(logging.Handler):
    """Writes to standard error, which Ray keeps in its files, and to a `Witness`."""

    def __init__(self, witness: Any) -> None:
        super().__init__(logging.WARNING)
        self._witness = witness

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)
        with contextlib.suppress(Exception):  # nobody is there to hear it
            self._witness.warn.remote(record.getMessage())


def arrive(witness: Any, kind: str) -> None:
    """Tell a handle on a `Witness` that this worker has begun, and from now on what its process warns of."""
    witness.arrive.remote(kind)
    forward_warnings(witness)


def forward_warnings(witness: Any) -> None:
    """Have a `Witness` told what this process warns of from now on, and no other."""
    package = logging.getLogger("pipeline")
    for handler in package.handlers[:]:
        if isinstance(handler, _Forwarding):
            package.removeHandler(handler)
    package.addHandler(_Forwarding(witness))


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


@contextlib.contextmanager
def heard(witness: Any, asked: Mapping[str, str]) -> Iterator[None]:
    """While the block lasts, say what workers warn of, and once, where the cluster has not begun in time what was
    `asked` of it: Ray waits in silence for what is not free.

    `witness` is a handle on a `Witness`; `asked` says in words, by the kinds that arrive there, what resources they ask
    for.
    """
    ended = threading.Event()

    def listen() -> None:
        due = time.monotonic() + BEGIN_WITHIN_S
        with contextlib.suppress(Exception):  # the cluster is lost, or being left: others tell that
            while True:
                is_last = ended.wait(min(_LISTEN_EVERY_S, BEGIN_WITHIN_S))
                _pass_on_warnings(witness)
                if is_last:
                    return
                if time.monotonic() >= due:
                    due = math.inf
                    _tell_what_waits(witness, asked)

    thread = threading.Thread(target=listen, name="listening", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(1.0)  # a cluster that is lost may never answer it


def _pass_on_warnings(witness: Any) -> None:
    import ray

    for text in ray.get(witness.take_warnings.remote()) if ray.is_initialized() else []:  # else it would start another
        logger.warning(text)


def _tell_what_waits(witness: Any, asked: Mapping[str, str]) -> None:
    import ray

    missing = asked.keys() - ray.get(witness.arrived.remote())
    if not missing:
        return
    words = Counter(asked[kind] for kind in sorted(missing))
    logger.warning(
        f"not begun within {BEGIN_WITHIN_S:.0f} s: "
        f"{', '.join(f'{number} times {text}' if number > 1 else text for text, number in words.items())}; "
        f"free in the cluster now: {_free_in_words()}. Waiting goes on; where other jobs hold what is missing, stop "
        "these or ask for less"
    )


def _free_in_words() -> str:
    import ray

    free = ray.available_resources()
    return in_words(free.get("CPU", 0), free.get("GPU", 0))


def in_words(cpus: float, gpus: float) -> str:
    """Resources as messages name them."""
    parts = [
        f"{round(number, 3):g} {name}{'s' * (number != 1)}" for number, name in ((cpus, "CPU"), (gpus, "GPU")) if number
    ]
    return " and ".join(parts) or "nothing"
