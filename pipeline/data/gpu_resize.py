"""Resizing and cropping many images at once on a GPU: one Triton kernel, whatever their sizes.

One by one an image takes some ten launches, which cost the interpreter more time than the GPU, and most of it is spent
on pixels that the crop drops. Imported where a GPU decodes only: Triton comes with torch's builds for GPUs, and wants a
C compiler.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_BLOCK = 256  # pixels of the crop to a program
_OPTIONS = {"enable_fp_fusion": False}  # by default a matter of Triton's version, and of the last bit


def resize_and_crop(
    images: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]], crop_size: int, *, is_bicubic: bool
) -> torch.Tensor:
    """Each image, uint8 3×H×W on one GPU, resized to its height and width of `sizes`, antialiased, and its centre.

    uint8 N×3×crop_size×crop_size in channels_last memory, with zeros where an image is smaller.
    """
    assert all(image.dtype == torch.uint8 and image.ndim == 3 for image in images)
    device = images[0].device
    rows = [
        [image.data_ptr(), *image.stride(), *image.shape[1:], *size, *_corner(size, crop_size)]
        for image, size in zip(images, sizes, strict=True)
    ]
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    shape = (len(images), 3, crop_size, crop_size)
    crops = torch.empty(shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
    grid = (triton.cdiv(crop_size * crop_size, _BLOCK), len(images))  # the second may be 65,535
    _resize_and_crop[grid](table, crops, crop_size, len(rows[0]), is_bicubic, _BLOCK, **_OPTIONS)
    return crops


def _corner(size: tuple[int, int], crop_size: int) -> list[int]:
    """Where in the resized image the crop begins, before it where there is padding: rows, columns."""
    return [round(max(side - crop_size, 0) / 2) - max(crop_size - side, 0) // 2 for side in size]


@triton.jit
def _resize_and_crop(table, crops, size, num_columns, is_bicubic: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """A block of an image's crop. The sums of torch's antialiased kernels (UpSampleBilinear2d.cu), in float32."""
    image = tl.program_id(1)
    row = table + image * num_columns
    pixels = tl.load(row).to(tl.pointer_type(tl.uint8))
    of_channel, of_row, of_column = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    height, width = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    resized_height, resized_width = tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32)
    top, left = tl.load(row + 8).to(tl.int32), tl.load(row + 9).to(tl.int32)

    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, x = place // size + top, place % size + left
    is_image = (y >= 0) & (y < resized_height) & (x >= 0) & (x < resized_width)
    centre_y, stretch_y, first_y, last_y, taps_y = _window(y, height, resized_height, is_bicubic)
    centre_x, stretch_x, first_x, last_x, taps_x = _window(x, width, resized_width, is_bicubic)

    nothing = tl.full([BLOCK], 0.0, tl.float32)
    red, green, blue, total = nothing, nothing, nothing, nothing
    for tap_y in range(taps_y):
        at_y = first_y + tap_y
        weight_y = tl.where(at_y < last_y, _weight((at_y - centre_y + 0.5) / stretch_y, is_bicubic), 0.0)
        for tap_x in range(taps_x):
            at_x = first_x + tap_x
            weight_x = tl.where(at_x < last_x, _weight((at_x - centre_x + 0.5) / stretch_x, is_bicubic), 0.0)
            weight = weight_y * weight_x
            pixel = pixels + at_y * of_row + at_x * of_column
            is_used = is_image & (at_y < last_y) & (at_x < last_x)
            red += weight * tl.load(pixel, mask=is_used, other=0).to(tl.float32)
            green += weight * tl.load(pixel + of_channel, mask=is_used, other=0).to(tl.float32)
            blue += weight * tl.load(pixel + 2 * of_channel, mask=is_used, other=0).to(tl.float32)
            total += weight
    scale = tl.where(is_image, 1.0 / tl.where(is_image, total, 1.0), 0.0)

    crop = crops + (image.to(tl.int64) * size * size + place) * 3
    is_crop = place < size * size
    tl.store(crop, _level(red * scale), mask=is_crop)
    tl.store(crop + 1, _level(green * scale), mask=is_crop)
    tl.store(crop + 2, _level(blue * scale), mask=is_crop)


@triton.jit
def _window(at, side, resized_side, is_bicubic: tl.constexpr):
    """What of a side of the image goes into pixels `at` of the resized one: centre, stretch, first, last, most taps."""
    scale = side.to(tl.float32) / resized_side.to(tl.float32)
    stretch = tl.maximum(scale, 1.0)
    reach = stretch * 2.0 if is_bicubic else stretch
    centre = scale * (at.to(tl.float32) + 0.5)
    first = tl.maximum((centre - reach + 0.5).to(tl.int32), 0)
    last = tl.minimum((centre + reach + 0.5).to(tl.int32), side)
    return centre, stretch, first, last, (2.0 * reach).to(tl.int32) + 2


@triton.jit
def _weight(distance, is_bicubic: tl.constexpr):
    """Of a triangle, or of Keys' cubic with a = -0.5 as in Pillow and torch."""
    x = tl.abs(distance)
    if is_bicubic:
        near, far = (1.5 * x - 2.5) * x * x + 1.0, ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.maximum(1.0 - x, 0.0)


@triton.jit
def _level(value):
    """Rounded to one of 256."""
    return tl.minimum(tl.maximum(value + 0.5, 0.0), 255.0).to(tl.uint8)
