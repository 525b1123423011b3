"""The evaluation job: the answers of `predict`, the same for any number of workers, wrong input refused at once."""

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import evaluate as job
from jobs.demo_images import CLASSES
from jobs.evaluate import EvaluateConfig
from pipeline.cluster import Node
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError, StorageError
from pipeline.models.bundle import Architecture, Bundle
from pipeline.tables import open_table
from pipeline.training.evaluate import Setup
from pipeline.training.verdict import judge_bundle
from pipeline.training.worker import Worker
from tests.manifests import images_of
from tests.worlds import make_world, run_job


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


def evaluate(world: Path, **fields: Any) -> dict[str, Any]:
    places = {name: world / name for name in ("manifest", "registry")}
    return run_job("evaluate", **{**places, "bundle": "tiny", "max_error_rate": 0.1, **fields})


@pytest.fixture(scope="module")
def by_one_worker(world, tmp_path_factory, jobs_share_ray) -> tuple[dict[str, Any], Path]:
    """The summary of an evaluation, and what it wrote."""
    output = tmp_path_factory.mktemp("evaluation")
    return evaluate(world, output=output, compute__num_workers=1), output


@pytest.mark.ray
@pytest.mark.slow
def test_the_accuracy_is_exactly_that_of_predict(world, by_one_worker, tmp_path):
    summary, evaluation = by_one_worker
    places = {name: world / name for name in ("manifest", "registry")}
    run_job("predict", **places, bundles="tiny", output=tmp_path / "tables", run_id="same")
    predicted = open_table(str(tmp_path / "tables/predictions"), "same").to_table().to_pylist()
    failed = open_table(str(tmp_path / "tables/errors"), "same").to_table().drop_columns(["run_id"]).to_pylist()
    truth = {row["uri"]: row["label"] for row in images_of(Manifest.open(str(world / "manifest")))}
    assert (summary["status"], summary["num_images"], summary["num_errors"]) == ("done", len(predicted), len(failed))
    assert summary["top1_error"] == sum(row["label_id"] != truth[row["uri"]] for row in predicted) / 27
    assert summary["top5_error"] == sum(truth[row["uri"]] not in row["topk_label_ids"] for row in predicted) / 27
    assert pq.read_table(evaluation / "errors.parquet").to_pylist() == failed
    confusion = json.loads((evaluation / "evaluation.json").read_text())["confusion"]
    answers = Counter((truth[row["uri"]], row["label_id"]) for row in predicted)
    found = zip(confusion["truths"], confusion["answers"], confusion["counts"], strict=True)
    assert {(label, answer): count for label, answer, count in found} == answers
    assert (evaluation / "report.html").read_text().startswith("<!")


@pytest.mark.slow
@pytest.mark.ray
def test_one_and_two_workers_count_the_same(world, by_one_worker, tmp_path):
    by_two = evaluate(world, output=tmp_path, compute__num_workers=2, compute__cpus_per_worker=1), tmp_path
    found = []
    for num_workers, (summary, output) in ((1, by_one_worker), (2, by_two)):
        assert summary["num_workers"] == num_workers
        told = json.loads((output / "evaluation.json").read_text())
        assert told.pop("loss") == pytest.approx(summary["loss"])
        found.append((told, (output / "errors.parquet").read_bytes()))
    assert found[0] == found[1]
    assert by_two[0]["loss"] == pytest.approx(by_one_worker[0]["loss"])
    assert (found[0][0]["num_images"], found[0][0]["num_errors"]) == (27, 3)


# --- in this process, without Ray ------------------------------------------------------------------------------------


def config_of(world: Path, **fields: Any) -> EvaluateConfig:
    places = {name: str(world / name) for name in ("manifest", "registry")}
    return EvaluateConfig(**{**places, "bundle": "tiny", "max_error_rate": 0.1, **fields})


@pytest.fixture
def no_ray(monkeypatch) -> None:
    """Whoever asks for a cluster fails."""

    def refuse(*_args):
        raise AssertionError("a cluster was asked for")

    monkeypatch.setattr(job, "connected_ray", refuse)


