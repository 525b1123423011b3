import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import BundleError
from pipeline.models.bundle import fill
from pipeline.models.catalog import Network, build
from pipeline.models.foreign import adapt, read_weights

State = dict[str, Tensor]


@pytest.fixture
def network() -> Network:
    return build("cifar_resnet8", 10)


@pytest.fixture
def state(network: Network) -> State:
    return dict(build("cifar_resnet8", 10).state_dict())


def written(folder: Path, content: Any) -> str:
    torch.save(content, folder / "checkpoint.pth")
    return str(folder / "checkpoint.pth")


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


def renamed(**names: str) -> Callable[[State], State]:
    def rename(state: State) -> State:
        return {
            next((name.replace(a, b) for a, b in names.items() if name.startswith(a)), name): tensor
            for name, tensor in state.items()
        }

    return rename


@pytest.mark.parametrize(
    ("change", "rename"),
    [
        (lambda state: state, {}),
        (prefixed("module."), {}),
        (prefixed("_orig_mod.module."), {}),
        (prefixed("model._orig_mod."), {}),
        (lambda state: prefixed("module.")(state) | {"n_averaged": torch.tensor(3)}, {}),
        (renamed(fc="linear"), {}),
        (lambda state: prefixed("module.")(renamed(fc="classifier.1")(state)), {}),
        (renamed(fc="head", layer3="stage3"), {"stage3": "layer3"}),
        (prefixed("backbone."), {"backbone": ""}),
        (renamed(conv1="stem"), {"stem.weight": "conv1.weight"}),
        (lambda state: {name: tensor for name, tensor in state.items() if "num_batches" not in name}, {}),
        (
            lambda state: {
                name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()
            },
            {},
        ),
        (lambda state: state | {"aux1.conv.weight": torch.zeros(1), "AuxLogits.fc.weight": torch.zeros(1)}, {}),
    ],
)
def test_names_from_elsewhere_are_brought_to_the_networks(
    network: Network, state: State, change: Callable[[State], State], rename: dict[str, str]
):
    adapted = adapt(change(state), network, rename)
    fill(network, adapted.weights, "here")
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == state[name].dtype
        torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-6)


def test_the_names_that_were_changed_are_told(network: Network, state: State):
    changed = prefixed("module.")(renamed(fc="linear")(state))
    told = adapt(changed, network, {}).renamed
    assert told["module.linear.weight"] == "fc.weight"
    assert set(told) == set(changed)


def test_a_final_layer_is_not_guessed_between_two(network: Network, state: State):
    two = renamed(fc="first")(state) | {"second.weight": state["fc.weight"], "second.bias": state["fc.bias"]}
    with pytest.raises(BundleError, match=r"fc\.weight \(10, 64\) is missing(.|\n)*second\.bias \(10,\) is unexpected"):
        fill(network, adapt(two, network, {}).weights, "here")


def test_everything_that_does_not_fit_is_named_at_once(network: Network, state: State):
    del state["layer1.0.conv1.weight"]
    state["surprise"] = torch.zeros(2)
    state["conv1.weight"] = torch.zeros(16, 3, 7, 7)
    with pytest.raises(BundleError) as raised:
        fill(network, adapt(state, network, {}).weights, "weights.pth")
    message = str(raised.value)
    assert message.startswith("weights.pth: the weights do not fit")
    assert "layer1.0.conv1.weight (16, 16, 3, 3) is missing" in message
    assert "surprise (2,) is unexpected" in message
    assert "conv1.weight: expected (16, 3, 3, 3), got (16, 3, 7, 7)" in message


def test_a_head_for_another_number_of_classes_is_named(state: State):
    with pytest.raises(BundleError, match=r"fc\.weight: expected \(7, 64\), got \(10, 64\)(.|\n)*built for 7 classes"):
        fill(build("cifar_resnet8", 7), state, "here")


def test_two_names_that_become_one_are_refused(network: Network, state: State):
    with pytest.raises(BundleError, match=r"layer1\.0\.conv1\.weight.*layer2\.0\.conv1\.weight.*both become"):
        adapt(state, network, {"layer2": "layer1"})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "best_prec1": 91.78},
        lambda state: {
            "model_state_dict": state,
            "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
        },
        lambda state: {"net": state, "epoch": 3, "loss": torch.tensor(0.5)},
        lambda state: {"model": state, "args": Namespace(lr=0.1)},
    ],
)
def test_a_checkpoint_holds_its_state_dict_bare_or_under_some_key(
    tmp_path: Path, state: State, wrap: Callable[[State], Any]
):
    read = read_weights(written(tmp_path, wrap(state)))
    assert set(read) == set(state)
    assert torch.equal(read["fc.weight"], state["fc.weight"])


def test_of_several_state_dicts_the_key_tells_which(tmp_path: Path, state: State):
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    uri = written(tmp_path, {"model": state, "ema": averaged})
    with pytest.raises(BundleError, match='set `key` to one of "model", "ema"'):
        read_weights(uri)
    assert torch.equal(read_weights(uri, "ema")["fc.bias"], averaged["fc.bias"])
    with pytest.raises(BundleError, match=r'expected an entry .*"model", "ema", got .net.'):
        read_weights(uri, "net")


def test_safetensors_are_told_by_their_content(tmp_path: Path, state: State):
    (tmp_path / "weights.bin").write_bytes(safetensors.torch.save(state))
    read = read_weights(str(tmp_path / "weights.bin"))
    assert set(read) == set(state)
    assert torch.equal(read["fc.weight"], state["fc.weight"])


def test_a_checkpoint_in_an_object_store_is_read(state: State):
    from pipeline import storage

    storage.write("memory://bucket/weights.safetensors", safetensors.torch.save(state))
    assert set(read_weights("memory://bucket/weights.safetensors")) == set(state)


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"state_dict": Malicious()}))
    for uri in (written(tmp_path, {"state_dict": Malicious()}), "plain.pkl"):
        with pytest.raises(BundleError, match=r"plain containers.*save the model's state_dict"):
            read_weights(uri)
    assert not Path("executed").exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path, network: Network):
    with pytest.raises(BundleError, match="save the model's state_dict"):
        read_weights(written(tmp_path, torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("content", [[1, 2], 3, {"epoch": 3}, {}])
def test_a_checkpoint_without_weights_is_refused(tmp_path: Path, content: Any):
    with pytest.raises(BundleError, match="expected a state dict"):
        read_weights(written(tmp_path, content))


@pytest.mark.parametrize("data", [b"", b"<html>", b"PK\x03\x04", b"\x08\0\0\0\0\0\0\0{broken}"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, data: bytes):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(BundleError, match="expected a PyTorch checkpoint"):
        read_weights(str(tmp_path / "file"))


def test_a_truncated_checkpoint_is_refused(tmp_path: Path, state: State):
    path = Path(written(tmp_path, state))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BundleError, match="expected a PyTorch checkpoint"):
        read_weights(str(path))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(BundleError, match=r"absent\.pth: expected a PyTorch checkpoint .* found nothing"):
        read_weights(str(tmp_path / "absent.pth"))
