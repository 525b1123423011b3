"""The stages of a run's work, each done alone so that it can be timed: fetch, decode, predict, write.

What one leaves behind the next takes up, all of it in memory: for some hundred images to a process.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.data.gpu_loader import Prepared
from pipeline.data.loader import Batch, LoadLog
from pipeline.data.manifest import Manifest, Shard
from pipeline.errors import ImageError
from pipeline.inference.bound import Timed
from pipeline.inference.outputs import ShardOutputs, build_tables
from pipeline.inference.predictor import Predictor, distinct_preprocessings
from pipeline.inference.run import Run
from pipeline.inference.shard import decode_batches, fetch_shard, prepare_images
from pipeline.models.bundle import Bundle
from pipeline.tables.writing import write_shard


@dataclass(slots=True)
class _Held:
    """A shard between two stages."""

    shard: Shard
    encoded: list[bytes | ImageError] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    log: LoadLog = field(default_factory=LoadLog)
    outputs: ShardOutputs | None = None


class Stages:
    """One process's share of a run's shards, and its networks where it has any; heavy, so built where it runs.

    `fetch`, `decode`, `predict` and `write` are called in this order, each over all the shards; `arrive` before what
    takes long. Raises BundleError, StorageError.
    """

    def __init__(
        self, run: Run, shards: Sequence[Shard], *, with_networks: bool, arrive: Callable[[], None] = lambda: None
    ) -> None:
        arrive()
        self._run, self._manifest = run, Manifest.open(run.manifest_uri)
        self._predictor = Predictor(run, self._manifest) if with_networks else None
        self._preprocessings = distinct_preprocessings([Bundle.load(model.uri) for model in run.models])
        self._held = [_Held(shard) for shard in shards]

    def fetch(self) -> Timed:
        """Bytes from the store; where GPUs decode, CPUs also sort them out for these, which no store waits for."""
        fetched = self._timed(self._fetch)
        if self._run.decode == "cpu":
            return fetched
        return replace(fetched, cpu_s=fetched.cpu_s + self._timed(self._prepare).cpu_s)

    def decode(self) -> Timed:
        """Batches of pixels from bytes."""
        return self._timed(self._decode)

    def warm_up(self) -> None:
        """A batch through the networks: the first is slower. A shard through a GPU's, which wakes slowly."""
        assert self._predictor is not None
        for held in self._held[:1]:
            list(self._predictor.map(held.batches[: 1 if self._run.device == "cpu" else None]))

    def predict(self) -> Timed:
        """Outputs from pixels."""
        return self._timed(self._predict)

    def write(self) -> Timed:
        """Table files from outputs."""
        return self._timed(self._write)

    def _timed(self, work: Callable[[_Held], None]) -> Timed:
        wall, cpu = time.perf_counter(), time.process_time()
        for held in self._held:
            work(held)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Timed(sum(held.shard.num_images for held in self._held), wall, cpu)

    def _fetch(self, held: _Held) -> None:
        held.encoded = list(fetch_shard(self._run, self._manifest, held.shard))

    def _prepare(self, held: _Held) -> None:
        options = self._options(held)
        held.prepared = list(prepare_images(self._run, held.encoded, self._preprocessings, **options))
        held.encoded = []

    def _decode(self, held: _Held) -> None:
        if self._run.decode == "cpu":
            pin_memory = self._predictor is not None and self._predictor.uses_pinned_memory
            options = {**self._options(held), "pin_memory": pin_memory}
            held.batches = list(decode_batches(self._run, held.encoded, self._preprocessings, **options))
        else:
            assert self._predictor is not None
            assert self._predictor.decoder is not None
            batch_size = self._run.batch_size
            held.batches = list(self._predictor.decoder.batches(held.prepared, batch_size=batch_size, log=held.log))
        held.encoded, held.prepared = [], []

    def _options(self, held: _Held) -> dict[str, Any]:
        return {"num_threads": self._run.num_threads, "isolated": False, "log": held.log}

    def _predict(self, held: _Held) -> None:
        assert self._predictor is not None
        held.outputs = ShardOutputs(held.log.errors)
        for predicted in self._predictor.map(held.batches):
            held.outputs.add(predicted.rows, predicted.outputs)
        held.batches = []

    def _write(self, held: _Held) -> None:
        assert self._predictor is not None
        assert held.outputs is not None
        tables = build_tables(self._run, self._manifest.images(held.shard), self._predictor, held.outputs)
        write_shard(self._run.output_uri, self._run.run_id, held.shard.shard_id, tables)