@pytest.fixture
def judged_here(monkeypatch) -> None:
    """One worker, this process, judges."""

    def judge(config, manifest, bundle_uri, bundle, nodes, device):
        setup = Setup(preprocessing=bundle.preprocessing, max_error_rate=config.max_error_rate)
        return *judge_bundle(bundle_uri, manifest.uri, setup, config.compute.precision, Worker()), 1

    monkeypatch.setattr(job, "connected_ray", lambda awaited: nullcontext([Node(2, 0)]))
    monkeypatch.setattr(job, "_judge", judge)


def test_the_output_tells_what_was_asked(world, tmp_path, judged_here):
    config = config_of(world, output=str(tmp_path))
    job.main(config)
    assert (tmp_path / "config.yaml").read_text() == config.to_yaml()


def test_what_auto_was_computed_in_is_recorded(world, tmp_path, judged_here):
    summary = job.main(config_of(world, output=str(tmp_path), compute={"precision": "auto"}))
    assert summary["precision"] == json.loads((tmp_path / "evaluation.json").read_text())["precision"] == "float32"
    assert "<dd>float32</dd>" in (tmp_path / "report.html").read_text()


def test_an_output_that_takes_nothing_is_told_before_a_cluster_is_asked_for(world, tmp_path, no_ray):
    (tmp_path / "taken").write_text("a file, and no folder")
    with pytest.raises(StorageError, match=r"taken/evaluation/config\.yaml"):
        job.main(config_of(world, output=str(tmp_path / "taken/evaluation")))


def test_a_network_of_one_input_size_is_shown_no_whole_images(world, tmp_path, no_ray):
    bundle = Bundle.load(str(world / "registry/tiny/1"))
    of_one_size = bundle.model_copy(update={"architecture": Architecture(name="vit_b_32")})
    (tmp_path / "model.json").write_text(of_one_size.model_dump_json())
    fields = {"bundle": str(tmp_path), "output": str(tmp_path / "evaluation")}
    with pytest.raises(ConfigError, match="takes images of 224 by 336 pixels, got AssertionError"):
        job.main(config_of(world, **fields, protocol={"views": "multi_scale"}))
    assert not (tmp_path / "evaluation").exists()


def test_an_earlier_evaluation_is_not_left_beside_another_config(world, tmp_path, judged_here, monkeypatch):
    job.main(config_of(world, output=str(tmp_path)))
    assert (tmp_path / "evaluation.json").exists()

    def fail(*_):
        raise StorageError("the store is down")

    monkeypatch.setattr(job, "_judge", fail)
    with pytest.raises(StorageError, match="down"):
        job.main(config_of(world, output=str(tmp_path), max_error_rate=0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_where_writing_fails_at_the_end_the_summary_has_the_figures(world, tmp_path, judged_here, monkeypatch):
    figures, judge = job.main(config_of(world)), job._judge

    def judge_and_obstruct(*given):
        (tmp_path / "evaluation.json" / "in the way").mkdir(parents=True)
        return judge(*given)

    monkeypatch.setattr(job, "_judge", judge_and_obstruct)
    with pytest.raises(StorageError, match=r"evaluation\.json.*this summary has the figures") as refusal:
        job.main(config_of(world, output=str(tmp_path)))
    assert figures["num_images"] == 27
    for name in ("top1", "top1_error", "loss", "num_images", "bundle_digest", "errors_by_kind"):
        assert refusal.value.details[name] == figures[name]


# --- bad input, said before a Ray is waited for ----------------------------------------------------------------------


def test_classes_in_another_order_are_refused(world, tmp_path):
    run_job(
        "manifest",
        source__uri=world / "images",
        labels__kind="folders",
        output=tmp_path / "manifest",
        classes=list(CLASSES[::-1]),
    )
    refusal = evaluate(world, manifest=tmp_path / "manifest", expected_code=2)
    assert refusal["error"] == "ManifestError"
    assert f"label 0 is {CLASSES[-1]!r} where the network's is {CLASSES[0]!r}" in refusal["message"]


def test_a_protocol_that_does_not_fit_the_bundle_is_refused(world):
    refusal = evaluate(world, protocol__views="ten_crop", protocol__flip="true", expected_code=2)
    assert "half of the ten crops are mirror images already" in refusal["message"]


def test_a_bundle_that_is_not_there_is_refused(world):
    assert "named 'huge'" in evaluate(world, bundle="huge", expected_code=2)["message"]
