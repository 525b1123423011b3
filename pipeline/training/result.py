"""What a finished training leaves: the best weights as a bundle, and the run's history, errors and report."""

import json
import logging
from collections import Counter
from typing import Any, TypeGuard

import pyarrow as pa
from pydantic import JsonValue

from pipeline import storage
from pipeline.errors import BundleError, RunError
from pipeline.models import registry
from pipeline.models.bundle import Bundle, Metric, pack
from pipeline.models.export import EXPORT_FILES, export
from pipeline.report.thumbnail import make_thumbnail
from pipeline.report.training import HardImage, TrainingReport, render
from pipeline.tables import schemas
from pipeline.tables.writing import encode
from pipeline.training import checkpoint
from pipeline.training.checkpoint import State
from pipeline.training.counts import from_entries
from pipeline.training.loop import make_network
from pipeline.training.protocol import Protocol
from pipeline.training.run import MAY_CHANGE, TrainingRun

logger = logging.getLogger(__name__)

Facts = dict[str, Any]
_NOT_OF_THE_WEIGHTS = {field: what for field, what in MAY_CHANGE.items() if field not in ("name", "version")}


def publish(run: TrainingRun, last: State | None = None) -> tuple[Bundle, str, State]:
    """Publish the best weights by top-1 accuracy, once; the bundle, its URI, and the last state of the run with the
    `outcome` of the best; `last` is the last state, where it was read already.

    Publishing them again changes nothing, nor does it move an alias back that leads elsewhere by then. Raises RunError
    where the run has not come to its end, BundleError where the version is another's.
    """
    last = last or checkpoint.read_last(run.uri)
    if not is_finished(last, run):
        done = 0 if last is None else last["step"]
        raise RunError(
            f"expected {run.num_steps} steps to be done and judged, found {done} done: run again with --resume auto"
        )
    best = checkpoint.read(run.uri, checkpoint.best_step(last["evaluations"]))
    network = make_network(run)
    network.load_state_dict(best["ema"] or best["network"])
    evaluation = best["evaluations"][-1]
    bundle, weights = pack(
        network,
        name=run.config.name,
        version=run.config.version,
        architecture=run.architecture,
        classes=run.classes,
        preprocessing=run.preprocessing,
        metrics=_metrics(run, evaluation),
        training=_origin(run, evaluation),
    )
    uri = registry.publish(run.config.registry, bundle, weights)
    storage.write(storage.join(uri, "MODEL_CARD.md"), _model_card(run, bundle).encode())
    for wanted in run.config.export:
        exported = export(network.eval(), run.preprocessing.crop_size, wanted)
        storage.write(storage.join(uri, "exports", EXPORT_FILES[wanted]), exported)
    _point_alias(run, uri)  # last: who follows it finds all there
    return bundle, uri, {**last, "outcome": best["outcome"]}


def is_finished(last: State | None, run: TrainingRun) -> TypeGuard[State]:
    """Whether a run whose last state is this has nothing left to do: all its steps, and their evaluation."""
    if last is None:
        return False
    judged = [evaluation["step"] for evaluation in last["evaluations"]]
    return last["step"] == run.num_steps and run.num_steps in judged


def write_records(run: TrainingRun, last: State, facts: Facts) -> None:
    """Write the run's `history.json`, `errors.parquet` and `report.html`."""
    history = {"train": last["history"], "evaluations": last["evaluations"]}
    storage.write(storage.join(run.uri, "history.json"), json.dumps(history, indent=1).encode())
    storage.write(storage.join(run.uri, "errors.parquet"), encode(_errors_table(last["errors"])))
    storage.write(storage.join(run.uri, "report.html"), render(_report(run, last, facts)).encode())


