"""From a training set to the batches of a worker: fetched and decoded ahead of the loop, in the epoch's order.

    lanes ──► images in order ──► fetch (loose: many requests at once; packed: a window read ahead) ──► decode and crop
    in threads, uint8 ──► batches

An image that fails keeps its place, black and without weight, so that a batch is the same size at every attempt.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline import storage
from pipeline.data.decoders import NO_CAUTION, Caution, guarded_decoder
from pipeline.data.readers import BYTES_AHEAD, ImageRef, ReadLimits, fetch_image, image_refs, read_shard
from pipeline.data.sampler import Draws, EpochOrder, Parts, Steps, Window
from pipeline.data.training_set import TrainingSet
from pipeline.errors import ImageError, StorageError

_LISTED_ROWS = 1000  # of a table, that are made objects at once
_LISTED_AT_ONCE = 8  # lanes
_LISTED_SCHEMA = pa.schema(  # large strings: those of a lane may be more than 2 GB
    [("uri", pa.large_string()), ("size", pa.int64()), ("etag", pa.large_string()), ("label", pa.int64())]
)

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
    """Reads a worker's batches of any steps of a run.

    `num_threads` decode; `errors` collects the images that failed, by uri.
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

    def parts(self, steps: range, rank: int, world_size: int) -> Parts:
        """A rank's part of each of these steps of a run."""
        return Parts(self.steps, self.order, self.num_draws, steps, rank, world_size)

    def batches(
        self, steps: range, *, rank: int, world_size: int, size_at: Callable[[int], int]
    ) -> Iterator[TrainBatch]:
        """This rank's part of each of these steps of a run; what comes next is read across the ends of epochs.

        `size_at` gives the side of the crop at a step, in pixels.
        Nothing is raised for an image, StorageError for a store that fails: its images would be missing.
        """
        parts = self.parts(steps, rank, world_size)
        decoded = self._decoded_ahead(self._ordered(parts), parts.sizes_and_draws(size_at))
        return self._batches(decoded, parts, size_at)

    def whole_images(self) -> "Iterator[_Decoded]":
        """Every image of the set in manifest order, decoded and whole."""
        sizes = enumerate(self.images.shard_sizes.tolist())
        shards = (Window(np.full(size, shard_id, np.int64), np.arange(size)) for shard_id, size in sizes)
        uncut = replace(self, geometry=lambda image, size, draws: image)
        with self._loading(1) as pool:
            yield from uncut._decoded_ahead(self._items(shards, pool), itertools.repeat((0, np.empty(0))))

    def _ordered(self, parts: Parts) -> Iterator["_Item"]:
        with self._loading(len(parts.lanes)) as pool:
            lanes = {lane: self._items(parts.windows(lane), pool) for lane in parts.lanes}
            fronts = storage.map_concurrently(lambda items: next(items, None), lanes.values(), len(lanes) or 1)
            heads = dict(zip(lanes, fronts, strict=True))  # the first windows at once, not one after the other
            for step in parts.span:
                for position in parts.positions(step):
                    lane = position % self.num_lanes
                    yield heads.pop(lane, None) or next(lanes[lane])

    @contextmanager
    def _loading(self, num_lanes: int) -> Iterator[Executor]:
        """Threads that load windows; few that only list, for Arrow keeps memory for each (mimalloc some 8 MB)."""
        num_threads = num_lanes if self.images.is_packed else min(num_lanes, _LISTED_AT_ONCE)
        pool = ThreadPoolExecutor(max(num_threads, 1), thread_name_prefix="windows")
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _items(self, windows: Iterator[Window], pool: Executor) -> Iterator["_Item"]:
        """The images of windows, of packed ones with their bytes, which are read one window ahead."""
        if not self.images.is_packed:
            yield from self._listed_items(windows, pool)
            return
        for items in storage.map_concurrently(self._load_packed, windows, 1, pool=pool):
            yield from items

    def _load_packed(self, window: Window) -> Iterator["_Item"]:
        """A packed window with its images' bytes, each of which is let go as soon as it is decoded."""
        loaded: list[_Item | None] = [None] * len(window.rows)
        for shard_id, places in _by_shard(window):
            place_of = dict(zip(window.rows[places].tolist(), places.tolist(), strict=True))
            for row, item in enumerate(self._read_packed(shard_id, max(place_of) + 1)):
                if row in place_of:
                    loaded[place_of[row]] = item
        loaded.reverse()
        return _popped(loaded)

    def _read_packed(self, shard_id: int, num_rows: int) -> Iterator["_Item"]:
        shard = self.images.shards[shard_id]
        table = self.images.manifest.images(shard)
        encoded = read_shard(shard, table, allowed_roots=self.limits.allowed_roots, max_bytes=self.limits.max_bytes)
        labels = self.images.labels[shard_id].tolist()
        return map(_Item, image_refs(table)[:num_rows], labels, encoded)

    def _listed_items(self, windows: Iterator[Window], pool: Executor) -> Iterator["_Item"]:
        """The images of windows of loose ones, still to be fetched.

        A window is a lane of an epoch, so the next one is listed when little of it is left.
        """
        upcoming = [pool.submit(self._list, window) for window in itertools.islice(windows, 1)]
        while upcoming:
            parts = upcoming.pop().result()
            while parts:
                rows = parts.pop()
                if not parts:
                    upcoming = [pool.submit(self._list, window) for window in itertools.islice(windows, 1)]
                for ref, label in zip(image_refs(rows), rows["label"].to_pylist(), strict=True):
                    yield _Item(ref, label, None)

    def _list(self, window: Window) -> list[pa.Table]:
        """The rows of a window, some at a time, the last ones first: whoever pops them lets go of what was due.

        As tables, in which an image takes some hundred bytes, and several times that as objects of Python.
        """
        shards = list(_by_shard(window))
        listed = pa.concat_tables(self._listed(shard_id, window.rows[places]) for shard_id, places in shards)
        order = np.argsort(np.concatenate([places for _, places in shards]))
        starts = reversed(range(0, len(order), _LISTED_ROWS))
        return [listed.take(order[start : start + _LISTED_ROWS]) for start in starts]

    def _listed(self, shard_id: int, rows: npt.NDArray[np.int64]) -> pa.Table:
        images = self.images.manifest.images(self.images.shards[shard_id]).select(_LISTED_SCHEMA.names)
        return images.take(rows).cast(_LISTED_SCHEMA)

    def _decoded_ahead(
        self, items: Iterator["_Item"], sizes_and_draws: Iterable[tuple[int, Draws]]
    ) -> Iterator["_Decoded"]:
        if not self.images.is_packed:
            items = storage.map_concurrently(
                self._fetched,
                items,
                self.limits.fetch_concurrency,
                size_of=lambda item: item.ref.size or 0,
                max_size=BYTES_AHEAD,
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
        self, decoded: Iterator["_Decoded"], parts: Parts, size_at: Callable[[int], int]
    ) -> Iterator[TrainBatch]:
        for step in parts.span:
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


def _by_shard(window: Window) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Each shard of a window, and the places of its images in it."""
    places = np.argsort(window.shard_ids, kind="stable")
    shard_ids, starts = np.unique(window.shard_ids[places], return_index=True)
    return zip(shard_ids.tolist(), np.split(places, starts[1:]), strict=True)


def _popped(items: "list[_Item | None]") -> Iterator[_Item]:
    while items:
        item = items.pop()
        assert item is not None
        yield item


def pinned(batch: TrainBatch) -> TrainBatch:
    """The batch in pinned memory, from which copies to a GPU need not be waited for."""
    pixels, labels, weights = (tensor.pin_memory() for tensor in (batch.pixels, batch.labels, batch.weights))
    return replace(batch, pixels=pixels, labels=labels, weights=weights)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, copied from pinned memory: else the host waits until a GPU has done its work."""
    is_copied_to_gpu = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if is_copied_to_gpu else tensor).to(device, non_blocking=True)
