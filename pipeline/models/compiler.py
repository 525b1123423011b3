"""Compiling a network ahead of time, and running it: uint8 pixels in, logits and embeddings out, in one call.

A package is native code: who may write to a registry may run code where its bundles are used.
"""

import copy
import hashlib
import io
import logging
import platform
import tempfile
import time
import weakref
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import storage
from pipeline.data.transforms import Preprocessing
from pipeline.errors import AccessDeniedError, BundleError, NotKeptError, ObjectNotFoundError, StorageError, first_line
from pipeline.models import int8
from pipeline.models.bundle import Bundle, load_network
from pipeline.models.catalog import Network
from pipeline.models.compiled import (
    Agreement,
    Record,
    Target,
    alone_on_this_machine,
    find,
    package_uri,
    record_uri,
)
from pipeline.models.precision import Precision, compute_repeatably, dtype_of

NUM_SAMPLES = 128
_FEWEST_RANGED = 16  # images to measure int8's ranges on; its agreement is measured on as many others
_RUNNERS_ON_GPU = 2  # batches under way

Program: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""uint8 N×3×S×S on its device to float32 logits N×classes and embeddings N×d, for any N up to the batch size."""

logger = logging.getLogger(__name__)


def target_here(
    bundle: Bundle, device: torch.device, precision: Precision, *, batch_size: int, num_threads: int
) -> Target:
    """The target that is this process's machine and software."""
    return Target(
        bundle_digest=bundle.digest,
        device="cuda" if device.type == "cuda" else "cpu",
        device_kind=_kind_of(device),
        precision=precision,
        batch_size=batch_size,
        crop_size=bundle.preprocessing.crop_size,
        num_threads=num_threads if device.type == "cpu" else 0,
    )


def ensure(bundle_uri: str, target: Target, samples: Callable[[], Tensor] | None = None) -> Record:
    """The record of the bundle's compilation for `target`, which must be this machine's; compiles where there is none.

    `samples` gives preprocessed images, uint8 N×3×S×S, to measure the agreement on; without it, or where it gives none,
    they are drawn, but not for int8, whose ranges are measured on half of them. Of several on this machine one compiles
    and the others wait; of several machines the first to end is right. Raises BundleError where it cannot be compiled
    here or kept, NotKeptError where the registry allows no writes, StorageError where nothing can be read.
    """
    record = find(bundle_uri, target)
    if record is not None:
        return record
    with alone_on_this_machine(target.key):  # compilers take gigabytes each
        return find(bundle_uri, target) or _compile_and_keep(bundle_uri, target, samples)


def _compile_and_keep(bundle_uri: str, target: Target, samples: Callable[[], Tensor] | None) -> Record:
    record, package = _compile(bundle_uri, target, samples)
    try:
        storage.write(package_uri(bundle_uri, record), package)
        storage.write(record_uri(bundle_uri, target), record.model_dump_json(indent=1).encode(), if_absent=True)
    except StorageError as error:
        faster = find(bundle_uri, target)
        if faster is not None:
            return faster
        kind = NotKeptError if isinstance(error, AccessDeniedError) else BundleError
        raise kind(f"compiled, but not to be kept: {error}; run jobs.compile as one who may write") from error
    return record


def measure_anew(bundle_uri: str, record: Record, samples: Callable[[], Tensor]) -> Record:
    """The record with the agreement on `samples`, kept in place of that on drawn pictures where the registry allows it.

    Raises BundleError where the network cannot be loaded, StorageError.
    """
    if record.target.device == "cuda":
        compute_repeatably()
    bundle, pixels = Bundle.load(bundle_uri), samples()
    program = load(bundle_uri, record)
    agreement = measure_agreement(load_network(bundle_uri), bundle.preprocessing, program, record.target, pixels)
    measured = record.model_copy(update={"agreement": agreement, "is_drawn": False})
    try:
        storage.write(record_uri(bundle_uri, record.target), measured.model_dump_json(indent=1).encode())
    except AccessDeniedError as error:
        logger.warning("the agreement on real images cannot be kept, that on drawn ones stays: %s", error)
    return measured


