"""A training's figures reach TensorBoard files beside the run, and MLflow where one is configured."""

from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.training.run import make_run
from pipeline.training.tracking import Tracker
from tests.training_worlds import make_square_sets, train_config

TOLD = [
    {"step": 10, "loss": 2.0, "top1": 0.25, "learning_rate": 0.1, "images_per_s": 50.0, "data_wait_share": 0.01},
    {"evaluated_at": 10, "evaluation_top1": 0.5, "evaluation_top5": 1.0, "evaluation_loss": 1.5},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("tracked")
    make_square_sets(root)
    return make_run(train_config(root))


def track(run) -> None:
    with Tracker(run) as tracker:
        for told in TOLD:
            tracker.update(told)


def test_every_figure_is_in_the_event_files(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(run)
    events = EventAccumulator(str(Path(run.uri.removeprefix("file://")) / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *(f"training/{name}" for name in ("loss", "top1", "learning_rate", "images_per_s", "data_wait_share")),
        *(f"evaluation/{name}" for name in ("top1", "top5", "loss")),
    }
    assert [(event.step, event.value) for event in events.Scalars("evaluation/top1")] == [(10, 0.5)]


def test_a_configured_mlflow_gets_the_figures_too(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its other stores need a database or a server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    track(run)
    (tracked,) = mlflow.tracking.MlflowClient().search_runs(
        [mlflow.get_experiment_by_name(run.config.name).experiment_id]
    )
    assert tracked.data.metrics["evaluation_top1"] == 0.5
    assert tracked.data.params["architecture"] == "cifar_resnet8"
    assert tracked.info.status == "FINISHED"


def test_a_tracking_server_that_fails_is_named(run, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://server")
    mlflow.set_tracking_uri("nonsense://server")
    with pytest.raises(RunError, match="MLFLOW_TRACKING_URI: expected to begin a run there, got"):
        Tracker(run)
