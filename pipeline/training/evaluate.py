"""How good a network is on a labelled manifest: every image counted exactly once, whatever the number of ranks.

    manifest ──► `parts_of` a rank ──► views ──► scores ──► `Counts` ──► summed over ranks, held against the manifest

A rank takes a contiguous share of the images, cut at the image: nothing is padded, no rank is idle, and what the ranks
find is added up as integers. Images that cannot be used are counted and listed, not judged.

The scores of an image are its softmax outputs, averaged over its views, as Krizhevsky et al. 2012 ("ImageNet
Classification with Deep Convolutional Neural Networks", section 4.1) average those of ten crops; its loss is the
cross-entropy of that average, without label smoothing.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.data.decoders import NO_CAUTION, Caution, guarded_decoder
from pipeline.data.loader import Batch, Decode, LoadLog, load_batches
from pipeline.data.manifest import Manifest, Shard
from pipeline.data.readers import ReadLimits, read_shard
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError, ManifestError, RunError, StorageError
from pipeline.models.catalog import Network
from pipeline.training.counts import Counts, FailedImage, Gather, HardImage, IntArray, Outcome
from pipeline.training.protocol import Protocol
from pipeline.training.views import make_views, of_equal_shapes
from pipeline.training.worker import Worker

_CPU = torch.device("cpu")
_TOP = 5


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How to evaluate. `precision` is autocast's, None for the weights' own; `batch_size` images are one forward pass,
    fewer where multi_scale makes them larger than a crop; `max_error_rate` is the share of them that may be unusable.
    """

    preprocessing: Preprocessing
    protocol: Protocol = field(default_factory=Protocol)
    images: ReadLimits = field(default_factory=ReadLimits)
    batch_size: int = 256
    device: torch.device = _CPU
    precision: torch.dtype | None = None
    keep_hardest: int = 0
    num_threads: int = 1
    caution: Caution = NO_CAUTION
    max_error_rate: float = 1.0


# --- which images ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """`num_images` images of a shard, from row `first` on."""

    shard: Shard
    first: int
    num_images: int

    def images(self, manifest: Manifest) -> pa.Table:
        """The manifest's rows. Raises ManifestError."""
        return manifest.images(self.shard).slice(self.first, self.num_images)


