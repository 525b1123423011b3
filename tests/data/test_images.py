"""Decoding against Pillow's interpretation of real, tiny images; refusals."""

import io
import resource
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pillow_heif
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.data.decoders import IsolatedDecoder
from pipeline.data.images import decode
from pipeline.errors import ImageError

pillow_heif.register_heif_opener()
MAX_PIXELS = 100_000


def picture(width: int = 48, height: int = 33) -> Image.Image:
    """Smooth enough for lossy formats, different in every corner."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = [255 * x, 255 * y, 127 + 127 * np.sin(9 * x * y)]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def with_alpha(mode: str = "RGBA") -> Image.Image:
    image = picture().convert(mode[:-1])
    image.putalpha(picture().getchannel(0))
    return image


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def expected(data: bytes) -> torch.Tensor:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image.info.pop("transparency", None)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def png(bit_depth: int, colour_type: int, rows: NDArray[np.generic], size: tuple[int, int] | None = None) -> bytes:
    """A PNG of `rows`, one per line; `size` (width, height) can say otherwise than the rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    width, height = size or (rows.shape[1], rows.shape[0])
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def exif(orientation: int, order: str = ">") -> bytes:
    magic = b"MM\0*" if order == ">" else b"II*\0"
    directory = struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    return b"Exif\0\0" + magic + directory


def outcome(data: bytes) -> torch.Tensor | ImageError:
    try:
        return decode(data, max_pixels=MAX_PIXELS)
    except ImageError as error:
        return error


