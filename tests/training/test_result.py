"""What a finished training leaves: the best weights, published once, and its records."""

import json
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch

from jobs.demo_images import CLASSES
from pipeline import storage
from pipeline.data.images import decode
from pipeline.errors import BundleError, ImageError, RunError
from pipeline.models import registry
from pipeline.models.bundle import Bundle, load_network
from pipeline.training import checkpoint
from pipeline.training.checkpoint import CheckpointWriter
from pipeline.training.config import CheckpointConfig
from pipeline.training.loop import make_network
from pipeline.training.result import is_finished, publish, write_records
from pipeline.training.run import TrainingRun, begin, make_run
from tests.training_worlds import make_sets, train_config, train_here
from tests.worlds import make_bundle

NUM_STEPS = 12


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Where the manifests lie; every test has its own registry and runs."""
    folder: Path = tmp_path_factory.mktemp("sets")
    make_sets(folder)
    return folder


@pytest.fixture
def run(sets, tmp_path) -> TrainingRun:
    return make_run(config_of(sets, tmp_path))


def config_of(sets: Path, own: Path, **fields: Any) -> Any:
    return train_config(sets, output=str(own / "runs"), registry=str(own / "registry"), **fields)


def weights_of(run: TrainingRun, value: float) -> dict[str, torch.Tensor]:
    return {
        name: torch.full_like(tensor, value if tensor.is_floating_point() else 1)
        for name, tensor in make_network(run).state_dict().items()
    }


def leave_states(run: TrainingRun, top1: dict[int, float], *, with_ema: bool = False) -> None:
    """Checkpoints as a training leaves them that was judged so; the weights of a step are its number."""
    writer = CheckpointWriter(run.uri, CheckpointConfig(keep_last=2, keep_best=1), since=0)
    evaluations: list[dict[str, Any]] = []
    for step, value in top1.items():
        figures = {"top1": value, "top5": 1.0, "loss": 1 - value, "num_images": 20, "num_errors": 0}
        evaluations.append({"step": step, "epoch": step / 6, **figures})
        hard = {"uri": f"memory://gone/{step}.jpg", "label_id": 0, "predicted_id": 1, "score": 0.9, "loss": 2.0}
        confusion = {"truths": torch.tensor([0]), "answers": torch.tensor([0]), "counts": torch.tensor([step])}
        writer.write(
            {
                "step": step,
                "network": weights_of(run, step),
                "ema": weights_of(run, step + 0.5) if with_ema else None,
                "evaluations": evaluations,
                "history": [],
                "errors": {},
                "outcome": {"confusion": confusion, "hardest": [hard]},
            }
        )
    writer.wait()


def head_of(bundle_uri: str) -> float:
    network = load_network(bundle_uri)
    values = {parameter.unique().item() for parameter in network.parameters()}
    assert len(values) == 1
    return float(values.pop())


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the bundle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top1", "best"), [({3: 0.9, 6: 0.4, 9: 0.5, 12: 0.6}, 3), ({3: 0.2, 6: 0.7, 9: 0.7, 12: 0.7}, 6), ({12: 0.0}, 12)]
)
def test_the_best_weights_are_published_and_not_the_last(run, top1, best):
    leave_states(run, top1)
    bundle, uri, last = publish(run)
    assert head_of(uri) == best
    assert bundle.training["step"] == best
    assert bundle.metrics["top1"].value == top1[best]
    assert last["step"] == NUM_STEPS
    assert last["outcome"]["confusion"]["counts"].tolist() == [best]


def test_the_average_is_published_where_there_is_one(run):
    leave_states(run, {6: 0.9, 12: 0.5}, with_ema=True)
    assert head_of(publish(run)[1]) == 6.5


def test_a_bundle_says_where_it_comes_from(run):
    leave_states(run, {12: 0.5})
    bundle, uri, _ = publish(run)
    assert uri == registry.resolve(run.config.registry, "shapes/1")
    assert bundle == Bundle.load(uri)
    assert bundle.classes == list(CLASSES)
    assert bundle.preprocessing == run.preprocessing
    assert bundle.metrics["top1"].protocol == f"1-crop 32 of 32, bilinear, manifest {run.evaluation_digest[:12]}"
    assert (bundle.training["run_id"], bundle.training["train_digest"]) == ("first", run.train_digest)
    assert bundle.training["config"]["optimizer"]["learning_rate"] == 0.1
    card = storage.read(f"{uri}/MODEL_CARD.md").decode()
    assert "`first`" in card
    assert bundle.digest in card
    assert "top1: 0.5000" in card


def test_publishing_twice_changes_nothing(run, tmp_path):
    leave_states(run, {6: 0.9, 12: 0.5})
    first = publish(run)
    before = files_below(tmp_path / "registry")
    assert set(before) == {f"shapes/1/{name}" for name in ("MODEL_CARD.md", "model.json", "weights.safetensors")}
    second = publish(run)
    assert second[:2] == first[:2]
    assert files_below(tmp_path / "registry") == before


def test_a_run_resumed_on_other_workers_publishes_the_same_bundle(sets, tmp_path):
    began = make_run(config_of(sets, tmp_path))
    begin(began)
    leave_states(began, {12: 0.5})
    before = publish(began)[0]
    fields = {"compute": {"num_workers": 4}, "data": {"decode_threads": 7}, "alias": "production"}
    resumed = make_run(config_of(sets, tmp_path, resume=True, **fields))
    begin(resumed)
    assert publish(resumed)[0] == before
    assert registry.resolve(str(tmp_path / "registry"), "shapes@production").endswith("/shapes/1")


@pytest.mark.parametrize(("top1", "done"), [({}, 0), ({3: 0.4, 6: 0.9}, 6)])
def test_an_unfinished_run_is_not_published(run, tmp_path, top1, done):
    leave_states(run, top1)
    with pytest.raises(
        RunError, match=f"expected 12 steps to be done and judged, found {done} done: run again with --resume auto"
    ):
        publish(run)
    assert not (tmp_path / "registry").exists()


def test_a_run_that_was_killed_before_its_last_evaluation_is_not_published(run, tmp_path):
    leave_states(run, {6: 0.9, 12: 0.5})
    state = checkpoint.read(run.uri, 12)
    assert is_finished(state, run)
    state["evaluations"].pop()
    assert not is_finished(state, run)
    writer = CheckpointWriter(run.uri, CheckpointConfig(), since=6)
    writer.write(state)
    writer.wait()
    with pytest.raises(RunError, match="expected 12 steps to be done and judged, found 12 done"):
        publish(run)
    assert not (tmp_path / "registry").exists()


def test_a_version_that_became_anothers_is_refused(run, tmp_path):
    leave_states(run, {12: 0.5})
    make_bundle(tmp_path / "registry", name="shapes")
    before = files_below(tmp_path / "registry")
    with pytest.raises(BundleError, match="found another bundle, and bundles never change; choose a new version"):
        publish(run)
    assert files_below(tmp_path / "registry") == before
    _, uri, _ = publish(run.model_copy(update={"config": run.config.model_copy(update={"version": "2"})}))
    assert uri == registry.resolve(run.config.registry, "shapes/2")


def test_an_alias_that_leads_elsewhere_by_now_is_not_moved_back(run, tmp_path, caplog):
    leave_states(run, {12: 0.5})
    publish(run)
    run = run.model_copy(update={"config": run.config.model_copy(update={"alias": "production"})})
    publish(run)  # with an alias, which it had none of before
    assert registry.resolve(run.config.registry, "shapes@production").endswith("shapes/1")
    make_bundle(tmp_path / "registry", name="shapes", version="2")
    registry.set_alias(run.config.registry, "shapes", "production", "2")
    publish(run)
    assert registry.resolve(run.config.registry, "shapes@production").endswith("shapes/2")
    assert "alias production leads to" in caplog.text
    publish(run.model_copy(update={"config": run.config.model_copy(update={"version": "3"})}))
    assert registry.resolve(run.config.registry, "shapes@production").endswith("shapes/3")
    publish(run.model_copy(update={"config": run.config.model_copy(update={"alias": "staging"})}))
    publish(run)
    assert registry.resolve(run.config.registry, "shapes@production").endswith("shapes/3")
    storage.delete(storage.join(run.config.registry, "shapes/aliases/production.json"))
    publish(run)
    assert "alias production leads to no bundle and stays so" in caplog.text


# --- the records -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, TrainingRun]:
    """A short training over a set with broken images, published, its records written."""
    root: Path = tmp_path_factory.mktemp("trained")
    make_sets(root, num_train=24, num_evaluation=12, num_broken=3)
    run = train_here(train_config(root, run_id="broken-ones", data={"max_error_rate": 0.25}))
    _, _, last = publish(run)
    write_records(run, last, {"device": "cpu", "training images": run.num_images})
    return root, run


def broken_below(folder: Path) -> list[str]:
    def is_broken(path: Path) -> bool:
        try:
            decode(path.read_bytes(), max_pixels=10**8)
        except ImageError:
            return True
        return False

    return sorted(f"file://{path}" for path in folder.rglob("*.*") if is_broken(path))


def test_the_errors_table_has_the_broken_images(trained):
    root, run = trained
    broken = broken_below(root / "train-images")
    assert len(broken) == 3
    rows = duckdb.sql(f"select uri, stage, error, message from '{run.uri[7:]}/errors.parquet' order by uri").fetchall()
    assert [uri for uri, *_ in rows] == broken
    assert {stage for _, stage, _, _ in rows} == {"decode"}
    assert all(error and message for _, _, error, message in rows)


def test_the_history_is_that_of_the_last_state(trained):
    _, run = trained
    history = json.loads(storage.read(f"{run.uri}/history.json"))
    last = checkpoint.read_last(run.uri)
    assert last is not None
    assert history == {"train": last["history"], "evaluations": last["evaluations"]}
    assert [entry["step"] for entry in history["train"]] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in history["evaluations"]] == [3, 6]
    assert history["evaluations"][0]["num_errors"] == len(broken_below(trained[0] / "evaluation-images"))


def test_the_report_tells_of_the_run(trained):
    _, run = trained
    html = storage.read(f"{run.uri}/report.html").decode()
    assert "<h1>shapes 1 · broken-ones</h1>" in html
    assert "decode/" in html
    assert html.count("data:image/jpeg;base64,") > 0
    assert "run_id: broken-ones" in html


def test_a_report_is_made_though_its_hardest_images_are_gone(run):
    leave_states(run, {6: 0.9, 12: 0.5})
    _, _, last = publish(run)
    write_records(run, last, {})
    html = storage.read(f"{run.uri}/report.html").decode()
    assert "memory://gone/6.jpg" in html
    assert "memory://gone/12.jpg" not in html
    assert "no picture" in html
