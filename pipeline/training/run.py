"""What a training run is: its config with everything resolved that decides the weights; the same at every resume.

<output>/<run_id>/run.json        this
<output>/<run_id>/config.yaml     the config, as `--config` reads it
<output>/<run_id>/checkpoints/    the resumable state
<output>/<run_id>/errors.parquet  images that could not be used
<output>/<run_id>/history.json    losses, accuracies and rates over the steps
<output>/<run_id>/report.html     the same to look at
<output>/<run_id>/alias.json      the alias that was pointed at its bundle, where one was
<output>/<run_id>/summary.json    how it ended
"""

import importlib.util
import json
import logging
import os
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage
from pipeline.cluster import Device
from pipeline.config import describe, refuse_change
from pipeline.data.sampler import Steps
from pipeline.data.training_set import TrainingSet, refuse_one_class, refuse_other_labels, refuse_overlap
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ConfigError, ObjectExistsError, ObjectNotFoundError
from pipeline.models import registry
from pipeline.models.bundle import Architecture, Bundle
from pipeline.training.config import TrainConfig

logger = logging.getLogger(__name__)

# Where and how hard, not what: these do not change the weights.
MAY_CHANGE: dict[str, Any] = {
    "resume": True,
    "name": True,  # another run may have published under it meanwhile
    "version": True,
    "alias": True,
    "export": True,
    "progress_interval_s": True,
    "checkpoint": True,
    "cluster": True,
    "registry": True,
    "data": {
        "decode_threads",
        "decode_processes",
        "prefetch_batches",
        "fetch_concurrency",
        "max_error_rate",
        "allowed_roots",
        "max_bytes",
    },
    "evaluation": {"batch_size"},
    "compute": {"num_workers", "cpus_per_worker", "max_failures", "compile", "deterministic"},
}


def is_passed(every: float, since: int, until: int) -> bool:
    """Whether the steps after `since`, up to `until`, pass a multiple of `every`."""
    return until // every > since // every


class TrainingRun(BaseModel):
    """A run as recorded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: TrainConfig
    train_digest: str
    evaluation_digest: str
    num_images: int
    classes: list[str]
    architecture: Architecture
    preprocessing: Preprocessing
    start_uri: str | None
    start_digest: str | None
    device: Device | None = None
    """None until the cluster is known."""

    @property
    def uri(self) -> str:
        """Where the run's files lie."""
        return _uri_of(self.config)

    @property
    def summary_uri(self) -> str:
        """Where it is told how it ended; nothing is there until all else is."""
        return _summary_uri(self.uri)

    @property
    def steps(self) -> Steps:
        """Epochs, cut into steps and dealt to workers."""
        return Steps(self.num_images, self.config.batch_size, min(self.config.data.num_lanes, self.num_images))

    @property
    def steps_per_epoch(self) -> int:
        return self.steps.per_epoch

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        if self.config.steps is not None:
            return self.config.steps
        assert self.config.epochs is not None
        return max(1, round(self.config.epochs * self.steps_per_epoch))


def make_run(config: TrainConfig) -> TrainingRun:
    """The run of a config, its training and its evaluation set read and checked; nothing is written.

    Raises ConfigError, ManifestError, BundleError.
    """
    places = ("train", "evaluate_on", "output", "registry")  # absolute: workers have other working folders
    config = config.model_copy(update={name: storage.normalise(getattr(config, name)) for name in places})
    train, evaluation = (TrainingSet.open(storage.normalise(uri)) for uri in (config.train, config.evaluate_on))
    refuse_one_class(train)
    refuse_other_labels(train, evaluation)
    start = _start_uri(config)
    architecture, preprocessing = config.architecture, config.evaluation.preprocessing
    if start is not None:
        bundle = Bundle.load(start)
        architecture, preprocessing = architecture or bundle.architecture, preprocessing or bundle.preprocessing
        _tell_of_lost_head(bundle, train)
    assert architecture is not None
    assert preprocessing is not None
    run = TrainingRun(
        config=config,
        train_digest=train.manifest.digest,
        evaluation_digest=evaluation.manifest.digest,
        num_images=train.manifest.num_images,
        classes=train.classes,
        architecture=architecture,
        preprocessing=preprocessing,
        start_uri=start,
        start_digest=None if start is None else Bundle.load(start).digest,
    )
    if not goes_on(run) and config.version in registry.list_versions(config.registry, config.name):
        raise ConfigError(f"version: {config.name}/{config.version} is published already; choose a new one")
    _refuse_missing_packages(config)
    if not goes_on(run):  # else it is of the same sets, and settings
        refuse_overlap(train, evaluation)
        _refuse_idle(run)
    if config.batch_size > run.num_images:
        raise ConfigError(
            f"batch_size: expected at most the {run.num_images} images of the set, got {config.batch_size}"
        )
    return run


