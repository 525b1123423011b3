"""What is minimised: one loss per image, summed with a weight for each, so that workers' sums add up to the batch's."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.training.config import LossConfig


class Loss:
    """The loss of a batch, from logits and targets.

    `class_counts` are the training images of each class, needed for `class_weights: balanced` only. Class c of n_c
    images then weighs N / (K·n_c), where N images fall into K classes: 1 on average over the images; a class without
    images weighs 0. Raises ConfigError where balanced weights are asked for and there are no images.
    """

    def __init__(self, config: LossConfig, class_counts: Sequence[int] | None) -> None:
        self._config = config
        self._class_weights = _balanced(class_counts) if config.class_weights == "balanced" else None

    def __call__(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """The sum over images of `weights[i]` times the loss of image i, a float32 scalar; not their mean.

        `logits` are N×C, `targets` int64 N or probabilities N×C, `weights` float32 N. Label smoothing takes targets t
        to (1 - s)·t + s/C. Cross-entropy is torch's, class weights within the sum over classes included. Binary
        cross-entropy is the mean over classes, as in timm and so in the recipes of Wightman et al. 2021
        (arXiv:2110.00476), and an image's class weight is that of its targets before threshold and smoothing.
        """
        logits = logits.float()
        if self._class_weights is not None:
            self._class_weights = self._class_weights.to(logits.device)
        losses = self._bce(logits, targets) if self._config.kind == "bce" else self._cross_entropy(logits, targets)
        return (weights * losses).sum()

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = self._config.label_smoothing
        return F.cross_entropy(logits, targets, self._class_weights, reduction="none", label_smoothing=smoothing)

    def _bce(self, logits: Tensor, targets: Tensor) -> Tensor:
        num_classes, smoothing = logits.shape[1], self._config.label_smoothing
        if targets.ndim == 1:
            targets = F.one_hot(targets, num_classes).to(logits.dtype)
        aims = targets
        if self._config.bce_threshold is not None:
            aims = (targets > self._config.bce_threshold).to(logits.dtype)
        smoothed = aims * (1 - smoothing) + smoothing / num_classes
        losses = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none").mean(1)
        return losses if self._class_weights is None else losses * (targets @ self._class_weights)


def _balanced(class_counts: Sequence[int] | None) -> Tensor:
    counts = torch.tensor(class_counts or [], dtype=torch.float64, device="cpu")  # trials are made on no device
    if counts.sum() == 0:
        raise ConfigError("loss.class_weights: balanced weights need training images of known classes, got none")
    weights = counts.sum() / ((counts > 0).sum() * counts)
    return weights.masked_fill(counts == 0, 0).float()
