"""Train a network on a labelled manifest and publish the best weights as a bundle.

python -m jobs.train --config configs/train_cifar_10_epochs.yaml --train URI --evaluate_on URI --output URI ...
python -m jobs.train ... --resume auto      goes on from the last checkpoint, where there is one
"""

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

from jobs import run_job
from pipeline import storage
from pipeline.cluster import choose_device, connected_ray
from pipeline.data.training_set import TrainingSet
from pipeline.errors import BundleError, RunError
from pipeline.models import registry
from pipeline.models.bundle import Bundle
from pipeline.training.bound import Pace
from pipeline.training.config import TrainConfig
from pipeline.training.run import TrainingRun, begin, ended_run, make_run, read_summary, refuse_name

if TYPE_CHECKING:
    from pipeline.training.trainer import Workers


def main(config: TrainConfig) -> dict[str, Any]:
    """Run, or resume, the training that `config` describes; publish, and write its records."""
    start = time.monotonic()
    run = make_run(config)  # what is wrong here is said before a cluster is waited for
    refuse_name(run)
    if (ended := ended_run(run)) is not None and (told := _published_anew(ended)) is not None:
        return {**told, "status": "was done", "duration_s": round(time.monotonic() - start, 1)}
    run, workers = _train(run)
    return _conclude(run, workers, start)


def _train(run: TrainingRun) -> tuple[TrainingRun, "Workers"]:
    """Train to the run's end; the run, its device known, and what it was trained by."""
    from pipeline.telemetry import TrainingProgress
    from pipeline.training.loop import refuse_impossible
    from pipeline.training.tracking import Tracker
    from pipeline.training.trainer import choose_workers, run_training

    config = run.config
    with connected_ray(config.cluster) as nodes:
        device = choose_device(nodes, config.compute.device)
        run = run.model_copy(update={"device": device})
        workers = choose_workers(
            nodes,
            num_workers=config.compute.num_workers,
            cpus_per_worker=config.compute.cpus_per_worker,
            use_gpu=device == "cuda",
            num_lanes=config.data.num_lanes,
        )
        refuse_impossible(run, TrainingSet.open(config.train))
        begin(run)
        with (
            Tracker(run) as tracker,
            TrainingProgress(num_steps=run.num_steps, interval_s=config.progress_interval_s) as progress,
        ):

            def observe(told: dict[str, Any]) -> None:
                progress.update(told)
                tracker.update(told)

            run_training(run, workers, observe)
    return run, workers


def _conclude(run: TrainingRun, workers: "Workers", start: float) -> dict[str, Any]:
    """Publish the best weights, write the records; the summary, which is the last of them."""
    from pipeline.training.result import publish, write_records

    bundle, uri, last = publish(run)
    best = {name: metric.value for name, metric in bundle.metrics.items()}
    pace, num_workers = Pace.of(last), last.get("num_workers", workers.most)  # earlier versions kept neither
    summary: dict[str, Any] = {
        "status": "done",
        "run_id": run.config.run_id,
        "run": run.uri,
        "bundle": uri,
        "digest": bundle.digest,
        **best,
        "step": bundle.training["step"],
        "num_steps": run.num_steps,
        "num_images": run.num_images,
        "num_errors": len(last["errors"]),
        "images_per_s": round(pace.images_per_s, 1),
        "data_wait_share": round(pace.data_wait_share, 4),
        "verdict": pace.verdict(on_gpu=run.device == "cuda"),
        "device": run.device,
        "num_workers": num_workers,
        "train_s": round(pace.train_s, 1),
        "duration_s": round(time.monotonic() - start, 1),
        "report": storage.join(run.uri, "report.html"),
    }
    facts = {
        "time": f"{pace.train_s:,.1f} s in its steps",
        "images/s": f"{pace.images_per_s:,.0f}",
        "data-wait": f"{pace.data_wait_share:.1%}",
        "bound": summary["verdict"] or "not known",
        "device": run.device,
        "workers": f"{num_workers} of {workers.cpus_per_worker} CPUs",
        "training images": run.num_images,
        "network": run.architecture.name,
    }
    write_records(run, last, facts)
    _record(run, summary)
    return summary


def _published_anew(run: TrainingRun) -> dict[str, Any] | None:
    """The summary of a run that has ended, its bundle there, under the name that it has now; None where the summary or
    the last of its checkpoints is damaged: then it has to be gone on with. Needs no cluster.

    Raises RunError where neither the checkpoints nor the bundle are there any longer.
    """
    from pipeline.training import checkpoint
    from pipeline.training.result import is_finished, publish

    recorded, last = read_summary(run.uri), checkpoint.read_last(run.uri)
    if recorded is None:
        return None
    if last is None:
        return _still_published(run, recorded)
    if not is_finished(last, run):
        return None
    best = checkpoint.best_step(last["evaluations"])
    if not storage.exists(checkpoint.checkpoint_uri(run.uri, best)):
        return _still_published(run, recorded)
    bundle, uri, _ = publish(run, last)
    summary = {**recorded, "bundle": uri, "digest": bundle.digest}
    if summary != recorded:
        _record(run, summary)
    return summary


def _still_published(run: TrainingRun, recorded: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run whose checkpoints were tidied away, its bundle being there. Raises RunError else: nobody
    wants it trained once more unasked.
    """
    reference = f"{run.config.name}/{run.config.version}"
    with contextlib.suppress(BundleError):
        uri = registry.resolve(run.config.registry, reference)
        if Bundle.load(uri).digest == recorded["digest"]:
            return {**recorded, "bundle": uri}
    raise RunError(
        f"expected the checkpoints of {run.config.run_id!r}, which has ended, to publish {reference} of, found them "
        f"gone from {run.uri!r}: restore them, copy the bundle from {recorded['bundle']!r}, or train under another "
        "run_id"
    )


def _record(run: TrainingRun, summary: dict[str, Any]) -> None:
    storage.write(run.summary_uri, json.dumps(summary, indent=1).encode())


if __name__ == "__main__":
    run_job(TrainConfig, main)