def load(bundle_uri: str, record: Record) -> Program:
    """The compiled network, ready to run. Raises BundleError where the package is missing, altered or cannot be run."""
    uri, remedy = package_uri(bundle_uri, record), f"delete {record_uri(bundle_uri, record.target)} to compile anew"
    try:
        package = storage.read(uri)
    except ObjectNotFoundError as error:
        raise BundleError(f"expected a compiled network at {uri!r}, found none; {remedy}") from error
    if hashlib.sha256(package).hexdigest() != record.package_digest:
        raise BundleError(f"{uri} was altered: expected sha256 {record.package_digest}; {remedy}")
    try:
        return _open(package, record.target)
    except (RuntimeError, OSError) as error:
        raise BundleError(f"{uri} cannot be loaded here: {error}; {remedy}") from error


def compile_network(network: Network, preprocessing: Preprocessing, target: Target, pixels: Tensor) -> bytes:
    """AOTInductor's package of `network` (CPU, float32, eval mode, left as it is) for `target`, which must be here.

    `pixels`, uint8 N×3×S×S, are what int8's ranges are measured on.
    """
    from torch._inductor import aoti_compile_and_package

    whole = _Whole(network, preprocessing, dtype_of(target.precision))
    whole = whole.to(target.device).to(memory_format=torch.channels_last)
    if target.precision == "int8":
        batches = _repeated(pixels, target.batch_size).split(target.batch_size)
        with torch.no_grad():
            whole.trunk = int8.quantised(whole.trunk, [preprocessing.normalise(batch) for batch in batches])
    shape = (target.batch_size, 3, target.crop_size, target.crop_size)
    example = torch.zeros(shape, dtype=torch.uint8, device=target.device).contiguous(memory_format=torch.channels_last)
    options = {"freezing": True} | ({"cpp.threads": target.num_threads} if target.device == "cpu" else {})
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = str(Path(folder, "model.pt2"))
        aoti_compile_and_package(torch.export.export(whole, (example,)), package_path=path, inductor_configs=options)
        return Path(path).read_bytes()


def measure_agreement(
    network: Network, preprocessing: Preprocessing, program: Program, target: Target, pixels: Tensor
) -> Agreement:
    """How `program` answers beside the eager network in float32, on uint8 N×3×S×S; the network is moved."""
    network = network.to(target.device)
    num_same, cosines = 0, 0.0
    with torch.inference_mode():
        for batch in pixels.to(target.device).split(target.batch_size):
            expected, expected_embeddings = network(preprocessing.normalise(batch))
            logits, embeddings = program(batch)
            num_same += int((expected.argmax(1) == logits.argmax(1)).sum())
            cosines += float(F.cosine_similarity(expected_embeddings, embeddings).sum())
    return Agreement.of(len(pixels), num_same, cosines)


