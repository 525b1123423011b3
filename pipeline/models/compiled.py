"""Networks compiled ahead of time for one kind of device: uint8 pixels in, logits and embeddings out, in one call.

    <bundle>/compiled/<key>.pt2     AOTInductor's package: native code and the weights
    <bundle>/compiled/<key>.json    what it was compiled for and how well it agrees with float32; written last

The key is the digest of all that the code depends on (`Target`), so that one made by other software, for other hardware
or for another batch size is never found. A compilation that fails, or whose answers are too far from float32's, leaves
a record that says so, and no package: whoever comes later need not try again.

A package is native code: who may write to a registry may run code where its bundles are used.
"""

import copy
import hashlib
import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from pydantic import JsonValue, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import __version__, storage
from pipeline.config import Section, describe
from pipeline.data.transforms import Preprocessing
from pipeline.errors import BundleError, ObjectExistsError, ObjectNotFoundError
from pipeline.models.bundle import Bundle, Digest, load_network
from pipeline.models.catalog import Network
from pipeline.models.precision import AgreementLimits, Precision, dtype_of

NUM_SAMPLES = 64
_LONGEST_COMPILATION_S = 1800
_POLL_S = 1.0

Program: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""uint8 N×3×S×S on its device to float32 logits N×classes and embeddings N×d, for any N up to the batch size."""

logger = logging.getLogger(__name__)


class Target(Section):
    """All that compiled code depends on."""

    bundle_digest: Digest
    device: Literal["cpu", "cuda"]
    device_kind: dict[str, JsonValue]
    precision: Precision
    batch_size: int
    crop_size: int
    num_threads: int
    """Of a forward pass on the CPU; GPUs do not care."""
    software: dict[str, str]

    @classmethod
    def here(
        cls, bundle: Bundle, device: torch.device, precision: Precision, *, batch_size: int, num_threads: int
    ) -> "Target":
        """The target that is this process's machine and software."""
        return cls(
            bundle_digest=bundle.digest,
            device="cuda" if device.type == "cuda" else "cpu",
            device_kind=_kind_of(device),
            precision=precision,
            batch_size=batch_size,
            crop_size=bundle.preprocessing.crop_size,
            num_threads=num_threads if device.type == "cpu" else 0,
            software={"torch": torch.__version__, "image-batch-pipeline": __version__},
        )

    @property
    def key(self) -> str:
        """The name of what is compiled for it."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class Agreement(Section):
    """How compiled answers compare with those of the eager network in float32, over `num_images`."""

    num_images: int
    top1: float
    """Share of the images whose best class is the same."""
    cosine: float
    """Mean cosine of the embeddings."""

    def fault(self, limits: AgreementLimits) -> str | None:
        """Why what answers so must not be used, if so."""
        if self.top1 >= limits.min_top1 and self.cosine >= limits.min_cosine:
            return None
        return (
            f"expected a top-1 agreement with float32 of at least {limits.min_top1} and a cosine of "
            f"{limits.min_cosine}, got {self.top1:.4f} and {self.cosine:.6f} on {self.num_images} images"
        )


class Record(Section):
    """What is known of a compilation; `refused` says why there is no package."""

    target: Target
    package_digest: Digest | None = None
    agreement: Agreement | None = None
    compile_s: float = 0.0
    refused: str | None = None


def ensure(bundle_uri: str, target: Target, samples: Callable[[], Tensor] | None, limits: AgreementLimits) -> Record:
    """The record of the bundle's compilation for `target`, which must be this machine's; compiles where there is none.

    Of several processes that ask at once one compiles and the others wait. `samples` gives preprocessed images, uint8
    N×3×S×S, to measure the agreement on; without it, or where it gives none, they are drawn. Raises BundleError, and
    StorageError where the registry takes no writes.
    """
    record_uri, claim_uri = _uri(bundle_uri, target, "json"), _uri(bundle_uri, target, "claim")
    while (record := find(bundle_uri, target)) is None:
        try:
            storage.write(claim_uri, str(time.time()).encode(), if_absent=True)
        except ObjectExistsError:
            _await(record_uri, claim_uri)
            continue
        try:
            return _compile_and_keep(bundle_uri, target, samples, limits)
        finally:
            storage.delete(claim_uri)
    return record


def find(bundle_uri: str, target: Target) -> Record | None:
    """The record of the compilation for `target`, if there is one. Raises BundleError where it is damaged."""
    uri = _uri(bundle_uri, target, "json")
    try:
        record = Record.model_validate_json(storage.read(uri))
    except ObjectNotFoundError:
        return None
    except ValidationError as error:
        raise BundleError(f"{uri} is damaged: {describe(error)}; delete it to compile anew") from error
    if record.target != target:
        raise BundleError(f"{uri}: expected the record of another target, found {record.target}; delete it")
    return record


def load(bundle_uri: str, record: Record) -> Program:
    """The compiled network, ready to run. Raises BundleError where the package is missing or altered."""
    uri = package_uri(bundle_uri, record.target)
    try:
        package = storage.read(uri)
    except ObjectNotFoundError as error:
        raise BundleError(f"expected a compiled network at {uri!r}, found none; delete its .json") from error
    if hashlib.sha256(package).hexdigest() != record.package_digest:
        raise BundleError(f"{uri} was altered: expected sha256 {record.package_digest}; delete it and its .json")
    return _open(package, record.target)


def package_uri(bundle_uri: str, target: Target) -> str:
    """Where the package of the bundle's compilation for `target` lies."""
    return _uri(bundle_uri, target, "pt2")


