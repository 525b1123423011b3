"""Encoded images, of the kinds that decoding on a GPU tells apart, and a CPU in the place of nvJPEG."""

import io

import torch
from PIL import Image

MAX_PIXELS = 100_000


def encoded(
    format: str, mode: str = "RGB", *, orientation: int = 1, size: tuple[int, int] = (40, 30), **options: object
) -> bytes:
    """A gradient, encoded by Pillow."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.linear_gradient("L").resize(size).convert(mode).save(file, format, exif=exif, **options)
    return file.getvalue()


PLAIN = {
    "jpeg": encoded("JPEG"),
    "grayscale": encoded("JPEG", "L"),
    "rotated": encoded("JPEG", orientation=6),
}
OTHERS = {
    "cmyk": encoded("JPEG", "CMYK"),
    "not YCbCr": encoded("JPEG", keep_rgb=True),
    "png": encoded("PNG"),
    "large": encoded("JPEG", size=(400, 300)),
    "truncated": encoded("JPEG")[:-20],
    "headless": b"\xff\xd8\xff",
    "text": b"not an image",
    "empty": b"",
}
ALL = {**PLAIN, **OTHERS}


class NvjpegOnCpu:
    """In the place of torchvision's operator; refuses a call that `damaged` is among."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.damaged: bytes | None = None

    def __call__(self, tensors: list[torch.Tensor], mode: int, device: torch.device) -> list[torch.Tensor]:
        data = [bytes(tensor.numpy()) for tensor in tensors]
        self.seen += data
        if self.damaged in data:
            raise RuntimeError("nvjpegDecodeBatched failed: 2")
        return [torch.ops.image.decode_jpeg(tensor, mode) for tensor in tensors]
