"""The image set of the demo: simple shapes in class folders, drawn with Pillow, some of the files broken on purpose."""

import io
import math
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")

_DEVIATION_OF_BYTES = 73.9  # of 0 to 255, all as likely

Point = tuple[float, float]


def draw_set(folder: Path, *, num_images: int, seed: int, num_broken: int = 0) -> None:
    """Write `num_images` images as `<folder>/<class>/<number>.<suffix>`, `num_broken` of them unreadable.

    The same arguments draw the same set.
    """
    broken = set(random.Random(seed).sample(range(num_images), num_broken))
    for index in range(num_images):
        rng = random.Random(seed * 1_000_003 + index)
        name = CLASSES[index % len(CLASSES)]
        data, suffix = _encode(draw(name, rng), rng)
        if index in broken:
            data, suffix = _BREAKAGES[index % len(_BREAKAGES)](data), "jpg"
        path = folder / name / f"{index:05d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def draw(name: str, rng: random.Random) -> Image.Image:
    """One shape of class `name` on a noisy ground; size, place, turn and colours vary."""
    width, height = rng.randint(48, 128), rng.randint(48, 128)
    ground = tuple(rng.randint(0, 255) for _ in range(3))
    colour = tuple((channel + rng.randint(70, 185)) % 256 for channel in ground)
    image = _noise((width, height), rng.uniform(5, 40), random.Random(repr(ground))).convert("RGB")
    image = Image.blend(image, Image.new("RGB", image.size, ground), 0.7)
    radius = min(width, height) * rng.uniform(0.25, 0.42)
    centre = (width / 2 + rng.uniform(-0.1, 0.1) * width, height / 2 + rng.uniform(-0.1, 0.1) * height)
    _shape(ImageDraw.Draw(image), name, centre, radius, rng.uniform(0, 2 * math.pi), colour)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))


def _noise(size: tuple[int, int], deviation: float, rng: random.Random) -> Image.Image:
    """Grey around the middle; Pillow's own noise comes from C's generator, whose state is the whole process's."""
    grains = Image.frombytes("L", size, rng.randbytes(size[0] * size[1]))
    spread = deviation / _DEVIATION_OF_BYTES
    return grains.point([round(127.5 + (grey - 127.5) * spread) for grey in range(256)])


def _shape(
    canvas: ImageDraw.ImageDraw, name: str, centre: Point, radius: float, turn: float, colour: tuple[int, ...]
) -> None:
    box = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
    if name == "circle":
        canvas.ellipse(box, fill=colour)
    elif name == "ring":
        canvas.ellipse(box, outline=colour, width=max(3, int(radius / 3)))
    else:
        outline = {"square": [1.0] * 4, "triangle": [1.0] * 3, "star": [1.0, 0.42] * 5, "cross": _CROSS}[name]
        canvas.polygon(list(_polygon(centre, radius, turn, outline)), fill=colour)


_CROSS = [1.0, 1.0, 0.4] * 4  # two tips and a notch, four times


def _polygon(centre: Point, radius: float, turn: float, distances: list[float]) -> Iterator[Point]:
    angles = [turn + 2 * math.pi * index / len(distances) for index in range(len(distances))]
    if distances is _CROSS:
        angles = [turn + math.pi / 2 * arm + offset for arm in range(4) for offset in (-0.28, 0.28, math.pi / 4)]
    for angle, distance in zip(angles, distances, strict=True):
        yield centre[0] + radius * distance * math.cos(angle), centre[1] + radius * distance * math.sin(angle)


def _encode(image: Image.Image, rng: random.Random) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    kind = rng.random()
    if kind < 0.05:
        image.convert("L").save(buffer, "JPEG", quality=90)
    elif kind < 0.08:
        image.convert("CMYK").save(buffer, "JPEG", quality=90)
    elif kind < 0.12:
        image.save(buffer, "PNG")
        return buffer.getvalue(), "png"
    else:
        image.save(buffer, "JPEG", quality=rng.randint(60, 95))
    return buffer.getvalue(), "jpg"


def _bomb(data: bytes) -> bytes:
    """A PNG of a few bytes that claims 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


_BREAKAGES: tuple[Callable[[bytes], bytes], ...] = (
    lambda data: data[: len(data) // 2],
    lambda data: b"",
    lambda data: b"<html><body>404 Not Found</body></html>",
    _bomb,
)
