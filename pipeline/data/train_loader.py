"""From a training set to the batches of a worker: fetched and decoded ahead of the loop, in the epoch's order.

    lanes ──► images in order ──► fetch (loose: many requests at once; packed: a window read ahead) ──► decode and crop
    in threads, uint8 ──► batches

An image that fails keeps its place, black and without weight, so that a batch is the same size at every attempt.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipeline import storage
from pipeline.data.decoders import NO_CAUTION, Caution, guarded_decoder
from pipeline.data.manifest import Shard
from pipeline.data.readers import LOOSE_BYTES_AHEAD, ImageRef, ReadLimits, fetch_image, image_refs, read_shard
from pipeline.data.sampler import EpochOrder, Steps, Window
from pipeline.data.training_set import TrainingSet
from pipeline.errors import ConfigError, ImageError, StorageError

Draws: TypeAlias = npt.NDArray[np.float64]
Geometry: TypeAlias = Callable[[torch.Tensor, int, Draws], torch.Tensor]
"""Crops one decoded image to a square: (uint8 3×H×W, size, draws) to uint8 3×size×size."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One worker's part of one step's images.

    `pixels` uint8 n×3×S×S, `labels` int64 n, `weights` float32 n (0 where the image failed), `draws` float64
    n×num_draws in [0, 1): each image's own random numbers. n may be 0.
    """

    step: int
    num_global: int
    uris: list[str]
    pixels: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    draws: torch.Tensor


@dataclass(frozen=True, slots=True)
class TrainLoader:
    """Reads a worker's batches of any epoch.

    `num_threads` decode; `size_at` gives the side of the crop at a step of an epoch; `errors` collects the images that
    failed, by uri.
    """

    images: TrainingSet
    limits: ReadLimits
    geometry: Geometry
    num_draws: int
    seed: int
    batch_size: int
    num_lanes: int
    shuffle_window: int | None
    num_threads: int
    pin_memory: bool = False
    caution: Caution = NO_CAUTION
    errors: dict[str, ImageError] = field(default_factory=dict)

    @property
    def steps(self) -> Steps:
        return Steps(int(self.images.shard_sizes.sum()), self.batch_size, self.num_lanes)

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch."""
        window = self.shuffle_window if self.images.is_packed else None
        return EpochOrder(self.images.shard_sizes, self.seed, epoch, self.num_lanes, window)

    def batches(
        self, epoch: int, first_step: int, *, rank: int, world_size: int, size_at: Callable[[int], int]
    ) -> Iterator[TrainBatch]:
        """This rank's part of every step of an epoch from `first_step` on.

        Nothing is raised for an image, StorageError for a store that fails: its images would be missing.
        """
        order = self.order(epoch)
        parts = _Parts(order, self.steps, first_step, rank, world_size, self.num_draws)
        decoded = self._decoded_ahead(self._ordered(order, parts), parts.sizes_and_draws(size_at))
        return self._batches(decoded, parts, size_at)

    def whole_images(self) -> "Iterator[_Decoded]":
        """Every image of the set in manifest order, decoded and whole."""
        items = (item for shard in self.images.shards for item in self._whole_shard(shard))
        uncut = replace(self, geometry=lambda image, size, draws: image)
        return uncut._decoded_ahead(items, itertools.repeat((0, np.empty(0))))

    def _ordered(self, order: EpochOrder, parts: "_Parts") -> Iterator["_Item"]:
        start, _ = parts.steps.bounds(parts.first_step)
        mine = range(parts.rank, order.num_lanes, parts.world_size)
        lanes = {
            lane: self._lane(order, lane, (start - lane + order.num_lanes - 1) // order.num_lanes) for lane in mine
        }
        fronts = storage.map_concurrently(lambda lane: next(lane, None), lanes.values(), len(lanes) or 1)
        heads = dict(zip(lanes, fronts, strict=True))  # the first windows at once, not one after the other
        for step in parts.range:
            for position in parts.positions(step):
                lane = position % order.num_lanes
                yield heads.pop(lane, None) or next(lanes[lane])

    def _lane(self, order: EpochOrder, lane: int, first: int) -> Iterator["_Item"]:
        """A lane's images from its image `first` on, one window ahead of the reader."""
        for items, skip in storage.map_concurrently(self._load_window, order.windows(lane, first), 1):
            items.reverse()
            del items[len(items) - skip :]
            while items:  # popped, so that a packed image's bytes are let go as soon as it is decoded
                yield items.pop()

    def _load_window(self, window_and_skip: tuple[Window, int]) -> "tuple[list[_Item], int]":
        window, skip = window_and_skip
        loaded: dict[tuple[int, int], _Item] = {}
        for shard_id in np.unique(window.shard_ids):
            rows = window.rows[window.shard_ids == shard_id]
            loaded |= {(shard_id, row): item for row, item in self._load_rows(int(shard_id), set(rows.tolist()))}
        return [loaded[place] for place in zip(window.shard_ids, window.rows, strict=True)], skip

    def _load_rows(self, shard_id: int, wanted: set[int]) -> Iterator[tuple[int, "_Item"]]:
        shard, labels = self.images.shards[shard_id], self.images.labels[shard_id]
        table = self.images.manifest.images(shard)
        refs = image_refs(table)
        if shard.source is None:
            yield from ((row, _Item(refs[row], int(labels[row]), None)) for row in sorted(wanted))
            return
        encoded = read_shard(shard, table, allowed_roots=self.limits.allowed_roots, max_bytes=self.limits.max_bytes)
        for row, data in zip(range(max(wanted) + 1), encoded, strict=False):
            if row in wanted:
                yield row, _Item(refs[row], int(labels[row]), data)

    def _whole_shard(self, shard: Shard) -> Iterator["_Item"]:
        return (item for _, item in self._load_rows(shard.shard_id, set(range(shard.num_images))))

    def _decoded_ahead(
        self, items: Iterator["_Item"], sizes_and_draws: Iterable[tuple[int, Draws]]
    ) -> Iterator["_Decoded"]:
        if not self.images.is_packed:
            items = storage.map_concurrently(
                self._fetched,
                items,
                self.limits.fetch_concurrency,
                size_of=lambda item: item.ref.size or 0,
                max_size=LOOSE_BYTES_AHEAD,
            )
        num_threads = 1 if self.caution.isolated else self.num_threads
        with guarded_decoder(isolated=self.caution.isolated) as decoder:
            decode = partial(self._decoded, decoder.decode)
            yield from storage.map_concurrently(decode, zip(items, sizes_and_draws, strict=False), num_threads)

    def _fetched(self, item: "_Item") -> "_Item":
        data = fetch_image(item.ref, allowed_roots=self.limits.allowed_roots, max_bytes=self.limits.max_bytes)
        return _Item(item.ref, item.label, data)

    def _decoded(self, decode: Callable[..., torch.Tensor], job: "tuple[_Item, tuple[int, Draws]]") -> "_Decoded":
        item, (size, draws) = job
        if (known := self.caution.known.get(item.ref.uri)) is not None:  # not raised: it would gather tracebacks
            self.errors.setdefault(item.ref.uri, known)
            return _Decoded(item.ref.uri, item.label, None)
        try:
            if isinstance(item.data, ImageError):
                if item.data.error == "storage_error":
                    cause = item.data.with_cause
                    raise StorageError(f"{cause}; training goes on from its last checkpoint when the store is back")
                raise item.data
            assert item.data is not None
            image = decode(item.data, max_pixels=self.limits.max_pixels)
            return _Decoded(item.ref.uri, item.label, self.geometry(image, size, draws))
        except ImageError as error:
            self.errors.setdefault(item.ref.uri, error)
        return _Decoded(item.ref.uri, item.label, None)

    def _batches(
        self, decoded: Iterator["_Decoded"], parts: "_Parts", size_at: Callable[[int], int]
    ) -> Iterator[TrainBatch]:
        for step in parts.range:
            part = [next(decoded) for _ in parts.positions(step)]
            size = size_at(step)
            black = torch.zeros(3, size, size, dtype=torch.uint8)
            pixels = [black if image.pixels is None else image.pixels for image in part]
            batch = TrainBatch(
                step,
                parts.num_global(step),
                [image.uri for image in part],
                torch.stack(pixels) if pixels else black[None][:0],
                torch.tensor([image.label for image in part], dtype=torch.int64),
                torch.tensor([float(image.pixels is not None) for image in part]),
                torch.from_numpy(parts.draws(step)),
            )
            yield pinned(batch) if self.pin_memory else batch


@dataclass(frozen=True, slots=True)
class _Item:
    ref: ImageRef
    label: int
    data: bytes | ImageError | None
    """None: still to be fetched."""


@dataclass(frozen=True, slots=True)
class _Decoded:
    uri: str
    label: int
    pixels: torch.Tensor | None


@dataclass(frozen=True)
class _Parts:
    """A rank's part of each step from `first_step` on."""

    order: EpochOrder
    steps: Steps
    first_step: int
    rank: int
    world_size: int
    num_draws: int

    @property
    def range(self) -> Sequence[int]:
        return range(self.first_step, self.steps.num_steps)

    def num_global(self, step: int) -> int:
        start, end = self.steps.bounds(step)
        return end - start

    def positions(self, step: int) -> list[int]:
        positions: list[int] = self.steps.share(step, self.rank, self.world_size).tolist()
        return positions

    def draws(self, step: int) -> Draws:
        start, end = self.steps.bounds(step)
        share = self.steps.share(step, self.rank, self.world_size) - start
        return self.order.draws(step, end - start, self.num_draws)[share]

    def sizes_and_draws(self, size_at: Callable[[int], int]) -> Iterator[tuple[int, Draws]]:
        for step in self.range:
            size = size_at(step)
            yield from ((size, draws) for draws in self.draws(step))


def pinned(batch: TrainBatch) -> TrainBatch:
    """The batch in pinned memory, from which copies to a GPU need not be waited for."""
    pixels, labels, weights = (tensor.pin_memory() for tensor in (batch.pixels, batch.labels, batch.weights))
    return replace(batch, pixels=pixels, labels=labels, weights=weights)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, copied from pinned memory: else the host waits until a GPU has done its work."""
    is_copied_to_gpu = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if is_copied_to_gpu else tensor).to(device, non_blocking=True)


class CachedLoader:
    """The same batches out of a set that stays decoded, all of it on `device`; for images of one size.

    `crop` is the loader's geometry for a whole batch on the device: (uint8 n×3×H×W, size, draws float64 n×num_draws) to
    uint8 n×3×size×size. Raises ConfigError where images differ in size.
    """

    def __init__(
        self,
        loader: TrainLoader,
        device: torch.device,
        crop: Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor],
    ) -> None:
        self._loader, self._crop = loader, crop
        images = list(loader.whole_images())
        shapes = {tuple(image.pixels.shape) for image in images if image.pixels is not None}
        if len(shapes) != 1:
            raise ConfigError(f"data.cache: expected images of one size, got {len(shapes)} sizes; use cache none")
        black = torch.zeros(shapes.pop(), dtype=torch.uint8)
        self._pixels = torch.stack([black if image.pixels is None else image.pixels for image in images]).to(device)
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
        self, epoch: int, first_step: int, *, rank: int, world_size: int, size_at: Callable[[int], int]
    ) -> Iterator[TrainBatch]:
        """This rank's part of every step of an epoch from `first_step` on."""
        order = replace(self._loader.order(epoch), shuffle_window=None)  # all of it is in memory
        starts = np.cumsum(order.shard_sizes) - order.shard_sizes
        lanes = [
            np.concatenate([starts[window.shard_ids] + window.rows for window, _ in order.windows(lane)])
            for lane in range(order.num_lanes)
        ]
        parts = _Parts(order, self.steps, first_step, rank, world_size, self._loader.num_draws)
        for step in parts.range:
            places = [lanes[p % order.num_lanes][p // order.num_lanes] for p in parts.positions(step)]
            chosen = to_device(torch.tensor(places, dtype=torch.int64), self._pixels.device)
            draws = torch.from_numpy(parts.draws(step))
            yield TrainBatch(
                step,
                parts.num_global(step),
                [self._uris[place] for place in places],
                self._crop(self._pixels[chosen], size_at(step), draws),
                self._labels[chosen],
                self._weights[chosen],
                draws,
            )
