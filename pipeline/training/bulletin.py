"""Where rank 0 and the driver of a training meet; apart from the rest, so that the actor need not import torch."""

from typing import Any, TypeAlias

from pipeline.errors import PipelineError

Status: TypeAlias = dict[str, Any]


class Bulletin:
    """Where rank 0 tells its progress and asks what is wanted; one actor, on the driver's node."""

    def __init__(self) -> None:
        self._told: list[Status] = []
        self._should_stop = False
        self._ended: tuple[PipelineError | None, Any] = None, None

    def tell(self, status: Status) -> bool:
        """Keep it for the driver; whether a stop was asked for."""
        self._told.append(status)
        return self._should_stop

    def take(self) -> list[Status]:
        """What was told since the last time."""
        told, self._told = self._told, []
        return told

    def stop(self) -> None:
        """Ask for a stop at the next look."""
        self._should_stop = True

    def end(self, failure: PipelineError | None, result: Any) -> None:
        """Rank 0 is done. A failure is every rank's: starting again would change nothing."""
        self._ended = failure, result

    def ended(self) -> tuple[PipelineError | None, Any]:
        """What `end` was told."""
        return self._ended
