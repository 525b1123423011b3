"""Encoded bytes in, upright RGB pixels out; whatever is wrong with the bytes becomes an ImageError.

JPEGs go through libjpeg-turbo behind torchvision's operator: a third faster than Pillow, and all of it outside the
interpreter lock. Everything else goes through Pillow, PNG too: torchvision 0.29's PNG decoder dies of SIGSEGV on
damaged pixel data.

The operator is loaded from its shared library alone: importing torchvision costs as much again as torch (its detection
operators import torch's compiler), and `torchvision.io` warns on every call that it will move to another package.
"""

import importlib.util
import io
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.data.jpeg import JpegHeader, read_jpeg_header
from pipeline.errors import ImageError

# Pillow warns about odd metadata, and about large images that `max_pixels` has already allowed.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Raster formats only. Pillow knows more, some of which start other programs (EPS) or hold images within images whose
# size is seen too late (ICO).
_PILLOW_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|\0\0\0\x0cjP  |....ftyp", re.DOTALL
)
_HEIF = re.compile(rb"....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)
_JPEG = b"\xff\xd8\xff"
RGB = 3  # torchvision.io.ImageReadMode.RGB


class DecodeOptions(TypedDict):
    """How `decode` is to be called."""

    max_pixels: int
    shrink_to: int | None


def decode(data: bytes, *, max_pixels: int, shrink_to: int | None = None) -> torch.Tensor:
    """Decode one image to RGB, as `PIL.Image.convert("RGB")` would, turned upright by its EXIF orientation.

    Returns uint8 3×H×W, its memory in H×W×3 order. Transparency is dropped, not composited, as in torchvision's
    reference pipelines; animations give their first frame; 16-bit samples their high byte; ICC profiles are ignored.
    With `shrink_to`, a JPEG comes at a half, a quarter or an eighth of its size as long as its shorter side stays at
    least that.

    Raises ImageError at stage `decode`: `empty`, `not_an_image`, `too_many_pixels` and `no_pixels` (both before any
    pixel is decoded; beyond JPEG, Pillow's own limit of 179 megapixels holds too), `truncated`, `corrupt`,
    `unsupported`, `out_of_memory`. A JPEG without its end marker counts as truncated, since nothing else tells that its
    last rows are there. Damage inside a JPEG's entropy-coded data that libjpeg conceals goes unnoticed, as in Pillow.
    """
    if not data:
        raise _refusal("empty", "expected an encoded image, got no bytes")
    try:
        if data.startswith(_JPEG):
            return _decode_jpeg(data, max_pixels, shrink_to)
        return _decode_with_pillow(data, max_pixels)
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly everything: OSError, SyntaxError, struct.error, RuntimeError …
        raise _as_refusal(error) from error


def plain_jpeg_header(data: bytes, *, max_pixels: int, shrink_to: int | None = None) -> JpegHeader | None:
    """The header of a JPEG that `decode` would decode whole and not through Pillow; None for all else, good or bad."""
    if not data.startswith(_JPEG):
        return None
    try:
        header = read_jpeg_header(data)
        _check_size(header.width, header.height, max_pixels)
    except Exception:  # `decode` says what is wrong
        return None
    return header if _is_plain(header, shrink_to) else None


def _decode_jpeg(data: bytes, max_pixels: int, shrink_to: int | None) -> torch.Tensor:
    header = read_jpeg_header(data)
    _check_size(header.width, header.height, max_pixels)
    if not _is_plain(header, shrink_to):
        return _decode_with_pillow(data, max_pixels, shrink_to, header.orientation)
    return upright(_torchvision_decode_jpeg(as_tensor(data), RGB), header.orientation)


def _is_plain(header: JpegHeader, shrink_to: int | None) -> bool:
    is_reduced = shrink_to is not None and min(header.width, header.height) >= 2 * shrink_to
    return header.num_components in (1, 3) and not is_reduced  # not CMYK and YCCK, which Adobe stores inverted


def as_tensor(data: bytes | memoryview) -> torch.Tensor:
    """The same memory as uint8, to be read only."""
    return torch.frombuffer(data, dtype=torch.uint8)


with warnings.catch_warnings():  # torch says once in a process that bytes must not be written to, which nobody does
    warnings.simplefilter("ignore")
    as_tensor(b"\0")


def _decode_with_pillow(
    data: bytes, max_pixels: int, shrink_to: int | None = None, orientation: int | None = None
) -> torch.Tensor:
    """As `decode`; a JPEG's `orientation` is given, for Pillow would take XMP's where EXIF has none."""
    try:
        with Image.open(io.BytesIO(data), formats=_pillow_formats()) as image:
            _check_size(image.width, image.height, max_pixels)
            if shrink_to is not None:
                image.draft("RGB", (shrink_to, shrink_to))  # the smallest of libjpeg's sizes with no side below that
            pixels = torch.from_numpy(_to_rgb(image)).permute(2, 0, 1)
            return upright(pixels, _orientation(image) if orientation is None else orientation)
    except Image.DecompressionBombError as error:
        raise _refusal("too_many_pixels", f"{error}") from error
    except UnidentifiedImageError as error:
        if _HEIF.match(data) and "HEIF" not in _pillow_formats():
            raise _refusal("unsupported", "got HEIC, which needs the package pillow-heif: install it") from error
        if _MAGIC.match(data):
            raise _refusal("corrupt", "the header is damaged or cut short") from error
        raise _refusal("not_an_image", f"expected an encoded image, got bytes that begin {data[:16]!r}") from error


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels as uint8 H×W×3."""
    is_pgm = image.mode == "I" and image.format == "PPM"  # Pillow widens 16 bits to 32 here
    if image.mode in ("I", "F", "LAB") and not is_pgm:
        raise _refusal("unsupported", f"expected 8 or 16 bits a sample, got {image.format} of mode {image.mode!r}")
    if image.mode.startswith("I"):
        return np.repeat(_gray_from_16_bits(image)[:, :, None], 3, axis=2)
    image.load()
    image.info.pop("transparency", None)  # dropped here, or `convert` warns and then drops it
    return np.array(image.convert("RGB"))


def _gray_from_16_bits(image: Image.Image) -> NDArray[np.uint8]:
    """The high 8 bits of up to 16: `convert` would clip at 255. Pillow keeps TIFF's 12-bit samples and its
    white-is-zero as they stand in the file.
    """
    tags = getattr(image, "tag_v2", {})
    num_bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    gray: NDArray[np.uint8] = (np.array(image) >> (num_bits - 8)).astype(np.uint8)
    is_white_zero = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    return np.invert(gray) if is_white_zero else gray


@cache
def _pillow_formats() -> tuple[str, ...]:
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in (*_PILLOW_FORMATS, "HEIF") if name in Image.OPEN)


def _load_torchvision_decode_jpeg() -> Callable[[torch.Tensor, int], torch.Tensor]:
    package = importlib.util.find_spec("torchvision")
    folders = (package.submodule_search_locations if package else None) or []
    libraries = [path for folder in folders for path in Path(folder).glob("image*.so")]
    if not libraries:
        raise ImportError(f"expected torchvision's image decoders (image*.so) in {folders}, found none")
    torch.ops.load_library(libraries[0])
    return torch.ops.image.decode_jpeg.default


_torchvision_decode_jpeg = _load_torchvision_decode_jpeg()


# --- orientation and size --------------------------------------------------------------------------------------------


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata does not make the pixels unusable
        return 1


def upright(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """C×H×W pixels as stored, turned by their EXIF orientation, 1 to 8 (others count as 1); a view where it can be."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flipped = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return pixels.flip(flipped) if flipped else pixels


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height == 0:
        raise _refusal("no_pixels", f"expected at least one pixel, got {width}×{height}")
    if width * height > max_pixels:
        raise _refusal("too_many_pixels", f"expected at most {max_pixels} pixels, got {width}×{height}")


# --- refusals --------------------------------------------------------------------------------------------------------


def _refusal(error: str, message: str) -> ImageError:
    return ImageError("decode", error, message)


def _as_refusal(error: Exception) -> ImageError:
    """A decoder's exception as an ImageError whose message is the same for the same bytes, every time."""
    if isinstance(error, MemoryError):
        return _refusal("out_of_memory", "the decoder ran out of memory")
    first_line = str(error).strip().partition("\n")[0]
    said = re.sub(r"^.*\.cpp:\d+, |<.* at 0x\w+>", "", first_line)
    is_cut = isinstance(error, EOFError) or "truncated" in said.lower()
    return _refusal("truncated" if is_cut else "corrupt", f"{type(error).__name__}: {said}")
