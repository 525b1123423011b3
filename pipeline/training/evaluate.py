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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field, model_validator

from pipeline import storage
from pipeline.config import Section
from pipeline.data.images import decode
from pipeline.data.loader import Batch, LoadLog, load_batches
from pipeline.data.manifest import Manifest, Shard
from pipeline.data.readers import read_shard
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ConfigError, ImageError, ManifestError, RunError, StorageError
from pipeline.models.catalog import Network

IntArray: TypeAlias = npt.NDArray[np.int64]
Reduce: TypeAlias = Callable[[torch.Tensor], object]
"""Sums a tensor over all ranks, in place, as `torch.distributed.all_reduce` does."""

_CPU = torch.device("cpu")
_TOP = 5
_MAX_ASPECT_RATIO = 16  # of an image taken whole: its forward pass must fit the device
_BATCHES_HELD = 4  # of images of other shapes, while a batch of one shape fills


# --- what is asked ---------------------------------------------------------------------------------------------------


class Protocol(Section):
    """Which views of an image a network judges; their scores are averaged."""

    views: Literal["one_crop", "ten_crop", "multi_scale"] = "one_crop"
    """one_crop: that of the preprocessing, which inference uses. ten_crop: the four corners and the centre of the
    resized image, and their mirror images (Krizhevsky et al. 2012, section 4.1). multi_scale: the whole image, resized
    to each of `scales`, global average pooling making one score of it (He et al. 2015, arXiv:1512.03385, section
    3.4)."""
    flip: bool = False
    """Average with the mirror image, for one_crop and multi_scale."""
    scales: list[Annotated[int, Field(ge=2, le=2048)]] = Field([224, 256, 384, 480, 640], min_length=1)
    """Shorter sides after resizing, in pixels, for multi_scale."""

    @model_validator(mode="after")
    def _not_twice(self) -> Self:
        if self.flip and self.views == "ten_crop":
            raise ValueError("expected flip: false, since half of the ten crops are mirror images already")
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"expected each of scales once, got {self.scales}")
        return self

    @property
    def has_mirrors(self) -> bool:
        return self.flip or self.views == "ten_crop"

    def describe(self, preprocessing: Preprocessing) -> str:
        """The protocol in words, for `Metric.protocol`: "1-crop 224 of 256, bilinear"."""
        crop = f"{preprocessing.crop_size} of {preprocessing.resize_size}"
        views = {
            "one_crop": f"1-crop {crop}",
            "ten_crop": f"10-crop {crop}",
            "multi_scale": f"multi-scale {'/'.join(map(str, self.scales))}, whole image",
        }[self.views]
        return ", ".join([views, preprocessing.interpolation, *(["with mirror image"] if self.flip else [])])

    def view_makers(self, preprocessing: Preprocessing) -> list[Preprocessing]:
        """What makes an image's pixels ready for the device. Raises ConfigError where ten crops do not fit."""
        fields = preprocessing.model_dump()
        if self.views == "one_crop":
            return [preprocessing]
        if self.views == "multi_scale":
            return [_Whole(**{**fields, "resize_size": scale}) for scale in self.scales]
        if preprocessing.resize_size < preprocessing.crop_size:
            raise ConfigError(
                f"ten_crop: expected a preprocessing whose resize_size is at least its crop_size, got "
                f"{preprocessing.resize_size} and {preprocessing.crop_size}; use one_crop"
            )
        return [_FiveCrops(**fields)]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How to evaluate. `precision` is autocast's, None for the weights' own; `batch_size` images are one forward pass,
    fewer where multi_scale makes them larger than a crop.
    """

    preprocessing: Preprocessing
    protocol: Protocol = field(default_factory=Protocol)
    batch_size: int = 256
    device: torch.device = _CPU
    precision: torch.dtype | None = None
    keep_hardest: int = 0
    allowed_roots: Sequence[str] = tuple(f"{scheme}://" for scheme in storage.SCHEMES)
    max_pixels: int = 100_000_000
    max_bytes: int = 1 << 30
    fetch_concurrency: int = 32
    num_threads: int = 1


# --- what is found ---------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Counts:
    """What was counted; adds up over ranks. `confusion` int64 C×C holds the images judged: row truth, column answer."""

    confusion: IntArray
    num_errors: int = 0
    top5: int = 0
    loss_sum: float = 0.0

    @classmethod
    def empty(cls, num_classes: int) -> Self:
        return cls(np.zeros((num_classes, num_classes), np.int64))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.confusion + other.confusion,
            self.num_errors + other.num_errors,
            self.top5 + other.top5,
            self.loss_sum + other.loss_sum,
        )

    def summed(self, reduce: Reduce, device: torch.device) -> "Counts":
        """The counts of all ranks together."""
        tensor = self.to_tensor().to(device)
        loss_sum = torch.tensor(self.loss_sum, dtype=torch.float64, device=device)
        reduce(tensor)
        reduce(loss_sum)
        return Counts.from_tensor(tensor, loss_sum.item())

    def to_tensor(self) -> torch.Tensor:
        """All integers as one int64 vector of 2 + C·C; the loss stays behind."""
        return torch.from_numpy(np.concatenate([[self.num_errors, self.top5], self.confusion.ravel()]).astype(np.int64))

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor, loss_sum: float) -> Self:
        """What `to_tensor` made, and the loss beside it."""
        num_errors, top5 = tensor[:2].tolist()
        num_classes = math.isqrt(len(tensor) - 2)
        confusion = tensor[2:].cpu().numpy().reshape(num_classes, num_classes)
        return cls(confusion, num_errors, top5, loss_sum)

    @property
    def num_images(self) -> int:
        """The images judged; those of `num_errors` are not among them."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> int:
        return int(self.confusion.trace())

    @property
    def top1_accuracy(self) -> float:
        return _ratio(self.top1, self.num_images)

    @property
    def top5_accuracy(self) -> float:
        """The share of images whose class is among the best five, or among all where there are fewer."""
        return _ratio(self.top5, self.num_images)

    @property
    def error(self) -> float:
        return 1 - self.top1_accuracy

    @property
    def loss(self) -> float:
        """The mean cross-entropy."""
        return _ratio(self.loss_sum, self.num_images)

    @property
    def per_class_accuracy(self) -> npt.NDArray[np.float64]:
        """float64 C; NaN for a class without images."""
        num_images = self.confusion.sum(1)
        accuracy = np.full(len(num_images), np.nan)
        np.divide(self.confusion.diagonal(), num_images, out=accuracy, where=num_images > 0)
        return accuracy

    def as_dict(self) -> dict[str, Any]:
        """The figures for JSON, NaN as None; all but the confusion matrix."""
        names = ("num_images", "num_errors", "top1", "top5", "top1_accuracy", "top5_accuracy", "error", "loss")
        per_class = self.per_class_accuracy.tolist()
        figures = {name: getattr(self, name) for name in names} | {"per_class_accuracy": per_class}
        return {name: _without_nan(figure) for name, figure in figures.items()}