def draw_samples(crop_size: int, num_images: int = NUM_SAMPLES) -> Tensor:
    """Seeded pictures of a kind, smooth at several scales, where no real ones are at hand: uint8 N×3×S×S."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.zeros(num_images, 3, crop_size, crop_size)
    for cells in (2, 5, 13, 34):
        coarse = torch.rand(num_images, 3, cells, cells, generator=generator) - 0.5
        picture += F.interpolate(coarse, crop_size, mode="bicubic")
    return ((picture + 1) * 127.5).clamp(0, 255).to(torch.uint8)


class _Whole(nn.Module):
    """Normalisation, network and casts in one graph.

    The head computes in float32: of 16 bits, logits would be equal that are merely close, and it costs nothing.
    """

    def __init__(self, network: Network, preprocessing: Preprocessing, dtype: torch.dtype) -> None:
        super().__init__()
        self.trunk, self.head = _folded(network.trunk).to(dtype), copy.deepcopy(network.head)
        self._preprocessing, self._dtype = preprocessing, dtype

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.trunk(self._preprocessing.normalise(pixels).to(self._dtype)).float()
        return self.head(embedding), embedding


def _compile(bundle_uri: str, target: Target, samples: Callable[[], Tensor] | None) -> tuple[Record, bytes]:
    start = time.monotonic()
    if target.device == "cuda":
        compute_repeatably()  # so that what it is compared with is float32
    bundle, network = Bundle.load(bundle_uri), load_network(bundle_uri)
    pixels = samples() if samples else torch.empty(0)
    ranging, is_drawn = torch.empty(0), not len(pixels)
    if target.precision == "int8":
        if len(pixels) < 2 * _FEWEST_RANGED:
            raise BundleError(
                f"precision int8: expected a manifest of at least {2 * _FEWEST_RANGED} images to measure ranges on and "
                f"try it with, got {len(pixels)}"
            )
        ranging, pixels = pixels[::2], pixels[1::2]  # it must agree on others than it was fitted to
    elif is_drawn:
        pixels = draw_samples(target.crop_size)
    try:
        package = compile_network(network, bundle.preprocessing, target, ranging)
        agreement = measure_agreement(network, bundle.preprocessing, _open(package, target), target, pixels)
    except BundleError:
        raise
    except Exception as error:  # compilers raise nearly everything
        logger.warning("%s does not compile", bundle_uri, exc_info=True)
        said = first_line(error)
        raise BundleError(f"{bundle_uri} does not compile here: {type(error).__name__}: {said}") from error
    digest = hashlib.sha256(package).hexdigest()
    seconds = round(time.monotonic() - start, 1)
    facts = {"agreement": agreement, "is_drawn": is_drawn, "compile_s": seconds}
    return Record(target=target, package_digest=digest, **facts), package


def _open(package: bytes, target: Target) -> Program:
    with ExitStack() as unpacked:
        folder = Path(unpacked.enter_context(tempfile.TemporaryDirectory(prefix="compiled-")))
        loader = _load(package, folder, num_runners=1 if target.device == "cpu" else _RUNNERS_ON_GPU)

        def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
            num_images = len(pixels)
            logits, embeddings = loader.run([_padded(pixels, target.batch_size)])
            return logits[:num_images], embeddings[:num_images]

        if target.device == "cuda":  # whose kernels are files of their own, each read when it is first called
            for file in folder.rglob("*"):
                if file.suffix in (".so", ".pt2"):  # read by now, and nearly all that stays if the process is killed
                    file.unlink()
            weakref.finalize(run, unpacked.pop_all().close)
    return run


def _load(package: bytes, folder: Path, *, num_runners: int) -> Any:
    """Torch's loader of a package, unpacked into an empty folder.

    Unpacked here, since what the loader unpacks itself stays behind when its process is killed; and not by
    torch._inductor.aoti_load_package, which makes the same call after an import of 4 s.
    """
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        archive.extractall(folder)
    try:
        return torch._C._aoti.AOTIModelPackageLoader(str(folder), "model", False, num_runners, -1)
    except RuntimeError as error:
        if "zip archive" not in str(error):
            raise
    file = folder / "model.pt2"
    file.write_bytes(package)  # torch 2.11 takes no folder
    return torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, num_runners, -1)


def _repeated(pixels: Tensor, multiple: int) -> Tensor:
    """Images over again until their number is one of `multiple`: black ones in their place would widen ranges."""
    num_images = -(-len(pixels) // multiple) * multiple
    return pixels[torch.arange(num_images) % len(pixels)]


def _padded(pixels: Tensor, batch_size: int) -> Tensor:
    if len(pixels) < batch_size:
        pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, batch_size - len(pixels)))
    return pixels.contiguous(memory_format=torch.channels_last)


def _folded(trunk: nn.Module) -> nn.Module:
    """A copy whose batch norms are part of the convolutions before them, in float32, where tracing finds them."""
    from torch.fx.experimental.optimization import fuse

    try:
        folded: nn.Module = fuse(trunk)
    except Exception:  # control flow that cannot be traced; inductor folds what it finds
        logger.info("batch norms stay where they are", exc_info=True)
        return copy.deepcopy(trunk)
    return folded


def _kind_of(device: torch.device) -> dict[str, JsonValue]:
    """What tells kinds of devices apart for which other code is made; code for the host's CPU launches a GPU's."""
    if device.type == "cpu":
        return _kind_of_cpu()
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return {"name": name, "capability": list(capability), "cuda": torch.version.cuda, "host": _kind_of_cpu()}


def _kind_of_cpu() -> dict[str, JsonValue]:
    kind = {"machine": platform.machine(), "system": platform.system(), "has": torch.backends.cpu.get_cpu_capability()}
    capabilities: dict[str, JsonValue] = {"vnni": torch.cpu._is_vnni_supported()}  # what int8 turns on
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.11 may lack it
        capabilities = dict(torch.cpu.get_capabilities())
    return kind | {name: value for name, value in sorted(capabilities.items()) if not name.startswith("num_")}