def _point_alias(run: TrainingRun, bundle_uri: str) -> None:
    """Point the alias asked for at the bundle, once: by the next time it may lead to a later one."""
    if run.config.alias is None:
        return
    record_uri, wanted = storage.join(run.uri, "alias.json"), {"alias": run.config.alias, "bundle": bundle_uri}
    pointed = json.loads(storage.read(record_uri)) if storage.exists(record_uri) else []
    pointed = [pointed] if isinstance(pointed, dict) else pointed  # of an earlier version
    if wanted not in pointed:
        registry.set_alias(run.config.registry, run.config.name, run.config.alias, run.config.version)
        storage.write(record_uri, json.dumps([*pointed, wanted]).encode())
    elif (now := _alias_leads_to(run)) != bundle_uri:
        logger.warning(
            "alias %s leads to %s and stays so: this run has pointed it to %s before; registry.set_alias moves it",
            run.config.alias,
            now or "no bundle",
            bundle_uri,
        )


def _alias_leads_to(run: TrainingRun) -> str | None:
    try:
        return registry.resolve(run.config.registry, f"{run.config.name}@{run.config.alias}")
    except BundleError:  # it was taken away, or what it led to
        return None


def _metrics(run: TrainingRun, evaluation: dict[str, Any]) -> dict[str, Metric]:
    protocol = f"{Protocol().describe(run.preprocessing)}, manifest {run.evaluation_digest[:12]}"
    return {name: Metric(value=evaluation[name], protocol=protocol) for name in ("top1", "top5", "loss")}


def _origin(run: TrainingRun, evaluation: dict[str, Any]) -> dict[str, JsonValue]:
    return {
        "run_id": run.config.run_id,
        "step": evaluation["step"],
        "num_steps": run.num_steps,
        "train_digest": run.train_digest,
        "evaluation_digest": run.evaluation_digest,
        "start_digest": run.start_digest,
        "config": run.config.model_dump(mode="json", exclude=_NOT_OF_THE_WEIGHTS),
    }


def _model_card(run: TrainingRun, bundle: Bundle) -> str:
    figures = "\n".join(f"- {name}: {metric.value:.4f} ({metric.protocol})" for name, metric in bundle.metrics.items())
    software = ", ".join(f"{name} {version}" for name, version in bundle.software.items())
    return f"""# {bundle.name} {bundle.version}

{bundle.architecture.name}, {len(bundle.classes)} classes, trained by run `{run.config.run_id}` on {run.num_images} \
images (manifest {run.train_digest[:12]}), the best step of {run.num_steps}: {bundle.training["step"]}.

## Evaluation

{figures}

Judged on manifest {run.evaluation_digest[:12]}, by which the best step was also chosen: expect a little less on images
that played no part in that.

## Use

Input: {bundle.preprocessing.crop_size}×{bundle.preprocessing.crop_size} RGB, prepared as `model.json` says. Output: \
logits in the order of its `classes`, and an embedding of {bundle.embedding_size} numbers.

Digest {bundle.digest}; weights {bundle.weights_digest}; made with {software}.
"""


def _errors_table(errors: dict[str, list[str]]) -> pa.Table:
    rows = [
        {"uri": uri, "etag": None, "stage": stage, "error": error, "message": message}
        for uri, (stage, error, message) in sorted(errors.items())
    ]
    return pa.Table.from_pylist(rows, schemas.schema("errors"))


def _report(run: TrainingRun, last: State, facts: Facts) -> TrainingReport:
    outcome = last["outcome"]
    return TrainingReport(
        title=f"{run.config.name} {run.config.version}",
        run_id=run.config.run_id,
        status="done",
        facts={name: str(value) for name, value in facts.items()},
        config_yaml=run.config.to_yaml(),
        history={"train": last["history"], "evaluations": last["evaluations"]},
        classes=run.classes,
        confusion=from_entries(outcome["confusion"], len(run.classes)),
        hardest=[_hard_image(run, image) for image in outcome["hardest"]],
        errors=dict(Counter(f"{stage}/{error}" for stage, error, _ in last["errors"].values())),
    )


def _hard_image(run: TrainingRun, image: dict[str, Any]) -> HardImage:
    label, predicted = run.classes[image["label_id"]], run.classes[image["predicted_id"]]
    return HardImage(image["uri"], label, predicted, image["score"], make_thumbnail(image["uri"], run.config.data))
