"""What an evaluation finds: counts that add up over ranks, images that failed, images that were hardest."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipeline.report.confusion import Confusion

IntArray: TypeAlias = npt.NDArray[np.int64]
Gather: TypeAlias = Callable[[Any], list[Any]]
"""Every rank's value, in the order of ranks, on each, as `Worker.gather` has it."""

_COLUMNS = ("truths", "answers", "counts")
_COUNTED = ("num_images", "num_errors", "top1", "top5")
_DERIVED = ("top1_accuracy", "top5_accuracy", "top1_error", "top5_error", "loss")


@dataclass(eq=False, slots=True)
class Counts:
    """What was counted; adds up over ranks. `pairs` holds the images judged, by truth · C + answer of C classes.

    Only pairs that occurred are held, never more than images: C×C would be gigabytes for tens of thousands of classes.
    """

    num_classes: int
    pairs: Counter[int] = field(default_factory=Counter)
    num_errors: int = 0
    top5: int = 0
    loss_sum: float = 0.0

    def add(self, truths: IntArray, answers: IntArray) -> None:
        """Count N images as judged, by their class ids."""
        self.pairs.update((truths * self.num_classes + answers).tolist())

    def summed(self, gather: Gather) -> "Counts":
        """The counts of all ranks together, the same on each."""
        total = Counts(self.num_classes)
        for counts in gather(self):
            total.pairs.update(counts.pairs)
            total.num_errors += counts.num_errors
            total.top5 += counts.top5
            total.loss_sum += counts.loss_sum
        return total

    @property
    def confusion(self) -> Confusion:
        """The images judged, by truth and answer."""
        pairs = np.array(sorted(self.pairs.items()), np.int64).reshape(-1, 2)
        truths, answers = np.divmod(pairs[:, 0], self.num_classes)
        return Confusion(self.num_classes, truths, answers, pairs[:, 1])

    @property
    def num_images(self) -> int:
        """The images judged; those of `num_errors` are not among them."""
        return self.pairs.total()

    @property
    def top1(self) -> int:
        return sum(self.pairs[label_id * (self.num_classes + 1)] for label_id in range(self.num_classes))

    @property
    def top1_accuracy(self) -> float:
        return _ratio(self.top1, self.num_images)

    @property
    def top5_accuracy(self) -> float:
        """The share of images whose class is among the best five, or among all where there are fewer."""
        return _ratio(self.top5, self.num_images)

    @property
    def top1_error(self) -> float:
        return _ratio(self.num_images - self.top1, self.num_images)

    @property
    def top5_error(self) -> float:
        return _ratio(self.num_images - self.top5, self.num_images)

    @property
    def loss(self) -> float:
        """The mean cross-entropy."""
        return _ratio(self.loss_sum, self.num_images)

    def as_dict(self) -> dict[str, float | None]:
        """The figures for JSON, None for those of no images; not those by class."""
        figures: dict[str, float] = {name: getattr(self, name) for name in _COUNTED + _DERIVED}
        return {name: None if math.isnan(figure) else figure for name, figure in figures.items()}

    def by_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """For JSON, each class in the order of the ids, since names may repeat; without images its accuracy is None."""
        confusion = self.confusion
        num_images, num_right = confusion.by_truth().tolist(), confusion.right().tolist()
        return [
            {"class": name, "num_images": images, "top1": right, "top1_accuracy": right / images if images else None}
            for name, images, right in zip(classes, num_images, num_right, strict=True)
        ]


def to_entries(confusion: Confusion) -> dict[str, torch.Tensor]:
    """The columns of a confusion as checkpoints keep them: int64 `truths`, `answers` and `counts`."""
    return {name: torch.tensor(getattr(confusion, name)) for name in _COLUMNS}


def from_entries(entries: Mapping[str, torch.Tensor | Sequence[int]], num_classes: int) -> Confusion:
    """The confusion that `to_entries` was told."""
    return Confusion(num_classes, *(np.asarray(entries[name], np.int64) for name in _COLUMNS))


@dataclass(frozen=True, slots=True)
class FailedImage:
    """An image that was not judged: a row of the `errors` table."""

    uri: str
    etag: str | None
    stage: str
    error: str
    message: str


@dataclass(frozen=True, slots=True)
class HardImage:
    """An image judged with a high loss; `score` is that of `predicted_id`."""

    uri: str
    label_id: int
    predicted_id: int
    score: float
    loss: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an evaluation found; `errors` and `hardest` (highest loss first) are this rank's own."""

    counts: Counts
    errors: list[FailedImage]
    hardest: list[HardImage]


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else math.nan
