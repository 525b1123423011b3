"""The work on one shard, start to receipt; knows nothing of where it runs.

fetch + decode ──► a stream of batches ──► `Predictor` ──► tables ──► files ──► `Receipt`
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice

from pipeline.data.decoders import guarded_decoder
from pipeline.data.gpu_loader import GpuDecoder, Prepared, prepare
from pipeline.data.loader import Batch, LoadLog, load_batches
from pipeline.data.manifest import Manifest, Shard
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError
from pipeline.inference.commit import Receipt
from pipeline.inference.outputs import ShardOutputs, build_tables
from pipeline.inference.predictor import Predictor
from pipeline.inference.run import Run
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
    decoder: GpuDecoder | None = None,
    pin_memory: bool = False,
    batch_size: int | None = None,
) -> Iterator[Batch]:
    """Batches of one shard's images, of the run's size unless told otherwise: fetched and decoded, overlapped.

    They are decoded by `decoder` where there is one, and what that is not for by `num_threads`. These decode each image
    in a child process where they are `isolated`, so that one that kills its decoder is named and harms no other; not
    those that nvJPEG refuses. Raises StorageError.
    """
    encoded = fetch_shard(run, manifest, shard)
    if decoder is not None:
        prepared = prepare_images(run, encoded, preprocessings, num_threads=num_threads, isolated=isolated, log=log)
        return decoder.batches(prepared, batch_size=batch_size or run.batch_size, log=log)
    return decode_batches(
        run,
        encoded,
        preprocessings,
        num_threads=num_threads,
        isolated=isolated,
        log=log,
        pin_memory=pin_memory,
        batch_size=batch_size,
    )


def fetch_shard(run: Run, manifest: Manifest, shard: Shard) -> Iterator[bytes | ImageError]:
    """The encoded images of one shard, or why they cannot be had, in order.

    Raises StorageError where that looks like an outage.
    """
    return run.images.fetch(shard, manifest.images(shard))


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
    """Batches of a shard's encoded images, decoded and preprocessed on CPUs, `num_threads` at a time."""
    with guarded_decoder(isolated=isolated) as decoder:
        yield from load_batches(
            encoded,
            partial(decoder.decode, **run.images.decode_options(preprocessings)),
            [preprocessing.apply for preprocessing in preprocessings],
            batch_size=batch_size or run.batch_size,
            num_threads=1 if isolated else num_threads,
            log=log,
            pin_memory=pin_memory,
        )


def prepare_images(
    run: Run,
    encoded: Iterable[bytes | ImageError],
    preprocessings: Sequence[Preprocessing],
    *,
    num_threads: int,
    isolated: bool,
    log: LoadLog,
) -> Iterator[Prepared]:
    """A shard's encoded images for a `GpuDecoder`; those that it is not for decoded as by `decode_batches`."""
    with guarded_decoder(isolated=isolated) as decoder:
        yield from prepare(
            encoded,
            preprocessings,
            run.images.decode_options(preprocessings),
            num_threads=1 if isolated else num_threads,
            log=log,
            decode=decoder.decode,
        )


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