@dataclass(frozen=True, slots=True)
class FailedImage:
    """An image that was not judged: a row of the `errors` table."""

    uri: str
    etag: str | None
    stage: str
    error: str
    message: str


@dataclass(frozen=True, slots=True)
class HardImage:
    """An image judged with a high loss; `score` is that of `predicted_id`."""

    uri: str
    label_id: int
    predicted_id: int
    score: float
    loss: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an evaluation found; `errors` and `hardest` (highest loss first) are this rank's own."""

    counts: Counts
    errors: list[FailedImage]
    hardest: list[HardImage]


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
    manifest: Manifest,
    num_classes: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    reduce: Reduce | None = None,
    device: torch.device = _CPU,
) -> None:
    """Raise ManifestError, on every rank, where images have no label or one that is not below `num_classes`."""
    wrong = torch.zeros(2, dtype=torch.int64)
    for part in parts_of(manifest, rank, world_size):
        labels = part.images(manifest)["label"]
        is_outside = pc.or_(pc.less(labels, 0), pc.greater_equal(labels, num_classes))
        wrong += torch.tensor([labels.null_count, pc.sum(is_outside).as_py() or 0])
    wrong = wrong.to(device)
    if reduce is not None:
        reduce(wrong)
    num_unlabelled, num_outside = wrong.tolist()
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
    reduce: Reduce | None = None,
    on_progress: Callable[[int], None] = lambda num_images: None,
) -> Outcome:
    """Judge this rank's share of the images; the counts are those of all ranks, the same on each.

    The network is on `setup.device`, in channels_last where its answers are to be those of `predict` bit for bit; it is
    run in eval mode, and each of its modules has its own mode back afterwards. `reduce` is called equally often on
    every rank, with tensors on that device. `on_progress` hears the number of images done by this rank.

    Raises ManifestError as `check_labels` does, before any image is read; RunError where not one image could be judged;
    StorageError, on the rank that meets it, where the store fails: the figures would depend on its weather.
    """
    assert world_size == 1 or reduce is not None
    num_classes, device = network.num_classes, setup.device
    check_labels(manifest, num_classes, rank=rank, world_size=world_size, reduce=reduce, device=device)
    outcome = evaluate_parts(network, manifest, parts_of(manifest, rank, world_size), setup, on_progress=on_progress)
    counts = outcome.counts if reduce is None else outcome.counts.summed(reduce, device)
    assert counts.num_images + counts.num_errors == manifest.num_images
    if not counts.num_images:
        kinds = dict(Counter(f"{failed.stage}/{failed.error}" for failed in outcome.errors))
        raise RunError(
            f"expected images to judge in {manifest.uri!r}, but none of its {manifest.num_images} could be used "
            f"(rank {rank}: {kinds}). Is the folder mounted, the key valid, the network finite?"
        )
    return replace(outcome, counts=counts)


def evaluate_parts(
    network: Network,
    manifest: Manifest,
    parts: Iterable[Part],
    setup: Setup,
    *,
    on_progress: Callable[[int], None] = lambda num_images: None,
) -> Outcome:
    """Judge the images of `parts`, whose labels are known to be in order; as `evaluate`, for one process."""
    outcome = Outcome(Counts.empty(network.num_classes), [], [])
    num_done = 0
    with _in_eval_mode(network), torch.inference_mode():
        for part in parts:
            outcome = _evaluate_part(network, manifest, part, setup, outcome)
            num_done += part.num_images
            on_progress(num_done)
    return outcome


