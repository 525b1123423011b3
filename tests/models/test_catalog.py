import copy
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.models.catalog import build, names
from pipeline.models.preact import PreactResNet
from pipeline.models.resnet import ResNet

TINY: dict[str, tuple[int, dict[str, Any]]] = {  # one of each of torchvision's families: image size, arguments
    "mobilenet_v2": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "shufflenet_v2_x0_5": (32, {}),
    "regnet_y_400mf": (32, {}),
    "mnasnet0_5": (32, {}),
    "densenet121": (32, {}),
    "efficientnet_b0": (32, {}),
    "googlenet": (64, {}),
    "vit_b_16": (32, {"image_size": 32}),
    "swin_t": (64, {}),
    "resnext50_32x4d": (32, {}),
}
LARGE: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (64, {}),
    "convnext_tiny": (32, {}),
    "efficientnet_v2_s": (32, {}),
    "inception_v3": (75, {}),
    "maxvit_t": (224, {}),
    "swin_v2_t": (64, {}),
    "vgg11": (32, {}),
    "vgg11_bn": (32, {}),
    "wide_resnet50_2": (32, {}),
}
CASES = [
    *((name, *case) for name, case in TINY.items()),
    *(pytest.param(name, *case, marks=pytest.mark.slow) for name, case in LARGE.items()),
]


@pytest.mark.parametrize(("name", "size", "arguments"), CASES)
def test_logits_are_those_of_the_plain_torchvision_classifier(name: str, size: int, arguments: dict[str, Any]):
    from torchvision import models

    network = build(name, 11, **arguments).eval()
    for_training = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    plain = models.get_model(name, weights=None, num_classes=11, **for_training, **arguments).eval()
    plain.load_state_dict(network.state_dict(), strict=True)
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        logits, embedding = network(images)
        assert torch.equal(logits, plain(images))
        assert torch.equal(logits, network.head(embedding))
    assert embedding.shape == (2, network.embedding_size)


@pytest.mark.slow
@pytest.mark.usefixtures("without_weights")
def test_every_classifier_of_torchvision_is_cut_before_its_last_layer():
    for name in names():
        if name.startswith("squeezenet"):
            continue
        network = build(name, 11).eval()
        size = {"inception_v3": 299, "vit_h_14": 224}.get(name, 224)
        logits, embedding = network(torch.empty(2, 3, size, size))
        assert logits.shape == (2, 11), name
        assert embedding.shape == (2, network.embedding_size), name


def test_the_embedding_of_a_resnet_is_its_pooled_feature_map():
    network = build("resnet18", 10).eval()
    pooled = []
    network.trunk.avgpool.register_forward_hook(lambda module, inputs, output: pooled.append(output.flatten(1)))
    with torch.inference_mode():
        _, embedding = network(torch.randn(2, 3, 64, 64))
    assert torch.equal(embedding, pooled[0])


def test_our_own_nets_come_before_torchvisions_of_the_same_name():
    assert isinstance(build("resnet18", 10).trunk, ResNet)
    assert isinstance(build("cifar_plain20", 10).trunk, ResNet)


def test_every_net_of_our_own_has_a_name_in_the_catalog():
    ours = {"resnet152", "plain34", "cifar_resnet1202", "cifar_plain56"}
    ours |= {f"preact_resnet{depth}" for depth in (18, 34, 50, 101, 152, 200)}
    ours |= {f"cifar_preact_resnet{depth}" for depth in (110, 164, 1001)}
    assert ours <= set(names())


def test_preactivation_nets_go_by_their_own_name():
    assert isinstance(build("preact_resnet18", 10).trunk, PreactResNet)
    assert isinstance(build("cifar_preact_resnet20", 10).trunk, PreactResNet)
    assert not isinstance(build("cifar_resnet20", 10).trunk, PreactResNet)


def test_a_network_saves_and_loads_under_the_classifiers_own_names():
    network = build("cifar_resnet20", 10)
    state = network.state_dict()
    assert {"conv1.weight", "fc.weight", "fc.bias"} < set(state)
    assert not any(name.startswith(("trunk.", "head.")) for name in state)
    other = build("cifar_resnet20", 10)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.head.weight, network.head.weight)


def test_own_names_survive_copying_and_wrapping():
    network = build("swin_t", 3)  # its own head is called `head`, as ours is
    wrapped = torch.nn.Sequential(copy.deepcopy(network))
    assert {f"0.{name}" for name in network.state_dict()} == set(wrapped.state_dict())
    wrapped.load_state_dict({f"0.{name}": tensor for name, tensor in network.state_dict().items()}, strict=True)


def test_a_network_can_be_exported():
    network = build("cifar_resnet8", 10).eval()
    images = torch.randn(2, 3, 32, 32)
    program = torch.export.export(network, (images,))
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(images), network(images))


def test_arguments_reach_the_constructor():
    assert any("downsample" in name for name in build("cifar_resnet20", 10, shortcut="B").state_dict())
    assert build("vit_b_32", 5, image_size=64).state_dict()["encoder.pos_embedding"].shape[1] == 1 + 4


def test_an_unknown_name_is_refused_with_close_ones():
    with pytest.raises(ConfigError, match=r"got 'densenet120'; did you mean .*densenet121"):
        build("densenet120", 10)
    with pytest.raises(ConfigError, match="got 'qqq'; see"):
        build("qqq", 10)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("squeezenet1_1", {}, "no final linear layer"),
        ("resnet18", {"depth_multiplier": 2}, "depth_multiplier"),
        ("cifar_resnet21", {}, "6n\\+2"),
        ("cifar_plain20", {"shortcut": "B"}, "no shortcut to choose"),
        ("cifar_preact_resnet21", {}, "6n\\+2"),
        ("cifar_preact_resnet20", {"block": "wide"}, "basic, bottleneck"),
        ("preact_resnet18", {"shortcut": "none"}, "A, B, C"),
        ("preact_resnet20", {}, "preact_resnet200"),
        ("preact_plain18", {}, "expected a name of the catalog"),
        ("mobilenet_v2", {"weights": "DEFAULT"}, "jobs.import_model"),
        ("vit_b_16", {"bogus": 1}, "bogus"),
        ("vit_b_16", {"image_size": 225}, "cannot be built with arguments .*225"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build(name, 10, **arguments)
