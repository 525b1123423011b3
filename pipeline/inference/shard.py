"""The work on one shard, start to receipt; knows nothing of where it runs.

fetch + decode ──► `DecodedShard` or a stream of batches ──► `Predictor` ──► tables ──► files ──► `Receipt`
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data import images as image_data
from pipeline.data import nvjpeg
from pipeline.data.loader import Batch, LoadLog, load_batches, load_batches_on_gpu
from pipeline.data.manifest import Manifest, Shard
from pipeline.data.readers import read_shard, refusing_outages
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError
from pipeline.inference.commit import Receipt
from pipeline.inference.outputs import ShardOutputs, build_tables
from pipeline.inference.plan import Run
from pipeline.inference.predictor import Predictor
from pipeline.tables.writing import write_shard


def load_shard(
    run: Run,
    manifest: Manifest,
    shard: Shard,
    preprocessings: Sequence[Preprocessing],
    *,
    num_threads: int,
    isolated: bool,
    log: LoadLog,
    pin_memory: bool = False,
    batch_size: int | None = None,
) -> Iterator[Batch]:
    """Batches of one shard's images: `fetch_shard`, then `decode_batches`, overlapped. Raises StorageError."""
    return decode_batches(
        run,
        fetch_shard(run, manifest, shard),
        preprocessings,
        num_threads=num_threads,
        isolated=isolated,
        log=log,
        pin_memory=pin_memory,
        batch_size=batch_size,
    )


def fetch_shard(run: Run, manifest: Manifest, shard: Shard) -> Iterator[bytes | ImageError]:
    """The encoded images of one shard, or why they cannot be had, in order.

    Raises StorageError where more images than the run allows are lost to a failing store, and where all of several are
    gone or denied.
    """
    encoded = read_shard(
        shard,
        manifest.images(shard),
        allowed_roots=run.images.allowed_roots,
        max_bytes=run.images.max_bytes,
        concurrency=run.images.fetch_concurrency,
    )
    return refusing_outages(
        encoded,
        shard,
        max_storage_errors=run.images.max_storage_errors,
        accept_lost_shards=run.images.accept_lost_shards,
    )


def decode_batches(
    run: Run,
    encoded: Iterable[bytes | ImageError],
    preprocessings: Sequence[Preprocessing],
    *,
    num_threads: int,
    isolated: bool,
    log: LoadLog,
    pin_memory: bool = False,
    batch_size: int | None = None,
) -> Iterator[Batch]:
    """Batches of a shard's encoded images, decoded and preprocessed `num_threads` at a time, or on the GPU.

    They are the run's in size unless told otherwise. `isolated` decodes each image in a child process, so that one that
    kills its decoder is named and harms no other.
    """
    batch_size = batch_size or run.batch_size
    max_pixels, shrink_to = run.images.max_pixels, _shrink_to(run, preprocessings)
    if run.decode == "gpu" and not isolated:
        device = torch.device(run.device)
        decode_group = partial(
            nvjpeg.decode_group, device=device, num_threads=num_threads, max_pixels=max_pixels, shrink_to=shrink_to
        )
        group_views = [preprocessing.apply_to_all for preprocessing in preprocessings]
        yield from load_batches_on_gpu(
            encoded, decode_group, group_views, batch_size=batch_size, device=device, log=log
        )
        return
    with ExitStack() as stack:
        decode = image_data.decode
        if isolated:
            decode = stack.enter_context(image_data.IsolatedDecoder()).decode
        yield from load_batches(
            encoded,
            partial(decode, max_pixels=max_pixels, shrink_to=shrink_to),
            [preprocessing.apply for preprocessing in preprocessings],
            batch_size=batch_size,
            num_threads=1 if isolated else num_threads,
            log=log,
            pin_memory=pin_memory,
        )


def _shrink_to(run: Run, preprocessings: Sequence[Preprocessing]) -> int | None:
    if run.images.reduced_decode is None:
        return None
    return run.images.reduced_decode * max(preprocessing.resize_size for preprocessing in preprocessings)


