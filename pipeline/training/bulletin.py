"""Where rank 0 and the driver of a training meet; apart from the rest, so that the actor need not import torch."""

from typing import Any, TypeAlias

from pipeline.errors import PipelineError
from pipeline.witness import Witness

Status: TypeAlias = dict[str, Any]


class Bulletin(Witness):
    """Where rank 0 tells its progress and asks what is wanted; one actor, on the driver's node."""

    def __init__(self) -> None:
        super().__init__()
        self._told: list[Status] = []
        self._should_stop = False
        self._begun: set[tuple[int, int, int]] = set()
        self._ended: tuple[PipelineError | None, bytes] = None, b""

    def begin(self, rank: int, step: int, world_size: int) -> bool:
        """A rank of so many begins from that step; whether one has before.

        Among another number it may not have been killed; if an image did kill it, the next beginning tells.
        """
        beginning = rank, step, world_size
        has_begun = beginning in self._begun
        self._begun.add(beginning)
        return has_begun

    def excuse(self) -> None:
        """It is known why the ranks will begin again: no image is to blame."""
        self._begun.clear()

    def tell(self, status: Status) -> bool:
        """Keep it for the driver; whether a stop was asked for."""
        self._told.append(status)
        return self._should_stop

    def take(self) -> tuple[list[Status], PipelineError | None]:
        """What was told since the last time, and what a worker has failed of for good."""
        told, self._told = self._told, []
        return told, self._ended[0]

    def stop(self) -> None:
        """Ask for a stop at the next look."""
        self._should_stop = True

    def end(self, failure: PipelineError | None, result: bytes) -> None:
        """Rank 0 is done, or a rank has failed of what starting again would not change; the first failure stays.

        The result comes pickled: what it is made of may want torch.
        """
        if self._ended[0] is None:
            self._ended = failure, result

    def ended(self) -> tuple[PipelineError | None, bytes]:
        """What `end` was told."""
        return self._ended
