"""How fast images decode and preprocess, Pillow beside this package, and how far apart their pixels are.

    python -m benchmarks.decode FOLDER [--num-images 300] [--rounds 5]

FOLDER holds JPEGs, at any depth. Variants alternate within each round; a rate is the median over the rounds.
"""

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from pipeline.data.images import decode
from pipeline.data.transforms import Preprocessing

PREPROCESSING = Preprocessing(resize_size=256, crop_size=224)
MAX_PIXELS = 100_000_000
_SUFFIXES = (".jpg", ".jpeg")


def open_with_pillow(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def decode_pillow(data: bytes) -> np.ndarray:
    return np.array(open_with_pillow(data))


def decode_torchvision(data: bytes) -> torch.Tensor:
    """The bare operator: no header read, nothing checked, nothing turned upright."""
    decoded: torch.Tensor = torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), 3)
    return decoded


def decode_ours(data: bytes) -> torch.Tensor:
    return decode(data, max_pixels=MAX_PIXELS)


def prepare_pillow(data: bytes) -> np.ndarray:
    image = open_with_pillow(data)
    height, width = PREPROCESSING.resized_size(image.height, image.width)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized.crop((left, top, left + 224, top + 224)))


def prepare_ours(data: bytes) -> torch.Tensor:
    return PREPROCESSING.apply(decode_ours(data))


VARIANTS: dict[str, Callable[[bytes], object]] = {
    "decode, Pillow": decode_pillow,
    "decode, bare torchvision operator": decode_torchvision,
    "decode, ours": decode_ours,
    "decode + resize + crop, Pillow": prepare_pillow,
    "decode + resize + crop, ours": prepare_ours,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-images", type=int, default=300, help="images a rate is measured over")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    arguments = parser.parse_args()
    files = [path.read_bytes() for path in sorted(arguments.folder.rglob("*")) if path.suffix.lower() in _SUFFIXES]
    if not files:
        parser.error(f"expected JPEGs under {arguments.folder}, found none")
    torch.set_num_threads(1)
    rates = measure_rates(files[: arguments.num_images], arguments.rounds)
    print(json.dumps({"images_per_s": rates, "agreement": compare(files)}, indent=2))


def measure_rates(files: list[bytes], num_rounds: int) -> dict[str, dict[str, float]]:
    """Images per second by variant and number of threads."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for round_number in range(num_rounds):
        print(f"round {round_number + 1} of {num_rounds}", file=sys.stderr)
        for name, variant in VARIANTS.items():
            for num_threads in (1, 2):
                with ThreadPoolExecutor(num_threads) as threads:
                    start = time.perf_counter()
                    consume(threads.map(variant, files))
                    seconds.setdefault((name, num_threads), []).append(time.perf_counter() - start)
    rates: dict[str, dict[str, float]] = {}
    for (name, num_threads), taken in seconds.items():
        rates.setdefault(name, {})[f"on {num_threads}"] = round(len(files) / statistics.median(taken))
    return rates


def consume(results: Iterable[object]) -> None:
    for _ in results:
        pass


def compare(files: list[bytes]) -> dict[str, float]:
    """Absolute differences from Pillow in levels of 255, of decoded pixels and of preprocessed ones."""
    num_equal_decoded = num_equal_prepared = 0
    largest, mean = 0, 0.0
    for data in files:
        num_equal_decoded += np.array_equal(decode_ours(data).permute(1, 2, 0).numpy(), decode_pillow(data))
        difference = np.abs(prepare_ours(data).permute(1, 2, 0).numpy().astype(int) - prepare_pillow(data).astype(int))
        num_equal_prepared += not difference.any()
        largest, mean = max(largest, int(difference.max())), mean + float(difference.mean()) / len(files)
    return {
        "images": len(files),
        "decoded bit for bit as Pillow": num_equal_decoded,
        "resized and cropped bit for bit as Pillow": num_equal_prepared,
        "largest difference": largest,
        "mean difference": mean,
    }


if __name__ == "__main__":
    main()
