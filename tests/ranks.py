"""Several ranks in one process, for tests: each a thread."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.training.worker import Worker


class Meeting:
    """Where threads, as ranks, bring a value each and take those of all away."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._values: list[Any] = [None] * world_size

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


@dataclass(frozen=True)
class Peer(Worker):
    """A worker whose peers are threads."""

    meeting: Meeting | None = None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.copy_(torch.stack(self.gather(values.clone())).sum(0))

    def gather(self, value: Any) -> list[Any]:
        assert self.meeting is not None
        return self.meeting.gather(self.rank, value)


def on_ranks(world_size: int, work: Callable[[Peer], Any], **fields: Callable[[int], Any]) -> list[Any]:
    """What `work` returns on each rank; `fields` are those of the workers, by rank."""
    meeting = Meeting(world_size)
    peers = [
        Peer(rank, world_size, meeting=meeting, **{name: of(rank) for name, of in fields.items()})
        for rank in range(world_size)
    ]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, peers))
