from pathlib import Path

import pytest
import torch

from pipeline.errors import BundleError, ConfigError
from pipeline.models.bundle import fill
from pipeline.models.catalog import build
from pipeline.models.foreign import adapt
from pipeline.models.pretrained import describe, is_weights_name, read_weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub folder in place of the user's."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    ("text", "is_name"),
    [
        ("ResNet50_Weights.IMAGENET1K_V2", True),
        ("ViT_B_16_Weights.DEFAULT", True),
        ("s3://bucket/ResNet50_Weights.pth", False),
        ("weights.pth", False),
        ("MyNet_Weights.pth", False),
        ("checkpoints/ResNet50_Weights.pth", False),
    ],
)
def test_weights_names_are_told_from_uris(text: str, is_name: bool):
    assert is_weights_name(text) == is_name


def test_what_torchvision_says_of_its_weights_is_taken_over():
    known = describe("ResNet50_Weights.IMAGENET1K_V2")
    assert known.architecture.name == "resnet50"
    assert known.architecture.arguments == {}
    assert len(known.classes) == 1000
    assert known.classes[0] == "tench"
    assert known.preprocessing.resize_size == 232
    assert known.preprocessing.crop_size == 224
    assert known.preprocessing.interpolation == "bilinear"
    assert known.metrics["ImageNet-1K acc@1"].value == 80.858
    assert "ResNet50_Weights.IMAGENET1K_V2" in known.metrics["ImageNet-1K acc@1"].protocol


@pytest.mark.parametrize(
    ("name", "arguments", "interpolation", "crop_size"),
    [
        ("ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1", {"image_size": 384}, "bicubic", 384),
        ("ViT_B_16_Weights.IMAGENET1K_V1", {}, "bilinear", 224),
        ("Inception_V3_Weights.DEFAULT", {"transform_input": True}, "bilinear", 299),
        ("GoogLeNet_Weights.DEFAULT", {"transform_input": True}, "bilinear", 224),
        ("EfficientNet_B0_Weights.IMAGENET1K_V1", {}, "bicubic", 224),
    ],
)
def test_arguments_and_preprocessing_of_special_cases(
    name: str, arguments: dict[str, object], interpolation: str, crop_size: int
):
    known = describe(name)
    assert known.architecture.arguments == arguments
    assert known.preprocessing.interpolation == interpolation
    assert known.preprocessing.crop_size == crop_size


@pytest.mark.slow
@pytest.mark.usefixtures("without_weights")
def test_all_weights_of_torchvisions_classifiers_fit_what_the_catalog_builds():
    from torchvision import models

    for architecture in models.list_models(module=models):
        for weights in models.get_model_weights(architecture):
            if weights.meta["categories"] is None or architecture.startswith("squeezenet"):
                continue
            known = describe(str(weights))
            assert known.architecture.name == architecture
            network = build(architecture, len(known.classes), **known.architecture.arguments)
            published = weights.meta["num_params"]
            if architecture == "inception_v3":
                published -= 3_326_696  # its auxiliary head, which GoogLeNet's figure leaves out
            assert sum(parameter.numel() for parameter in network.parameters()) == published, str(weights)


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v3_small", "googlenet"])
def test_weights_in_the_hub_folder_are_read_without_a_download(hub: Path, name: str):
    from torchvision import models

    weights = models.get_model_weights(name).DEFAULT
    training_only = {"init_weights": False, "aux_logits": True} if name == "googlenet" else {}
    theirs = models.get_model(name, weights=None, **training_only).eval()
    state = {_as_first_published(key): tensor for key, tensor in theirs.state_dict().items()}
    torch.save(state, hub / Path(weights.url).name)

    known = describe(str(weights))
    network = build(known.architecture.name, len(known.classes), **known.architecture.arguments).eval()
    fill(network, adapt(read_weights(str(weights)), network, {}).weights, str(weights))
    theirs.transform_input = name == "googlenet"
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(network(images)[0], theirs(images))


def _as_first_published(key: str) -> str:
    """DenseNet's weights still have names that its modules could not have today, such as `denselayer1.norm.1`."""
    for part in ("norm", "relu", "conv"):
        for number in ("1", "2"):
            if "denselayer" in key:
                key = key.replace(f".{part}{number}.", f".{part}.{number}.")
    return key


def test_a_failed_download_says_where_to_put_the_file(hub: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision import models

    unreachable = "http://127.0.0.1:9/resnet18-0badcafe.pth"  # nothing listens on that port
    monkeypatch.setattr(models.ResNet18_Weights.DEFAULT.value, "url", unreachable)
    with pytest.raises(BundleError, match=r"resnet18-0badcafe\.pth.*put that file into .*/checkpoints"):
        read_weights("ResNet18_Weights.DEFAULT")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ResNet50_Weights.IMAGENET1K_V9", "expected weights of torchvision"),
        ("ResNet51_Weights.DEFAULT", "expected weights of torchvision"),
        ("VGG16_Weights.IMAGENET1K_FEATURES", "no classes"),
    ],
)
def test_weights_that_do_not_exist_or_do_not_classify_are_refused(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        describe(name)
