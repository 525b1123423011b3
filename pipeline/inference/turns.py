"""Whose turn it is at the networks, of the shards that a process works on at once.

While one shard is predicted, the next is fetched and its first batch decoded, and the one before is written: a device
waits for neither. Seconds are told so that the shards of a process add up to the time it took.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class Turn:
    """A shard's time at the networks.

    `began` (of `time.perf_counter`) is when the shard was begun or when the one before it left the networks, whichever
    was later: what came before was hidden behind another shard. `cpu_s`, once it has ended, are the seconds of CPUs
    that the process used since the turn before it ended.
    """

    began: float
    cpu_s: float = 0.0


class Turns:
    """The networks of one process: one shard at a time has them."""

    def __init__(self) -> None:
        self._networks = threading.Lock()
        self._ended, self._cpu_s = time.perf_counter(), time.process_time()

    @contextmanager
    def next(self, begun: float) -> Iterator[Turn]:
        """Around the forward passes of a shard that was `begun` then; waits until the networks are free."""
        with self._networks:
            turn = Turn(max(begun, self._ended))
            try:
                yield turn
            finally:
                cpu_s = time.process_time()
                turn.cpu_s, self._cpu_s = cpu_s - self._cpu_s, cpu_s
                self._ended = time.perf_counter()
