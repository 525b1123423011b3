"""Decoding large JPEGs at a half, a quarter or an eighth, as `images.reduced_decode` does: how fast, and how far off.

    python -m benchmarks.reduced_decode --images FOLDER

A few photos, enlarged to several sizes; CPU seconds of decoding, resizing and cropping, and the mean difference of the
crops in levels of 255.
"""

import argparse
import io
import json
import time
from pathlib import Path

import torch
from PIL import Image

from pipeline.data.images import decode
from pipeline.data.transforms import Preprocessing

PREPROCESSING = Preprocessing(resize_size=256, crop_size=224)
NUM_PHOTOS, ROUNDS = 8, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEGs")
    paths = sorted(parser.parse_args().images.rglob("*.JPEG"))[:NUM_PHOTOS]
    torch.set_num_threads(1)
    compare([enlarged(path, 1024) for path in paths[:1]])  # the first use of a decoder is slower
    for side in (1024, 1536, 2048, 3000):
        print(json.dumps({"shorter_side": side, **compare([enlarged(path, side) for path in paths])}), flush=True)


def enlarged(path: Path, shorter_side: int) -> bytes:
    image = Image.open(path).convert("RGB")
    scale = shorter_side / min(image.size)
    file = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=90
    )
    return file.getvalue()


def compare(photos: list[bytes]) -> dict[str, float]:
    seconds, levels = {None: 0.0, 2 * PREPROCESSING.resize_size: 0.0}, 0.0
    for photo in photos:
        crops = []
        for shrink_to in seconds:
            start = time.thread_time()
            for _ in range(ROUNDS):
                crop = PREPROCESSING.apply(decode(photo, max_pixels=10**9, shrink_to=shrink_to))
            seconds[shrink_to] += time.thread_time() - start
            crops.append(crop.int())
        levels += float((crops[0] - crops[1]).abs().float().mean())
    whole, reduced = (1000 * total / ROUNDS / len(photos) for total in seconds.values())
    figures = {"whole_ms": whole, "reduced_ms": reduced, "faster": whole / reduced, "levels": levels / len(photos)}
    return {name: round(value, 2) for name, value in figures.items()}


if __name__ == "__main__":
    main()
