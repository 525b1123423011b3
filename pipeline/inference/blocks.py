"""A shard between the two stages of the split form, as a row of Ray Data whose large columns are read in place.

decode on CPUs    `DecodedShard`     pixels, of all images that decoded
decode on GPUs    `PreparedShard`    encoded JPEGs, and the pixels of what nvJPEG is not for
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.gpu_loader import Prepared
from pipeline.data.images import as_tensor
from pipeline.data.loader import Batch, LoadLog
from pipeline.data.manifest import Shard
from pipeline.data.nvjpeg import PlainJpeg
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError

_MOST_BYTES = 512 << 20  # of a shard that is handed on encoded; as many tasks as there are CPUs hold one
_MOST_PIXELS = 1 << 30  # bytes of one that is handed on decoded, of which its task holds two copies
Row: TypeAlias = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class DecodedShard:
    """A shard that CPUs have decoded.

    `rows` int64 N are the positions of the images that decoded; `pixels` holds a uint8 array N×H×W×3 per preprocessing.
    It is not whole where that would be too many bytes for tasks to hold, and the actor is to fetch and decode them; the
    arrays are there and empty then, for one block of Ray's may have rows of either kind.
    """

    shard: Shard
    attempt: int
    rows: npt.NDArray[np.int64]
    pixels: list[npt.NDArray[np.uint8]]
    log: LoadLog
    is_whole: bool = True

    @classmethod
    def gather(
        cls, shard: Shard, attempt: int, batches: Iterable[Batch], preprocessings: Sequence[Preprocessing], log: LoadLog
    ) -> "DecodedShard":
        """Of the shard's images as one batch; of none where none decoded. What is too much is not begun."""
        is_whole = shard.num_images * sum(3 * each.crop_size**2 for each in preprocessings) <= _MOST_PIXELS
        gathered = list(batches) if is_whole else []
        if not gathered:
            empty = [np.empty((0, size, size, 3), np.uint8) for size in (each.crop_size for each in preprocessings)]
            return cls(shard, attempt, np.empty(0, np.int64), empty, log, is_whole)
        [batch] = gathered
        pixels = [block.permute(0, 2, 3, 1).numpy() for block in batch.pixels]
        return cls(shard, attempt, np.array(batch.rows, np.int64), pixels, log)

    def batches(self, batch_size: int, *, pin_memory: bool = False) -> Iterator[Batch]:
        """The batches that the fused form would have made; copies, of a batch each: the store's pages are read-only."""
        for start in range(0, len(self.rows), batch_size):
            part = slice(start, start + batch_size)
            pixels = [_copied(block[part], pin_memory).permute(0, 3, 1, 2) for block in self.pixels]
            yield Batch(self.rows[part].tolist(), pixels)

    def to_row(self) -> Row:
        """As a Ray Data batch of one row."""
        columns = {f"pixels_{index}": pixels[None] for index, pixels in enumerate(self.pixels)}
        errors = {row: [error.stage, error.error, error.message] for row, error in self.log.errors.items()}
        head = {**_facts(self.shard, self.attempt, self.log), "errors": errors, "is_whole": self.is_whole}
        return {"head": _text(head), "rows": self.rows[None], **columns}

    @classmethod
    def from_row(cls, row: Row) -> "DecodedShard":
        """What `to_row` made."""
        head = json.loads(str(row["head"][0]))
        shard, attempt, log = _of_facts(head)
        log.errors.update({int(row): ImageError(*error) for row, error in head["errors"].items()})
        pixels = [np.asarray(row[f"pixels_{index}"][0], np.uint8) for index in range(len(row) - 2)]
        return cls(shard, attempt, np.asarray(row["rows"][0], np.int64), pixels, log, head["is_whole"])


@dataclass(frozen=True, slots=True)
class PreparedShard:
    """A shard whose JPEGs a GPU is to decode.

    `images` are all of its images in order, as views of the row they came in; None where they are too many bytes for
    tasks to hold, and the actor is to fetch them.
    """

    shard: Shard
    attempt: int
    images: list[Prepared] | None
    log: LoadLog

    @staticmethod
    def row_of(shard: Shard, attempt: int, prepared: Iterable[Prepared], log: LoadLog) -> Row:
        """What `gpu_loader.prepare` gives, as a Ray Data batch of one row; not read to its end where it is too much."""
        block, told = bytearray(), []
        is_whole = shard.num_bytes <= _MOST_BYTES
        for item in prepared if is_whole else ():
            told.append(_add(item, block))
            if len(block) > _MOST_BYTES:  # the manifest did not know their sizes, or pixels are more than they were
                is_whole, block, told = False, bytearray(), []
                break
        head = {**_facts(shard, attempt, log), "images": told if is_whole else None}
        return {"head": _text(head), "block": np.frombuffer(block, np.uint8)[None]}

    @classmethod
    def from_row(cls, row: Row) -> "PreparedShard":
        """What `row_of` made."""
        head = json.loads(str(row["head"][0]))
        block = np.asarray(row["block"][0], np.uint8).data
        images: list[Prepared] | None = None
        if head["images"] is not None:
            images = []
            for told in head["images"]:
                image, block = _take(told, block)
                images.append(image)
        shard, attempt, log = _of_facts(head)
        return cls(shard, attempt, images, log)


def _add(image: Prepared, block: bytearray) -> list[Any]:
    """Add the image's bytes or pixels to the block; what is to be told of it."""
    if isinstance(image, ImageError):
        return ["error", image.stage, image.error, image.message]
    if isinstance(image, PlainJpeg):
        block += image.data
        return ["jpeg", len(image.data), image.num_pixels, image.orientation]
    for view in image:
        block += view.contiguous().numpy().data
    return ["pixels", *(view.shape for view in image)]


def _take(told: list[Any], block: memoryview) -> tuple[Prepared, memoryview]:
    """The image at the block's beginning, and the rest of the block."""
    kind, *facts = told
    if kind == "error":
        return ImageError(*facts), block
    if kind == "jpeg":
        size, num_pixels, orientation = facts
        return PlainJpeg(block[:size], num_pixels, orientation), block[size:]
    views = []
    for shape in facts:
        size = math.prod(shape)
        views.append(as_tensor(block[:size]).view(shape))
        block = block[size:]
    return views, block


def _facts(shard: Shard, attempt: int, log: LoadLog) -> dict[str, Any]:
    seconds = {"fetch_s": log.fetch_s, "decode_s": log.decode_s, "began_at": log.began_at}
    return {"shard": asdict(shard), "attempt": attempt, "log": seconds}


def _of_facts(head: dict[str, Any]) -> tuple[Shard, int, LoadLog]:
    return Shard(**head["shard"]), head["attempt"], LoadLog(**head["log"])


def _text(head: dict[str, Any]) -> npt.NDArray[np.object_]:
    return np.array([json.dumps(head)], object)


def _copied(block: npt.NDArray[np.uint8], pin_memory: bool) -> torch.Tensor:
    copy = torch.empty(block.shape, dtype=torch.uint8, pin_memory=pin_memory)
    np.copyto(copy.numpy(), block)
    return copy
