"""What a training tells, as TensorBoard files beside the run, and to MLflow where a tracking server is configured.

<output>/<run_id>/tensorboard/    event files
MLFLOW_TRACKING_URI               in the environment: the same figures there too; needs the package mlflow
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pipeline import storage
from pipeline.errors import RunError
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
        self._writer.close()
        self._upload()
        self._folder.cleanup()
        with _not_worth_a_training():
            if self._mlflow is not None:
                self._mlflow.end_run("FINISHED" if kind is None else "FAILED")

    def update(self, told: dict[str, Any]) -> None:
        """Rank 0 looked, or the network was evaluated."""
        step = told.get("evaluated_at", told.get("step"))
        figures = {name: told[name] for name in (*_TRAINING, *_EVALUATION) if name in told}
        for name, value in figures.items():
            tag = name.replace("evaluation_", "evaluation/") if name in _EVALUATION else f"training/{name}"
            self._writer.add_scalar(tag, value, step)
        with _not_worth_a_training():
            if self._mlflow is not None:
                self._mlflow.log_metrics(figures, step=step)
        if "evaluated_at" in told:
            self._writer.flush()
            self._upload()

    def _upload(self) -> None:
        with _not_worth_a_training():
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
        mlflow.set_experiment(run.config.name)
        mlflow.start_run(run_name=run.config.run_id)
        mlflow.log_params({"architecture": run.architecture.name, **_deciding(run)})
    except Exception as error:  # its own, and those of many stores
        raise RunError(
            f"MLFLOW_TRACKING_URI: expected to begin a run there, got {type(error).__name__}; see to it or unset it, "
            "then run again with --resume auto"
        ) from error
    return mlflow


def _deciding(run: TrainingRun) -> dict[str, Any]:
    return run.config.model_dump(mode="json", include={"batch_size", "epochs", "steps", "seed"})
