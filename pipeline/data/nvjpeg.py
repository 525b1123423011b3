"""JPEGs decoded on an NVIDIA GPU, many at a time: nvJPEG, behind torchvision's operator.

What it is not for goes through `images.decode` on the CPU: other formats, CMYK, reduced and very large images, all that
is damaged, and every image of a group of which nvJPEG refuses one. So what becomes an error is what would on CPUs. The
pixels are not quite the same: nvJPEG transforms and upsamples in its own arithmetic.
"""

from collections.abc import Sequence
from functools import partial

import torch

from pipeline import storage
from pipeline.data import images
from pipeline.errors import ImageError

_MOST_PIXELS = 2**24  # of an image: 50 MB decoded, and a group's images are there at once


def decode_group(
    encoded: Sequence[bytes], *, device: torch.device, num_threads: int, max_pixels: int, shrink_to: int | None = None
) -> list[torch.Tensor | ImageError]:
    """Each image as `images.decode` gives it, uint8 3×H×W, on `device` or else on the CPU; or its refusal."""
    read_header = partial(images.plain_jpeg_header, max_pixels=min(max_pixels, _MOST_PIXELS), shrink_to=shrink_to)
    headers = {index: header for index, data in enumerate(encoded) if (header := read_header(data))}
    decoded = _decode_jpegs([encoded[index] for index in headers], device) if headers else []
    found: dict[int, torch.Tensor | ImageError] = {
        index: images.upright(pixels, header.orientation)
        for (index, header), pixels in zip(headers.items(), decoded, strict=False)  # none where one was refused
    }
    others = [index for index in range(len(encoded)) if index not in found]
    decode = partial(_decode_or_refuse, max_pixels=max_pixels, shrink_to=shrink_to)
    found |= zip(others, storage.map_concurrently(decode, (encoded[i] for i in others), num_threads), strict=True)
    return [found[index] for index in range(len(encoded))]


def _decode_jpegs(encoded: Sequence[bytes], device: torch.device) -> list[torch.Tensor]:
    """All of them, or none. A GPU that has failed for good fails again at what comes next, so no fault is hidden."""
    try:
        decoded: list[torch.Tensor] = torch.ops.image.decode_jpegs_cuda(
            [images.as_tensor(data) for data in encoded], images.RGB, device
        )
    except RuntimeError:  # of one damaged image, or of memory that is short
        return []
    return decoded


def _decode_or_refuse(data: bytes, max_pixels: int, shrink_to: int | None) -> torch.Tensor | ImageError:
    try:
        return images.decode(data, max_pixels=max_pixels, shrink_to=shrink_to)
    except ImageError as error:
        return error
