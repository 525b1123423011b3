"""Progress of long work: a bar on a terminal, one JSON line every few seconds otherwise; both on standard error."""

import json
import sys
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


class RunProgress:
    """Images done of all, images/s, ETA, errors and seconds by stage of a run under way.

    A context manager; `update` is called from the driver's thread, the line is written by one of its own, so that a
    run that stands still still says so.
    """

    def __init__(self, *, num_images: int, num_done: int, interval_s: float) -> None:
        self._num_images, self._num_before, self._num_done = num_images, num_done, num_done
        self._num_errors = 0
        self._seconds: Counter[str] = Counter()
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._report, name="progress", daemon=True)
        self._bar = _new_bar() if sys.stderr.isatty() else None

    def __enter__(self) -> "RunProgress":
        if self._bar:
            self._task = self._bar.add_task("images", total=self._num_images, completed=self._num_done, detail="")
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

    def update(self, *, num_images: int, num_errors: int, seconds: dict[str, float]) -> None:
        """A shard more is written."""
        self._num_done += num_images
        self._num_errors += num_errors
        self._seconds.update(seconds)

    def status(self) -> dict[str, Any]:
        """What the progress line says now; rates count from the start of this attempt."""
        elapsed = time.monotonic() - self._start
        rate = (self._num_done - self._num_before) / elapsed if elapsed else 0.0
        left = self._num_images - self._num_done
        return {
            "images": self._num_done,
            "of": self._num_images,
            "images_per_s": round(rate, 1),
            "eta_s": round(left / rate) if rate else None,
            "errors": self._num_errors,
            "elapsed_s": round(elapsed, 1),
            "seconds_by_stage": {stage: round(seconds, 1) for stage, seconds in self._seconds.items()},
        }

    def _report(self) -> None:
        while not self._stopped.wait(0.5 if self._bar else self._interval_s):
            self._write()

    def _write(self) -> None:
        status = self.status()
        if self._bar:
            detail = f"{status['images_per_s']} images/s, {status['errors']} errors"
            self._bar.update(self._task, completed=self._num_done, detail=detail)
        else:
            print(json.dumps({"progress": status}), file=sys.stderr, flush=True)


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
