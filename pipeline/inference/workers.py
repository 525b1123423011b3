"""What runs in Ray's workers: the tasks and actors that take a shard to its receipt."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import ray

from pipeline.data.manifest import Manifest, Shard
from pipeline.errors import RunError
from pipeline.inference import networks
from pipeline.inference.attempts import MAX_DEATHS
from pipeline.inference.commit import Receipt
from pipeline.inference.run import Model, Run
from pipeline.inference.turns import Room
from pipeline.witness import arrive, forward_warnings

if TYPE_CHECKING:
    from pipeline.data.gpu_loader import GpuDecoder  # torch's import, which the driver does without
    from pipeline.data.loader import Batch, LoadLog
    from pipeline.data.transforms import Preprocessing

SHARDS_AT_ONCE = 2  # of an actor: while one is predicted, the next is fetched or the last written
_MOST_THREADS = 16
_TOGETHER_S = 0.5  # of work on shards that are begun together
_MOST_GROWTH = 4  # one that is done at once, its images not being there, says little of the next
_room = Room(SHARDS_AT_ONCE)  # of this process
T = TypeVar("T")
Row: TypeAlias = dict[str, Any]
"""A batch of rows, each a shard in any of its states; in the split form of one row."""

logger = logging.getLogger(__name__)


class _Predicting:
    """An actor with the run's networks."""

    def __init__(self, run: Run, attempts: Any) -> None:
        arrive(attempts, "actors")  # before what takes long
        from pipeline.inference.predictor import Predictor

        self._run, self._attempts = run, attempts
        self._manifest = open_unchanged(run.manifest_uri, run.manifest_digest)
        self._predictor = Predictor(run, self._manifest)

    def _decoder_at(self, attempt: int) -> "GpuDecoder | None":
        """The GPU's, but at the last attempt: CPUs decode all then, isolated; their pixels differ."""
        return self._predictor.decoder if attempt < MAX_DEATHS else None

    def _load(self, shard: Shard, attempt: int, log: "LoadLog", num_threads: int) -> Iterator["Batch"]:
        from pipeline.inference.shard import load_shard

        return load_shard(
            self._run,
            self._manifest,
            shard,
            self._predictor.preprocessings,
            num_threads=num_threads,
            isolated=attempt > 1,
            log=log,
            decoder=self._decoder_at(attempt),
            pin_memory=self._predictor.uses_pinned_memory,
        )

    def _load_with_idle_cpus(self, shard: Shard, attempt: int, log: "LoadLog") -> Iterator["Batch"]:
        """Tasks that have handed nothing on leave them idle."""
        return self._load(shard, attempt, log, min(_MOST_THREADS, os.cpu_count() or 1))

    def _predict(self, shard: Shard, batches: Iterable["Batch"], log: "LoadLog", attempt: int) -> Receipt:
        from pipeline.inference.shard import predict_shard

        return predict_shard(self._run, self._manifest, shard, batches, self._predictor, log=log, attempt=attempt)


class PredictFused(_Predicting):
    """An actor that takes a task's shards from fetch to written tables, batches streaming inside."""

    def __call__(self, rows: Row) -> Row:
        return receipt_rows(attempt_each(self._attempts, "all", shards_of(rows), self._take))

    def _take(self, shard: Shard, attempt: int) -> Receipt:
        from pipeline.data.loader import LoadLog

        log = LoadLog()
        with self._predictor.own_stream():
            return self._predict(shard, self._load(shard, attempt, log, self._run.num_threads), log, attempt)


def decode_shard(rows: Row, run: Run, attempts: Any) -> Row:
    """A CPU task that fetches and decodes a shard to one uint8 block per preprocessing."""
    from pipeline.data.loader import LoadLog
    from pipeline.inference.blocks import DecodedShard
    from pipeline.inference.shard import load_shard

    [shard], log = shards_of(rows), LoadLog()
    manifest = open_unchanged(run.manifest_uri, run.manifest_digest)
    preprocessings = _preprocessings_of(run.models)
    with attempting(attempts, "decode", shard) as attempt:
        options: dict[str, Any] = {"num_threads": 1, "isolated": attempt > 1, "batch_size": shard.num_images}
        batches = load_shard(run, manifest, shard, preprocessings, log=log, **options)
        return DecodedShard.gather(shard, attempt, batches, preprocessings, log).to_row()


class PredictDecoded(_Predicting):
    """An actor that predicts and writes shards that tasks have decoded."""

    def __call__(self, rows: Row) -> Row:
        from pipeline.inference.blocks import DecodedShard

        decoded = DecodedShard.from_row(rows)
        shard, log = decoded.shard, decoded.log
        with attempting(self._attempts, "predict", shard) as attempt:
            if decoded.is_whole:
                batches = decoded.batches(self._run.batch_size, pin_memory=self._predictor.uses_pinned_memory)
            else:
                _say_that_shards_are_too_large()
                batches = self._load_with_idle_cpus(shard, attempt, log)
            return receipt_rows([self._predict(shard, batches, log, max(attempt, decoded.attempt))])


def prepare_shard(rows: Row, run: Run, attempts: Any) -> Row:
    """A CPU task that fetches a shard for a GPU to decode, and decodes what the GPU does not."""
    from pipeline.data.loader import LoadLog
    from pipeline.inference.blocks import PreparedShard
    from pipeline.inference.shard import fetch_shard, prepare_images

    [shard], log = shards_of(rows), LoadLog()
    manifest = open_unchanged(run.manifest_uri, run.manifest_digest)
    preprocessings = _preprocessings_of(run.models)
    with attempting(attempts, "decode", shard) as attempt:
        encoded = fetch_shard(run, manifest, shard)
        prepared = prepare_images(run, encoded, preprocessings, num_threads=1, isolated=attempt > 1, log=log)
        return PreparedShard.row_of(shard, attempt, prepared, log)


