import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from pipeline.data.transforms import Preprocessing
from pipeline.errors import BundleError
from pipeline.models.bundle import Architecture, AskedArchitecture, Bundle, Metric, load_network, pack, save
from pipeline.models.catalog import Network, build

PREPROCESSING = Preprocessing(resize_size=32, crop_size=32)


def a_network(num_classes: int = 3) -> Network:
    return build("cifar_resnet8", num_classes).eval()


def packed(network: Network, **changes: Any) -> tuple[Bundle, bytes]:
    fields: dict[str, Any] = {
        "name": "tiny",
        "version": "1",
        "architecture": Architecture(name="cifar_resnet8"),
        "classes": ["ant", "bee", "cat"],
        "preprocessing": PREPROCESSING,
        "metrics": {"accuracy": Metric(value=0.1 + 0.2, protocol="drawn images, test split")},
        "training": {"epochs": 3, "optimiser": {"lr": 0.4}},
    }
    return pack(network, **fields | changes)


def saved(folder: Path, **changes: Any) -> str:
    uri = f"file://{folder}/tiny/1"
    save(uri, *packed(a_network(), **changes))
    return uri


def rewrite(uri: str, **changes: Any) -> None:
    """Alter fields of a saved model.json, as damage would."""
    path = Path(uri.removeprefix("file://"), "model.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_bundle_comes_back_as_it_was_saved(tmp_path: Path):
    network = a_network()
    bundle, weights = packed(network)
    save(f"file://{tmp_path}/b", bundle, weights)
    assert Bundle.load(f"file://{tmp_path}/b") == bundle
    assert Bundle.load(str(tmp_path / "b")) == bundle
    images = torch.randn(2, 3, 32, 32)
    loaded = load_network(str(tmp_path / "b"))
    assert not loaded.training
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(loaded(images), network(images), strict=True))


def test_weights_are_saved_under_the_classifiers_own_names(tmp_path: Path):
    from safetensors import safe_open

    uri = saved(tmp_path)
    with safe_open(uri.removeprefix("file://") + "/weights.safetensors", "pt") as file:
        assert {"conv1.weight", "fc.bias"} < set(file.keys())


def test_a_torchvision_classifier_travels_too(tmp_path: Path):
    network = build("mnasnet0_5", 3).eval()  # the one whose state dict insists on a format version
    bundle, weights = packed(network, architecture=Architecture(name="mnasnet0_5"))
    save(str(f"file://{tmp_path}/b"), bundle, weights)
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(load_network(f"file://{tmp_path}/b")(images)[0], network(images)[0])


