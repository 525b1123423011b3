"""The views of an image that a protocol asks for, and batches of views of all shapes."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from pipeline.data.loader import Batch, View
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError
from pipeline.training.protocol import Protocol

_MAX_ASPECT_RATIO = 16  # of an image taken whole: its forward pass must fit the device
_BATCHES_HELD = 4  # of images of other shapes, while a batch of one shape fills


def make_views(protocol: Protocol, preprocessing: Preprocessing) -> list[View]:
    """What makes an image's pixels ready for the device, mirror images aside, which are made there.

    one_crop: `preprocessing.apply`. ten_crop: uint8 5×3×crop_size×crop_size. multi_scale: uint8 3×H×W for each scale;
    raises ImageError at stage `preprocess`, `aspect_ratio`, for an image too narrow to be taken whole.
    """
    protocol.check(preprocessing)
    if protocol.views == "one_crop":
        return [preprocessing.apply]
    if protocol.views == "ten_crop":
        return [partial(_five_crops, preprocessing)]
    scaled = (preprocessing.model_copy(update={"resize_size": scale}) for scale in protocol.scales)
    return [partial(_whole, preprocessing) for preprocessing in scaled]


def _five_crops(preprocessing: Preprocessing, image: torch.Tensor) -> torch.Tensor:
    resized, size = preprocessing.resize(image), preprocessing.crop_size
    rows, columns = [[slice(None, size), slice(side - size, None)] for side in resized.shape[1:]]
    corners = [resized[:, row, column] for row in rows for column in columns]
    return torch.stack([*corners, preprocessing.crop(resized)])


def _whole(preprocessing: Preprocessing, image: torch.Tensor) -> torch.Tensor:
    height, width = image.shape[1:]
    if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(
            "preprocess",
            "aspect_ratio",
            f"expected a long side of at most {_MAX_ASPECT_RATIO} short ones for multi_scale, got {width}×{height}",
        )
    return preprocessing.resize(image)


def of_equal_shapes(singles: Iterable[Batch], max_pixels: int) -> Iterator[Batch]:
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
