"""Decoding large JPEGs at a half, a quarter or an eighth, as `images.reduced_decode` does: how fast, and how far off.

    python -m benchmarks.reduced_decode --data ../shared/data [--num-images 10000]

DATA holds `imagenet-sample-700.tar` and the archives of `benchmarks.cifar_checkpoints`. First a few photos, enlarged to
several sizes: CPU milliseconds of decoding, resizing and cropping, and the mean difference of the crops in levels of
255, with `reduced_decode` unset, 4 and 2. Then what four published CIFAR-10 networks make of it, in float32: their
errors on CIFAR-10's test images, enlarged eight times, and how often their best class stays the same, there and on the
photos, which are of other classes.
"""

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.cifar_checkpoints import EXPECTED_ERRORS, import_checkpoint, members
from pipeline import storage
from pipeline.data.images import decode
from pipeline.data.transforms import Preprocessing
from pipeline.models.bundle import Bundle, load_network

PREPROCESSING = Preprocessing(resize_size=256, crop_size=224)
REDUCED = {"whole": None, "4": 4, "2": 2}
NUM_PHOTOS, ROUNDS = 8, 3
MOST_PIXELS = 10**9
ENLARGED_TO = 256  # from 32
BATCH = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the three archives")
    parser.add_argument("--num-images", type=int, default=10_000, help="CIFAR-10 test images for the networks' errors")
    arguments = parser.parse_args()
    photos = [data for name, data in members(arguments.data / "imagenet-sample-700.tar", "") if name.endswith(".JPEG")]
    torch.set_num_threads(1)
    compare_crops([enlarged(photo, 1024) for photo in photos[:1]])  # the first use of a decoder is slower
    for side in (1024, 1536, 2048, 3000):
        figures = compare_crops([enlarged(photo, side) for photo in photos[:NUM_PHOTOS]])
        print(json.dumps({"shorter_side": side, **figures}), flush=True)
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="reduced-decode-") as folder:
        for line in compare_networks(arguments.data, photos, arguments.num_images, Path(folder)):
            print(json.dumps(line), flush=True)


def enlarged(photo: bytes, shorter_side: int) -> bytes:
    image = Image.open(io.BytesIO(photo)).convert("RGB")
    scale = shorter_side / min(image.size)
    file = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=90
    )
    return file.getvalue()


def crop_of(photo: bytes, preprocessing: Preprocessing, reduced: int | None) -> torch.Tensor:
    shrink_to = None if reduced is None else reduced * preprocessing.resize_size
    return preprocessing.apply(decode(photo, max_pixels=MOST_PIXELS, shrink_to=shrink_to))


def compare_crops(photos: list[bytes]) -> dict[str, dict[str, float]]:
    """Milliseconds, and levels off the whole, by what is asked for."""
    figures, whole = {}, [crop_of(photo, PREPROCESSING, None) for photo in photos]
    for name, reduced in REDUCED.items():
        start = time.thread_time()
        for _ in range(ROUNDS):
            crops = [crop_of(photo, PREPROCESSING, reduced) for photo in photos]
        spent_ms = 1000 * (time.thread_time() - start) / ROUNDS / len(photos)
        figures[name] = {"ms": round(spent_ms, 1), "levels": round(levels_between(whole, crops), 2)}
    return figures


def levels_between(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    differences = [(one.float() - other.float()).abs().mean().item() for one, other in zip(some, others, strict=True)]
    return sum(differences) / len(differences)


def compare_networks(data: Path, photos: list[bytes], num_images: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Of each network and set of images: percent wrong, where classes are known, and of the best classes the same."""
    bundles = {model: import_bundle(data, model, folder) for model in EXPECTED_ERRORS}
    preprocessing = Bundle.load(bundles["cifar-resnet20/1"]).preprocessing
    tests = list(
        islice(members(data / "cifar10-jpeg.tar.gz", "cifar10-jpeg/test/"), 0, None, max(1, 10_000 // num_images))
    )
    labels = [name.partition("/")[0] for name, _ in tests]
    truth = torch.tensor([sorted(set(labels)).index(label) for label in labels])
    sets = {
        "CIFAR-10, enlarged": (crops_of([enlarged(image, ENLARGED_TO) for _, image in tests], preprocessing), truth),
        "photos": (crops_of(photos, preprocessing), None),
    }
    for model, uri in bundles.items():
        network = load_network(uri)
        for images, (crops, classes) in sets.items():
            best = {name: best_classes(network, preprocessing, pixels) for name, pixels in crops.items()}
            same = {name: percent(found == best["whole"]) for name, found in best.items()}
            wrong = {} if classes is None else {name: percent(found != classes) for name, found in best.items()}
            yield {"network": model, "images": f"{len(best['whole'])}, {images}", "same": same, "wrong": wrong}


def import_bundle(data: Path, model: str, folder: Path) -> str:
    """The checkpoint as a bundle in `folder`; its URI."""
    depth = model.partition("/")[0].removeprefix("cifar-resnet")
    checkpoints = dict(members(data / "cifar10-resnet-weights.tar", "cifar10-resnet-weights/"))
    [name] = [name for name in checkpoints if name.startswith(f"resnet{depth}-")]
    path = folder / name
    path.write_bytes(checkpoints[name])
    import_checkpoint(str(folder / "registry"), str(path), depth, {})
    return storage.normalise(str(folder / "registry" / model))


def crops_of(images: list[bytes], preprocessing: Preprocessing) -> dict[str, torch.Tensor]:
    """The images' crops, by what is asked for."""
    return {
        name: torch.stack([crop_of(image, preprocessing, reduced) for image in images])
        for name, reduced in REDUCED.items()
    }


def best_classes(network: torch.nn.Module, preprocessing: Preprocessing, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([network(preprocessing.normalise(batch))[0].argmax(1) for batch in pixels.split(BATCH)])


def percent(flags: torch.Tensor) -> float:
    return round(100 * flags.float().mean().item(), 2)


if __name__ == "__main__":
    main()
