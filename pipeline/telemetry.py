"""Progress of long work: a bar on a terminal, one JSON line every few seconds otherwise; both on standard error."""

import json
import sys
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


class Report:
    """Tells `status()` while a block runs: on a bar, or as a JSON line every `interval_s`; by a thread of its own, so
    that work that stands still still says so.
    """

    def __init__(self, unit: str, *, total: int, num_done: int, interval_s: float) -> None:
        self._unit, self._total, self._num_done = unit, total, num_done
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._report, name="progress", daemon=True)
        self._bar = _new_bar() if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._bar:
            self._task = self._bar.add_task(self._unit, total=self._total, completed=self._num_done, detail="")
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._write()
        if self._bar:
            self._bar.stop()

    def status(self) -> dict[str, Any]:
        """What the progress line says now."""
        raise NotImplementedError

    def detail(self, status: dict[str, Any]) -> str:
        """What stands beside the bar."""
        raise NotImplementedError

    def _pace(self, num_before: int = 0) -> dict[str, Any]:
        """How many are done of all, how fast since the start, when `num_before` were, and how long the rest takes."""
        elapsed = time.monotonic() - self._start
        rate = (self._num_done - num_before) / elapsed if elapsed else 0.0
        return {
            self._unit: self._num_done,
            "of": self._total,
            f"{self._unit}_per_s": round(rate, 1),
            "eta_s": round((self._total - self._num_done) / rate) if rate else None,
            "elapsed_s": round(elapsed, 1),
        }

    def _report(self) -> None:
        while not self._stopped.wait(0.5 if self._bar else self._interval_s):
            self._write()

    def _write(self) -> None:
        status = self.status()
        if self._bar:
            self._bar.update(self._task, completed=self._num_done, detail=self.detail(status))
        else:
            print(json.dumps({"progress": status}), file=sys.stderr, flush=True)


class RunProgress(Report):
    """Images done of all, images/s, ETA, errors and seconds by stage of a run under way.

    A context manager; `update` is called from the driver's thread.
    """

    def __init__(self, *, num_images: int, num_done: int, interval_s: float) -> None:
        super().__init__("images", total=num_images, num_done=num_done, interval_s=interval_s)
        self._num_before = num_done
        self._num_errors = 0
        self._seconds: Counter[str] = Counter()

    def update(self, *, num_images: int, num_errors: int, seconds: dict[str, float]) -> None:
        """A shard more is written."""
        self._num_done += num_images
        self._num_errors += num_errors
        self._seconds.update(seconds)

    def status(self) -> dict[str, Any]:
        """What the progress line says now; rates count from the start of this attempt."""
        seconds = {stage: round(seconds, 1) for stage, seconds in self._seconds.items()}
        return {**self._pace(self._num_before), "errors": self._num_errors, "seconds_by_stage": seconds}

    def detail(self, status: dict[str, Any]) -> str:
        return f"{status['images_per_s']} images/s, {status['errors']} errors"


class TrainingProgress(Report):
    """Steps done of all, loss, accuracy, images/s, data-wait and ETA of a training under way.

    A context manager; `update` takes what the logbook tells, from the driver's thread.
    """

    def __init__(self, *, num_steps: int, interval_s: float) -> None:
        super().__init__("steps", total=num_steps, num_done=0, interval_s=interval_s)
        self._last: dict[str, Any] = {}

    def update(self, told: dict[str, Any]) -> None:
        """Rank 0 looked, or the network was evaluated."""
        self._last = {**self._last, **told}
        self._num_done = self._last.get("step", 0)

    def status(self) -> dict[str, Any]:
        """What the progress line says now."""
        rounded = {name: _rounded(value) for name, value in self._last.items()}
        return {"step": 0, "of": self._total, **rounded, "elapsed_s": round(time.monotonic() - self._start, 1)}

    def detail(self, status: dict[str, Any]) -> str:
        names = ("loss", "top1", "images_per_s", "data_wait_share", "evaluation_top1")
        return ", ".join(f"{name} {status[name]}" for name in names if name in status)


class EvaluationProgress(Report):
    """Images done of all, images/s and ETA of an evaluation under way.

    A context manager; `update` takes what each rank tells of itself, from the driver's thread.
    """

    def __init__(self, *, num_images: int, interval_s: float) -> None:
        super().__init__("images", total=num_images, num_done=0, interval_s=interval_s)
        self._by_rank: dict[int, int] = {}

    def update(self, told: dict[str, Any]) -> None:
        """A rank has done so many images; fewer than before where it was started again."""
        self._by_rank[told["rank"]] = told["images"]
        self._num_done = sum(self._by_rank.values())

    def status(self) -> dict[str, Any]:
        """What the progress line says now."""
        return self._pace()

    def detail(self, status: dict[str, Any]) -> str:
        return f"{status['images_per_s']} images/s"


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _new_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    return Progress(*columns, console=Console(stderr=True), auto_refresh=True)