def _evaluate_part(network: Network, manifest: Manifest, part: Part, setup: Setup, before: Outcome) -> Outcome:
    images = part.images(manifest)
    uris, labels = images["uri"].to_pylist(), images["label"].to_numpy()
    counts, hardest = Counts.empty(network.num_classes), before.hardest
    log = LoadLog()
    for batch in _load(part.shard, images, setup, log):
        judged = _judge(network, batch, labels[batch.rows], setup)
        for row in judged.rows[~judged.is_finite]:
            log.errors[int(row)] = ImageError(
                "predict", "not_finite", "expected finite logits, the network gave others"
            )
        judged.count_in(counts)
        hardest = heapq.nlargest(
            setup.keep_hardest, [*hardest, *judged.hardest(uris, setup.keep_hardest)], key=lambda hard: hard.loss
        )
    counts.num_errors = len(log.errors)
    assert counts.num_images + counts.num_errors == part.num_images
    etags = images["etag"].to_pylist()
    errors = [
        FailedImage(uris[row], etags[row], error.stage, error.error, error.message)
        for row, error in sorted(log.errors.items())
    ]
    return Outcome(before.counts + counts, before.errors + errors, hardest)


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

    def count_in(self, counts: Counts) -> None:
        good = self.is_finite
        np.add.at(counts.confusion, (self.labels[good], self.predicted[good]), 1)
        counts.top5 += int(self.is_in_top5[good].sum())
        counts.loss_sum += float(self.losses[good].sum())

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


# --- views -----------------------------------------------------------------------------------------------------------


class _FiveCrops(Preprocessing):
    """Four corners and the centre, uint8 5×3×crop_size×crop_size; their mirror images are made on the device."""

    def _crop(self, image: torch.Tensor) -> torch.Tensor:
        size = self.crop_size
        rows, columns = [[slice(None, size), slice(side - size, None)] for side in image.shape[1:]]
        corners = [image[:, row, column] for row in rows for column in columns]
        return torch.stack([*corners, super()._crop(image)])


class _Whole(Preprocessing):
    """The whole resized image, uint8 3×H×W."""

    def _crop(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        short, long = sorted((height, width))
        if long > _MAX_ASPECT_RATIO * short:
            raise ImageError(
                "preprocess",
                "aspect_ratio",
                f"expected a long side of at most {_MAX_ASPECT_RATIO} short ones for multi_scale, got {width}×{height}",
            )
        return super().resized_size(height, width)


def _load(shard: Shard, images: pa.Table, setup: Setup, log: LoadLog) -> Iterator[Batch]:
    encoded = read_shard(
        shard,
        images,
        allowed_roots=setup.allowed_roots,
        max_bytes=setup.max_bytes,
        concurrency=setup.fetch_concurrency,
    )
    is_whole = setup.protocol.views == "multi_scale"
    batches = load_batches(
        _refusing_outages(encoded),
        partial(decode, max_pixels=setup.max_pixels),
        setup.protocol.view_makers(setup.preprocessing),
        batch_size=1 if is_whole else setup.batch_size,
        num_threads=setup.num_threads,
        log=log,
    )
    return _of_equal_shapes(batches, setup.batch_size * setup.preprocessing.crop_size**2) if is_whole else batches


def _of_equal_shapes(singles: Iterable[Batch], max_pixels: int) -> Iterator[Batch]:
    """Batches of one image, joined where their shapes agree, to at most `max_pixels` of the largest view, or one image.

    At most some times that is held back.
    """
    waiting: dict[tuple[torch.Size, ...], list[Batch]] = {}
    num_held = 0  # pixels of the largest views
    for single in singles:
        shapes = tuple(pixels.shape for pixels in single.pixels)
        size = max(shape[2] * shape[3] for shape in shapes)
        waiting.setdefault(shapes, []).append(single)
        num_held += size
        if (len(waiting[shapes]) + 1) * size > max_pixels:
            num_held -= len(waiting[shapes]) * size
            yield _joined(waiting.pop(shapes))
        elif num_held > _BATCHES_HELD * max_pixels:
            num_held = 0
            yield from map(_joined, waiting.values())
            waiting.clear()
    yield from map(_joined, waiting.values())


def _joined(batches: list[Batch]) -> Batch:
    rows = [row for batch in batches for row in batch.rows]
    return Batch(rows, [torch.cat(pixels) for pixels in zip(*(batch.pixels for batch in batches), strict=True)])


def _refusing_outages(encoded: Iterable[bytes | ImageError]) -> Iterator[bytes | ImageError]:
    for item in encoded:
        if isinstance(item, ImageError) and item.error == "storage_error":
            raise StorageError(f"{item}; an evaluation that skips such images would be another one: run it again later")
        yield item


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else math.nan


def _without_nan(figure: Any) -> Any:
    if isinstance(figure, list):
        return [_without_nan(item) for item in figure]
    return None if isinstance(figure, float) and math.isnan(figure) else figure
