"""What an evaluation finds: counts that add up over ranks, images that failed, images that were hardest."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

IntArray: TypeAlias = npt.NDArray[np.int64]
Reduce: TypeAlias = Callable[[torch.Tensor], object]
"""Sums a tensor over all ranks, in place, as `torch.distributed.all_reduce` does."""

_COUNTED = ("num_images", "num_errors", "top1", "top5")
_DERIVED = ("top1_accuracy", "top5_accuracy", "top1_error", "top5_error", "loss")


@dataclass(eq=False, slots=True)
class Counts:
    """What was counted; adds up over ranks. `confusion` int64 C×C holds the images judged: row truth, column answer."""

    confusion: IntArray
    num_errors: int = 0
    top5: int = 0
    loss_sum: float = 0.0

    @classmethod
    def empty(cls, num_classes: int) -> Self:
        return cls(np.zeros((num_classes, num_classes), np.int64))

    def summed(self, reduce: Reduce, device: torch.device) -> "Counts":
        """The counts of all ranks together."""
        tensor = self.to_tensor().to(device)
        loss_sum = torch.tensor(self.loss_sum, dtype=torch.float64, device=device)
        reduce(tensor)
        reduce(loss_sum)
        return Counts.from_tensor(tensor, loss_sum.item())

    def to_tensor(self) -> torch.Tensor:
        """All integers as one int64 vector of 2 + C·C; the loss stays behind."""
        return torch.from_numpy(np.concatenate([np.array([self.num_errors, self.top5]), self.confusion.ravel()]))

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor, loss_sum: float) -> Self:
        """What `to_tensor` made, and the loss beside it."""
        num_errors, top5 = tensor[:2].tolist()
        num_classes = math.isqrt(len(tensor) - 2)
        confusion = tensor[2:].cpu().numpy().reshape(num_classes, num_classes)
        return cls(confusion, num_errors, top5, loss_sum)

    @property
    def num_images(self) -> int:
        """The images judged; those of `num_errors` are not among them."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> int:
        return int(self.confusion.trace())

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
        num_images, num_right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        return [
            {"class": name, "num_images": images, "top1": right, "top1_accuracy": right / images if images else None}
            for name, images, right in zip(classes, num_images, num_right, strict=True)
        ]


def to_entries(confusion: IntArray) -> dict[str, torch.Tensor]:
    """What is not zero in a confusion: int64 `truths`, `answers` and `counts`.

    Of many classes it is little beside C×C: at most an entry for each image.
    """
    truths, answers = np.nonzero(confusion)
    columns = {"truths": truths, "answers": answers, "counts": confusion[truths, answers]}
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def from_entries(entries: Mapping[str, torch.Tensor | Sequence[int]], num_classes: int) -> IntArray:
    """The confusion that `to_entries` was told."""
    confusion = Counts.empty(num_classes).confusion
    truths, answers, counts = (np.asarray(entries[name], np.int64) for name in ("truths", "answers", "counts"))
    confusion[truths, answers] = counts
    return confusion


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
