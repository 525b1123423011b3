"""Real images and published weights, which lie beside the repository, or where TEST_DATA says; skipped where absent."""

import os
from pathlib import Path

import pytest

from benchmarks import cifar_checkpoints, exactness

DATA = Path(os.environ.get("TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))

pytestmark = pytest.mark.slow


def require(*names: str) -> None:
    missing = [name for name in names if not (DATA / name).is_file()]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} in {DATA}: set TEST_DATA to the folder that has them")


@pytest.mark.s3
@pytest.mark.ray
def test_published_cifar_checkpoints_score_their_known_errors_in_one_pass(s3_uri: str) -> None:
    require("cifar10-jpeg.tar.gz", "cifar10-resnet-weights.tar")
    cifar_checkpoints.upload(DATA, s3_uri)
    summary = cifar_checkpoints.run_jobs(s3_uri, seconds={})
    assert (summary["num_predicted"], summary["num_errors"]) == (10_000, 0)
    errors = cifar_checkpoints.measure_errors(s3_uri, summary["run_id"])
    assert errors == pytest.approx(cifar_checkpoints.EXPECTED_ERRORS, abs=cifar_checkpoints.TOLERANCE)


@pytest.mark.parametrize("architecture", ["resnet18", "densenet121"])
def test_logits_on_imagenet_samples_are_torchvisions(architecture: str) -> None:
    require("imagenet-sample-700.tar")
    figures = exactness.measure(architecture, DATA / "imagenet-sample-700.tar", num_images=64)
    assert (figures["num_images"], figures["num_identical"]) == (64, 64)
    assert figures["num_same_crops"] > 0
    assert exactness.is_exact(figures)
    assert figures["end_to_end"]["largest_level"] <= 2
