"""What a run is, and what it refuses to become."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from jobs.demo_images import CLASSES
from pipeline import storage
from pipeline.data.manifest import write_manifest
from pipeline.errors import BundleError, ConfigError, ManifestError
from pipeline.models import registry
from pipeline.models.bundle import Bundle
from pipeline.training.config import TrainConfig
from pipeline.training.run import MAY_CHANGE, TrainingRun, begin, make_run, read_run
from tests.manifests import Rows
from tests.training_worlds import train_config
from tests.worlds import make_bundle

LABELS = {"train": ["cat", "dog", "ant"] * 4, "evaluation": ["ant", "cat", "dog"]}


def list_labels(
    root: Path, name: str, labels: list[str], start: int | None = None, label_kind: str = "names", **fields: Any
) -> None:
    """The manifest `name` of images that have these labels; their bytes are nowhere."""
    first = {"train": 0, "evaluation": 1000}[name] if start is None else start
    rows = [(f"s3://bucket/{first + number}.jpg", 1, None, label) for number, label in enumerate(labels)]
    write_manifest(str(root / name), Rows(rows, label_kind=label_kind), shard_size=5, **fields)


@pytest.fixture
def root(tmp_path) -> Path:
    for name, labels in LABELS.items():
        list_labels(tmp_path, name, labels)
    return tmp_path


def run_of(root: Path, **fields: Any) -> TrainingRun:
    return make_run(train_config(root, **fields))


def test_a_run_says_what_it_is_made_of(root):
    run = run_of(root, batch_size=5, epochs=2.5)
    assert (run.num_images, run.classes, run.architecture.name) == (12, ["ant", "cat", "dog"], "cifar_resnet8")
    assert (run.steps_per_epoch, run.num_steps) == (3, 8)
    assert run.uri == f"file://{root}/runs/first"
    assert run.train_digest != run.evaluation_digest


@pytest.mark.parametrize(
    ("fields", "num_steps"),
    [
        ({"epochs": 1}, 2),
        ({"epochs": 0.01}, 1),
        ({"epochs": None, "steps": 7}, 7),
        ({"epochs": 3, "batch_size": 12}, 3),
    ],
)
def test_the_length_is_in_epochs_or_in_steps(root, fields, num_steps):
    assert run_of(root, **{"batch_size": 8, **fields}).num_steps == num_steps


def test_making_a_run_writes_nothing(root):
    before = sorted(root.rglob("*"))
    run_of(root)
    assert sorted(root.rglob("*")) == before


def test_a_start_bundle_brings_architecture_and_preprocessing(root):
    uri = make_bundle(root / "registry")
    run = run_of(root, start={"bundle": "tiny"}, architecture=None, evaluation={})
    assert (run.start_uri, run.architecture.name, run.preprocessing.crop_size) == (uri, "cifar_resnet8", 32)
    assert run.start_digest
    assert run.classes != list(CLASSES)


def test_a_start_bundle_that_is_not_there_is_refused(root):
    with pytest.raises(BundleError, match="'tiny'"):
        run_of(root, start={"bundle": "tiny"})


# --- names and resuming ----------------------------------------------------------------------------------------------


def test_a_name_that_is_taken_is_refused(root):
    begin(run_of(root))
    with pytest.raises(ConfigError, match=r"run_id: 'first' is there already under .*; go on with it by --resume auto"):
        begin(run_of(root))
    begin(run_of(root, run_id="second"))


def test_resuming_needs_a_run(root):
    with pytest.raises(ConfigError, match=r"resume: expected a run 'first' under .*, found none"):
        begin(run_of(root, resume=True))
    assert read_run(run_of(root).uri) is None


def test_auto_begins_a_run_and_goes_on_with_it(root):
    begin(run_of(root, resume="auto"))
    begin(run_of(root, resume="auto"))
    with pytest.raises(ConfigError, match="began otherwise"):
        begin(run_of(root, resume="auto", seed=5))


def test_auto_refuses_a_published_version_of_a_run_it_would_begin(root):
    make_bundle(root / "registry", name="shapes")
    with pytest.raises(ConfigError, match="shapes/1 is published already"):
        run_of(root, resume="auto")


def test_an_mlflow_that_is_not_installed_is_named_before_a_name_is_taken(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="mlflow is not installed"):
        run_of(root)


def test_a_run_that_is_resumed_as_it_began_is_the_same(root):
    run = run_of(root)
    begin(run)
    begin(run_of(root, resume=True))
    assert read_run(run.uri) == run


def test_the_recorded_config_is_what_config_reads(root):
    run = run_of(root, augment={"crop": "pad", "progressive": [(0.5, 40)]})
    begin(run)
    recorded = yaml.safe_load(storage.read(f"{run.uri}/config.yaml"))
    assert TrainConfig(**recorded) == run.config


CHANGED: list[tuple[str, dict[str, Any]]] = [
    ("seed", {"seed": 1}),
    ("epochs", {"epochs": 3}),
    ("batch_size", {"batch_size": 7}),
    ("optimizer.learning_rate", {"optimizer": {"learning_rate": 0.2}}),
    ("augment.horizontal_flip", {"augment": {"crop": "center", "size": 32, "horizontal_flip": 0.1}}),
    ("data.num_lanes", {"data": {"num_lanes": 5}}),
    ("data.shuffle_window", {"data": {"shuffle_window": 5}}),
    ("data.max_pixels", {"data": {"max_pixels": 5}}),
    ("compute.precision", {"compute": {"precision": "bfloat16"}}),
    ("architecture.name", {"architecture": {"name": "cifar_resnet20"}}),
    ("evaluation.preprocessing.resize_size", {"evaluation": {"preprocessing": {"resize_size": 40, "crop_size": 32}}}),
]


def test_a_resume_with_a_cache_is_refused_for_packed_images_come_in_another_order(root):
    cropped = {"augment": {"crop": "pad", "size": 32}}
    begin(run_of(root, **cropped))
    with pytest.raises(ConfigError, match=r"data\.cache: began with 'none', now 'memory'"):
        begin(run_of(root, resume=True, data={"cache": "memory"}, **cropped))


@pytest.mark.parametrize(("name", "fields"), CHANGED, ids=[name for name, _ in CHANGED])
def test_a_resume_under_a_changed_config_names_the_field(root, name, fields):
    begin(run_of(root))
    changed = run_of(root, resume=True, **fields)
    with pytest.raises(ConfigError, match=r"resume: run 'first' began otherwise") as raised:
        begin(changed)
    lines = str(raised.value).splitlines()[1:]
    assert any(line.startswith(f"{name}: began with ") and ", now " in line for line in lines)
    assert all(name.rpartition(".")[2] in line for line in lines)  # nothing else is blamed


@pytest.mark.parametrize(
    "fields",
    [
        {"alias": "production", "progress_interval_s": 1},
        {"name": "other", "version": "2"},
        {"cluster": {"cpus": 8, "gpus": 1}},
        {"checkpoint": {"every_steps": 3, "keep_last": 5}},
        {"compute": {"num_workers": [1, 4], "cpus_per_worker": 1, "max_failures": 0}},
        {"data": {"decode_threads": 3, "prefetch_batches": 9, "fetch_concurrency": 2, "max_error_rate": 0.5}},
        {"evaluation": {"batch_size": 4, "preprocessing": {"resize_size": 32, "crop_size": 32}}},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_what_does_not_change_the_weights_may_change(root, fields):
    began = run_of(root)
    begin(began)
    begin(run_of(root, resume=True, **fields))
    assert read_run(began.uri) == began


@pytest.mark.parametrize(("label_kind", "is_told"), [("ids", True), ("names", False)])
def test_a_bundles_head_that_bare_ids_cannot_keep_is_told_of(root, label_kind, is_told, caplog):
    make_bundle(root / "registry")
    labels = ["0", "1"] * 6 if label_kind == "ids" else LABELS["train"]
    list_labels(root, "train_anew", labels, start=0, label_kind=label_kind)
    list_labels(root, "evaluation_anew", labels[:3], start=1000, label_kind=label_kind)
    sets = {"train": str(root / "train_anew"), "evaluate_on": str(root / "evaluation_anew")}
    run_of(root, **sets, start={"bundle": "tiny"}, architecture=None, evaluation={})
    assert ("so its head is not kept" in caplog.text) == is_told


def test_a_run_goes_on_from_the_bundle_it_began_with_wherever_the_name_leads_by_then(root):
    fields = {"start": {"bundle": "tiny"}, "architecture": None, "evaluation": {}, "resume": "auto"}
    uri = make_bundle(root / "registry")
    begin(run_of(root, **fields))
    registry.publish(str(root / "registry"), *as_version(uri, "2"))
    assert run_of(root, run_id="later", **fields).start_uri == uri.replace("/tiny/1", "/tiny/2")
    run = run_of(root, **fields)
    assert run.start_uri == uri
    begin(run)


def as_version(uri: str, version: str) -> tuple[Bundle, bytes]:
    weights = storage.read(f"{uri}/weights.safetensors")
    return Bundle.load(uri).model_copy(update={"version": version}), weights


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"ema": {"decay": 0.9, "every_steps": 5}}, r"ema\.every_steps: expected at most the 4 steps"),
        ({"augment": {"progressive": [(0.75, 40), (0.8, 48)]}}, r"progressive: .*at most 0\.75.*got \[\(0\.8, 48\)\]"),
        ({"schedule": {"warmup": 3}}, r"schedule\.warmup: expected at most the training's 2 epochs, got 3"),
        ({"schedule": {"warmup": 5, "unit": "steps"}}, r"schedule\.warmup"),
        (
            {"schedule": {"kind": "step", "milestones": [1, 2, 30]}},
            r"schedule\.milestones: expected each above 0 and below the training's 2 epochs, got \[2\.0, 30\.0\]",
        ),
        (
            {"schedule": {"kind": "step", "milestones": [1, 4], "unit": "steps"}},
            r"below the training's 4 steps, got \[4\.0\]",
        ),
        ({"schedule": {"kind": "step", "milestones": [-1, 0, 1]}}, r"schedule\.milestones: .*got \[-1\.0, 0\.0\]"),
    ],
)
def test_settings_whose_time_never_comes_are_refused(root, fields, told):
    with pytest.raises(ConfigError, match=told):
        run_of(root, batch_size=6, epochs=2, **fields)


@pytest.mark.parametrize(("unit", "milestones"), [("epochs", [0.5, 1.9]), ("steps", [1, 3])])
def test_milestones_within_the_training_pass(root, unit, milestones):
    run_of(root, batch_size=6, epochs=2, schedule={"kind": "step", "unit": unit, "milestones": milestones})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"augment": {"progressive": [(0.6, 48), (0.3, 64)]}}, "each share above the one before"),
        ({"loss": {"bce_threshold": 0.1}}, "bce_threshold with kind bce alone"),
        ({"optimizer": {"betas": (0.9, 1.0)}}, "less than 1"),
        ({"schedule": {"kind": "step"}}, "milestones with kind step"),
        ({"schedule": {"kind": "cosine", "milestones": [1]}}, r"milestones \[\] with kind cosine, got"),
        ({"epochs": float("inf")}, "finite"),
        ({"version": "aliases"}, "another version than 'aliases'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, fields, told):
    with pytest.raises(ValidationError, match=told):
        train_config(tmp_path, **fields)


def test_what_may_change_are_fields_of_the_config():
    def missing(model: type[BaseModel], names: dict[str, Any] | set[str]) -> list[str]:
        found = [name for name in names if name not in model.model_fields]
        sections = names.items() if isinstance(names, dict) else ()
        for name, inner in sections:
            if inner is not True:
                found += missing(model.model_fields[name].annotation, inner)
        return found

    assert missing(TrainConfig, MAY_CHANGE) == []


def test_a_resume_over_other_images_is_refused(root):
    begin(run_of(root))
    (root / "train").rename(root / "before")
    list_labels(root, "train", [*LABELS["train"], "cat"])
    with pytest.raises(ConfigError, match="train_digest: began with"):
        begin(run_of(root, resume=True))


def test_a_resume_on_another_kind_of_device_is_refused(root):
    begin(run_of(root).model_copy(update={"device": "cuda"}))
    with pytest.raises(ConfigError, match="device: began with 'cuda', now 'cpu'"):
        begin(run_of(root, resume=True).model_copy(update={"device": "cpu"}))


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"run_id": "first"}'])
def test_a_record_of_something_else_is_refused(root, content):
    run = run_of(root, resume=True)
    storage.write(f"{run.uri}/run.json", content)
    with pytest.raises(ConfigError, match=r"runs/first/run\.json: not a training run of this version"):
        begin(run)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_set_is_refused(root):
    run_of(root, batch_size=12)
    with pytest.raises(ConfigError, match="batch_size: expected at most the 12 images of the set, got 13"):
        run_of(root, batch_size=13)


def test_a_version_that_is_published_is_refused_before_training(root):
    make_bundle(root / "registry", name="shapes")
    with pytest.raises(ConfigError, match="version: shapes/1 is published already; choose a new one"):
        run_of(root)
    run_of(root, version="2")
    run_of(root, resume=True)  # it may be this run that published it


@pytest.mark.parametrize("resume", [False, "auto"])
def test_a_name_that_is_no_trainings_is_refused(root, resume):
    run = run_of(root, run_id="experiment", resume=resume)
    storage.write(run.summary_uri, b"{}")
    with pytest.raises(ConfigError, match=r"expected no other records than a training's at .*experiment', found some"):
        begin(run)


def test_an_evaluation_set_of_strange_classes_is_refused(tmp_path):
    list_labels(tmp_path, "train", LABELS["train"])
    list_labels(tmp_path, "evaluation", ["cat", "emu", "cow"])
    with pytest.raises(
        ManifestError, match=r"3 in their order, got 3, and label 0 is 'cat' where the network's is 'ant'"
    ):
        run_of(tmp_path)


def test_an_evaluation_set_whose_labels_mean_other_classes_is_refused(tmp_path):
    list_labels(tmp_path, "train", LABELS["train"])
    list_labels(tmp_path, "evaluation", ["cat", "dog"])
    with pytest.raises(ManifestError, match="label 0 is 'cat' where the network's is 'ant'") as raised:
        run_of(tmp_path)
    assert """with --classes '["ant", "cat", "dog"]', or with class ids""" in str(raised.value)


@pytest.mark.parametrize("fields", [{}, {"classes": ["ant", "cat", "dog"]}])
def test_an_evaluation_set_may_lack_classes_where_equal_labels_mean_equal_classes(tmp_path, fields):
    list_labels(tmp_path, "train", LABELS["train"])
    list_labels(tmp_path, "evaluation", ["ant", "cat"], **fields)
    assert run_of(tmp_path).classes == ["ant", "cat", "dog"]


def test_an_evaluation_set_may_have_bare_ids_of_the_training_sets_classes(tmp_path):
    list_labels(tmp_path, "train", LABELS["train"])
    list_labels(tmp_path, "evaluation", ["2", "0"], label_kind="ids")
    assert run_of(tmp_path).classes == ["ant", "cat", "dog"]


def test_an_evaluation_set_of_ids_that_no_class_has_is_refused(tmp_path):
    list_labels(tmp_path, "train", LABELS["train"])
    list_labels(tmp_path, "evaluation", ["2", "3"], label_kind="ids")
    with pytest.raises(ManifestError, match="to be ids of the training set's 3 classes, got 3"):
        run_of(tmp_path)


def test_training_and_evaluating_on_the_same_image_is_refused(tmp_path):
    list_labels(tmp_path, "train", LABELS["train"])
    list_labels(tmp_path, "evaluation", ["dog", "ant", "cat"], start=10)
    with pytest.raises(ManifestError, match=r"expected no image in both .*, found 2, e\.g\. 's3://bucket/10\.jpg'"):
        run_of(tmp_path)


def test_one_class_is_refused(tmp_path):
    list_labels(tmp_path, "train", ["cat"] * 12)
    list_labels(tmp_path, "evaluation", ["cat"])
    with pytest.raises(ManifestError, match="at least two classes"):
        run_of(tmp_path)
