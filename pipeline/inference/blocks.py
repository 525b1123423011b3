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
from pipeline.data.loader import Batch, LoadLog
from pipeline.data.manifest import Shard
from pipeline.data.nvjpeg import PlainJpeg
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError

_MOST_ENCODED_BYTES = 256 << 20  # of a shard; as many tasks as there are CPUs hold one twice
Row: TypeAlias = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class DecodedShard:
    """A shard that CPUs have decoded.

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

    def to_row(self) -> Row:
        """As a Ray Data batch of one row."""
        columns = {f"pixels_{index}": pixels[None] for index, pixels in enumerate(self.pixels)}
        head = {**_facts(self), "errors": _told(self.log.errors)}
        return {"head": _text(head), "rows": self.rows[None], **columns}

    @classmethod
    def from_row(cls, row: Row) -> "DecodedShard":
        """What `to_row` made."""
        head = json.loads(str(row["head"][0]))
        shard, attempt, log = _of_facts(head)
        log.errors = _errors(head["errors"])
        pixels = [np.asarray(row[f"pixels_{index}"][0], np.uint8) for index in range(len(row) - 2)]
        return cls(shard, attempt, np.asarray(row["rows"][0], np.int64), pixels, log)


@dataclass(frozen=True, slots=True)
class PreparedShard:
    """A shard whose JPEGs a GPU is to decode.

    `images` are all of its images in order; None where they are too many bytes to be handed on, and the actor is to
    fetch them: so large, few go through its interpreter.
    """

    shard: Shard
    attempt: int
    images: list[Prepared] | None
    log: LoadLog

    @classmethod
    def gather(cls, shard: Shard, attempt: int, prepared: Iterable[Prepared], log: LoadLog) -> "PreparedShard":
        """Of what `gpu_loader.prepare` gives, which is not read to its end where it is too much."""
        images: list[Prepared] = []
        num_bytes = 0
        if shard.num_bytes <= _MOST_ENCODED_BYTES:
            for item in prepared:
                images.append(item)
                num_bytes += len(item.data) if isinstance(item, PlainJpeg) else 0
                if num_bytes > _MOST_ENCODED_BYTES:  # the manifest did not know their sizes
                    break
            else:
                return cls(shard, attempt, images, log)
        return cls(shard, attempt, None, log)

    def to_row(self) -> Row:
        """As a Ray Data batch of one row."""
        images = dict(enumerate(self.images or []))
        jpegs = {row: item for row, item in images.items() if isinstance(item, PlainJpeg)}
        viewed = {row: item for row, item in images.items() if isinstance(item, list)}
        views = [torch.stack(view).numpy() for view in zip(*viewed.values(), strict=True)]
        head = {
            **_facts(self),
            "num_images": None if self.images is None else len(self.images),
            "errors": _told({row: item for row, item in images.items() if isinstance(item, ImageError)}),
            "jpegs": [[row, len(jpeg.data), jpeg.num_pixels, jpeg.orientation] for row, jpeg in jpegs.items()],
            "viewed": list(viewed),
            "shapes": [view.shape for view in views],
        }
        encoded, pixels = b"".join(jpeg.data for jpeg in jpegs.values()), b"".join(view.tobytes() for view in views)
        return {"head": _text(head), "encoded": _column(encoded), "pixels": _column(pixels)}

    @classmethod
    def from_row(cls, row: Row) -> "PreparedShard":
        """What `to_row` made; the JPEGs' bytes lie where the row's do."""
        head = json.loads(str(row["head"][0]))
        shard, attempt, log = _of_facts(head)
        if head["num_images"] is None:
            return cls(shard, attempt, None, log)
        encoded, pixels = (np.asarray(row[name][0], np.uint8).data for name in ("encoded", "pixels"))
        images: dict[int, Prepared] = dict(_errors(head["errors"]))
        for index, size, num_pixels, orientation in head["jpegs"]:
            images[index] = PlainJpeg(encoded[:size], num_pixels, orientation)
            encoded = encoded[size:]
        views = []
        for shape in head["shapes"]:
            size = math.prod(shape)
            views.append(torch.frombuffer(bytearray(pixels[:size]), dtype=torch.uint8).view(shape))
            pixels = pixels[size:]
        images |= zip(head["viewed"], map(list, zip(*views, strict=True)), strict=True)
        return cls(shard, attempt, [images[index] for index in range(head["num_images"])], log)


def _facts(block: DecodedShard | PreparedShard) -> dict[str, Any]:
    log = {"fetch_s": block.log.fetch_s, "decode_s": block.log.decode_s, "began_at": block.log.began_at}
    return {"shard": asdict(block.shard), "attempt": block.attempt, "log": log}


def _of_facts(head: dict[str, Any]) -> tuple[Shard, int, LoadLog]:
    return Shard(**head["shard"]), head["attempt"], LoadLog(**head["log"])


def _told(errors: dict[int, ImageError]) -> dict[int, list[str]]:
    return {row: [error.stage, error.error, error.message] for row, error in errors.items()}


def _errors(told: dict[str, list[str]]) -> dict[int, ImageError]:
    return {int(row): ImageError(*error) for row, error in told.items()}


def _text(head: dict[str, Any]) -> npt.NDArray[np.object_]:
    return np.array([json.dumps(head)], object)


def _column(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)[None]


def _copied(block: npt.NDArray[np.uint8], pin_memory: bool) -> torch.Tensor:
    copy = torch.empty(block.shape, dtype=torch.uint8, pin_memory=pin_memory)
    np.copyto(copy.numpy(), block)
    return copy
