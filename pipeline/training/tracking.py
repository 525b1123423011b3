"""What a training tells, as TensorBoard files beside the run, and to MLflow where a tracking server is configured.

<output>/<run_id>/tensorboard/    event files
<output>/<run_id>/mlflow.json     the run at MLflow, which a resumed training goes on with
MLFLOW_TRACKING_URI               in the environment: the same figures there too; needs the package mlflow
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pipeline import storage
from pipeline.errors import ObjectNotFoundError, RunError
from pipeline.training.run import TrainingRun

logger = logging.getLogger(__name__)

_TRAINING = ("loss", "top1", "learning_rate", "images_per_s", "data_wait_share")
_EVALUATION = ("evaluation_top1", "evaluation_top5", "evaluation_loss")


class Tracker:
    """Takes what the logbook tells, on the driver; a context manager.

    Raises RunError where MLflow is configured, but cannot be told.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._uri = storage.join(run.uri, "tensorboard")
        self._mlflow = _start_mlflow(run) if os.environ.get("MLFLOW_TRACKING_URI") else None

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter  # seconds that a refused config need not wait

        self._folder = tempfile.TemporaryDirectory(prefix="tensorboard-")
        self._writer = SummaryWriter(self._folder.name)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with _not_worth_a_training():
            self._writer.close()
        self._upload()
        self._folder.cleanup()
        with _not_worth_a_training():
            if self._mlflow is not None:
                self._mlflow.end_run(_status(kind))

    def update(self, told: dict[str, Any]) -> None:
        """Rank 0 looked, or the network was evaluated."""
        step = told.get("evaluated_at", told.get("step"))
        figures = {name: told[name] for name in (*_TRAINING, *_EVALUATION) if name in told}
        with _not_worth_a_training():
            for name, value in figures.items():
                tag = name.replace("evaluation_", "evaluation/") if name in _EVALUATION else f"training/{name}"
                self._writer.add_scalar(tag, value, step)
        with _not_worth_a_training():
            if self._mlflow is not None:
                self._mlflow.log_metrics(figures, step=step)
        if "evaluated_at" in told:
            self._upload()

    def _upload(self) -> None:
        with _not_worth_a_training():
            self._writer.flush()
            for path in Path(self._folder.name).iterdir():
                storage.write(storage.join(self._uri, path.name), path.read_bytes())


@contextmanager
def _not_worth_a_training() -> Iterator[None]:
    """Whatever telling the outside fails of is logged, and training goes on."""
    try:
        yield
    except Exception:
        logger.warning("the training's figures could not be told", exc_info=True)


def _start_mlflow(run: TrainingRun) -> Any:
    import mlflow

    try:
        begun = _resumed(run) or mlflow.start_run(
            experiment_id=_experiment_id(run.config.name), run_name=run.config.run_id
        )
        storage.write(_record_uri(run), json.dumps({"run_id": begun.info.run_id}).encode())
        mlflow.log_params({"architecture": run.architecture.name, **_deciding(run)})
    except Exception as error:  # its own, and those of many stores
        raise RunError(
            f"MLFLOW_TRACKING_URI: expected to begin a run there, got {type(error).__name__}; see to it or unset it, "
            "then run again with --resume auto"
        ) from error
    return mlflow


def _resumed(run: TrainingRun) -> Any:
    """The run of an earlier attempt, active again; None where there was none, or this server has it no longer."""
    import mlflow

    try:
        return mlflow.start_run(run_id=json.loads(storage.read(_record_uri(run)))["run_id"])
    except (ObjectNotFoundError, mlflow.MlflowException):
        return None


def _experiment_id(name: str) -> str:
    """The experiment of that name, made where there is none; `set_experiment` would be for all of the process."""
    import mlflow

    experiment = mlflow.get_experiment_by_name(name)
    return str(mlflow.create_experiment(name) if experiment is None else experiment.experiment_id)


def _status(kind: type[BaseException] | None) -> str:
    """What MLflow calls an end by this exception; what is no Exception is a signal's."""
    if kind is None:
        return "FINISHED"
    return "FAILED" if issubclass(kind, Exception) else "KILLED"


def _record_uri(run: TrainingRun) -> str:
    return storage.join(run.uri, "mlflow.json")


def _deciding(run: TrainingRun) -> dict[str, Any]:
    return run.config.model_dump(mode="json", include={"batch_size", "epochs", "steps", "seed"})