def parts_of(manifest: Manifest, rank: int = 0, world_size: int = 1) -> Iterator[Part]:
    """The images [N·rank/world_size, N·(rank+1)/world_size) of the manifest's N, shard by shard; there may be none."""
    assert 0 <= rank < world_size
    start, end = (manifest.num_images * share // world_size for share in (rank, rank + 1))
    before = 0
    for shard in manifest.shards():
        first, last = max(start - before, 0), min(end - before, shard.num_images)
        if first < last:
            yield Part(shard, first, last - first)
        before += shard.num_images


def check_labels(
    manifest: Manifest, num_classes: int, *, rank: int = 0, world_size: int = 1, gather: Gather = _alone
) -> None:
    """Raise ManifestError, on every rank, where images have no label or one that is not below `num_classes`."""
    wrong = np.zeros(2, np.int64)
    for part in parts_of(manifest, rank, world_size):
        labels = part.images(manifest)["label"]
        is_outside = pc.or_(pc.less(labels, 0), pc.greater_equal(labels, num_classes))
        wrong += [labels.null_count, pc.sum(is_outside).as_py() or 0]
    num_unlabelled, num_outside = np.sum(gather(wrong), 0).tolist()
    if num_unlabelled or num_outside:
        raise ManifestError(
            f"expected a label from 0 to {num_classes - 1} for each of the {manifest.num_images} images in "
            f"{manifest.uri!r}, found {num_unlabelled} without one and {num_outside} with one outside; make a manifest "
            "with the labels and classes of the network"
        )


# --- evaluating ------------------------------------------------------------------------------------------------------


def evaluate(
    network: Network,
    manifest: Manifest,
    setup: Setup,
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = _alone,
    on_progress: Callable[[int], None] = lambda num_images: None,
) -> Outcome:
    """Judge this rank's share of the images; the counts are those of all ranks, the same on each.

    The network is on `setup.device`, in channels_last where its answers are to be those of `predict` bit for bit; it is
    run in eval mode, and each of its modules has its own mode back afterwards. `gather` is called equally often on
    every rank. `on_progress` hears the number of images done by this rank.

    Raises ManifestError as `check_labels` does, before any image is read; RunError where not one image could be judged
    or more than `max_error_rate` could not; StorageError, on the rank that meets it, where the store fails: the figures
    would depend on its weather.
    """
    assert world_size == 1 or gather is not _alone
    check_labels(manifest, network.num_classes, rank=rank, world_size=world_size, gather=gather)
    outcome = evaluate_parts(network, manifest, parts_of(manifest, rank, world_size), setup, on_progress=on_progress)
    counts = outcome.counts.summed(gather)
    assert counts.num_images + counts.num_errors == manifest.num_images
    kinds = dict(Counter(f"{failed.stage}/{failed.error}" for failed in outcome.errors))
    if not counts.num_images:
        raise RunError(
            f"expected images to judge in {manifest.uri!r}, but none of its {manifest.num_images} could be used "
            f"(rank {rank}: {kinds}). Is the folder mounted, the key valid, the network finite?"
        )
    if counts.num_errors / manifest.num_images > setup.max_error_rate:
        raise RunError(
            f"expected at most {100 * setup.max_error_rate:g}% of the {manifest.num_images} images of {manifest.uri!r} "
            f"to be unusable (max_error_rate, of a training's data), {counts.num_errors} are (rank {rank}: {kinds}); "
            "raise it, or leave them out of the manifest"
        )
    return replace(outcome, counts=counts)


def evaluate_together(
    network: Network,
    manifest: Manifest,
    setup: Setup,
    worker: Worker,
    *,
    on_progress: Callable[[int], None] = lambda num_images: None,
) -> Outcome:
    """`evaluate` on every rank; the errors, in manifest order, and the hardest images are those of all ranks too."""
    outcome = evaluate(
        network,
        manifest,
        setup,
        rank=worker.rank,
        world_size=worker.world_size,
        gather=worker.gather,
        on_progress=on_progress,
    )
    errors = [failed for of_rank in worker.gather(outcome.errors) for failed in of_rank]
    hardest = [hard for of_rank in worker.gather(outcome.hardest) for hard in of_rank]
    return Outcome(outcome.counts, errors, heapq.nlargest(setup.keep_hardest, hardest, key=lambda hard: hard.loss))


def evaluate_parts(
    network: Network,
    manifest: Manifest,
    parts: Iterable[Part],
    setup: Setup,
    *,
    on_progress: Callable[[int], None] = lambda num_images: None,
) -> Outcome:
    """Judge the images of `parts`, whose labels are known to be in order; as `evaluate`, for one process."""
    outcome = Outcome(Counts(network.num_classes), [], [])
    num_done = 0
    with (
        _in_eval_mode(network),
        torch.inference_mode(),
        guarded_decoder(isolated=setup.caution.isolated) as decoder,
    ):
        decode = partial(decoder.decode, max_pixels=setup.images.max_pixels)
        for part in parts:
            _evaluate_part(network, manifest, part, setup, decode, outcome)
            num_done += part.num_images
            on_progress(num_done)
    return outcome


def _evaluate_part(
    network: Network, manifest: Manifest, part: Part, setup: Setup, decode: Decode, outcome: Outcome
) -> None:
    """Add what is found of a part to `outcome`, in place."""
    images = part.images(manifest)
    uris, labels = images["uri"].to_pylist(), images["label"].to_numpy()
    num_judged, log = 0, LoadLog()
    for batch in _load(part.shard, images, setup, decode, log):
        judged = _judge(network, batch, labels[batch.rows], setup)
        for row in judged.rows[~judged.is_finite]:
            log.errors[int(row)] = ImageError(
                "predict", "not_finite", "expected finite logits, the network gave others"
            )
        num_judged += judged.count_in(outcome.counts)
        hard = [*outcome.hardest, *judged.hardest(uris, setup.keep_hardest)]
        outcome.hardest[:] = heapq.nlargest(setup.keep_hardest, hard, key=lambda image: image.loss)
    assert num_judged + len(log.errors) == part.num_images
    outcome.counts.num_errors += len(log.errors)
    etags = images["etag"].to_pylist()
    outcome.errors.extend(
        FailedImage(uris[row], etags[row], error.stage, error.error, error.message)
        for row, error in sorted(log.errors.items())
    )


@contextmanager
def _in_eval_mode(network: torch.nn.Module) -> Iterator[None]:
    """Each module gets its own mode back: those of a network with frozen norms differ."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True, slots=True)
class _Judged:
    """What a network makes of a batch of N: an array of N each."""

    rows: IntArray
    labels: IntArray
    predicted: IntArray
    scores: npt.NDArray[np.float32]
    losses: npt.NDArray[np.float64]
    is_in_top5: npt.NDArray[np.bool_]
    is_finite: npt.NDArray[np.bool_]

    def count_in(self, counts: Counts) -> int:
        """Add the images with finite answers to `counts`; their number."""
        good = self.is_finite
        counts.add(self.labels[good], self.predicted[good])
        counts.top5 += int(self.is_in_top5[good].sum())
        counts.loss_sum += float(self.losses[good].sum())
        return int(good.sum())

    def hardest(self, uris: list[str], count: int) -> Iterator[HardImage]:
        losses = np.where(self.is_finite, self.losses, -np.inf)
        for at in np.argsort(-losses, kind="stable")[: min(count, int(self.is_finite.sum()))]:
            ids = int(self.labels[at]), int(self.predicted[at])
            yield HardImage(uris[self.rows[at]], *ids, float(self.scores[at]), float(self.losses[at]))


def _judge(network: Network, batch: Batch, labels: npt.NDArray[np.int32], setup: Setup) -> _Judged:
    logits = _logits(network, batch, setup)
    truth = torch.from_numpy(labels.astype(np.int64)).to(logits.device)
    scores, label_ids = logits.softmax(2).mean(0).topk(min(_TOP, logits.shape[2]))
    log_scores = logits.double().log_softmax(2)[:, torch.arange(len(truth), device=truth.device), truth]
    losses = math.log(len(logits)) - log_scores.logsumexp(0)
    return _Judged(
        np.asarray(batch.rows, np.int64),
        truth.cpu().numpy(),
        label_ids[:, 0].cpu().numpy(),
        scores[:, 0].cpu().numpy(),
        losses.cpu().numpy(),
        (label_ids == truth[:, None]).any(1).cpu().numpy(),
        logits.isfinite().all(2).all(0).cpu().numpy(),
    )


def _logits(network: Network, batch: Batch, setup: Setup) -> torch.Tensor:
    """float32 V×N×C, one forward pass per view."""
    views = batch.pixels[0].unbind(1) if setup.protocol.views == "ten_crop" else batch.pixels
    logits: list[torch.Tensor] = []
    with torch.autocast(setup.device.type, setup.precision, enabled=setup.precision is not None):
        for view in views:
            images = view.to(setup.device, non_blocking=True, memory_format=torch.channels_last)
            seen = [images, images.flip(3)] if setup.protocol.has_mirrors else [images]
            logits += [network(setup.preprocessing.normalise(pixels))[0].float() for pixels in seen]
    return torch.stack(logits)


# --- reading images ---------------------------------------------------------------------------------------------------


def _load(shard: Shard, images: pa.Table, setup: Setup, decode: Decode, log: LoadLog) -> Iterator[Batch]:
    encoded = read_shard(
        shard,
        images,
        allowed_roots=setup.images.allowed_roots,
        max_bytes=setup.images.max_bytes,
        concurrency=setup.images.fetch_concurrency,
    )
    is_whole = setup.protocol.views == "multi_scale"
    batches = load_batches(
        _withholding(setup.caution.known, images["uri"].to_pylist(), _refusing_storage_errors(encoded)),
        decode,
        make_views(setup.protocol, setup.preprocessing),
        batch_size=1 if is_whole else setup.batch_size,
        num_threads=1 if setup.caution.isolated else setup.num_threads,
        log=log,
    )
    return of_equal_shapes(batches, setup.batch_size * setup.preprocessing.crop_size**2) if is_whole else batches


def _withholding(
    known: Mapping[str, ImageError], uris: Sequence[str], encoded: Iterable[bytes | ImageError]
) -> Iterator[bytes | ImageError]:
    for uri, item in zip(uris, encoded, strict=True):
        yield known.get(uri, item)


def _refusing_storage_errors(encoded: Iterable[bytes | ImageError]) -> Iterator[bytes | ImageError]:
    for item in encoded:
        if isinstance(item, ImageError) and item.error == "storage_error":
            raise StorageError(
                f"{item.with_cause}; an evaluation that skips such images would be another one: run it again later"
            )
        yield item
