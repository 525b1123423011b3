"""A worker's training batches, decoded by processes of their own.

Threads that decode hold the interpreter while the loop wants it to launch a GPU's kernels, and one interpreter serves
only so many images a second. So a worker may have several: each has the lanes of a rank of its own, and a batch is what
they made of it, put together in the order of the epoch. Batches are the same whatever the number of processes.
"""

import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.data.train_loader import TrainBatch, TrainLoader, pinned
from pipeline.errors import ImageError, PipelineError


@dataclass(frozen=True, slots=True)
class _Part:
    """What a process made of a batch, and the images, by uri, that have failed since its last part."""

    batch: TrainBatch
    errors: dict[str, ImageError]


class _Parts(IterableDataset["_Part | PipelineError"]):
    """One process's part of every batch; an error that ends them comes as the last.

    What it needs, labels of every image too, lies in shared memory: written to a process's pipe, it would hold up the
    start of the next one until this one has imported torch.
    """

    def __init__(
        self, loader: TrainLoader, steps: range, rank: int, world_size: int, size_at: Callable[[int], int]
    ) -> None:
        needed = bytearray(pickle.dumps((loader, size_at)))
        self._needed = torch.frombuffer(needed, dtype=torch.uint8).clone().share_memory_()
        self._steps, self._rank, self._world_size = steps, rank, world_size

    def __iter__(self) -> "Iterator[_Part | PipelineError]":
        info = get_worker_info()
        assert info is not None
        loader, size_at = pickle.loads(self._needed.numpy())
        rank = _ranks_of(self._rank, self._world_size, info.num_workers)[info.id]
        world_size = self._world_size * info.num_workers
        try:
            for batch in loader.batches(self._steps, rank=rank, world_size=world_size, size_at=size_at):
                yield _Part(batch, _taken(loader.errors))
        except PipelineError as error:
            yield error


def decoded_by_processes(
    loader: TrainLoader,
    steps: range,
    *,
    rank: int,
    world_size: int,
    size_at: Callable[[int], int],
    num_processes: int,
    num_ahead: int,
) -> Iterator[TrainBatch]:
    """The loader's batches of these steps, each of `num_processes` decoding its part `num_ahead` batches ahead.

    The loader's threads and requests are shared out among them, and what fails is added to its `errors`; `size_at`
    crosses to them. Raises as `loader.batches`, and RuntimeError where a process dies.
    """
    num_threads = max(1, loader.num_threads // num_processes)
    concurrency = max(1, loader.limits.fetch_concurrency // num_processes)
    limits = loader.limits.model_copy(update={"fetch_concurrency": concurrency})
    theirs = replace(loader, num_threads=num_threads, limits=limits, pin_memory=False, errors={})
    parts = iter(
        DataLoader(
            _Parts(theirs, steps, rank, world_size, size_at),
            batch_size=None,
            num_workers=num_processes,
            prefetch_factor=num_ahead,
            multiprocessing_context="spawn",  # a fork would inherit locks that other threads hold
        )
    )
    try:
        while step := list(islice(parts, num_processes)):  # in the order of the processes, one of each
            for part in step:
                if isinstance(part, PipelineError):
                    raise part
                loader.errors.update(part.errors)
            yield _together(loader, [part.batch for part in step], rank, world_size)
    finally:
        del parts  # which ends the processes, even where an exception keeps this frame


def free_shared_memory() -> int:
    """Bytes that batches from the processes may take: a container may have 64 MB, and dies of more (SIGBUS)."""
    shared = Path("/dev/shm")
    return shutil.disk_usage(shared).free if shared.is_dir() else sys.maxsize


def _ranks_of(rank: int, world_size: int, num_processes: int) -> list[int]:
    """The ranks, of `world_size` × `num_processes`, that have the lanes of this one among them."""
    return [rank + world_size * process for process in range(num_processes)]


def _taken(errors: dict[str, ImageError]) -> dict[str, ImageError]:
    """All errors, one by one: the threads that decode add others meanwhile."""
    return dict(errors.popitem() for _ in range(len(errors)))


def _together(loader: TrainLoader, parts: list[TrainBatch], rank: int, world_size: int) -> TrainBatch:
    """The batch of the parts, its images in their order."""
    first, num_parts = parts[0], len(parts)
    ranks = _ranks_of(rank, world_size, num_parts)
    shares = [loader.steps.share(first.step, each, world_size * num_parts) for each in ranks]
    positions = np.sort(np.concatenate(shares))
    places = [np.searchsorted(positions, share) for share in shares]
    shape = (len(positions), *first.pixels.shape[1:])
    pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=loader.pin_memory)
    for place, part in zip(places, parts, strict=True):
        pixels.numpy()[place] = part.pixels.numpy()  # torch copies by elements, eight times slower
    order = torch.from_numpy(np.argsort(np.concatenate(places)))
    uris = [uri for part in parts for uri in part.uris]
    labels, weights, draws = (
        torch.cat([getattr(part, name) for part in parts])[order] for name in ("labels", "weights", "draws")
    )
    uris = [uris[index] for index in order.tolist()]
    batch = TrainBatch(first.step, first.num_global, uris, pixels, labels, weights, draws)
    return pinned(batch) if loader.pin_memory else batch
