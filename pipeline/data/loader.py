"""From a shard to batches of pixels: fetch, decode and preprocess overlapped, in manifest order."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch

from pipeline import storage
from pipeline.data.decoders import IsolatedDecoder
from pipeline.data.manifest import Manifest
from pipeline.data.readers import ReadLimits, read_shard
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError, RunError

logger = logging.getLogger(__name__)

_SHARDS_SAMPLED = 8

Decode: TypeAlias = Callable[[bytes], torch.Tensor]
View: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Makes a decoded image, uint8 3×H×W, ready to be stacked, as `Preprocessing.apply` does."""
Loaded: TypeAlias = list[torch.Tensor] | ImageError
"""An image in all its views, or why there is none."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Images ready for the device.

    `rows` are their positions in the shard; `pixels` holds one uint8 tensor per view asked for, N× what the view makes
    of an image, mostly 3×H×W.
    """

    rows: list[int]
    pixels: list[torch.Tensor]


@dataclass(slots=True)
class LoadLog:
    """What loading a shard left to tell: the images that failed, by row, and the seconds spent.

    `fetch_s` is the time spent waiting for bytes, `decode_s` that of the CPUs which the decoding threads used. Where a
    GPU decodes, `decode_s` is the time that it was at it, and `fetch_s` has what CPUs decode of its images too.
    `began_at` is unix seconds.
    """

    errors: dict[int, ImageError] = field(default_factory=dict)
    fetch_s: float = 0.0
    decode_s: float = 0.0
    began_at: float = field(default_factory=time.time)


def load_batches(
    encoded: Iterable[bytes | ImageError],
    decode: Decode,
    views: Sequence[View],
    *,
    batch_size: int,
    num_threads: int,
    log: LoadLog,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches of `batch_size` images (the last may be shorter) from the encoded images of one shard, in order.

    Each image is decoded once, whatever the number of views. One that fails goes to `log.errors` and leaves no gap:
    which images share a batch depends on the shard alone. Pinned memory reaches a GPU without another copy.
    """

    def load(item: bytes | ImageError) -> tuple[Loaded, float]:
        start = time.thread_time()  # not the wall's: a forward pass that holds the interpreter would count as decoding
        pixels = item if isinstance(item, ImageError) else load_image(item, decode, views)
        return pixels, time.thread_time() - start

    loaded = storage.map_concurrently(load, timed(encoded, log), num_threads)
    return _gather(_adding_seconds(loaded, log), batch_size, log, pin_memory)


def _adding_seconds(loaded: Iterable[tuple[Loaded, float]], log: LoadLog) -> Iterator[Loaded]:
    for pixels, seconds in loaded:
        log.decode_s += seconds
        yield pixels


def _gather(loaded: Iterable[Loaded], batch_size: int, log: LoadLog, pin_memory: bool) -> Iterator[Batch]:
    rows: list[int] = []
    images: list[list[torch.Tensor]] = []
    for row, pixels in enumerate(loaded):
        if isinstance(pixels, ImageError):
            log.errors[row] = pixels
            continue
        rows.append(row)
        images.append(pixels)
        if len(rows) == batch_size:
            yield _stack(rows, images, pin_memory)
            rows, images = [], []
    if rows:
        yield _stack(rows, images, pin_memory)


def sample_pixels(
    manifest: Manifest, limits: ReadLimits, preprocessing: Preprocessing, num_images: int
) -> torch.Tensor:
    """Some `num_images` of the manifest, of shards all over it, for a network to be tried on: uint8 N×3×S×S.

    Fewer where there are fewer or many cannot be had, perhaps none: a warning says why.
    """
    every = max(1, manifest.num_shards // _SHARDS_SAMPLED)
    shards = [shard for shard in manifest.shards() if shard.shard_id % every == 0][:_SHARDS_SAMPLED]
    loaded: list[Loaded] = []
    with IsolatedDecoder() as decoder:
        decode = partial(decoder.decode, max_pixels=limits.max_pixels)
        for shard in shards:
            images = manifest.images(shard).slice(0, -(-num_images // len(shards)))
            encoded = read_shard(shard, images, allowed_roots=limits.allowed_roots, max_bytes=limits.max_bytes)
            loaded += [
                item if isinstance(item, ImageError) else load_image(item, decode, [preprocessing.apply])
                for item in encoded
            ]
    if refused := [error for error in loaded if isinstance(error, ImageError)]:
        told = (len(refused), len(loaded), manifest.uri, refused[0].with_cause)
        logger.warning("%d of %d images to try a network on could not be had of %s; the first: %s", *told)
    found = [images[0] for images in loaded if not isinstance(images, ImageError)]
    return stack(found[:num_images], pin_memory=False) if found else torch.empty(0, dtype=torch.uint8)


def load_image(data: bytes, decode: Decode, views: Sequence[View]) -> Loaded:
    """An encoded image in all its views, or why there is none."""

    def load() -> list[torch.Tensor]:
        image = decode(data)
        return [view(image) for view in views]

    return or_refusal(load)


def or_refusal(load: Callable[[], list[torch.Tensor]]) -> Loaded:
    """What `load` makes of one image, or why it does not. Raises RunError."""
    try:
        return load()
    except RunError:  # a decoder's process cannot be started, which is no image's fault
        raise
    except ImageError as error:
        return error
    except Exception as error:  # whatever one image does to a library is that image's
        return ImageError("preprocess", "failed", f"expected an image to preprocess, got {type(error).__name__}")


def timed(encoded: Iterable[bytes | ImageError], log: LoadLog) -> Iterator[bytes | ImageError]:
    """`encoded`, the time spent waiting for it added to `log.fetch_s`."""
    iterator = iter(encoded)
    while True:
        start = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            log.fetch_s += time.perf_counter() - start
        yield item


def _stack(rows: list[int], images: list[list[torch.Tensor]], pin_memory: bool) -> Batch:
    return Batch(rows, [stack(pixels, pin_memory=pin_memory) for pixels in zip(*images, strict=True)])


def stack(images: Sequence[torch.Tensor], *, pin_memory: bool) -> torch.Tensor:
    """uint8 tensors of one shape as one; images 3×H×W in channels_last memory, which is theirs and the networks'."""
    order = torch.channels_last if images[0].ndim == 3 else torch.contiguous_format
    shape, device = (len(images), *images[0].shape), images[0].device
    stacked = torch.empty(shape, dtype=torch.uint8, device=device, memory_format=order, pin_memory=pin_memory)
    return torch.stack(list(images), out=stacked)