def test_reading_a_bundle_imports_no_torch(tmp_path: Path):
    uri = saved(tmp_path)
    script = (
        "import sys; from pipeline.models import registry; from pipeline.models.bundle import Bundle;"
        f"Bundle.load(registry.resolve('file://{tmp_path}', 'tiny')).digest; print({uri!r}, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_the_digest_covers_what_determines_the_outputs_and_nothing_else():
    network = a_network()
    bundle, _ = packed(network)
    same, _ = packed(network, name="other", version="2", metrics={}, training={})
    assert same.digest == bundle.digest
    other_preprocessing = PREPROCESSING.model_copy(update={"interpolation": "bicubic"})
    for changes in (
        {"classes": ["bee", "ant", "cat"]},
        {"architecture": Architecture(name="cifar_resnet8", arguments={"shortcut": "A"})},
        {"preprocessing": other_preprocessing},
    ):
        assert packed(network, **changes)[0].digest != bundle.digest
    assert packed(a_network())[0].digest != bundle.digest


def test_packing_the_same_network_twice_gives_the_same_bytes():
    network = a_network()
    assert packed(network) == packed(network)


def test_a_bundle_never_changes_but_an_equal_one_may_be_saved_again(tmp_path: Path):
    network = a_network()
    bundle, weights = packed(network)
    uri = f"file://{tmp_path}/b"
    save(uri, bundle, weights)
    save(uri, bundle.model_copy(update={"software": {"torch": "9"}}), weights)
    with pytest.raises(BundleError, match="bundles never change"):
        save(uri, *packed(a_network()))
    with pytest.raises(BundleError, match="bundles never change"):
        save(uri, *packed(network, metrics={}))
    assert Bundle.load(uri) == bundle


def test_a_half_written_bundle_is_not_there_and_saving_it_again_completes_it(tmp_path: Path):
    bundle, weights = packed(a_network())
    (tmp_path / "weights.safetensors").write_bytes(weights)
    uri = f"file://{tmp_path}"
    with pytest.raises(BundleError, match=r"found no model.json"):
        Bundle.load(uri)
    with pytest.raises(BundleError, match="found other weights"):
        save(uri, *packed(a_network()))
    save(uri, bundle, weights)
    assert Bundle.load(uri) == bundle


def test_saving_a_bundle_again_brings_back_weights_that_were_lost(tmp_path: Path):
    network = a_network()
    bundle, weights = packed(network)
    save(f"file://{tmp_path}", bundle, weights)
    (tmp_path / "weights.safetensors").unlink()
    save(f"file://{tmp_path}", bundle, weights)
    assert (tmp_path / "weights.safetensors").read_bytes() == weights


@pytest.mark.parametrize("value", ["false", "True", "null", "384", "-1", "1e-3", "0.5"])
def test_arguments_that_a_command_line_made_text_of_are_refused_where_they_are_asked_for(value: str):
    asked = {"name": "inception_v3", "arguments": {"flag": value}}
    with pytest.raises(
        ValidationError, match=rf'expected arguments as JSON, {{"flag": {value.lower()}}}, got the text'
    ):
        TypeAdapter(AskedArchitecture).validate_python(asked)
    assert Architecture(**asked).arguments["flag"] == value  # as bundles of before may have it
    assert TypeAdapter(AskedArchitecture).validate_python({"name": "cifar_resnet8", "arguments": {"shortcut": "B"}})


def test_the_number_of_classes_must_be_the_heads():
    with pytest.raises(BundleError, match=r"classes: expected 3.*got 2"):
        packed(a_network(), classes=["ant", "bee"])


@pytest.mark.parametrize("name", ["", "a/b", "a@b", "../up", ".hidden", "a b", "a\n", "ü"])
def test_a_name_that_is_no_folder_name_is_refused(name: str):
    with pytest.raises(BundleError, match="name"):
        packed(a_network(), name=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_size": 65}, r"embedding_size: expected 64.*got 65"),
        ({"architecture": {"name": "cifar_resnet9"}}, "6n\\+2"),
        ({"architecture": {"name": "resnext"}}, "'resnext'; did you mean"),
        ({"architecture": {"name": "cifar_resnet8", "arguments": {"bogus": 1}}}, "bogus"),
        ({"architecture": {"name": "cifar_resnet14"}}, r"layer1\.1\.conv1\.weight \(16, 16, 3, 3\) is missing"),
        ({"classes": ["ant"]}, r"fc\.weight: expected \(1, 64\), got \(3, 64\)(.|\n)*built for 1 class"),
        ({"classes": []}, "classes"),
        ({"weights_digest": "0" * 64}, "was altered: expected sha256 0000"),
        ({"weights_digest": 7}, "weights_digest"),
        ({"format": 2}, "of a later version"),
        ({"surprise": 1}, "surprise: unknown field"),
        ({"preprocessing": {"crop_size": 32}}, r"preprocessing\.resize_size: required"),
    ],
)
def test_damage_to_the_description_is_named(tmp_path: Path, changes: dict[str, Any], message: str):
    uri = saved(tmp_path)
    rewrite(uri, **changes)
    with pytest.raises(BundleError, match=message):
        load_network(uri)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_a_description_that_is_no_json_object_is_named(tmp_path: Path, damage: bytes):
    uri = saved(tmp_path)
    Path(uri.removeprefix("file://"), "model.json").write_bytes(damage)
    with pytest.raises(BundleError, match=r"model\.json is damaged"):
        Bundle.load(uri)


def test_missing_and_altered_weights_are_named(tmp_path: Path):
    uri = saved(tmp_path)
    weights = Path(uri.removeprefix("file://"), "weights.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.safetensors was altered"):
        load_network(uri)
    weights.unlink()
    with pytest.raises(BundleError, match=r"found no weights\.safetensors"):
        load_network(uri)