@dataclass(frozen=True, slots=True)
class DecodedShard:
    """A shard between the two stages of the split form.

    `rows` int64 N are the positions of the images that decoded; `pixels` holds a uint8 array N×H×W×3 per preprocessing.
    """

    shard: Shard
    attempt: int
    rows: npt.NDArray[np.int64]
    pixels: list[npt.NDArray[np.uint8]]
    log: LoadLog

    @classmethod
    def gather(
        cls, shard: Shard, attempt: int, batches: Iterable[Batch], preprocessings: Sequence[Preprocessing], log: LoadLog
    ) -> "DecodedShard":
        """Of the shard's images as one batch; of none where none decoded."""
        gathered = list(batches)
        if not gathered:
            empty = [np.empty((0, size, size, 3), np.uint8) for size in (each.crop_size for each in preprocessings)]
            return cls(shard, attempt, np.empty(0, np.int64), empty, log)
        [batch] = gathered
        pixels = [block.permute(0, 2, 3, 1).numpy() for block in batch.pixels]
        return cls(shard, attempt, np.array(batch.rows, np.int64), pixels, log)

    def batches(self, batch_size: int, *, pin_memory: bool = False) -> Iterator[Batch]:
        """The batches that the fused form would have made; copies, of a batch each: the store's pages are read-only."""
        for start in range(0, len(self.rows), batch_size):
            part = slice(start, start + batch_size)
            pixels = [_copied(block[part], pin_memory).permute(0, 3, 1, 2) for block in self.pixels]
            yield Batch(self.rows[part].tolist(), pixels)

    def to_row(self) -> dict[str, npt.NDArray[np.generic] | list[object]]:
        """As a Ray Data batch of one row; pixels stay one buffer that the next stage reads in place."""
        log = {
            "fetch_s": self.log.fetch_s,
            "decode_s": self.log.decode_s,
            "began_at": self.log.began_at,
            "errors": {row: [error.stage, error.error, error.message] for row, error in self.log.errors.items()},
        }
        head = json.dumps({"shard": asdict(self.shard), "attempt": self.attempt, "log": log})
        columns = {f"pixels_{index}": pixels[None] for index, pixels in enumerate(self.pixels)}
        return {"head": np.array([head], object), "rows": self.rows[None], **columns}

    @classmethod
    def from_row(cls, row: dict[str, npt.NDArray[np.generic]]) -> "DecodedShard":
        """What `to_row` made."""
        head = json.loads(str(row["head"][0]))
        errors = {int(index): ImageError(*error) for index, error in head["log"].pop("errors").items()}
        pixels = [np.asarray(row[f"pixels_{index}"][0], np.uint8) for index in range(len(row) - 2)]
        rows = np.asarray(row["rows"][0], np.int64)
        return cls(Shard(**head["shard"]), head["attempt"], rows, pixels, LoadLog(errors, **head["log"]))


def _copied(block: npt.NDArray[np.uint8], pin_memory: bool) -> torch.Tensor:
    copy = torch.empty(block.shape, dtype=torch.uint8, pin_memory=pin_memory)
    np.copyto(copy.numpy(), block)
    return copy


def predict_shard(
    run: Run,
    manifest: Manifest,
    shard: Shard,
    batches: Iterable[Batch],
    predictor: Predictor,
    *,
    log: LoadLog,
    attempt: int = 1,
) -> Receipt:
    """Predict the batches, write the shard's table files, return the receipt. Raises StorageError.

    Its first batch is made before the shard's turn at the networks and its files are written after it, while another
    shard of this process has them.
    """
    start, fetched_s = time.perf_counter(), log.fetch_s
    predict_s, outputs = 0.0, ShardOutputs(log.errors)
    batches = _with_first_made(batches)
    with predictor.turns.take(begun=start) as turn:
        hidden_s, busy_until = turn.began - start, turn.began
        log.fetch_s -= min(hidden_s, log.fetch_s - fetched_s)
        for predicted in predictor.map(batches):
            outputs.add(predicted.rows, predicted.outputs)
            since = max(predicted.start, busy_until)  # of batches at once the time is one
            predict_s += max(0.0, predicted.end - since)
            busy_until = max(busy_until, predicted.end)
    write_start = time.perf_counter()
    tables = build_tables(run, manifest.images(shard), predictor, outputs)
    files = write_shard(run.output_uri, run.run_id, shard.shard_id, tables)
    end = time.perf_counter()
    return Receipt(
        shard_id=shard.shard_id,
        num_images=shard.num_images,
        num_predicted=outputs.num_predicted,
        num_errors=len(log.errors),
        errors=dict(sorted(Counter(f"{error.stage}/{error.error}" for error in log.errors.values()).items())),
        files=files,
        seconds={
            "fetch": round(log.fetch_s, 4),
            "decode": round(log.decode_s, 4),
            "predict": round(predict_s, 4),
            "write": round(end - write_start, 4),
            "total": round(turn.total_s, 4),
            "cpu": round(turn.cpu_s, 4),
        },
        attempt=attempt,
        began_at=round(log.began_at + hidden_s, 3),
        ended_at=round(time.time(), 3),
    )


def _with_first_made(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same, the first of them there already."""
    iterator = iter(batches)
    return chain(list(islice(iterator, 1)), iterator)
