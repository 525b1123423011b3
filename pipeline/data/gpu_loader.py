"""From encoded images to batches of pixels on the GPU that decodes them, in manifest order.

    encoded ──► `prepare`, on CPUs: what nvJPEG is not for is decoded ──► `GpuDecoder`: nvJPEG, resize, crop ──► batches

The halves may be in two processes: the first is most of what an image costs an interpreter, and one interpreter cannot
fetch as fast as a GPU decodes.
"""

import logging
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
from pipeline.data.loader import Batch, BusyTime, Decode, Loaded, LoadLog, load_image, or_refusal, stack, timed
from pipeline.data.nvjpeg import PlainJpeg
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError

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
    for group in _groups(timed(encoded, log)):
        sorted_out = [item if isinstance(item, ImageError) else find_plain(item) or item for item in group]
        others = [item for item in sorted_out if isinstance(item, bytes)]
        start = time.perf_counter()
        loaded = iter(list(storage.map_concurrently(load, others, num_threads)) if others else ())
        log.decode_s += time.perf_counter() - start
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
        self._threads = ThreadPoolExecutor(_GROUPS_AT_ONCE, "decode", initializer=self._take_a_stream)

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
        first_row, busy = 0, BusyTime()
        groups = storage.map_concurrently(self._decode_group, _groups(prepared), _GROUPS_AT_ONCE, pool=self._threads)
        for group in groups:
            log.decode_s += busy.add(group.start, group.end)
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
        start = time.perf_counter()
        jpegs = {row: item for row, item in enumerate(group) if isinstance(item, PlainJpeg)}
        decoded = zip(jpegs, nvjpeg.decode(list(jpegs.values()), self._device), strict=True)
        there = {row: image for row, image in decoded if image is not None}
        pixels = self._view(list(there.values())) if there else ""
        if isinstance(pixels, str) or len(there) < len(group):
            chunk, errors = self._stacked(self._loaded_one_by_one(group, there, pixels))
        else:
            chunk, errors = _Chunk(list(there), pixels), {}
        self._wait()
        return _Group(chunk, errors, len(group), start, time.perf_counter())

    def _stacked(self, loaded: dict[int, Loaded]) -> "tuple[_Chunk, dict[int, ImageError]]":
        errors = {row: item for row, item in loaded.items() if isinstance(item, ImageError)}
        viewed = {row: item for row, item in loaded.items() if not isinstance(item, ImageError)}
        views = [stack(each, pin_memory=False) for each in zip(*viewed.values(), strict=True)]
        return _Chunk(list(viewed), views), errors

    def _loaded_one_by_one(
        self, group: "list[Prepared]", decoded: dict[int, torch.Tensor], pixels: list[torch.Tensor] | str
    ) -> dict[int, Loaded]:
        """Where a group is not all JPEGs that were decoded and viewed together: each of its images, in order."""
        together = iter(()) if isinstance(pixels, str) else zip(*pixels, strict=True)
        loaded: dict[int, Loaded] = {}
        for row, item in enumerate(group):
            if row in decoded:
                views = next(together, None)
                loaded[row] = self._view_alone(decoded[row]) if views is None else list(views)
            else:
                on_cpu = self._load_on_cpu(bytes(item.data)) if isinstance(item, PlainJpeg) else item
                loaded[row] = self._moved(on_cpu)
        return loaded

    def _view(self, decoded: Sequence[torch.Tensor]) -> list[torch.Tensor] | str:
        """All views of images together; what went wrong as text: an exception holds what its frames had on the GPU."""
        try:
            return [preprocessing.apply_to_all(decoded) for preprocessing in self._preprocessings]
        except Exception as error:  # an image's fault or the GPU's: each alone tells whose, and a CPU which
            return str(error).partition("\n")[0] or type(error).__name__

    def _view_alone(self, image: torch.Tensor) -> Loaded:
        pixels = self._view([image])
        if not isinstance(pixels, str):
            return [views[0] for views in pixels]
        logger.warning("an image is preprocessed on the CPU, for on the GPU it failed: %s", pixels)
        here = image.cpu()  # raises where the GPU has failed for good: that must make no error rows
        return self._moved(or_refusal(lambda: [each.apply(here) for each in self._preprocessings]))

    def _moved(self, loaded: Loaded) -> Loaded:
        return loaded if isinstance(loaded, ImageError) else [view.to(self._device) for view in loaded]

    def _take_a_stream(self) -> None:
        """This thread's own: nvJPEG's buffers and those that kernels still read are given to no other thread."""
        if self._device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(self._device))

    def _wait(self) -> None:
        """Until what this thread has begun on the GPU is done."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


class _Chunk(NamedTuple):
    """Images in a row: their positions, and all of them stacked in each view."""

    rows: list[int]
    pixels: list[torch.Tensor]


class _Group(NamedTuple):
    """What became of `size` images, rows counted from the first of them, and when, of `time.perf_counter`."""

    chunk: _Chunk
    errors: dict[int, ImageError]
    size: int
    start: float
    end: float


def _load_on_cpu(data: bytes, *, preprocessings: Sequence[Preprocessing], decode: Decode) -> Loaded:
    return load_image(data, decode, [preprocessing.apply for preprocessing in preprocessings])


def _groups(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, _GROUP)):
        yield group