def goes_on(run: TrainingRun) -> bool:
    """Whether an earlier attempt at the run is to be gone on with."""
    return run.config.resume is True or (run.config.resume == "auto" and is_recorded(run.uri))


def is_recorded(uri: str) -> bool:
    """Whether a training run has begun at `uri`."""
    return storage.exists(_run_uri(uri))


def begin(run: TrainingRun) -> None:
    """Record the run, or find it recorded where `resume` is given; its name decides, never an accident.

    Raises ConfigError where the name is taken, or there is nothing to resume, or the run began otherwise.
    """
    refuse_name(run)
    if goes_on(run):
        earlier = read_run(run.uri)
        assert earlier is not None
        _refuse_change(earlier, run)
        return
    try:
        storage.write(_run_uri(run.uri), run.model_dump_json(indent=1).encode(), if_absent=True)
    except ObjectExistsError as error:
        raise _taken(run) from error
    storage.write(storage.join(run.uri, "config.yaml"), run.config.to_yaml().encode())


def refuse_name(run: TrainingRun) -> None:
    """Raise the ConfigError that `begin` has for the run's name: it is taken, or there is nothing to resume."""
    is_there = is_recorded(run.uri)
    if not is_there and storage.exists(run.summary_uri):  # as of an experiment of several trainings
        raise ConfigError(
            f"run_id: expected no other records than a training's at {run.uri!r}, found some; choose another name"
        )
    if run.config.resume == "auto":
        return
    if run.config.resume and not is_there:
        raise ConfigError(f"resume: expected a run {run.config.run_id!r} under {run.config.output!r}, found none")
    if is_there and not run.config.resume:
        raise _taken(run)


def begun_run(run: TrainingRun) -> TrainingRun | None:
    """`run`, on the device it had, where an earlier attempt at it is to be gone on with; None where it is to be begun.
    Asks no cluster what it has.

    Raises ConfigError where it began otherwise, or is of another version.
    """
    earlier = read_run(run.uri) if goes_on(run) else None
    if earlier is None:
        return None
    run = run.model_copy(update={"device": earlier.device})
    _refuse_change(earlier, run)
    return run


def ended_run(run: TrainingRun) -> TrainingRun | None:
    """As `begun_run`, where the earlier attempt has told how it ended; else None."""
    return begun_run(run) if storage.exists(run.summary_uri) else None


def read_run(uri: str) -> TrainingRun | None:
    """The run recorded at `uri`, None where there is none. Raises ConfigError for one of another version."""
    try:
        return TrainingRun.model_validate_json(storage.read(_run_uri(uri)))
    except ObjectNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{_run_uri(uri)}: not a training run of this version:\n{describe(error)}") from error


def read_summary(uri: str) -> dict[str, Any] | None:
    """How it ended, as told at `uri`; None where it is not told yet, or not legibly: then it is to be told anew."""
    try:
        summary = json.loads(storage.read(_summary_uri(uri)))
    except ObjectNotFoundError:
        return None
    except ValueError:
        summary = None
    if not isinstance(summary, dict):
        logger.warning(f"{_summary_uri(uri)}: expected how the run ended as JSON, found it damaged; it is made anew")
        return None
    return summary


