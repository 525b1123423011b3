"""Compiled networks beside their bundle: what they were made for, how well they agree with float32, where they lie.

    <bundle>/compiled/<key>.json             the record; written last, put-if-absent, changed only by
                                             `compiler.measure_anew`
    <bundle>/compiled/<key>-<digest>.pt2     AOTInductor's package: native code and the weights

The key is the digest of all that the code depends on (`Target`), so that one made by other software, for other hardware
or for another batch size is never found. Torch is not needed to find one; `compiler` makes and runs them.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from typing import Literal

from pydantic import Field, JsonValue, ValidationError

from pipeline import __version__, storage
from pipeline.cluster import Device
from pipeline.config import Section, describe
from pipeline.errors import BundleError, ObjectNotFoundError
from pipeline.models.bundle import Digest
from pipeline.models.precision import AgreementLimits, AskedPrecision, Precision


def software() -> dict[str, str]:
    """Versions of what compiles and runs."""
    return {"torch": version("torch"), "image-batch-pipeline": __version__}


class Target(Section):
    """All that compiled code depends on, but for the images that int8's ranges were measured on: the first's stay."""

    bundle_digest: Digest
    device: Literal["cpu", "cuda"]
    device_kind: dict[str, JsonValue]
    precision: Precision
    batch_size: int
    crop_size: int
    num_threads: int
    """Of a forward pass on the CPU; GPUs do not care."""
    software: dict[str, str] = Field(default_factory=software)

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
    """Mean cosine of the embeddings; -1 where it is no number."""

    @classmethod
    def of(cls, num_images: int, num_same: int, sum_of_cosines: float) -> "Agreement":
        """From sums over the images."""
        cosine = sum_of_cosines / num_images if math.isfinite(sum_of_cosines) else -1.0
        return cls(num_images=num_images, top1=num_same / num_images, cosine=cosine)

    def fault(self, limits: AgreementLimits) -> str | None:
        """Why what answers so must not be used, if so."""
        if self.top1 >= limits.min_top1 and self.cosine >= limits.min_cosine:
            return None
        return (
            f"expected a top-1 agreement with float32 of at least {limits.min_top1} and a cosine of "
            f"{limits.min_cosine}, got {self.top1:.4f} and {self.cosine:.6f} on {self.num_images} images"
        )


class Record(Section):
    """What is known of a compiled network."""

    target: Target
    package_digest: Digest
    agreement: Agreement
    is_drawn: bool = False
    """Whether that was measured on drawn pictures, for want of real ones."""
    compile_s: float


def find(bundle_uri: str, target: Target) -> Record | None:
    """The record of the compilation for `target`, if there is one. Raises BundleError where it is damaged."""
    record = _read(record_uri(bundle_uri, target))
    if record is not None and record.target != target:
        raise BundleError(f"{record_uri(bundle_uri, target)} is of another target than its name says: delete it")
    return record


def recorded_threads(
    bundle_uri: str, bundle_digest: str, device: Device, precision: AskedPrecision, *, batch_size: int
) -> set[int]:
    """For how many threads the bundle was compiled by this software, on whatever kind of CPU; for GPUs 0, if it was."""
    wanted = (bundle_digest, device, batch_size, software())
    return {
        target.num_threads
        for target in (record.target for record in records(bundle_uri))
        if wanted == (target.bundle_digest, target.device, target.batch_size, target.software)
        if precision == target.precision or (precision == "auto" and target.precision != "int8")
    }


def records(bundle_uri: str) -> Iterator[Record]:
    """Of every compilation of the bundle; but for those of other versions of this software, which it may not know."""
    for info in storage.list_objects(storage.join(storage.normalise(bundle_uri), "compiled")):
        if not info.uri.endswith(".json"):
            continue
        with contextlib.suppress(BundleError):
            if record := _read(info.uri):
                yield record


@contextlib.contextmanager
def alone_on_this_machine(name: str) -> Iterator[None]:
    """Hold the block until no other process of this user is in one of the same `name`; ends with the process."""
    path = os.path.join(tempfile.gettempdir(), f"compiling-{os.getuid()}-{name}.lock")
    lock = None
    with contextlib.suppress(OSError):  # then several may do the same, which is only slower
        lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)  # the file stays: others may wait for it


def record_uri(bundle_uri: str, target: Target) -> str:
    """Where the record of the bundle's compilation for `target` lies."""
    return storage.join(storage.normalise(bundle_uri), "compiled", f"{target.key}.json")


def package_uri(bundle_uri: str, record: Record) -> str:
    """Where the package lies that `record` is of."""
    name = f"{record.target.key}-{record.package_digest[:16]}.pt2"
    return storage.join(storage.normalise(bundle_uri), "compiled", name)


def _read(uri: str) -> Record | None:
    try:
        return Record.model_validate_json(storage.read(uri))
    except ObjectNotFoundError:
        return None
    except ValidationError as error:
        raise BundleError(f"{uri} is damaged: {describe(error)}; delete it to compile anew") from error
