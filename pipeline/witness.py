"""Hearing from a run's workers: what they warn of, and that there are none."""

import contextlib
import logging
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline import cluster

_LISTEN_EVERY_S = 5.0
_MOST_WARNINGS = 20  # of a run; all of them are in Ray's files

logger = logging.getLogger(__name__)


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


@contextlib.contextmanager
def heard(witness: Any, asked: Mapping[str, str]) -> Iterator[None]:
    """While the block lasts, say what workers warn of, and once, where the cluster has not begun in time what was
    `asked` of it: Ray waits in silence for what is not free.

    `witness` is a handle on a `Witness`; `asked` says in words, by the kinds that arrive there, what resources they ask
    for.
    """
    ended = threading.Event()

    def listen() -> None:
        due = time.monotonic() + cluster.BEGIN_WITHIN_S
        with contextlib.suppress(Exception):  # the cluster is lost, or being left: others tell that
            while True:
                is_last = ended.wait(min(_LISTEN_EVERY_S, cluster.BEGIN_WITHIN_S))
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
        f"not begun within {cluster.BEGIN_WITHIN_S:.0f} s: "
        f"{', '.join(f'{number} times {text}' if number > 1 else text for text, number in words.items())}; "
        f"free in the cluster now: {cluster.free_in_words()}. Waiting goes on; where other jobs hold what is missing, "
        "stop these or ask for less"
    )
