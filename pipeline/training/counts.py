"""What an evaluation finds: counts that add up over ranks, images that failed, images that were hardest."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

IntArray: TypeAlias = npt.NDArray[np.int64]
Reduce: TypeAlias = Callable[[torch.Tensor], object]
"""Sums a tensor over all ranks, in place, as `torch.distributed.all_reduce` does."""


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

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.confusion + other.confusion,
            self.num_errors + other.num_errors,
            self.top5 + other.top5,
            self.loss_sum + other.loss_sum,
        )

    def summed(self, reduce: Reduce, device: torch.device) -> "Counts":
        """The counts of all ranks together."""
        tensor = self.to_tensor().to(device)
        loss_sum = torch.tensor(self.loss_sum, dtype=torch.float64, device=device)
        reduce(tensor)
        reduce(loss_sum)
        return Counts.from_tensor(tensor, loss_sum.item())

    def to_tensor(self) -> torch.Tensor:
        """All integers as one int64 vector of 2 + C·C; the loss stays behind."""
        return torch.from_numpy(np.concatenate([[self.num_errors, self.top5], self.confusion.ravel()]).astype(np.int64))

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
    def error(self) -> float:
        return 1 - self.top1_accuracy

    @property
    def loss(self) -> float:
        """The mean cross-entropy."""
        return _ratio(self.loss_sum, self.num_images)

    @property
    def per_class_accuracy(self) -> npt.NDArray[np.float64]:
        """float64 C; NaN for a class without images."""
        num_images = self.confusion.sum(1)
        accuracy = np.full(len(num_images), np.nan)
        np.divide(self.confusion.diagonal(), num_images, out=accuracy, where=num_images > 0)
        return accuracy

    def as_dict(self) -> dict[str, Any]:
        """The figures for JSON, NaN as None; all but the confusion matrix."""
        names = ("num_images", "num_errors", "top1", "top5", "top1_accuracy", "top5_accuracy", "error", "loss")
        per_class = self.per_class_accuracy.tolist()
        figures = {name: getattr(self, name) for name in names} | {"per_class_accuracy": per_class}
        return {name: _without_nan(figure) for name, figure in figures.items()}


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


def _without_nan(figure: Any) -> Any:
    if isinstance(figure, list):
        return [_without_nan(item) for item in figure]
    return None if isinstance(figure, float) and math.isnan(figure) else figure
