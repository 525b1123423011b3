"""The order of training: a function of seed and epoch alone, whatever the number of workers.

    shards, shuffled ──► one stream of images ──► cut into lanes ──► each lane shuffled window by window
    position p of the epoch = image p // num_lanes of lane p % num_lanes
    step s of the epoch     = positions [N·s // S, N·(s+1) // S), S steps in all

So a batch has images of every lane, and a worker, which has every world_size-th lane, reads shards of its own. A
window holds whole shards (but for those that a lane's ends cut), so that packed shards are read once each. The steps of
an epoch are as even as can be: no batch at its end is too small for its norms.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
Draws: TypeAlias = npt.NDArray[np.float64]
_SHARDS, _WINDOW, _DRAWS = range(3)  # what random numbers are for


@dataclass(frozen=True, slots=True)
class Window:
    """Images of one lane that are shuffled among each other: of which shards, and in which order they come.

    `shard_ids` and `rows` int64 n, in the order of training.
    """

    shard_ids: IntArray
    rows: IntArray


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch over shards of `shard_sizes` images (int64, in manifest order).

    `shuffle_window` is the number of images of a lane, at least, that are shuffled among each other; None: all of them.
    """

    shard_sizes: IntArray
    seed: int
    epoch: int
    num_lanes: int
    shuffle_window: int | None = None

    @cached_property
    def num_images(self) -> int:
        return int(self.shard_sizes.sum())

    @cached_property
    def _shard_ids(self) -> IntArray:
        return self._rng(_SHARDS).permutation(len(self.shard_sizes))

    @cached_property
    def _ends(self) -> IntArray:
        """Where each shuffled shard ends in the stream."""
        return np.cumsum(self.shard_sizes[self._shard_ids])

    def lane_size(self, lane: int) -> int:
        """The images of a lane: as many as of any other, or one more."""
        return len(range(lane, self.num_images, self.num_lanes))

    def windows(self, lane: int, first: int = 0) -> Iterator[Window]:
        """The windows of a lane from its image `first` on, which is where the first of them begins."""
        done = 0
        for number, (start, end) in enumerate(self._window_bounds(lane)):
            size = end - start
            if first < done + size:
                window, skip = self._window(lane, number, start, end), max(first - done, 0)
                yield Window(window.shard_ids[skip:], window.rows[skip:])
            done += size

    def draws(self, step: int, num_images: int, num_draws: int) -> Draws:
        """Random numbers in [0, 1) for the images of a step, float64 num_images×num_draws."""
        return self._rng(_DRAWS, step).random((num_images, num_draws))

    def _window_bounds(self, lane: int) -> Iterator[tuple[int, int]]:
        start = sum(self.lane_size(before) for before in range(lane))
        lane_end = start + self.lane_size(lane)
        while start < lane_end:
            end = lane_end
            if self.shuffle_window is not None:
                full = int(np.searchsorted(self._ends, start + self.shuffle_window))  # the shard that fills it
                end = min(lane_end, int(self._ends[min(full, len(self._ends) - 1)]))
            yield start, end
            start = end

    def _window(self, lane: int, number: int, start: int, end: int) -> Window:
        stream = start + self._rng(_WINDOW, lane, number).permutation(end - start)
        place = np.searchsorted(self._ends, stream, side="right")
        shard_ids = self._shard_ids[place]
        return Window(shard_ids, stream - (self._ends[place] - self.shard_sizes[shard_ids]))

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, *purpose])


@dataclass(frozen=True, slots=True)
class Steps:
    """Each epoch's positions cut into a run's steps, and dealt to workers.

    Steps are counted over the run: that after an epoch's last is the next epoch's first.
    """

    num_images: int
    batch_size: int
    num_lanes: int

    @property
    def per_epoch(self) -> int:
        return -(-self.num_images // self.batch_size)

    def epoch(self, step: int) -> int:
        """That of a step, from 0."""
        return step // self.per_epoch

    def bounds(self, step: int) -> tuple[int, int]:
        """The first position of a step in its epoch, and the one after its last."""
        per_epoch = self.per_epoch
        in_epoch = step % per_epoch
        return self.num_images * in_epoch // per_epoch, self.num_images * (in_epoch + 1) // per_epoch

    def share(self, step: int, rank: int, world_size: int) -> IntArray:
        """The positions of a step that are this rank's, ascending: those of every world_size-th lane."""
        positions = np.arange(*self.bounds(step))
        share: IntArray = positions[positions % self.num_lanes % world_size == rank]
        return share


@dataclass(frozen=True)
class Parts:
    """A rank's part of each step of `span`, steps of a run whose epochs are in the order that `order` gives."""

    steps: Steps
    order: Callable[[int], EpochOrder]
    num_draws: int
    span: range
    rank: int
    world_size: int

    @property
    def lanes(self) -> range:
        """Those of the rank, if it does a step at all."""
        return range(self.rank, self.steps.num_lanes if self.span else 0, self.world_size)

    def windows(self, lane: int) -> Iterator[Window]:
        """The windows of a lane from its first image in the span to the end of the last step's epoch."""
        start, _ = self.steps.bounds(self.span[0])
        first = -(-(start - lane) // self.steps.num_lanes)
        for epoch in range(self.steps.epoch(self.span[0]), self.steps.epoch(self.span[-1]) + 1):
            yield from self._kept_order(epoch).windows(lane, first)
            first = 0

    def num_global(self, step: int) -> int:
        """The images of a step on all ranks."""
        start, end = self.steps.bounds(step)
        return end - start

    def positions(self, step: int) -> list[int]:
        """In the step's epoch."""
        positions: list[int] = self.steps.share(step, self.rank, self.world_size).tolist()
        return positions

    def draws(self, step: int) -> Draws:
        """The random numbers of the rank's images, float64 n×num_draws."""
        start, end = self.steps.bounds(step)
        order, in_epoch = self._kept_order(self.steps.epoch(step)), step % self.steps.per_epoch
        share = self.steps.share(step, self.rank, self.world_size) - start
        return order.draws(in_epoch, end - start, self.num_draws)[share]

    def sizes_and_draws(self, size_at: Callable[[int], int]) -> Iterator[tuple[int, Draws]]:
        """Of each image of the span, in order; `size_at` gives a step's size."""
        for step in self.span:
            size = size_at(step)
            yield from ((size, draws) for draws in self.draws(step))

    @cached_property
    def _kept_order(self) -> Callable[[int], EpochOrder]:
        """That of an epoch, kept for its lanes and for those that are in the next one already."""
        return lru_cache(maxsize=2)(self.order)
