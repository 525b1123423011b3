"""The losses against torch's own and against the formulas."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.training.config import LossConfig
from pipeline.training.loss import Loss

COUNTS = [60, 30, 10, 0]
NUM_CLASSES = len(COUNTS)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, NUM_CLASSES, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 1, 2, 0, 1, 0])
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0])
MIXED = F.one_hot(LABELS, NUM_CLASSES) * 0.7 + F.one_hot(LABELS.roll(1), NUM_CLASSES) * 0.3


def loss(**fields: object) -> Loss:
    return Loss(LossConfig.model_validate(fields), COUNTS)


@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_sums_to_torchs_mean_times_the_images(logits: Tensor, targets: Tensor, smoothing: float):
    ours = loss(label_smoothing=smoothing)(logits, targets, torch.ones(6))
    assert torch.allclose(ours, 6 * F.cross_entropy(logits, targets, label_smoothing=smoothing))


@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_sums_to_torchs_mean_times_the_images(logits: Tensor, targets: Tensor, smoothing: float):
    ours = loss(kind="bce", label_smoothing=smoothing)(logits, targets, torch.ones(6))
    probabilities = targets if targets.ndim == 2 else torch.eye(NUM_CLASSES)[targets]
    smoothed = probabilities * (1 - smoothing) + smoothing / NUM_CLASSES
    assert torch.allclose(ours, 6 * F.binary_cross_entropy_with_logits(logits, smoothed))


@pytest.mark.parametrize("kind", ["cross_entropy", "bce"])
@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_labels_are_the_same_as_certain_probabilities(logits: Tensor, kind: str, class_weights: str):
    of = loss(kind=kind, class_weights=class_weights, label_smoothing=0.1)
    assert torch.allclose(of(logits, LABELS, WEIGHTS), of(logits, torch.eye(NUM_CLASSES)[LABELS], WEIGHTS))


@pytest.mark.parametrize("kind", ["cross_entropy", "bce"])
def test_every_image_counts_by_its_weight(logits: Tensor, kind: str):
    of = loss(kind=kind)
    one_by_one = [of(logits[i : i + 1], LABELS[i : i + 1], torch.ones(1)) for i in range(6)]
    assert torch.allclose(of(logits, LABELS, WEIGHTS), (torch.stack(one_by_one) * WEIGHTS).sum())


@pytest.mark.parametrize("kind", ["cross_entropy", "bce"])
def test_balanced_classes_weigh_the_inverse_of_their_share_and_one_on_average(logits: Tensor, kind: str):
    plain, balanced = loss(kind=kind), loss(kind=kind, class_weights="balanced")
    ratios = []
    for label in (0, 1, 2):
        target = torch.tensor([label])
        one = (logits[:1], target, torch.ones(1))
        ratios.append(float(balanced(*one) / plain(*one)))
    assert ratios == pytest.approx([100 / (3 * 60), 100 / (3 * 30), 100 / (3 * 10)])
    assert sum(ratio * count / 100 for ratio, count in zip(ratios, COUNTS, strict=False)) == pytest.approx(1)


def test_balanced_cross_entropy_is_torchs_with_class_weights(logits: Tensor):
    ours = loss(class_weights="balanced", label_smoothing=0.1)(logits, MIXED, torch.ones(6))
    weights = torch.tensor([100 / 180, 100 / 90, 100 / 30, 0])
    assert torch.allclose(ours, F.cross_entropy(logits, MIXED, weights, reduction="sum", label_smoothing=0.1))


@pytest.mark.parametrize("kind", ["cross_entropy", "bce"])
def test_half_precision_logits_are_taken_in_float32(logits: Tensor, kind: str):
    half = logits.bfloat16()
    of = loss(kind=kind)
    assert torch.equal(of(half, LABELS, WEIGHTS), of(half.float(), LABELS, WEIGHTS))
    assert of(half, LABELS, WEIGHTS).dtype == torch.float32


@pytest.mark.parametrize("kind", ["cross_entropy", "bce"])
def test_a_batch_without_images_costs_nothing_but_has_gradients(kind: str):
    logits = torch.zeros(0, NUM_CLASSES, requires_grad=True)
    nothing = loss(kind=kind)(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert logits.grad is not None


@pytest.mark.parametrize("counts", [None, [], [0, 0]])
def test_balanced_weights_without_images_are_refused(counts: list[int] | None):
    with pytest.raises(ConfigError, match=r"loss.class_weights: .* got none"):
        Loss(LossConfig(class_weights="balanced"), counts)


@pytest.mark.parametrize("threshold", [None, 0.2, 0.5, 0.8])
def test_the_class_weight_of_mixed_images_is_that_of_their_shares_whatever_the_threshold(logits: Tensor, threshold):
    fields = {"kind": "bce", "bce_threshold": threshold}
    even = Loss(LossConfig.model_validate({**fields, "class_weights": "balanced"}), [7] * NUM_CLASSES)
    assert torch.allclose(even(logits, MIXED, WEIGHTS), loss(**fields)(logits, MIXED, WEIGHTS))
