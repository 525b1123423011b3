"""Whether the pipeline's float32 logits are torchvision's, network by network, on the same weights and real JPEGs.

    python -m benchmarks.exactness --images ../shared/data/imagenet-sample-700.tar [--architectures resnet18 …]
        [--num_images N] [--calibrate]

Left: manifest, bundle, `load_shard`, `Predictor`, as in a run, and the logits its network gave. Right: torchvision's
model of that name with the bundle's weights, in NCHW memory, behind torchvision's own eval transform on Pillow's image
turned upright. Compared is the largest difference of an image's logits relative to its largest logit, and each logit's:

    same_crops    images whose resized crop is Pillow's bit for bit, right as it stands      at most TOLERANCE
    same_pixels   all images, the pipeline's crop on the right too                           at most TOLERANCE
    identical     as same_pixels, the right in channels_last memory too: images whose logits agree bit for bit
    end_to_end    all images, right as it stands: what resizing on uint8 tensors brings

Weights are random under a seed. So drawn, a deep network's logits grow or vanish by orders of magnitude and tell images
hardly apart; `--calibrate` gives batch norms the statistics of the first images, which makes images differ, and ResNets
amplify every difference with depth, rounding errors included. Exits 1 where a bound is broken.
"""

import argparse
import copy
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torchvision import models

from pipeline import storage
from pipeline.data.images import decode
from pipeline.data.loader import LoadLog
from pipeline.data.manifest import Manifest, write_manifest
from pipeline.data.packed import WebDatasetSource
from pipeline.data.sources import PrefixSource
from pipeline.data.spool import Selection
from pipeline.data.transforms import Preprocessing
from pipeline.inference.config import PredictConfig
from pipeline.inference.layout import Layout
from pipeline.inference.plan import Plan, make_plan
from pipeline.inference.predictor import Predictor
from pipeline.inference.run import resolve_inputs
from pipeline.inference.shard import load_shard
from pipeline.models.bundle import Architecture, pack
from pipeline.models.catalog import Network, build
from pipeline.models.registry import publish

ARCHITECTURES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),  # this package's family
    *("densenet121", "efficientnet_b0", "vit_b_16"),  # torchvision's through the catalog
)
TOLERANCE = 1e-3
ELEMENT_FLOOR = 0.01  # element by element, a logit counts as at least this fraction of its image's largest
NUM_CALIBRATION_IMAGES = 32
_SHARD_SIZE = 96  # three batches
_CLASSES = [f"class-{index:04d}" for index in range(1000)]


@dataclass(frozen=True, slots=True)
class Compared:
    """Both sides of N images: uint8 crops N×3×H×W, float32 logits N×1000; two of the right are on the left's crops."""

    crops: Tensor
    reference_crops: Tensor
    logits: Tensor
    reference_logits: Tensor
    same_pixels_logits: Tensor
    same_layout_logits: Tensor

    @classmethod
    def concatenate(cls, parts: "list[Compared]") -> "Compared":
        """All batches as one."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder or tar of JPEGs")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="NAME", help="default: all eight")
    parser.add_argument("--num_images", type=int, help="the first so many images; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--calibrate", action="store_true", help="batch norms' statistics from the first images")
    parser.add_argument("--only_same_crops", action="store_true", help="only images whose crop is Pillow's bit for bit")
    arguments = parser.parse_args()
    figures = []
    for architecture in arguments.architectures:
        options = {name: getattr(arguments, name) for name in ("num_images", "seed", "calibrate")}
        with tempfile.TemporaryDirectory(prefix="same-crops-") as folder:
            images = arguments.images
            if arguments.only_same_crops:
                images = Path(folder)
                copy_same_crops(arguments.images, preset_of(architecture), images)
            figures.append(measure(architecture, images, **options))
        print(json.dumps(figures[-1]), flush=True)
    print(to_markdown(figures))
    sys.exit(0 if all(is_exact(figure) for figure in figures) else 1)


def measure(
    architecture: str,
    images: Path,
    *,
    num_images: int | None = None,
    seed: int = 0,
    calibrate: bool = False,
    sizes: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The figures of one network; `sizes` (resize, crop) replace those of torchvision's preset, for small tests."""
    start = time.perf_counter()
    preset = preset_of(architecture)
    if sizes is not None:
        preset = with_fields(preset, resize_size=[sizes[0]], crop_size=[sizes[1]])
    encoded = dict(read_images(images))
    with tempfile.TemporaryDirectory(prefix="exactness-") as folder:
        network = draw_network(architecture, seed)
        if calibrate:
            calibrate_batch_norms(network, preset, list(encoded.values())[:NUM_CALIBRATION_IMAGES])
        reference = reference_model(architecture, network)
        plan = plan_run(architecture, network, preset, images, num_images, Path(folder))
        with torch.inference_mode():
            compared = Compared.concatenate(list(compare_batches(plan, reference, preset, encoded)))
    seconds = round(time.perf_counter() - start, 1)
    drawn = {"architecture": architecture, "seed": seed, "is_calibrated": calibrate}
    return {**drawn, **figures_of(compared), "seconds": seconds}


