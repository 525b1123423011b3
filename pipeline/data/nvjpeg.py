"""JPEGs decoded on an NVIDIA GPU, many at a time: nvJPEG, behind torchvision's operator.

What it is not for goes through `images.decode` on the CPU: other formats, CMYK and RGB JPEGs, reduced and very large
images, whatever is damaged, and each image that nvJPEG refuses. So nothing becomes an error that would not on CPUs. The
pixels are not quite the same: nvJPEG transforms and upsamples in its own arithmetic.
"""

import io
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image

from pipeline.data import images
from pipeline.data.transforms import Preprocessing
from pipeline.errors import RunError, first_line

_MOST_PIXELS = 2**24  # of an image
_MOST_PIXELS_AT_ONCE = 2**26  # of a call, whose buffers grow with it; images stay, of two groups 3 GB each at the most

logger = logging.getLogger(__name__)


def require(device: torch.device, preprocessings: Sequence[Preprocessing]) -> None:
    """Decode and preprocess an image, which also makes nvJPEG and the kernels ready.

    Raises RunError where that does not work here.
    """
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        decoded = _decode_jpegs([file.getvalue()], device)
    except RuntimeError as error:
        said = first_line(error)
        raise RunError(f"nvJPEG does not work on this node: {said}; set compute.decode to cpu") from error
    try:
        for preprocessing in preprocessings:
            preprocessing.apply_to_all(decoded)
    except Exception as error:  # Triton's, or of what it calls; done otherwise, pixels would differ by node
        said = first_line(error)
        raise RunError(
            f"images cannot be resized on the GPU of this node: {said}; Triton needs a C compiler: install one, or set "
            "compute.decode to cpu"
        ) from error


class PlainJpeg(NamedTuple):
    """A JPEG that nvJPEG is for: its bytes, and what of its header is needed to decode it."""

    data: bytes | memoryview
    num_pixels: int
    orientation: int


def plain_jpeg(data: bytes, *, max_pixels: int, shrink_to: int | None = None) -> PlainJpeg | None:
    """The image, if it is one that nvJPEG is for."""
    header = images.plain_jpeg_header(data, max_pixels=min(max_pixels, _MOST_PIXELS), shrink_to=shrink_to)
    if header is None or header.is_rgb:
        return None
    return PlainJpeg(data, header.width * header.height, header.orientation)


def decode(jpegs: Sequence[PlainJpeg], device: torch.device) -> list[torch.Tensor | None]:
    """Each as `images.decode` gives it, uint8 3×H×W, on `device`; None for those that nvJPEG refuses."""
    found: list[torch.Tensor | None] = []
    for part in _parts(jpegs):
        pixels = _decode_or_none([jpeg.data for jpeg in part], device)
        turned = zip(pixels, part, strict=True)
        found += [None if image is None else images.upright(image, jpeg.orientation) for image, jpeg in turned]
    return found


def _parts(jpegs: Sequence[PlainJpeg]) -> Iterator[list[PlainJpeg]]:
    """The images in their order, cut so that no part has more pixels than one call is to decode."""
    part: list[PlainJpeg] = []
    num_pixels = 0
    for jpeg in jpegs:
        num_pixels += jpeg.num_pixels
        if part and num_pixels > _MOST_PIXELS_AT_ONCE:
            yield part
            part, num_pixels = [], jpeg.num_pixels
        part.append(jpeg)
    if part:
        yield part


def _decode_or_none(encoded: Sequence[bytes | memoryview], device: torch.device) -> Sequence[torch.Tensor | None]:
    """The pixels of each, None for those that nvJPEG refuses, which are found by halving: it takes all or none.

    A GPU that has failed for good raises here, so that it makes no error rows and is not taken for an image's fault.
    """
    try:
        return _decode_jpegs(encoded, device)
    except RuntimeError as error:
        said = first_line(error)
    _settle(device)
    if len(encoded) == 1:
        logger.warning("an image is decoded on the CPU, for nvJPEG refuses it: %s", said)
        return [None]
    half = len(encoded) // 2
    return [*_decode_or_none(encoded[:half], device), *_decode_or_none(encoded[half:], device)]


def _decode_jpegs(encoded: Sequence[bytes | memoryview], device: torch.device) -> list[torch.Tensor]:
    # nvJPEG writes on streams of its own without waiting for this one's, where kernels may still read what the
    # allocator now gives to it (pytorch/vision issue 9606). So threads that decode at once need a stream each.
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    tensors = [images.as_tensor(data) for data in encoded]
    decoded: list[torch.Tensor] = torch.ops.image.decode_jpegs_cuda(tensors, images.RGB, device)
    return decoded


def _settle(device: torch.device) -> None:
    """What a refused call began has ended, and the memory it may have lacked is free."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
