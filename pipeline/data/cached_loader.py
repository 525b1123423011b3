"""A training set that stays decoded, and the batches of it that a worker's loader would read."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from pipeline.data.sampler import IntArray, Parts, Steps
from pipeline.data.train_loader import TrainBatch, TrainLoader, to_device
from pipeline.errors import ConfigError, ImageError


class CachedLoader:
    """The same batches out of a set that stays decoded, all of it on `device`; for images of one size.

    `crop` is the loader's geometry for a whole batch on the device: (uint8 n×3×H×W, size, draws float64 n×num_draws) to
    uint8 n×3×size×size, of which `largest` is the largest. Raises ConfigError where images differ in size, and what
    `crop` does where they are too small for it.
    """

    def __init__(
        self,
        loader: TrainLoader,
        device: torch.device,
        crop: Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor],
        largest: int,
    ) -> None:
        self._loader, self._crop = loader, crop
        images = list(loader.whole_images())
        shapes = {tuple(image.pixels.shape) for image in images if image.pixels is not None}
        if len(shapes) != 1:
            raise ConfigError(f"data.cache: expected images of one size, got {len(shapes)} sizes; use cache none")
        black = torch.zeros(shapes.pop(), dtype=torch.uint8)
        self._pixels = torch.stack([black if image.pixels is None else image.pixels for image in images]).to(device)
        crop(self._pixels[:1], largest, torch.zeros(1, loader.num_draws, dtype=torch.float64))
        self._labels = torch.tensor([image.label for image in images], device=device)
        self._weights = torch.tensor([float(image.pixels is not None) for image in images], device=device)
        self._uris = [image.uri for image in images]

    @property
    def steps(self) -> Steps:
        return self._loader.steps

    @property
    def errors(self) -> dict[str, ImageError]:
        return self._loader.errors

    def batches(
        self, steps: range, *, rank: int, world_size: int, size_at: Callable[[int], int]
    ) -> Iterator[TrainBatch]:
        """This rank's part of each of these steps of a run."""
        parts = self._loader.parts(steps, rank, world_size)
        for epoch, of_epoch in itertools.groupby(steps, self.steps.epoch):
            lanes = self._places(epoch)
            yield from (self._batch(parts, step, lanes, size_at(step)) for step in of_epoch)

    def _places(self, epoch: int) -> list[IntArray]:
        """Of each lane's images, in their order."""
        order = replace(self._loader.order(epoch), shuffle_window=None)  # all of it is in memory
        starts = np.cumsum(order.shard_sizes) - order.shard_sizes
        lanes = (order.windows(lane) for lane in range(order.num_lanes))
        return [np.concatenate([starts[window.shard_ids] + window.rows for window in windows]) for windows in lanes]

    def _batch(self, parts: Parts, step: int, lanes: list[IntArray], size: int) -> TrainBatch:
        num_lanes = len(lanes)
        places = [lanes[p % num_lanes][p // num_lanes] for p in parts.positions(step)]
        chosen = to_device(torch.tensor(places, dtype=torch.int64), self._pixels.device)
        draws = torch.from_numpy(parts.draws(step))
        return TrainBatch(
            step,
            parts.num_global(step),
            [self._uris[place] for place in places],
            self._crop(self._pixels[chosen], size, draws),
            self._labels[chosen],
            self._weights[chosen],
            draws,
        )
