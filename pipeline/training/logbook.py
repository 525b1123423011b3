"""What a training run tells of itself: losses, accuracies and rates over its steps, its evaluations, failed images."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.data.decoders import is_deadly
from pipeline.data.train_loader import TrainBatch
from pipeline.errors import ImageError, RunError
from pipeline.training.bound import idle_share
from pipeline.training.counts import Outcome, to_entries
from pipeline.training.run import TrainingRun, is_passed
from pipeline.training.worker import Notice, Worker

_MOST_ENTRIES = 4000  # of a whole run: points of a curve
_URIS_TOLD = 8


@dataclass(frozen=True, slots=True)
class _Step:
    number: int
    learning_rate: float
    uris: list[str]
    totals: Tensor


class Logbook:
    """Sums up the steps since the last look, on the device, and at a look over all ranks.

    `history` has an entry per look, `evaluations` one per evaluation, `errors` the images that failed, by uri. Of an
    entry, `data_wait_share` is the share of the time that the loop waited for batches, `data_idle_share` that in which
    the device was idle for it, `device_lag` how many steps' time it still had work when the loop had none left.
    """

    def __init__(self, run: TrainingRun, worker: Worker) -> None:
        self._run, self._worker = run, worker
        self._look_every = max(1, min(10, run.num_steps // 100))  # a stop is heard at a look
        self._enter_every = math.ceil(run.num_steps / _MOST_ENTRIES)
        self.history: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.errors: dict[str, list[str]] = {}
        self.last_outcome: dict[str, Any] = {}
        self._deadly: dict[str, list[str]] = {}
        self._num_seen = self._num_failed = 0.0
        self._pace: Counter[str] = Counter()
        self._steps: list[_Step] = []
        self._restart_clock()

    def timed(self, batches: Iterator[TrainBatch]) -> Iterator[TrainBatch]:
        """The batches; the time that waiting for them takes is kept, and time counts from now on."""
        self._restart_clock()  # what has gone into the start until now is no step
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._wait_s += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, number: int, learning_rate: float, batch: TrainBatch, totals: Tensor) -> None:
        """A step was done; `totals` float64 are the sum of losses, the right answers and the images that counted."""
        self._steps.append(_Step(number, learning_rate, batch.uris, totals))

    def is_look_due(self, step: int) -> bool:
        """Whether the steps since the last look shall be summed up now."""
        return step % self._look_every == 0

    def is_entry_due(self, since: int, until: int) -> bool:
        """Whether a look at the steps after `since`, up to `until`, becomes a point of the curves; the last always."""
        return until == self._run.num_steps or is_passed(self._enter_every, since, until)

    def look(self) -> Notice:
        """Sum up over all ranks, tell the progress, and return what the outside asks for, the same on every rank.

        Raises RunError where a loss was no number, naming the step, its learning rate and its images, or where more
        images failed than `data.max_error_rate` allows.
        """
        notice = self._worker.notice()
        asked_at = time.perf_counter()
        totals = torch.stack([step.totals for step in self._steps]).sum(0).tolist() if self._steps else [0.0] * 3
        now = time.perf_counter()  # the device has done what it was given
        num_planned = sum(len(step.uris) for step in self._steps)
        seconds = [self._wait_s, now - asked_at, now - self._start]
        mine = [*totals, num_planned, *seconds, notice.should_checkpoint, notice.should_stop]
        device = self._worker.device
        summed = self._worker.sum(torch.tensor([float(value) for value in mine], dtype=torch.float64, device=device))
        loss, num_right, num_counted, num_planned, *seconds, should_checkpoint, should_stop = summed.tolist()
        if not math.isfinite(loss):
            self._refuse_loss()
        self._num_seen += num_planned
        self._num_failed += num_planned - num_counted
        self._refuse_failures()
        if self._steps:
            self._enter(loss / max(num_counted, 1), num_right / max(num_counted, 1), num_planned, *seconds)
        return Notice(should_checkpoint > 0, should_stop > 0)

    def judge(self, step: int, outcome: Outcome) -> None:
        """Enter an evaluation."""
        counts = outcome.counts
        entry = {
            "step": step,
            "epoch": step / self._run.steps_per_epoch,
            "top1": counts.top1_accuracy,
            "top5": counts.top5_accuracy,
            "loss": counts.loss,
            "num_images": counts.num_images,
            "num_errors": counts.num_errors,
        }
        self.evaluations.append(entry)
        self.last_outcome = {
            "confusion": to_entries(counts.confusion),
            "hardest": [asdict(image) for image in outcome.hardest],
        }
        self._keep_deadly({failed.uri: [failed.stage, failed.error, failed.message] for failed in outcome.errors})
        told = {f"evaluation_{name}": entry[name] for name in ("top1", "top5", "loss")}
        self._observe({**told, "evaluated_at": step})
        self._restart_clock()  # the evaluation's seconds are not training's

    def gather_errors(self, failed: dict[str, ImageError]) -> None:
        """Enter the images that failed in training until now, on any rank. Every rank calls it."""
        mine = {uri: [error.stage, error.error, error.message] for uri, error in list(failed.items())}
        for of_rank in self._worker.gather(mine):
            self.errors |= of_rank
            self._keep_deadly(of_rank)

    @property
    def deadly(self) -> dict[str, ImageError]:
        """The images, of training and of evaluation, that have killed their decoder, by uri."""
        return {uri: ImageError(*fields) for uri, fields in self._deadly.items()}

    def _keep_deadly(self, errors: dict[str, list[str]]) -> None:
        self._deadly |= {uri: fields for uri, fields in errors.items() if is_deadly(ImageError(*fields))}

    def has_judged(self, step: int) -> bool:
        """Whether the network of that step was evaluated."""
        return any(entry["step"] == step for entry in self.evaluations)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "history": self.history,
            "evaluations": self.evaluations,
            "errors": self.errors,
            "deadly": self._deadly,
            "outcome": self.last_outcome,
            "num_seen": self._num_seen,
            "num_failed": self._num_failed,
            "pace": dict(self._pace),
            "num_workers": self._worker.world_size,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.history, self.evaluations = list(state["history"]), list(state["evaluations"])
        self.errors, self.last_outcome = dict(state["errors"]), dict(state["outcome"])
        self._deadly = dict(state.get("deadly", {}))  # checkpoints of earlier versions have none
        self._num_seen, self._num_failed = state["num_seen"], state["num_failed"]
        self._pace = Counter(state.get("pace", {}))

    def _enter(
        self, loss: float, top1: float, num_images: float, all_wait_s: float, all_lag_s: float, all_elapsed_s: float
    ) -> None:
        elapsed_s = all_elapsed_s / self._worker.world_size
        step = self._steps[-1]
        entry = {
            "step": step.number,
            "epoch": step.number / self._run.steps_per_epoch,
            "loss": loss,
            "top1": top1,
            "learning_rate": step.learning_rate,
            "images_per_s": num_images / elapsed_s,
            "data_wait_share": all_wait_s / all_elapsed_s,
            "data_idle_share": idle_share(all_wait_s, all_lag_s, all_elapsed_s, len(self._steps)),
            "device_lag": all_lag_s / all_elapsed_s * len(self._steps),
        }
        means = {"wait_s": "data_wait_share", "idle_s": "data_idle_share", "lag_s": "device_lag"}
        of_look = {seconds: entry[mean] * elapsed_s for seconds, mean in means.items()}
        self._pace.update({"train_s": elapsed_s, "images": num_images, **of_look})
        if self.is_entry_due(step.number - len(self._steps), step.number):
            self.history.append(entry)
        left = (self._run.num_steps - step.number) * elapsed_s / len(self._steps)
        self._observe({**entry, "of": self._run.num_steps, "eta_s": round(left), "errors": int(self._num_failed)})
        self._steps = []
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._start, self._wait_s = time.perf_counter(), 0.0

    def _observe(self, status: dict[str, Any]) -> None:
        if self._worker.rank == 0:
            self._worker.observe(status)

    def _refuse_loss(self) -> None:
        """Every rank names the same images: those of the first step whose loss was no number on any rank."""
        mine = [
            (step.number, step.learning_rate, step.uris)
            for step in self._steps
            if not math.isfinite(step.totals[0].item())
        ]
        bad = sorted(found for of_rank in self._worker.gather(mine[:1]) for found in of_rank)
        number, learning_rate, uris = bad[0]
        raise RunError(
            f"step {number}: expected a finite loss, got none at learning rate {learning_rate:g}. Lower "
            "optimizer.learning_rate, lengthen schedule.warmup, or set optimizer.clip_norm; begin a new run or resume "
            f"from the last checkpoint. The batch's images: {', '.join(uris[:_URIS_TOLD])} and "
            f"{max(len(uris) - _URIS_TOLD, 0)} more",
            step=number,
            learning_rate=learning_rate,
            images=uris,
        )

    def _refuse_failures(self) -> None:
        """Held against whole epochs: an epoch's bad images may all come at its beginning."""
        most, num_images = self._run.config.data.max_error_rate, self._run.num_images
        num_epochs = max(math.ceil(self._num_seen / num_images), 1)
        if self._num_failed / (num_epochs * num_images) > most:
            raise RunError(
                f"expected at most {100 * most:g}% of {num_images} images an epoch to be unusable "
                f"(data.max_error_rate), got {self._num_failed:.0f} in {num_epochs} epochs begun: is the store "
                "reachable, the format known?"
            )
