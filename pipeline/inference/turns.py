"""How the shards that a process works on at once share it: its room, and the turns at its networks.

While one shard is predicted, the next is fetched and its first batch decoded, and the one before is written: a device
waits for neither. Seconds are told so that the shards of a process add up to the time it took.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass


class Room:
    """A process's room for shards: `size` of them beside each other, or one alone."""

    def __init__(self, size: int) -> None:
        self._size, self._places = size, threading.BoundedSemaphore(size)
        self._whole = threading.Lock()  # two that each had a part of it would wait for ever

    def beside_others(self) -> AbstractContextManager[object]:
        """Around the work on a shard; waits for a place, and for who waits to be alone."""
        with self._whole:
            return self._places  # to be entered at once

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Around the work on a shard that others would be in danger beside; waits until they have left."""
        with self._whole, ExitStack() as places:
            for _ in range(self._size):
                places.enter_context(self._places)
            yield


@dataclass(slots=True)
class Turn:
    """A shard's time at the networks.

    `began` (of `time.perf_counter`) is when the shard was begun or when the one before it left the networks, whichever
    was later: what came before was hidden behind another shard. Once it has ended: `total_s` since `began`, and
    `cpu_s`, the seconds of CPUs that the process used since the turn before it ended.
    """

    began: float
    total_s: float = 0.0
    cpu_s: float = 0.0


class Turns:
    """The networks of one process: one shard at a time has them."""

    def __init__(self) -> None:
        self._networks = threading.Lock()
        self._ended, self._cpu_s = time.perf_counter(), time.process_time()

    @contextmanager
    def take(self, *, begun: float) -> Iterator[Turn]:
        """Around the forward passes of a shard that was `begun` then; waits until the networks are free."""
        with self._networks:
            turn = Turn(max(begun, self._ended))
            try:
                yield turn
            finally:
                cpu_s = time.process_time()
                turn.cpu_s, self._cpu_s = cpu_s - self._cpu_s, cpu_s
                self._ended = time.perf_counter()
                turn.total_s = self._ended - turn.began
