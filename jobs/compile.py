"""Compile a bundle's network ahead of time for the cluster's devices, into the registry beside it.

python -m jobs.compile --registry URI --bundle NAME
python -m jobs.compile --registry URI --bundle NAME --manifest URI --precision bfloat16

`predict` does it by itself on first use in runs of 5,000 images and more, on GPUs of 100,000; doing it before spares a
scheduled run the wait, and shows the agreement with float32. Runs of any size use networks that are all compiled. What
is compiled already for the same device, software, precision, batch size and number of threads is left as it is; its
agreement, where it was measured on drawn images, is measured anew on a manifest's.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from jobs import run_job
from pipeline import storage
from pipeline.cluster import (
    Device,
    Node,
    choose_device,
    connected_ray,
    default_batch_size,
    in_words,
    results_of,
    start_here,
)
from pipeline.config import ClusterConfig, JobConfig
from pipeline.data.manifest import Manifest
from pipeline.data.readers import ReadLimits
from pipeline.errors import BundleError, ConfigError, ManifestError, RunError
from pipeline.models import registry
from pipeline.models.bundle import Bundle
from pipeline.models.precision import AgreementLimits, AskedPrecision, precisions
from pipeline.witness import Witness, arrive, heard

if TYPE_CHECKING:
    import torch


class CompileConfig(JobConfig):
    """Compile a bundle's network ahead of time for the cluster's devices, into the registry beside it."""

    bundle: str
    """Bundle to compile: name, name/version or name@alias in the registry, or a bundle's URI."""
    registry: str | None = None
    """URI of the registry that names of bundles are looked up in."""
    manifest: str | None = None
    """URI of a manifest, on some images of which the agreement with float32 is measured; unset: on drawn ones."""
    images: ReadLimits = ReadLimits()
    """How those are read."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where the cluster has any."""
    precision: AskedPrecision = "auto"
    """What the network computes in; auto: bfloat16 where the device has instructions for it, float32 elsewhere.
    int8, on CPUs: its ranges are measured on the manifest's images too."""
    batch_size: int | None = Field(None, ge=1)
    """Images per forward pass, as in predict; unset: 16 on CPUs, 256 on GPUs."""
    cpus_per_actor: int = Field(1, ge=1)
    """Threads of a forward pass on CPUs: those of predict's actors."""
    agreement: AgreementLimits = AgreementLimits()
    """With float32, below which the job fails, and predict would not use it."""
    cluster: ClusterConfig = ClusterConfig()


def main(config: CompileConfig) -> dict[str, Any]:
    """Compile the bundle that `config` names on a node that has the device, unless it is compiled already."""
    if config.precision == "int8" and config.manifest is None:
        raise ConfigError("precision: int8 needs a manifest, of images to measure ranges on; got none")
    uri = registry.resolve(config.registry, config.bundle)
    Bundle.load(uri)
    if config.manifest is not None:
        manifest = Manifest.open(storage.normalise(config.manifest))
        config = config.model_copy(update={"manifest": manifest.uri})  # absolute: workers have other working folders
    import ray

    with connected_ray(config.cluster) as nodes:
        device = choose_device(nodes, config.device)
        if config.precision == "int8" and device == "cuda":
            raise ConfigError("precision: int8 is for CPUs, got GPUs; use auto, or device cpu")
        _refuse_unfit([node for node in nodes if node.gpus or device == "cpu"], config.cpus_per_actor)
        threads = {"env_vars": {"OMP_NUM_THREADS": str(config.cpus_per_actor)}}
        options = {"num_cpus": config.cpus_per_actor, "num_gpus": int(device == "cuda"), "runtime_env": threads}
        witness = start_here(Witness)
        asked = {"compile": f"a task of {in_words(config.cpus_per_actor, int(device == 'cuda'))}"}
        try:
            with heard(witness, asked):
                compiling = ray.remote(compile_here).options(**options).remote(config, uri, device, witness)
                return dict(results_of([compiling])[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise RunError(f"expected the task that compiles to end, got {type(error).__name__}: {error}") from error


def compile_here(config: CompileConfig, uri: str, device_type: Device, witness: Any) -> dict[str, Any]:
    """Compile the bundle at `uri` for this process's machine.

    Raises BundleError where it agrees too little, ManifestError where no image of the manifest can be had.
    """
    arrive(witness, "compile")
    import torch

    from pipeline.models import compiled, compiler

    device, bundle = torch.device(device_type), Bundle.load(uri)
    torch.set_num_threads(config.cpus_per_actor)
    samples = None if config.manifest is None else partial(_samples, config.manifest, config.images, bundle)
    target = compiler.target_here(
        bundle,
        device,
        precisions(config.precision, device)[0],
        batch_size=config.batch_size or default_batch_size(device_type),
        num_threads=config.cpus_per_actor,
    )
    record = compiler.ensure(uri, target, samples)
    if samples is not None and record.is_drawn:
        record = compiler.measure_anew(uri, record, samples)
    fault = record.agreement.fault(config.agreement)
    if fault is not None:
        raise BundleError(f"{uri} is compiled in {target.precision}, but predict will not use it so: {fault}")
    return {
        "status": "done",
        "bundle": uri,
        "package": compiled.package_uri(uri, record),
        "agreement": record.agreement.model_dump(),
        "compile_s": record.compile_s,
        "target": target.model_dump(),
    }


def _samples(manifest_uri: str, limits: ReadLimits, bundle: Bundle) -> "torch.Tensor":
    from pipeline.data.loader import sample_pixels
    from pipeline.models import compiler

    manifest = Manifest.open(manifest_uri)
    pixels = sample_pixels(manifest, limits, bundle.preprocessing, compiler.NUM_SAMPLES)
    if not len(pixels):
        raise ManifestError(
            f"manifest: expected images in {manifest.uri!r} to measure the agreement on, got none that can be had; "
            "the warning before says why (images.allowed_roots?); without a manifest drawn ones are taken"
        )
    return pixels


def _refuse_unfit(nodes: list[Node], cpus: int) -> None:
    if max(node.cpus for node in nodes) < cpus:
        raise ConfigError(f"cpus_per_actor: expected at most the CPUs of a node, {nodes}, got {cpus}")


if __name__ == "__main__":
    run_job(CompileConfig, main)
