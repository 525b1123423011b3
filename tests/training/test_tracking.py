"""A training's figures reach TensorBoard files beside the run, and MLflow where one is configured."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs import Stopped
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


def test_a_disk_that_takes_no_events_does_not_end_the_training(run, monkeypatch, caplog):
    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    for call in ("add_scalar", "flush", "close"):
        monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{call}", fail)
    track(run)
    assert caplog.text.count("the training's figures could not be told") > len(TOLD)


@pytest.fixture
def client(tmp_path, monkeypatch):
    """What was told to an MLflow of this test's own."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its other stores need a database or a server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    return mlflow.tracking.MlflowClient()


def tracked(client, name: str):
    """The runs of an experiment, newest first."""
    return client.search_runs([client.get_experiment_by_name(name).experiment_id])


@pytest.fixture
def fresh(run, tmp_path):
    """A run without records."""
    return run.model_copy(update={"config": run.config.model_copy(update={"output": f"file://{tmp_path}/runs"})})


def test_a_configured_mlflow_gets_the_figures_too(fresh, client):
    track(fresh)
    (told,) = tracked(client, fresh.config.name)
    assert told.data.metrics["evaluation_top1"] == 0.5
    assert told.data.params["architecture"] == "cifar_resnet8"
    assert (told.info.run_name, told.info.status) == ("first", "FINISHED")


def test_trainings_beside_each_other_are_told_of_under_names_of_their_own(fresh, client, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    names, start_run = ["plain", "residual"], mlflow.start_run
    both_there = threading.Barrier(len(names), timeout=60)

    def start_together(**fields):
        both_there.wait()
        return start_run(**fields)

    def track_net(name: str) -> None:
        track(fresh.model_copy(update={"config": fresh.config.model_copy(update={"name": name, "run_id": name})}))

    monkeypatch.setattr(mlflow, "start_run", start_together)
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(track_net, names))
    assert [[each.info.run_name for each in tracked(client, name)] for name in names] == [["plain"], ["residual"]]


def test_a_training_that_a_signal_stops_is_told_to_be_killed_and_goes_on_as_the_same_run(fresh, client):
    def status() -> str:
        (told,) = tracked(client, fresh.config.name)
        return told.info.status

    with pytest.raises(Stopped), Tracker(fresh):
        raise Stopped
    assert status() == "KILLED"
    with pytest.raises(RunError), Tracker(fresh):
        raise RunError("a loss that is not finite")
    assert status() == "FAILED"
    with Tracker(fresh):
        assert status() == "RUNNING"
    assert status() == "FINISHED"


def test_a_run_that_mlflow_no_longer_has_is_begun_anew(fresh, client):
    track(fresh)
    (first,) = tracked(client, fresh.config.name)
    client.delete_run(first.info.run_id)
    track(fresh)
    (second,) = tracked(client, fresh.config.name)
    assert second.info.run_id != first.info.run_id


def test_a_tracking_server_that_fails_is_named(run, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://server")
    mlflow.set_tracking_uri("nonsense://server")
    with pytest.raises(RunError, match="MLFLOW_TRACKING_URI: expected to begin a run there, got"):
        Tracker(run)
