"""The pipeline's logits against torchvision's: benchmarks/exactness.py on a few drawn images, made small."""

import random
from pathlib import Path

import pytest
from torch import nn

from benchmarks import exactness
from jobs.demo_images import CLASSES, draw

SIZES = (72, 64)  # of the shorter side after resizing, of the crop


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight JPEGs, of which the first four need no resizing: both sides see the same pixels of these at least."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(8):
        image = draw(CLASSES[index % len(CLASSES)], random.Random(index))
        image = image.resize((72, 90)) if index < 4 else image.resize((210 + index, 160))
        image.save(folder / f"{index}.jpg", quality=90)
    return folder


@pytest.mark.parametrize("architecture", ["resnet18", "efficientnet_b0"])
def test_logits_are_torchvisions_where_the_pixels_are(images: Path, architecture: str) -> None:
    figures = exactness.measure(architecture, images, sizes=SIZES)
    assert figures["num_images"] == 8
    assert 4 <= figures["num_same_crops"] < 8  # how many resized ones agree is a matter of the CPU's instructions
    assert exactness.is_exact(figures)
    assert figures["num_identical"] == 8
    assert figures["logits"]["std_between_images"] > 0.1 * figures["logits"]["rms"]  # the network tells images apart
    assert 1 <= figures["end_to_end"]["largest_level"] <= 2
    assert figures["same_pixels"]["largest"] < figures["end_to_end"]["largest"] < 0.01


def test_a_network_that_differs_a_little_is_told(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference_model = exactness.reference_model

    def with_another_epsilon(*arguments: object) -> nn.Module:
        model = reference_model(*arguments)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps *= 100
        return model

    monkeypatch.setattr(exactness, "reference_model", with_another_epsilon)
    figures = exactness.measure("resnet18", images, num_images=4, sizes=SIZES)
    assert not exactness.is_exact(figures)
    assert figures["num_identical"] == 0