def _taken(run: TrainingRun) -> ConfigError:
    return ConfigError(
        f"run_id: {run.config.run_id!r} is there already under {run.config.output!r}; "
        "go on with it by --resume auto, or choose another name"
    )


def _refuse_missing_packages(config: TrainConfig) -> None:
    """Days of training shall not end in an ImportError, nor a name be taken by one that could not begin."""
    if os.environ.get("MLFLOW_TRACKING_URI") and importlib.util.find_spec("mlflow") is None:
        raise ConfigError("MLFLOW_TRACKING_URI is set, but mlflow is not installed: install it, or unset it")
    needed = ("onnxscript", "onnxruntime") if "onnx" in config.export else ()
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"export: onnx needs {' and '.join(missing)}: install them, or leave it out")


def _start_uri(config: TrainConfig) -> str | None:
    """Where `start.bundle` lies; for a run that goes on the bundle that it began with, wherever its name leads now."""
    if config.start.bundle is None:
        return None
    earlier = read_run(_uri_of(config)) if config.resume else None
    if earlier is not None and earlier.config.start == config.start:
        return earlier.start_uri
    return registry.resolve(config.registry, config.start.bundle)


def _tell_of_lost_head(bundle: Bundle, train: TrainingSet) -> None:
    """Bare ids may be places in the bundle's classes, or other classes: nothing here can tell."""
    if not train.manifest.classes and bundle.classes != train.classes:
        logger.warning(
            "start.bundle: its %d classes are not those of %s, which are only ids, %d of them; so its head is not kept "
            "but drawn anew. A manifest with the same classes (jobs.manifest --classes) keeps it",
            len(bundle.classes),
            train.manifest.uri,
            len(train.classes),
        )


def _refuse_idle(run: TrainingRun) -> None:
    """Settings whose time never comes. Raises ConfigError."""
    config = run.config
    if config.ema.decay is not None and config.ema.every_steps > run.num_steps:
        raise ConfigError(
            f"ema.every_steps: expected at most the {run.num_steps} steps of the training, got {config.ema.every_steps}"
        )
    steps_per_unit = run.steps_per_epoch if config.schedule.unit == "epochs" else 1
    if config.schedule.warmup * steps_per_unit > run.num_steps:
        raise ConfigError(
            f"schedule.warmup: expected at most the training's {run.num_steps / steps_per_unit:g} "
            f"{config.schedule.unit}, got {config.schedule.warmup:g}: its learning rate would never be reached"
        )
    last_step = (run.num_steps - 1) / run.num_steps
    if late := [(share, size) for share, size in config.augment.progressive if share > last_step]:
        raise ConfigError(
            f"augment.progressive: expected each share to be at most {last_step:g}, where the last of the training's "
            f"{run.num_steps} steps begins, got {late}: no image would have that size"
        )
    strange = [when for when in config.schedule.milestones if not 0 < when * steps_per_unit < run.num_steps]
    if strange:
        raise ConfigError(
            f"schedule.milestones: expected each above 0 and below the training's {run.num_steps / steps_per_unit:g} "
            f"{config.schedule.unit}, got {strange}: the learning rate would not drop there; change them with it"
        )


def _refuse_change(earlier: TrainingRun, now: TrainingRun) -> None:
    before, after = (_flat(run.model_dump(mode="json", exclude={"config": MAY_CHANGE})) for run in (earlier, now))
    refuse_change(before, after, f"resume: run {now.config.run_id!r} began otherwise; go back to that, or begin anew")


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        flat |= inner
    return {name.removeprefix("config."): value for name, value in flat.items()}


def _uri_of(config: TrainConfig) -> str:
    return storage.join(storage.normalise(config.output), config.run_id)


def _run_uri(uri: str) -> str:
    return storage.join(uri, "run.json")


def _summary_uri(uri: str) -> str:
    return storage.join(uri, "summary.json")
