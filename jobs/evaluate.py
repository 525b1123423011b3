"""Judge a bundle on a labelled manifest: top-1 and top-5 error, by class, with the confusion matrix.

python -m jobs.evaluate --config configs/evaluate.yaml
python -m jobs.evaluate --manifest URI --registry URI --bundle NAME --output URI --protocol.views ten_crop

Every image counts once, whatever the number of workers; in float32 the answers are those of jobs.predict that is not
compiled and computes in float32.
"""

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from jobs import run_job
from pipeline import storage
from pipeline.cluster import Device, Node, choose_device, connected_ray, default_batch_size
from pipeline.config import ClusterConfig, JobConfig, Section
from pipeline.data.manifest import Manifest
from pipeline.data.readers import ReadLimits
from pipeline.data.training_set import refuse_other_classes
from pipeline.errors import StorageError
from pipeline.models import registry
from pipeline.models.bundle import Bundle
from pipeline.models.precision import AskedFloatPrecision, FloatPrecision
from pipeline.training.protocol import Protocol

if TYPE_CHECKING:
    from pipeline.training.counts import Outcome

_MAX_FAILURES = 1  # nothing is kept of an attempt, so each begins anew
_MEET_WITHIN_S = 7 * 24 * 3600.0  # ranks meet when all is judged, and nodes may be of different speeds
_NUM_HARDEST = 24


class EvaluateComputeConfig(Section):
    """Where the work runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs where the cluster has any."""
    num_workers: int | None = Field(None, ge=1)
    """Processes, one per GPU or group of CPUs. Unset: one per GPU, or one where there is none."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """CPUs of one; unset: a fair share of the smallest node."""
    precision: AskedFloatPrecision = "float32"
    """Of the forward pass; float32 is that of predict in float32, not compiled. auto: bfloat16 on GPUs that all
    have it."""


class EvaluateConfig(JobConfig):
    """Judge a bundle on a labelled manifest: top-1 and top-5 error, by class, with the confusion matrix."""

    manifest: str
    """URI of the labelled manifest (made by jobs.manifest or jobs.pack); its classes are the bundle's, in their order,
    or its labels bare class ids."""
    bundle: str
    """Bundle to judge: name, name/version or name@alias in the registry, or a bundle's URI."""
    registry: str | None = None
    """URI of the registry that names of bundles are looked up in."""
    output: str | None = None
    """URI of a folder to write config.yaml, evaluation.json, errors.parquet and report.html to; unset: only the summary
    is told."""
    protocol: Protocol = Protocol()
    """Which views of an image are judged."""
    images: ReadLimits = ReadLimits()
    """How images are read."""
    max_error_rate: float = Field(0.01, ge=0, le=1)
    """Share of the images that may be impossible to fetch or decode; of more there is no verdict."""
    batch_size: int | None = Field(None, ge=1)
    """Images per forward pass; unset: 16 on CPUs, 256 on GPUs, as in predict."""
    compute: EvaluateComputeConfig = EvaluateComputeConfig()
    cluster: ClusterConfig = ClusterConfig()
    progress_interval_s: float = Field(5.0, gt=0)
    """Seconds between progress lines where standard error is no terminal."""


def main(config: EvaluateConfig) -> dict[str, Any]:
    """Judge the bundle that `config` names, and write what was found."""
    start = time.monotonic()
    manifest = Manifest.open(storage.normalise(config.manifest))
    bundle_uri = registry.resolve(config.registry, config.bundle)
    bundle = Bundle.load(bundle_uri)
    refuse_other_classes(manifest, bundle.classes)  # what is wrong here is said before a cluster is waited for
    config.protocol.check(bundle.preprocessing)
    from pipeline.training.verdict import Verdict, refuse_scales  # torch, 4 s

    refuse_scales(bundle, config.protocol)
    output = None if config.output is None else storage.normalise(config.output)
    if output is not None:  # the first file of it, so that a place that takes none is found before the work
        storage.write(storage.join(output, "config.yaml"), config.to_yaml().encode())
    with connected_ray(config.cluster) as nodes:
        device = choose_device(nodes, config.compute.device)
        if output is not None:
            _clear(output)
        outcome, precision, num_workers = _judge(config, manifest, bundle_uri, bundle, nodes, device)
    verdict = Verdict(bundle, bundle_uri, manifest, config.protocol, precision, outcome)
    duration_s = round(time.monotonic() - start, 1)
    of_run = {"device": device, "num_workers": num_workers, "duration_s": duration_s, "output": output}
    summary = {**verdict.summary(), **of_run}
    if output is not None:
        facts = {"device": device, "workers": str(num_workers), "time": f"{duration_s} s"}
        try:
            verdict.write(output, config.to_yaml(), facts, config.images)
        except StorageError as error:
            told = {**error.details, **summary}
            raise type(error)(f"{error}; this summary has the figures that were found", **told) from error
    return {"status": "done", **summary}


def _clear(output: str) -> None:
    """An earlier evaluation's findings are of another config."""
    for name in ("evaluation.json", "errors.parquet", "report.html"):
        if storage.exists(uri := storage.join(output, name)):
            storage.delete(uri)


def _judge(
    config: EvaluateConfig, manifest: Manifest, bundle_uri: str, bundle: Bundle, nodes: list[Node], device: Device
) -> tuple["Outcome", FloatPrecision, int]:
    """What the ranks found, what they computed in, and how many they were."""
    from pipeline.telemetry import EvaluationProgress
    from pipeline.training.evaluate import Setup
    from pipeline.training.trainer import choose_workers, run_workers
    from pipeline.training.verdict import judge_bundle

    compute = config.compute
    workers = choose_workers(
        nodes,
        num_workers=None if compute.num_workers is None else [compute.num_workers],
        cpus_per_worker=compute.cpus_per_worker,
        use_gpu=device == "cuda",
    )
    setup = Setup(
        preprocessing=bundle.preprocessing,
        protocol=config.protocol,
        images=config.images,
        batch_size=config.batch_size or default_batch_size(device),
        keep_hardest=_NUM_HARDEST if config.output else 0,
        max_error_rate=config.max_error_rate,
    )
    work = partial(judge_bundle, bundle_uri, manifest.uri, setup, compute.precision)
    with EvaluationProgress(num_images=manifest.num_images, interval_s=config.progress_interval_s) as progress:
        outcome, precision = run_workers(
            work,
            workers,
            name="evaluate",
            max_failures=_MAX_FAILURES,
            observe=progress.update,
            stop_within_s=0,  # there is nothing to be saved
            meet_within_s=_MEET_WITHIN_S,
        )
    return outcome, precision, workers.most


if __name__ == "__main__":
    run_job(EvaluateConfig, main)