def refusal(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(data, max_pixels=max_pixels)
    assert caught.value.stage == "decode"
    return caught.value


JPEGS = {
    "baseline": encoded(picture(), "JPEG"),
    "grayscale": encoded(picture().convert("L"), "JPEG"),
    "progressive": encoded(picture(), "JPEG", progressive=True),
    "restart markers": encoded(picture(), "JPEG", restart_marker_blocks=2),
    "full chroma": encoded(picture(), "JPEG", subsampling=0),
    "RGB inside": encoded(picture(), "JPEG", keep_rgb=True),
    "with thumbnail": encoded(picture(), "JPEG", exif=exif(1) + encoded(picture(8, 8), "JPEG")),
    "CMYK": encoded(picture().convert("CMYK"), "JPEG"),
    "trailing bytes": encoded(picture(), "JPEG") + b"appended by a camera",
}
OTHERS = {
    "PNG RGB": encoded(picture(), "PNG"),
    "PNG RGBA": encoded(with_alpha(), "PNG"),
    "PNG gray and alpha": encoded(with_alpha("LA"), "PNG"),
    "PNG 1-bit": encoded(picture().convert("1"), "PNG"),
    "PNG palette": encoded(picture().quantize(16), "PNG"),
    "PNG palette, one transparent": encoded(picture().quantize(16), "PNG", transparency=3),
    "PNG palette, alphas": encoded(picture().quantize(16), "PNG", transparency=bytes(range(0, 160, 10))),
    "PNG rotated": encoded(picture(), "PNG", exif=exif(6)),
    "GIF transparent": encoded(picture().quantize(16), "GIF", transparency=3),
    "WebP": encoded(picture(), "WEBP"),
    "WebP RGBA": encoded(with_alpha(), "WEBP", lossless=True),
    "BMP": encoded(picture(), "BMP"),
    "TIFF": encoded(picture(), "TIFF", compression="tiff_lzw"),
    "TIFF CMYK": encoded(picture().convert("CMYK"), "TIFF"),
    "TIFF rotated": encoded(picture(), "TIFF", tiffinfo={0x0112: 8}),
    "AVIF": encoded(picture(), "AVIF"),
    "AVIF rotated": encoded(picture(), "AVIF", exif=exif(6)),
    "HEIC": encoded(picture(), "HEIF"),
    "JPEG 2000": encoded(picture(), "JPEG2000"),
}


@pytest.mark.parametrize("data", [*JPEGS.values(), *OTHERS.values()], ids=[*JPEGS, *OTHERS])
def test_pixels_equal_those_of_pillow(data: bytes) -> None:
    image = decode(data, max_pixels=MAX_PIXELS)
    assert image.dtype == torch.uint8
    assert torch.equal(image, expected(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_rotated_jpeg_comes_out_upright(orientation: int, order: str) -> None:
    xmp = b"\xff\xe1\0\x20http://ns.adobe.com/xap/1.0/\0\0"
    plain = encoded(picture(), "JPEG", exif=exif(orientation, order))
    for data in (plain, plain[:2] + xmp + plain[2:]):
        image = decode(data, max_pixels=MAX_PIXELS)
        assert torch.equal(image, expected(plain))
        assert image.shape == ((3, 48, 33) if orientation >= 5 else (3, 33, 48))


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpegs_xmp_turns_no_decoders_image(mode: str) -> None:
    tags = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(picture().convert(mode), "JPEG", xmp=tags)
    assert decode(data, max_pixels=MAX_PIXELS).shape == (3, 33, 48)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6  # by which Pillow would turn it


@pytest.mark.parametrize("block", [b"", b"MM", b"II*\0\xff\xff\xff\xff", exif(99)[6:], exif(6)[6:20]])
def test_broken_exif_leaves_the_pixels_as_they_are(block: bytes) -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0" + block)
    assert torch.equal(decode(data, max_pixels=MAX_PIXELS), decode(JPEGS["baseline"], max_pixels=MAX_PIXELS))


def test_a_ycck_jpeg_gets_the_colours_it_was_made_of() -> None:
    wanted = picture()
    stored = [*ImageOps.invert(wanted).convert("YCbCr").split(), Image.new("L", wanted.size, 255)]
    as_cmyk = Image.merge("CMYK", [ImageOps.invert(channel) for channel in stored])
    data = bytearray(encoded(as_cmyk, "JPEG", quality=100, subsampling=0))
    adobe = data.index(b"Adobe")
    assert data[adobe + 11] == 0  # the transform, of CMYK
    data[adobe + 11] = 2  # YCCK
    difference = decode(bytes(data), max_pixels=MAX_PIXELS).int() - expected(encoded(wanted, "PNG")).int()
    assert difference.abs().max() <= 6


@pytest.mark.parametrize(("shrink_to", "size"), [(200, (100, 75)), (30, (50, 38)), (18, (25, 19))])
def test_a_large_jpeg_is_decoded_at_a_fraction_that_stays_large_enough(shrink_to: int, size: tuple[int, int]) -> None:
    data = encoded(picture(100, 75), "JPEG", quality=95)
    reduced = decode(data, max_pixels=MAX_PIXELS, shrink_to=shrink_to)
    assert tuple(reduced.shape) == (3, size[1], size[0])
    whole = decode(data, max_pixels=MAX_PIXELS)[None].float()
    resized = torch.nn.functional.interpolate(whole, reduced.shape[1:], mode="bilinear", antialias=True)[0]
    assert (reduced - resized).abs().mean() < 4
    with IsolatedDecoder() as decoder:
        assert torch.equal(decoder.decode(data, max_pixels=MAX_PIXELS, shrink_to=shrink_to), reduced)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    gray = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32
    wanted = torch.from_numpy((gray >> 8).astype(np.uint8)).expand(3, -1, -1)
    tiff = encoded(Image.fromarray(gray), "TIFF")
    for data in (png(16, 0, gray.astype(">u2")), tiff, encoded(Image.fromarray(gray), "PPM")):
        assert torch.equal(decode(data, max_pixels=MAX_PIXELS), wanted)
    white_is_zero = encoded(Image.fromarray(gray), "TIFF", tiffinfo={262: 0})
    assert torch.equal(decode(white_is_zero, max_pixels=MAX_PIXELS), 255 - wanted)
    colour = np.stack([gray, gray[::-1], gray * 2], axis=2)
    image = decode(png(16, 2, colour.astype(">u2")), max_pixels=MAX_PIXELS)
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy((colour >> 8).astype(np.uint8)))


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    frames = [picture(), ImageOps.invert(picture())]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    single = encoded(frames[0], format, lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert torch.equal(decode(data, max_pixels=MAX_PIXELS), expected(single))


def test_encoded_bytes_reach_a_decoder_without_a_copy_or_a_warning() -> None:
    command = "import torch; from pipeline.data.images import as_tensor; data = bytes(range(200)); print(" + (
        "as_tensor(data).data_ptr() == as_tensor(data).data_ptr(), as_tensor(data).tolist() == list(data))"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", command], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("True True\n", "")


def test_threads_get_the_same_pixels() -> None:
    files = [*JPEGS.values(), *OTHERS.values()] * 3
    with ThreadPoolExecutor(4) as threads:
        images = list(threads.map(lambda data: decode(data, max_pixels=MAX_PIXELS), files))
    assert all(torch.equal(image, expected(data)) for image, data in zip(images, files, strict=True))


@given(st.sampled_from([*JPEGS.values()][:-1]), st.data())
@settings(deadline=None, max_examples=200)
def test_a_jpeg_cut_anywhere_is_truncated(data: bytes, draw: st.DataObject) -> None:
    length = draw.draw(st.integers(3, len(data) - 1))
    assert refusal(data[:length]).error == "truncated"


def test_a_jpeg_cut_and_filled_up_with_zeros_is_truncated() -> None:
    data = JPEGS["baseline"]
    assert refusal(data[: len(data) // 2] + bytes(5000)).error == "truncated"


@given(st.sampled_from([*OTHERS.values()]), st.data())
@settings(deadline=None, max_examples=200)
def test_a_file_cut_anywhere_is_refused_or_whole(data: bytes, draw: st.DataObject) -> None:
    length = draw.draw(st.integers(1, len(data) - 1))
    result = outcome(data[:length])
    if isinstance(result, ImageError):
        assert result.error in ("truncated", "corrupt", "not_an_image")
    else:
        assert torch.equal(result, expected(data))


def test_a_png_cut_in_its_pixels_is_truncated() -> None:
    assert refusal(OTHERS["PNG RGB"][:-60]).error == "truncated"


@given(st.sampled_from([*JPEGS.values(), *OTHERS.values()]), st.data())
@settings(deadline=None, max_examples=200)
def test_damaged_bytes_give_an_image_or_an_image_error(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 5))):
        damaged[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    result = outcome(bytes(damaged))
    if isinstance(result, ImageError):
        assert result.message == refusal(bytes(damaged)).message  # it will stand in a table that must not vary
    else:
        assert result.shape[0] == 3
        assert result.numel() <= 3 * MAX_PIXELS


def test_a_png_with_damaged_pixels_is_corrupt() -> None:
    data = bytearray(OTHERS["PNG RGB"])
    data[data.index(b"IDAT") + 40] ^= 0xFF
    assert refusal(bytes(data)).error in ("corrupt", "truncated")


def test_a_jpeg_with_a_broken_huffman_table_is_corrupt() -> None:
    data = bytearray(JPEGS["baseline"])
    start = data.index(b"\xff\xc4") + 5
    data[start : start + 16] = b"\xff" * 16
    assert refusal(bytes(data)).error == "corrupt"
    assert "Huffman" in refusal(bytes(data)).message


def test_no_bytes_are_empty() -> None:
    assert refusal(b"").error == "empty"


@pytest.mark.parametrize(
    "data", [b"<!DOCTYPE html><html>", b"not found", b"\0" * 1000, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_other_files_are_not_images(data: bytes) -> None:
    assert refusal(data).error == "not_an_image"


def test_a_zip_bomb_costs_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bomb = png(8, 2, np.zeros((2, 150_000), np.uint8), size=(50_000, 50_000))
    assert refusal(bomb).error == "too_many_pixels"
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 50_000_000


@pytest.mark.parametrize("data", [JPEGS["baseline"], JPEGS["CMYK"], OTHERS["PNG RGB"], OTHERS["HEIC"]])
def test_the_pixel_limit_is_exact(data: bytes) -> None:
    assert decode(data, max_pixels=48 * 33).shape == (3, 33, 48)
    error = refusal(data, max_pixels=48 * 33 - 1)
    assert error.error == "too_many_pixels"
    assert "48×33" in error.message


def test_a_jpeg_without_rows_has_no_pixels() -> None:
    data = bytearray(JPEGS["baseline"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 7] = b"\0\0"
    assert refusal(bytes(data)).error == "no_pixels"


@pytest.mark.parametrize("format", ["TIFF", "PPM"])
def test_samples_without_a_defined_range_are_unsupported(format: str) -> None:
    floats = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    assert refusal(encoded(floats, format)).error == "unsupported"
