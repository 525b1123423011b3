"""From encoded images to batches of pixels on the GPU that decodes them, in manifest order.

    encoded ──► `prepare`, on CPUs: what nvJPEG is not for is decoded ──► `GpuDecoder`: nvJPEG, resize, crop ──► batches

The halves may be in two processes: the first is most of what an image costs an interpreter, and one interpreter cannot
fetch as fast as a GPU decodes.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeAlias, TypeVar

import torch

from pipeline import storage
from pipeline.data import images, nvjpeg
from pipeline.data.images import DecodeOptions
from pipeline.data.loader import Batch, Decode, Loaded, LoadLog, load_image, or_refusal, stack, timed
from pipeline.data.nvjpeg import PlainJpeg
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError, first_line

_GROUP = 64  # images that are decoded at once
_GROUPS_AT_ONCE = 2  # while nvJPEG has one, the other's kernels are launched

Prepared: TypeAlias = PlainJpeg | Loaded
"""A JPEG for the GPU; or an image in all its views, on the CPU; or why there is none."""
T = TypeVar("T")

logger = logging.getLogger(__name__)


def prepare(
    encoded: Iterable[bytes | ImageError],
    preprocessings: Sequence[Preprocessing],
    options: DecodeOptions,
    *,
    num_threads: int,
    log: LoadLog,
    decode: Callable[..., torch.Tensor] = images.decode,
) -> Iterator[Prepared]:
    """The images of a shard for `GpuDecoder.batches`; those that nvJPEG is not for are decoded, `num_threads` at once.

    In the place of `images.decode` another may stand, such as an IsolatedDecoder's.
    """
    load = partial(_load_on_cpu, preprocessings=preprocessings, decode=partial(decode, **options))
    find_plain = partial(nvjpeg.plain_jpeg, **options)
    with ThreadPoolExecutor(num_threads, "decode") as threads:  # started when first used
        for group in _groups(timed(encoded, log)):
            start = time.perf_counter()
            sorted_out = [item if isinstance(item, ImageError) else find_plain(item) or item for item in group]
            others = [item for item in sorted_out if isinstance(item, bytes)]
            loaded = iter(list(threads.map(load, others)))
            log.fetch_s += time.perf_counter() - start
            yield from (next(loaded) if isinstance(item, bytes) else item for item in sorted_out)


class GpuDecoder:
    """Decodes and preprocesses on a GPU for all the shards of a process; heavy, so built where it runs.

    Raises RunError where that GPU cannot.
    """

    def __init__(self, device: torch.device, preprocessings: Sequence[Preprocessing], options: DecodeOptions) -> None:
        nvjpeg.require(device, preprocessings)
        self._device, self._preprocessings = device, preprocessings
        decode = partial(images.decode, **options)
        self._load_on_cpu = partial(_load_on_cpu, preprocessings=preprocessings, decode=decode)
        self._clock = _BusyClock()
        self._threads = ThreadPoolExecutor(_GROUPS_AT_ONCE, "decode", _take_a_stream, (device,))

    def batches(self, prepared: Iterable[Prepared], *, batch_size: int, log: LoadLog) -> Iterator[Batch]:
        """The batches that `loader.load_batches` would make of the images, their pixels on the GPU."""
        waiting: list[_Chunk] = []
        for chunk in self._chunks(prepared, log):
            waiting.append(chunk)
            while sum(len(chunk.rows) for chunk in waiting) >= batch_size:
                batch, rest = self._cut(waiting, batch_size)
                waiting = [rest]
                yield batch
        if any(chunk.rows for chunk in waiting):
            yield self._cut(waiting, batch_size)[0]

    def _chunks(self, prepared: Iterable[Prepared], log: LoadLog) -> "Iterator[_Chunk]":
        """The images group by group, rows counted from the shard's first."""
        first_row = 0
        groups = storage.map_concurrently(self._decode_group, _groups(prepared), _GROUPS_AT_ONCE, pool=self._threads)
        for group in groups:
            log.decode_s += group.seconds
            log.errors.update({first_row + row: error for row, error in group.errors.items()})
            yield _Chunk([first_row + row for row in group.chunk.rows], group.chunk.pixels)
            first_row += group.size

    def _cut(self, chunks: "list[_Chunk]", batch_size: int) -> "tuple[Batch, _Chunk]":
        """The first `batch_size` of the images, and the rest."""
        rows = [row for chunk in chunks for row in chunk.rows]
        parts = zip(*(chunk.pixels for chunk in chunks if chunk.rows), strict=True)
        pixels = [torch.cat(part) if len(part) > 1 else part[0] for part in parts]
        self._wait()  # while the chunks are still held; other threads' streams may read the batch then
        batch = Batch(rows[:batch_size], [view[:batch_size] for view in pixels])
        return batch, _Chunk(rows[batch_size:], [view[batch_size:] for view in pixels])

    def _decode_group(self, group: "list[Prepared]") -> "_Group":
        self._clock.start()
        try:
            chunk, errors = self._decoded(group)
            self._wait()
        finally:
            seconds = self._clock.stop()
        return _Group(chunk, errors, len(group), seconds)

    def _decoded(self, group: "list[Prepared]") -> "tuple[_Chunk, dict[int, ImageError]]":
        jpegs = {row: item for row, item in enumerate(group) if isinstance(item, PlainJpeg)}
        decoded = zip(jpegs, nvjpeg.decode(list(jpegs.values()), self._device), strict=True)
        there = {row: image for row, image in decoded if image is not None}
        pixels = self._view_together(list(there.values()))
        if pixels is not None and len(there) == len(group):
            return _Chunk(list(there), pixels), {}
        loaded = self._loaded_one_by_one(group, there, pixels)
        errors = {row: item for row, item in loaded.items() if isinstance(item, ImageError)}
        viewed = {row: item for row, item in loaded.items() if not isinstance(item, ImageError)}
        views = [stack(each, pin_memory=False) for each in zip(*viewed.values(), strict=True)]
        return _Chunk(list(viewed), views), errors

    def _loaded_one_by_one(
        self, group: "list[Prepared]", decoded: dict[int, torch.Tensor], pixels: list[torch.Tensor] | None
    ) -> dict[int, Loaded]:
        """Where a group is not all JPEGs that were decoded and viewed together: each of its images, in order."""
        together = iter(()) if pixels is None else zip(*pixels, strict=True)
        loaded: dict[int, Loaded] = {}
        for row, item in enumerate(group):
            if row in decoded:
                views = next(together, None)
                loaded[row] = self._view_alone(decoded[row]) if views is None else list(views)
            else:
                on_cpu = self._load_on_cpu(bytes(item.data)) if isinstance(item, PlainJpeg) else item
                loaded[row] = self._moved(on_cpu)
        return loaded

    def _views(self, decoded: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [preprocessing.apply_to_all(decoded) for preprocessing in self._preprocessings]

    def _view_together(self, decoded: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """All views of images of the GPU; None where there are none or one fails: each alone tells which."""
        try:
            return self._views(decoded) if decoded else None
        except Exception:  # an image's fault or the GPU's
            return None

    def _view_alone(self, image: torch.Tensor) -> Loaded:
        try:
            return [views[0] for views in self._views([image])]
        except Exception as error:  # a CPU tells whose fault it is
            said = first_line(error)
        logger.warning("an image is preprocessed on the CPU, for on the GPU it failed: %s", said)
        here = image.cpu()  # raises where the GPU has failed for good: that must make no error rows
        return self._moved(or_refusal(lambda: [each.apply(here) for each in self._preprocessings]))

    def _moved(self, loaded: Loaded) -> Loaded:
        return loaded if isinstance(loaded, ImageError) else [view.to(self._device) for view in loaded]

    def _wait(self) -> None:
        """Until what this thread has begun on the GPU is done."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


class _Chunk(NamedTuple):
    """Images in a row: their positions, and all of them stacked in each view."""

    rows: list[int]
    pixels: list[torch.Tensor]


class _Group(NamedTuple):
    """What became of `size` images, rows counted from the first of them, and the seconds that were not yet counted."""

    chunk: _Chunk
    errors: dict[int, ImageError]
    size: int
    seconds: float


class _BusyClock:
    """Runs while at least one of several threads is at work; who stops is told the seconds that nobody was told yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_working, self._told_until = 0, 0.0

    def start(self) -> None:
        """One more is at work."""
        with self._lock:
            if not self._num_working:
                self._told_until = time.perf_counter()
            self._num_working += 1

    def stop(self) -> float:
        """One less is."""
        with self._lock:
            self._num_working -= 1
            since, self._told_until = self._told_until, time.perf_counter()
            return self._told_until - since


def _take_a_stream(device: torch.device) -> None:
    """This thread's own: what kernels still read, and what nvJPEG writes, is given to no other thread."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))


def _load_on_cpu(data: bytes, *, preprocessings: Sequence[Preprocessing], decode: Decode) -> Loaded:
    return load_image(data, decode, [preprocessing.apply for preprocessing in preprocessings])


def _groups(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, _GROUP)):
        yield group
