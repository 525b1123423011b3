"""Logbooks and what is entered into them, for tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.data.train_loader import TrainBatch
from pipeline.training.counts import HardImage, Outcome
from pipeline.training.logbook import Logbook
from pipeline.training.run import TrainingRun
from tests.confusions import counts_of
from tests.training_worlds import train_config


def run_of(num_images: int = 100, batch_size: int = 10, **fields: Any) -> TrainingRun:
    config = train_config(Path("/nowhere"), batch_size=batch_size, **fields)
    return TrainingRun(
        config=config,
        train_digest="t",
        evaluation_digest="e",
        num_images=num_images,
        classes=["cat", "dog"],
        architecture=config.architecture,
        preprocessing=config.evaluation.preprocessing,
        start_uri=None,
        start_digest=None,
    )


def batch_of(uris: list[str], pixels: torch.Tensor | None = None) -> TrainBatch:
    nothing = torch.empty(0)
    return TrainBatch(0, len(uris), uris, nothing if pixels is None else pixels, nothing, nothing, nothing)


def add(log: Logbook, number: int, uris: list[str], *, loss: float = 1.0, right: int = 0, failed: int = 0) -> None:
    """A step on these images, of this mean loss."""
    counted = len(uris) - failed
    totals = torch.tensor([loss * counted, right, counted], dtype=torch.float64)
    log.add(number, number / 100, batch_of(uris), totals)


def names(count: int, rank: int = 0) -> list[str]:
    return [f"{rank}-{number}.jpg" for number in range(count)]


COUNTS = replace(counts_of([[3, 1], [0, 4]]), num_errors=2, top5=8, loss_sum=4.0)
OUTCOME = Outcome(COUNTS, [], [HardImage("s3://b/1.jpg", 0, 1, 0.9, 2.5)])