class PredictPrepared(_Predicting):
    """An actor that decodes on its GPU, predicts and writes shards that tasks have fetched."""

    def __call__(self, rows: Row) -> Row:
        from pipeline.inference.blocks import PreparedShard

        prepared = PreparedShard.from_row(rows)
        shard, log = prepared.shard, prepared.log
        with attempting(self._attempts, "predict", shard) as attempt, self._predictor.own_stream():
            decoder = self._decoder_at(attempt)
            if prepared.images is None:
                _say_that_shards_are_too_large()
            if decoder is not None and prepared.images is not None:
                batches = decoder.batches(prepared.images, batch_size=self._run.batch_size, log=log)
            else:
                batches = self._load_with_idle_cpus(shard, attempt, log)
            return receipt_rows([self._predict(shard, batches, log, max(attempt, prepared.attempt))])


def compile_networks(run: Run, manifest: Manifest, attempts: Any) -> None:
    """A task that compiles a run's networks before its actors start. Raises BundleError where it must and cannot."""
    arrive(attempts, "compile")
    networks.decide(run, manifest)


@cache  # once in a process
def _say_that_shards_are_too_large() -> None:
    logger.warning(
        "shards are too large for tasks to hand on: actors fetch them, more slowly; make a manifest of smaller ones"
    )


@cache  # a process has many tasks of one run
def _preprocessings_of(models: tuple[Model, ...]) -> list["Preprocessing"]:
    from pipeline.inference.predictor import distinct_preprocessings, load_unchanged

    return distinct_preprocessings([load_unchanged(model) for model in models])


@cache
def open_unchanged(manifest_uri: str, digest: str) -> Manifest:
    """The manifest of a run under way, opened once per process. Raises RunError where another has taken its place."""
    manifest = Manifest.open(manifest_uri)
    if manifest.digest != digest:
        raise RunError(f"{manifest_uri}: expected the manifest the run began with, found another in its place")
    return manifest


def receipt_rows(receipts: Iterable[Receipt]) -> Row:
    """What a worker returns for the shards that it has written."""
    return {"receipt": np.array([replace(receipt, node=_node_id()).to_json() for receipt in receipts], dtype=object)}


@cache
def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


@contextmanager
def attempting(attempts: Any, stage: str, shard: Shard) -> Iterator[int]:
    """Around a stage of the shard; the number of this attempt at it, from 1. Raises RunError after `MAX_DEATHS`.

    A shard that has seen its process die has the next one to itself: beside another one either might be the killer.
    """
    forward_warnings(attempts)
    with ExitStack() as room:
        room.enter_context(_room.beside_others())
        [attempt] = _begin(attempts, stage, [shard])
        if attempt > 1:
            room.close()
            room.enter_context(_room.alone())
            [attempt] = _begin(attempts, stage, [shard], is_alone=True)
        if attempt > MAX_DEATHS:
            raise RunError(
                f"shard {shard.shard_id} was begun {MAX_DEATHS} times and its process died each time, with isolated "
                "decoding too, so no decoder is to blame: look for out-of-memory kills (smaller shards or batches, "
                "a lower images.fetch_concurrency, fewer actors) or very many lost nodes, then run again"
            )
        yield attempt
        _end(attempts, stage, [shard])


def attempt_each(attempts: Any, stage: str, shards: Iterable[Shard], work: Callable[[Shard, int], T]) -> Iterator[T]:
    """What `work` makes of each shard, in no particular order, told the number of this attempt as by `attempting`.

    Shards of milliseconds are begun and ended together, as many as take some half a second: two messages for each would
    take a third of their time. A death is blamed on all that are begun and not ended. Raises RunError as `attempting`,
    and what `work` raises.
    """
    forward_warnings(attempts)
    left, num_together = iter(shards), 1
    while together := list(islice(left, num_together)):
        with _room.beside_others():
            start = time.monotonic()
            numbered = list(zip(together, _begin(attempts, stage, together), strict=True))
            first = [shard for shard, attempt in numbered if attempt == 1]
            done = [work(shard, 1) for shard in first]
            _end(attempts, stage, first)
            took_s = time.monotonic() - start
        yield from done
        for again in (shard for shard, attempt in numbered if attempt > 1):
            with attempting(attempts, stage, again) as attempt:
                result = work(again, attempt)
            yield result
        if first:
            num_together = max(1, min(_MOST_GROWTH * len(together), round(len(together) * _TOGETHER_S / took_s)))


def _begin(attempts: Any, stage: str, shards: Sequence[Shard], *, is_alone: bool = False) -> list[int]:
    shard_ids = [shard.shard_id for shard in shards]
    numbers: list[int] = ray.get(attempts.begin.remote(stage, shard_ids, _node_id(), is_alone=is_alone))
    return numbers


def _end(attempts: Any, stage: str, shards: Sequence[Shard]) -> None:
    if shards:
        attempts.end.remote(stage, [shard.shard_id for shard in shards])


def shards_of(rows: Row) -> list[Shard]:
    """The shards of rows of `shard_dataset`."""
    return [Shard(**json.loads(text)) for text in rows["shard"]]
