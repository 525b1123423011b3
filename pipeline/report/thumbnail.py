"""Small pictures of images, for a report to carry."""

import io

from PIL import Image

from pipeline.data.images import decode
from pipeline.data.readers import ImageRef, ReadLimits, fetch_image
from pipeline.errors import ImageError

_SIDE = 128


def make_thumbnail(uri: str, limits: ReadLimits) -> bytes | None:
    """A small JPEG of the image, None where it is not to be had by its name, as packed ones may not be."""
    found = fetch_image(ImageRef(uri, None, None), allowed_roots=limits.allowed_roots, max_bytes=limits.max_bytes)
    if isinstance(found, ImageError):
        return None
    try:
        pixels = decode(found, max_pixels=limits.max_pixels)
    except ImageError:
        return None
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((_SIDE, _SIDE))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=85)
    return jpeg.getvalue()
