"""A worker's batches over a whole run: the loader that the config asks for, and who decodes, threads or processes."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial

import torch

from pipeline import storage
from pipeline.data.cached_loader import CachedLoader
from pipeline.data.decoders import NO_CAUTION, Caution, is_deadly
from pipeline.data.decoding_processes import decoded_by_processes, free_shared_memory
from pipeline.data.train_loader import TrainBatch, TrainLoader
from pipeline.data.training_set import TrainingSet
from pipeline.errors import ConfigError, ImageError
from pipeline.training import augment
from pipeline.training.run import TrainingRun
from pipeline.training.worker import Worker

logger = logging.getLogger(__name__)

_BYTES_TOLD_OF_AN_IMAGE = 16  # its label, and its part of what tells a shard: shared memory has that too
_THREADS_TO_A_PROCESS = 2  # that decode: the interpreter is a tenth of an image's work, and is fought for

Loader = TrainLoader | CachedLoader


class Feed:
    """A worker's batches over a whole run, with caution until it is relaxed. Raises ConfigError as `batches_of`."""

    def __init__(self, run: TrainingRun, worker: Worker, train_set: TrainingSet, caution: Caution) -> None:
        self._run, self._worker, self._train_set = run, worker, train_set
        self.caution = caution
        self._loader = make_loader(run, worker, train_set, caution)
        self._num_processes = _num_processes(run, worker, self._loader)  # once: later what is free is what others use

    @property
    def errors(self) -> dict[str, ImageError]:
        """The images that have failed, by uri; of what was read ahead, too."""
        return self._loader.errors

    def relax(self, known: Mapping[str, ImageError]) -> None:
        """From the next batch on images are decoded as usual again, but none that is known to kill its decoder."""
        if self.caution.isolated:
            self.caution = Caution(known=known)

    def batches(self, step: int) -> Iterator[TrainBatch]:
        """Those from a step of the run on, made ahead of the reader."""
        while step < self._run.num_steps:
            caution = self.caution
            ahead = batches_of(self._run, self._worker, self._loader, step, self._num_processes)
            with closing(storage.run_ahead(ahead, self._run.config.data.prefetch_batches)) as batches:
                for batch in batches:
                    yield batch
                    step += 1
                    if self.caution is not caution and isinstance(self._loader, TrainLoader):
                        break
            if step < self._run.num_steps:
                found = {uri: error for uri, error in self._loader.errors.items() if is_deadly(error)}
                self.caution = Caution(known={**self.caution.known, **found})
                self._loader = make_loader(self._run, self._worker, self._train_set, self.caution)


def make_loader(run: TrainingRun, worker: Worker, train_set: TrainingSet, caution: Caution = NO_CAUTION) -> Loader:
    """The worker's loader, cached where the config says so. Raises ConfigError where images to cache differ in size or
    are too small for the largest crop."""
    config = run.config
    geometry = augment.Geometry(config.augment, run.preprocessing)
    loader = TrainLoader(
        images=train_set,
        limits=config.data,
        geometry=geometry.apply,
        num_draws=augment.NUM_DRAWS,
        seed=config.seed,
        batch_size=config.batch_size,
        num_lanes=run.steps.num_lanes,
        shuffle_window=config.data.shuffle_window if config.data.cache == "none" else None,
        num_threads=config.data.decode_threads or worker.num_threads,
        pin_memory=worker.device.type == "cuda",
        caution=caution,
    )
    if config.data.cache == "none":
        return loader
    device = worker.device if config.data.cache == "device" else torch.device("cpu")
    padding, largest = config.augment.padding, max(augment.sizes(config.augment))
    return CachedLoader(
        loader, device, lambda pixels, size, draws: augment.crop_padded(pixels, padding, size, draws), largest
    )


def batches_of(
    run: TrainingRun, worker: Worker, loader: Loader, step: int, num_processes: int | None = None
) -> Iterator[TrainBatch]:
    """This rank's batches from a step of the run on, epoch after epoch, to the last step.

    `num_processes` decode them; unset: as many as the run asks for, or else as the worker's device and memory allow.
    Raises ConfigError where the decoding processes asked for lack the shared memory to hand them over.
    """
    steps, size_at = range(step, run.num_steps), partial(_size_at, run)
    num_processes = num_processes or _num_processes(run, worker, loader)
    if isinstance(loader, CachedLoader) or num_processes == 1:
        return loader.batches(steps, rank=worker.rank, world_size=worker.world_size, size_at=size_at)
    return decoded_by_processes(
        loader,
        steps,
        rank=worker.rank,
        world_size=worker.world_size,
        size_at=size_at,
        num_processes=num_processes,
        num_ahead=run.config.data.prefetch_batches,
    )


def _num_processes(run: TrainingRun, worker: Worker, loader: Loader) -> int:
    if isinstance(loader, CachedLoader):
        return 1
    asked = run.config.data.decode_processes
    on_gpu = worker.device.type == "cuda"
    wanted = asked or (max(1, loader.num_threads // _THREADS_TO_A_PROCESS) if on_gpu else 1)
    wanted = min(wanted, max(1, loader.num_lanes // worker.world_size))
    lack = _lack_of_shared_memory(run, worker, wanted) if wanted > 1 else None
    if lack is None:
        return wanted
    if asked:
        raise ConfigError(f"{lack}, or set it to 1")
    logger.warning("%s; one decodes", lack)
    return 1


def _lack_of_shared_memory(run: TrainingRun, worker: Worker, num_processes: int) -> str | None:
    config = run.config
    side = max(augment.sizes(config.augment))
    num_images = -(-config.batch_size // worker.world_size) * (config.data.prefetch_batches + 1)
    of_worker = num_images * 3 * side**2 + run.num_images * _BYTES_TOLD_OF_AN_IMAGE
    needed, free = worker.num_on_node * of_worker, free_shared_memory()
    if needed <= free:
        return None
    return (
        f"data.decode_processes: expected {needed / 2**20:.1f} MB of shared memory (/dev/shm) for the batches that "
        f"{num_processes} processes hand over to each of {worker.num_on_node} workers here, found "
        f"{free / 2**20:.1f} MB; give the container more (--shm-size), lower data.prefetch_batches"
    )


def _size_at(run: TrainingRun, step: int) -> int:
    return augment.size_at(run.config.augment, step / run.num_steps)