def _open(package: bytes, target: Target) -> Program:
    with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
        file.write(package)
        file.flush()
        # Not torch._inductor.aoti_load_package, which is this call after an import of 4 s.
        loader = torch._C._aoti.AOTIModelPackageLoader(file.name, "model", False, 1 if target.device == "cpu" else 4)

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        num_images = len(pixels)
        if num_images < target.batch_size:
            pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, target.batch_size - num_images))
        logits, embeddings = loader.run([pixels.contiguous(memory_format=torch.channels_last)])
        return logits[:num_images], embeddings[:num_images]

    return run


def _compile_and_keep(
    bundle_uri: str, target: Target, samples: Callable[[], Tensor] | None, limits: AgreementLimits
) -> Record:
    start = time.monotonic()
    bundle = Bundle.load(bundle_uri)
    network = load_network(bundle_uri)
    pixels = samples() if samples else draw_samples(target.crop_size)
    if not len(pixels):
        pixels = draw_samples(target.crop_size)
    record = Record(target=target)
    try:
        package = compile_network(network, bundle.preprocessing, target)
        agreement = measure_agreement(network, bundle.preprocessing, _open(package, target), target, pixels)
    except Exception as error:  # of the compilers: no fault of the bundle's, which still runs as it is
        logger.warning("%s: not compiled", bundle_uri, exc_info=True)
        record = record.model_copy(update={"refused": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"})
    else:
        digest = hashlib.sha256(package).hexdigest()
        found = {"agreement": agreement, "refused": agreement.fault(limits), "package_digest": digest}
        record = record.model_copy(update=found)
        if record.refused is None:
            storage.write(package_uri(bundle_uri, target), package)
    record = record.model_copy(update={"compile_s": round(time.monotonic() - start, 1)})
    storage.write(_uri(bundle_uri, target, "json"), record.model_dump_json(indent=1).encode())
    return record


def compile_network(network: Network, preprocessing: Preprocessing, target: Target) -> bytes:
    """AOTInductor's package of `network` (CPU, float32, eval mode, left as it is) for `target`, which must be here."""
    from torch._inductor import aoti_compile_and_package

    whole = _Whole(_folded(network), preprocessing, dtype_of(target.precision))
    whole = whole.to(target.device).to(memory_format=torch.channels_last)
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
    same, cosine = 0, 0.0
    with torch.inference_mode():
        for batch in pixels.to(target.device).split(target.batch_size):
            expected, expected_embeddings = network(preprocessing.normalise(batch))
            logits, embeddings = program(batch)
            same += int((expected.argmax(1) == logits.argmax(1)).sum())
            cosine += float(F.cosine_similarity(expected_embeddings, embeddings).sum())
    return Agreement(num_images=len(pixels), top1=same / len(pixels), cosine=cosine / len(pixels))


class _Whole(nn.Module):
    """Normalisation, network and casts in one graph."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self._preprocessing, self._dtype = preprocessing, dtype

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits, embedding = self.network(self._preprocessing.normalise(pixels).to(self._dtype))
        return logits.float(), embedding.float()


def _folded(network: Network) -> nn.Module:
    """A copy whose batch norms are part of the convolutions before them, in float32, where tracing finds them."""
    from torch.fx.experimental.optimization import fuse

    try:
        folded: nn.Module = fuse(network)
    except Exception:  # control flow that cannot be traced; inductor folds what it finds
        logger.info("batch norms stay where they are", exc_info=True)
        return copy.deepcopy(network)
    return folded


def draw_samples(crop_size: int, num_images: int = NUM_SAMPLES) -> Tensor:
    """Seeded pictures of a kind, smooth at several scales, where no real ones are at hand: uint8 N×3×S×S."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.zeros(num_images, 3, crop_size, crop_size)
    for cells in (2, 5, 13, 34):
        coarse = torch.rand(num_images, 3, cells, cells, generator=generator) - 0.5
        picture += F.interpolate(coarse, crop_size, mode="bicubic")
    return ((picture + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def _kind_of(device: torch.device) -> dict[str, JsonValue]:
    """What tells kinds of devices apart for which other code is made."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return {"name": torch.cuda.get_device_name(device), "capability": list(capability), "cuda": torch.version.cuda}
    kind = {"machine": platform.machine(), "system": platform.system(), "has": torch.backends.cpu.get_cpu_capability()}
    capabilities: dict[str, JsonValue] = getattr(torch.cpu, "get_capabilities", dict)()
    return kind | {name: value for name, value in sorted(capabilities.items()) if not name.startswith("num_")}


def _await(record_uri: str, claim_uri: str) -> None:
    """Until the record is there, or who claimed it has given up or died."""
    while not storage.exists(record_uri):
        try:
            claimed_at = float(storage.read(claim_uri))
        except ObjectNotFoundError:
            return
        if time.time() - claimed_at > _LONGEST_COMPILATION_S:
            with suppress(ObjectNotFoundError):
                storage.delete(claim_uri)
            return
        time.sleep(_POLL_S)


def _uri(bundle_uri: str, target: Target, suffix: str) -> str:
    return storage.join(storage.normalise(bundle_uri), "compiled", f"{target.key}.{suffix}")
