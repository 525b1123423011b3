import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from jobs.import_model import ImportConfig, main
from pipeline.config import load
from pipeline.errors import BundleError, ConfigError
from pipeline.models.bundle import Bundle, load_network
from pipeline.models.catalog import Network, build
from pipeline.models.registry import resolve

ROOT = Path(__file__).parents[2]
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture
def network() -> Network:
    return build("cifar_resnet8", 3).eval()


@pytest.fixture
def fields(tmp_path: Path, network: Network) -> dict[str, Any]:
    """The fields of a config for a checkpoint of `network` as others write them."""
    state = {f"module.{name}".replace(".fc.", ".linear."): tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "checkpoint.pth")
    return {
        "source": str(tmp_path / "checkpoint.pth"),
        "architecture": {"name": "cifar_resnet8"},
        "classes": CLASSES,
        "preprocessing": {"resize_size": 32, "crop_size": 32},
        "registry": str(tmp_path / "models"),
        "name": "tiny",
        "version": "1",
    }


def test_a_checkpoint_becomes_a_published_bundle(fields: dict[str, Any], network: Network):
    metrics = {"accuracy": {"value": 0.9, "protocol": "drawn images"}}
    summary = main(ImportConfig(**fields, alias="production", metrics=metrics))
    uri = resolve(fields["registry"], "tiny@production")
    bundle = Bundle.load(uri)
    assert summary["bundle"] == uri
    assert summary["digest"] == bundle.digest
    assert summary["num_parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert bundle.classes == CLASSES
    assert bundle.embedding_size == 64
    assert bundle.metrics["accuracy"].protocol == "drawn images"
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(load_network(uri)(images)[0], network(images)[0])


def test_importing_again_changes_nothing(fields: dict[str, Any]):
    assert main(ImportConfig(**fields)) == main(ImportConfig(**fields))


def test_classes_may_come_from_a_file(fields: dict[str, Any], tmp_path: Path):
    (tmp_path / "classes.txt").write_text("ant\nthe bee's\nkätzchen\n", encoding="utf-8-sig")  # as some editors do
    uri = main(ImportConfig(**fields | {"classes": None, "classes_from": str(tmp_path / "classes.txt")}))["bundle"]
    assert Bundle.load(uri).classes == ["ant", "the bee's", "kätzchen"]


def test_classes_may_be_those_of_torchvisions_weights(fields: dict[str, Any], tmp_path: Path):
    torch.save(build("cifar_resnet8", 1000).state_dict(), tmp_path / "checkpoint.pth")
    uri = main(ImportConfig(**fields | {"classes": None, "classes_from": "ResNet18_Weights.DEFAULT"}))["bundle"]
    assert Bundle.load(uri).classes[:2] == ["tench", "goldfish"]


def test_torchvisions_weights_bring_their_own_meaning(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from torchvision import models

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    theirs = models.get_model("shufflenet_v2_x0_5", weights=None).eval()
    (tmp_path / "checkpoints").mkdir()
    weights = models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    torch.save(theirs.state_dict(), tmp_path / "checkpoints" / Path(weights.url).name)
    given = {name: fields[name] for name in ("registry", "name", "version")}
    uri = main(ImportConfig(source=str(weights), **given))["bundle"]
    bundle = Bundle.load(uri)
    assert (bundle.architecture.name, len(bundle.classes)) == ("shufflenet_v2_x0_5", 1000)
    assert (bundle.preprocessing.resize_size, bundle.preprocessing.crop_size) == (256, 224)
    assert bundle.metrics["ImageNet-1K acc@1"].value == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(load_network(uri)(images)[0], theirs(images))
    with pytest.raises(ConfigError, match="classes: torchvision's weights bring their own"):
        main(ImportConfig(source=str(weights), classes=CLASSES, **given))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architecture": None}, ConfigError, "architecture: required"),
        ({"preprocessing": None}, ConfigError, "preprocessing: required"),
        ({"classes": None}, ConfigError, "classes: required"),
        (
            {"classes": None, "classes_from": "/no/classes.txt"},
            ConfigError,
            "classes_from: expected a file .*, found ne",
        ),
        ({"source": "/no/checkpoint.pth"}, BundleError, "/no/checkpoint.pth: expected a PyTorch checkpoint .* nothing"),
        ({"classes_from": "classes.txt"}, ConfigError, "either `classes` or `classes_from`"),
        (
            {"classes": [], "source": "ResNet18_Weights.DEFAULT"},
            ConfigError,
            "architecture: torchvision's weights bring",
        ),
        ({"classes": ["ant"]}, BundleError, r"fc\.weight \(1, 64\) is missing(.|\n)*linear\.weight \(3, 64\) is unexp"),
        ({"architecture": {"name": "cifar_resnet14"}}, BundleError, r"layer1\.1\.conv1\.weight .* is missing"),
        ({"architecture": {"name": "cifar_resnet"}}, ConfigError, "did you mean"),
        ({"key": "model"}, BundleError, "key: expected an entry"),
        ({"rename": {"linear": "layer1.0.conv1"}}, BundleError, "both become layer1.0.conv1.weight"),
        (
            {"architecture": {"name": "cifar_resnet8", "arguments": {"num_classes": 3}}},
            ValidationError,
            "expected no num_classes among the arguments",
        ),
        (
            {"architecture": {"name": "cifar_resnet8", "arguments": {"architecture": "resnet18"}}},
            ConfigError,
            "cannot be built with arguments",
        ),
        ({"name": "a/b"}, ValidationError, "name"),
        ({"alias": "my alias"}, ValidationError, "alias"),
        ({"version": "aliases"}, BundleError, "aliases"),
    ],
)
def test_what_cannot_be_imported_is_named_and_nothing_written(
    fields: dict[str, Any], changes: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        main(ImportConfig(**fields | changes))
    assert not Path(fields["registry"]).exists()


def test_a_crop_that_the_network_cannot_take_is_refused_and_nothing_written(fields: dict[str, Any], tmp_path: Path):
    torch.save(build("alexnet", 3).state_dict(), tmp_path / "checkpoint.pth")
    with pytest.raises(ConfigError, match="takes images of 32 by 32 pixels"):
        main(ImportConfig(**fields | {"architecture": {"name": "alexnet"}}))
    assert not Path(fields["registry"]).exists()


def test_fields_may_be_given_on_the_command_line(tmp_path: Path, fields: dict[str, Any]):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fields))
    config = load(
        ImportConfig,
        f"--config {tmp_path / 'config.yaml'} --architecture.name cifar_resnet20 --classes ant,bee "
        "--preprocessing.interpolation bicubic --rename linear=fc".split(),
    )
    assert config.architecture is not None
    assert config.architecture.name == "cifar_resnet20"
    assert config.classes == ["ant", "bee"]
    assert config.preprocessing is not None
    assert (config.preprocessing.interpolation, config.preprocessing.crop_size) == ("bicubic", 32)
    assert config.rename == {"linear": "fc"}


def test_the_job_prints_its_summary_alone(tmp_path: Path, fields: dict[str, Any]):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fields))
    command = [sys.executable, "-m", "jobs.import_model", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["bundle"] == f"file://{tmp_path}/models/tiny/1"


def test_the_published_cifar_checkpoints_import(tmp_path: Path):
    folder = os.environ.get("TEST_CIFAR_CHECKPOINTS")
    if not folder:
        pytest.skip("needs the four published CIFAR-10 ResNets: set TEST_CIFAR_CHECKPOINTS to their folder")
    for checkpoint in sorted(Path(folder).glob("resnet*.th")):
        depth = checkpoint.name.removeprefix("resnet").partition("-")[0]
        config = load(
            ImportConfig,
            f"--config {ROOT / 'configs' / 'import_cifar.yaml'} --source {checkpoint} --registry {tmp_path} "
            f"--architecture.name cifar_resnet{depth} --name cifar-resnet{depth}".split(),
        )
        bundle = Bundle.load(main(config)["bundle"])
        assert bundle.name == f"cifar-resnet{depth}"
        assert bundle.embedding_size == 64