def preset_of(architecture: str) -> nn.Module:
    """torchvision's own eval transform for that network."""
    preset: nn.Module = models.get_model_weights(architecture)["IMAGENET1K_V1"].transforms()
    return preset


def copy_same_crops(images: Path, preset: nn.Module, folder: Path) -> None:
    """Copy to `folder` those images whose uint8 crop behind `preset` is the pipeline's bit for bit."""
    preprocessing = Preprocessing.from_torchvision(preset)
    for name, data in read_images(images):
        crop = preprocessing.apply(decode(data, max_pixels=10**8))
        if torch.equal(crop, reference_crop(preset, open_image(data))):
            (folder / name).write_bytes(data)


def reference_crop(preset: nn.Module, image: Image.Image) -> Tensor:
    """What `preset` normalises, uint8 3×H×W."""
    unscaled = with_fields(preset, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
    crop: Tensor = unscaled(image).mul(255).round().to(torch.uint8)
    return crop


# --- the two sides -------------------------------------------------------------------------------------------------


def draw_network(architecture: str, seed: int) -> Network:
    """The catalog's network with random weights."""
    torch.manual_seed(seed)
    network = build(architecture, len(_CLASSES)).eval()
    if not network.head.weight.any():  # torchvision begins ViT with a head of zeros: all its logits would agree
        nn.init.normal_(network.head.weight, std=0.02)
    return network


def calibrate_batch_norms(network: Network, preset: nn.Module, encoded: list[bytes]) -> None:
    """Give batch norms, layer after layer, the statistics of one batch of images."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = 1.0
    with torch.inference_mode():
        network(torch.stack([preset(open_image(data)) for data in encoded]))
    network.eval()


def reference_model(architecture: str, network: Network) -> nn.Module:
    """torchvision's model of that name with the network's weights."""
    model: nn.Module = models.get_model(architecture, weights=None)
    model.load_state_dict(network.state_dict())
    return model.eval()


def plan_run(
    architecture: str, network: Network, preset: nn.Module, images: Path, num_images: int | None, folder: Path
) -> Plan:
    """What jobs.import_model, jobs.manifest and jobs.predict make before the work begins, below `folder`."""
    bundle, weights = pack(
        network,
        name=architecture,
        version="1",
        architecture=Architecture(name=architecture),
        classes=_CLASSES,
        preprocessing=Preprocessing.from_torchvision(preset),
    )
    config = PredictConfig(
        manifest=str(folder / "manifest"),
        output=str(folder / "tables"),
        bundles=[publish(storage.normalise(str(folder / "registry")), bundle, weights)],
    )
    source = WebDatasetSource(str(images)) if images.suffix == ".tar" else PrefixSource(str(images))
    write_manifest(config.manifest, source, shard_size=_SHARD_SIZE, selection=Selection(limit=num_images))
    layout = Layout("fused", "cpu", num_actors=1, cpus_per_actor=torch.get_num_threads(), gpus_per_actor=0)
    return make_plan(config, *resolve_inputs(config), layout)


def compare_batches(
    plan: Plan, reference: nn.Module, preset: nn.Module, encoded: dict[str, bytes]
) -> Iterator[Compared]:
    """Each batch of the run as the Predictor answers it, beside the reference's answers."""
    predictor = Predictor(plan.run, plan.manifest)
    seen: list[Tensor] = []

    def note_logits(module: nn.Module, _: Any, outputs: Any) -> None:
        if isinstance(module, Network):
            seen.append(outputs[0])

    in_channels_last = copy.deepcopy(reference).to(memory_format=torch.channels_last)
    normalised_only = with_fields(preset, resize_size=preset.crop_size)
    for names, crops in load_batches(plan, predictor):
        with register_module_forward_hook(note_logits):
            predictor([crops])
        originals = [open_image(encoded[name]) for name in names]
        normalised = normalised_only(crops.contiguous())
        yield Compared(
            crops,
            torch.stack([reference_crop(preset, image) for image in originals]),
            seen.pop(),
            reference(torch.stack([preset(image) for image in originals])),
            reference(normalised),
            in_channels_last(normalised.contiguous(memory_format=torch.channels_last)),
        )
        assert not seen, "expected one network to answer a batch"


def load_batches(plan: Plan, predictor: Predictor) -> Iterator[tuple[list[str], Tensor]]:
    """The run's batches: the images' base names and their uint8 crops. No image may fail."""
    manifest: Manifest = plan.manifest
    for shard in plan.pending_shards():
        log = LoadLog()
        names = [uri.rpartition("/")[2] for uri in manifest.images(shard)["uri"].to_pylist()]
        for batch in load_shard(
            plan.run, manifest, shard, predictor.preprocessings, num_threads=2, isolated=False, log=log
        ):
            yield [names[row] for row in batch.rows], batch.pixels[0]
        assert not log.errors, log.errors


def with_fields(preset: nn.Module, **fields: Any) -> nn.Module:
    """A copy of torchvision's preset with other fields."""
    other = copy.copy(preset)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def read_images(images: Path) -> Iterator[tuple[str, bytes]]:
    """Base names and bytes of a folder's or a tar's files in order, read without the pipeline."""
    if images.is_dir():
        for path in sorted(images.iterdir()):
            yield path.name, path.read_bytes()
        return
    with tarfile.open(images) as archive:
        for member in archive:
            if (file := archive.extractfile(member)) is not None:
                yield member.name.rpartition("/")[2], file.read()


def open_image(data: bytes) -> Image.Image:
    """As torchvision's loader opens it, but upright: torchvision's leaves the EXIF orientation to the caller."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


# --- figures -------------------------------------------------------------------------------------------------------


def figures_of(compared: Compared) -> dict[str, Any]:
    """The three comparisons, and the scale of the logits that makes them mean something."""
    levels = (compared.crops.int() - compared.reference_crops.int()).abs()
    is_same = levels.flatten(1).amax(1) == 0
    logits, reference = compared.logits, compared.reference_logits
    assert logits.isfinite().all()
    assert reference.isfinite().all()
    return {
        "num_images": len(logits),
        "num_same_crops": int(is_same.sum()),
        "same_crops": differences(logits[is_same], reference[is_same]) if is_same.any() else None,
        "same_pixels": differences(logits, compared.same_pixels_logits),
        "num_identical": int((logits == compared.same_layout_logits).all(1).sum()),
        "end_to_end": {
            **differences(logits, reference),
            "largest_level": int(levels.max()),
            "mean_level": float(levels.float().mean()),
            "top1_agreement": float((logits.argmax(1) == reference.argmax(1)).float().mean()),
        },
        "logits": {
            "largest": float(reference.abs().max()),
            "rms": float(reference.square().mean().sqrt()),
            "std_between_images": float(reference.std(0).mean()),
            "num_top1_classes": len(reference.argmax(1).unique()),
        },
    }


def differences(logits: Tensor, reference: Tensor) -> dict[str, float]:
    """Largest and mean over the images, relative to an image's largest logit, and the largest by element."""
    apart = (logits - reference).abs()
    largest = reference.abs().amax(1, keepdim=True)
    by_image = apart.amax(1) / largest[:, 0]
    by_element = apart / torch.maximum(reference.abs(), ELEMENT_FLOOR * largest)
    return {
        "largest": float(by_image.max()),
        "mean": float(by_image.mean()),
        "largest_by_element": float(by_element.max()),
    }


def is_exact(figures: dict[str, Any]) -> bool:
    """Whether both bounded comparisons hold, by image and by element."""
    bounded = [figures[name] for name in ("same_crops", "same_pixels") if figures[name] is not None]
    return all(max(found["largest"], found["largest_by_element"]) <= TOLERANCE for found in bounded)


def to_markdown(figures: list[dict[str, Any]]) -> str:
    """The figures as the table of RESULTS.md."""
    lines = [
        "| network | images / with the same crop | same crops: by image / by element "
        "| same pixels: by image / by element | identical "
        "| end to end: largest / mean | levels: largest / mean | top-1 agrees "
        "| logits: rms / std between images / top-1 classes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for figure in figures:
        bounded = [
            "none" if found is None else f"{found['largest']:.1e} / {found['largest_by_element']:.1e}"
            for found in (figure["same_crops"], figure["same_pixels"])
        ]
        end, logits = figure["end_to_end"], figure["logits"]
        cells = [
            figure["architecture"],
            f"{figure['num_images']} / {figure['num_same_crops']}",
            *bounded,
            str(figure["num_identical"]),
            f"{end['largest']:.1e} / {end['mean']:.1e}",
            f"{end['largest_level']} / {end['mean_level']:.4f}",
            f"{end['top1_agreement']:.1%}",
            f"{logits['rms']:.2g} / {logits['std_between_images']:.2g} / {logits['num_top1_classes']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
