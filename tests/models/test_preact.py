from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.catalog import build
from pipeline.models.preact import PreactBasicBlock, PreactBlock, PreactBottleneck, cifar_preact_resnet, preact_resnet
from pipeline.models.resnet import cifar_resnet

# Of ImageNet nets, osmr/imgclsmob's have 128 more: a norm after the stem's and before the first block.
PARAMETERS = {
    "preact_resnet18": 11_687_720,
    "preact_resnet34": 21_795_880,
    "preact_resnet50": 25_549_352,
    "preact_resnet101": 44_541_480,
    "preact_resnet152": 60_185_128,
    "preact_resnet200": 64_666_152,
    "cifar_preact_resnet110": 1_727_962,
    "cifar_preact_resnet164": 1_703_258,
    "cifar_preact_resnet1001": 10_327_706,
}


def built_without_weights(name: str, **arguments: Any) -> nn.Module:
    with torch.device("meta"):
        return build(name, 10 if name.startswith("cifar") else 1000, **arguments)


def block_types(network: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in network.modules() if isinstance(module, PreactBlock)}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_nets_have_the_published_parameter_counts(name: str):
    assert sum(parameter.numel() for parameter in built_without_weights(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("depth", "millions"), [(110, 1.7), (164, 1.7), (1001, 10.2)])
def test_convolutions_and_head_have_the_weights_that_the_paper_counts(depth: int, millions: float):
    """Only without the norms are the 1001 layers the paper's 10.2 million; with them they are 10.3."""
    layers = built_without_weights(f"cifar_preact_resnet{depth}").modules()
    weights = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Conv2d | nn.Linear))
    assert round(weights / 1e6, 1) == millions


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_net_has_as_many_weighted_layers_as_its_name_says(name: str):
    network = built_without_weights(name)
    layers = [
        layer
        for layer_name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and "downsample" not in layer_name
    ]
    assert name.endswith(f"resnet{len(layers)}")


def reference(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Figure 4(e) and the appendix, spelt out from the parameters of a CIFAR net: every activation by hand."""
    state = dict(network.state_dict())

    def activated(x: torch.Tensor, norm: str) -> torch.Tensor:
        statistics = (state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return nn.functional.batch_norm(x, *statistics).clamp(min=0)

    def convolved(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        return nn.functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    x = convolved(images, "conv1")
    for stage in (1, 2, 3):
        number = 0
        while f"layer{stage}.{number}.conv1.weight" in state:
            block, stride = f"layer{stage}.{number}", 2 if stage > 1 and number == 0 else 1
            inner = activated(x, "bn1" if block == "layer1.0" else f"{block}.bn1")
            if number == 0:
                x = inner
                if f"{block}.downsample.weight" in state:
                    x = convolved(inner, f"{block}.downsample", stride)
                elif stride == 2:
                    x = inner[:, :, ::2, ::2]
                    x = torch.cat([torch.zeros_like(x[:, ::2]), x, torch.zeros_like(x[:, ::2])], dim=1)
            if f"{block}.conv3.weight" in state:
                inner = activated(convolved(inner, f"{block}.conv1"), f"{block}.bn2")
                inner = activated(convolved(inner, f"{block}.conv2", stride), f"{block}.bn3")
                x = x + convolved(inner, f"{block}.conv3")
            else:
                inner = activated(convolved(inner, f"{block}.conv1", stride), f"{block}.bn2")
                x = x + convolved(inner, f"{block}.conv2")
            number += 1
    return activated(x, "bn2").mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("depth", [14, 29])  # two basic blocks, three bottlenecks a stage
def test_a_net_computes_what_the_paper_draws(depth: int):
    network = cifar_preact_resnet(depth, 10).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.0)
            module.bias.data -= 1  # so that activations cut
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(network(images), reference(network, images))


def test_the_first_block_of_an_imagenet_net_takes_the_pooled_activation_as_it_is():
    network = preact_resnet(18, 10).eval()
    assert not any(name.startswith("layer1.0.bn1") for name in network.state_dict())
    nn.init.zeros_(network.layer1[0].conv2.weight)
    x = torch.rand(1, 64, 8, 8)
    with torch.inference_mode():
        assert torch.equal(network.layer1[0](x), x)


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize("size", [16, 17])
def test_every_option_trains_for_both_blocks_and_odd_sizes(shortcut: Any, size: int):
    for depth in (8, 11):
        network = cifar_preact_resnet(depth, 7, shortcut=shortcut)
        logits = network(torch.randn(2, 3, size, size))
        assert logits.shape == (2, 7)
        logits.square().sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(("depth", "channels"), [(18, 512), (50, 2048)])
def test_the_feature_map_of_an_imagenet_net_is_a_32nd_of_the_image_and_activated(depth: int, channels: int):
    with torch.inference_mode():
        features = preact_resnet(depth, 7).eval().features(torch.randn(1, 3, 65, 64))
    assert features.shape == (1, channels, 3, 2)
    assert features.min() == 0


def test_projections_have_no_norm_of_their_own():
    names = [name for name in preact_resnet(50, 10).state_dict() if "downsample" in name]
    assert names == [f"layer{stage}.0.downsample.weight" for stage in (1, 2, 3, 4)]


def test_basic_blocks_with_option_a_have_the_parameters_of_the_nets_with_activations_after():
    counts = [sum(p.numel() for p in net.parameters()) for net in (cifar_preact_resnet(20, 10), cifar_resnet(20, 10))]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("depth", "arguments", "expected"),
    [
        (20, {}, PreactBasicBlock),
        (110, {}, PreactBasicBlock),
        (164, {}, PreactBottleneck),
        (29, {}, PreactBottleneck),
        (20, {"block": "bottleneck"}, PreactBottleneck),
        (164, {"block": "basic"}, PreactBasicBlock),
    ],
)
def test_a_cifar_depth_chooses_its_block_unless_told(depth: int, arguments: dict[str, Any], expected: type):
    network = built_without_weights(f"cifar_preact_resnet{depth}", **arguments)
    assert block_types(network) == {expected}


@pytest.mark.parametrize(
    ("depth", "arguments", "message"),
    [
        (2, {}, r"6n\+2 layers .* or 9n\+2"),
        (21, {}, r"6n\+2 layers .* or 9n\+2 .*, got 21"),
        (26, {"block": "bottleneck"}, r"9n\+2 layers with bottlenecks, got 26"),
        (29, {"block": "basic"}, r"6n\+2 layers with basic blocks, got 29"),
        (20, {"block": "wide"}, "block: expected one of basic, bottleneck, got 'wide'"),
        (20, {"shortcut": "none"}, "shortcut: expected one of A, B, C, got 'none'"),
    ],
)
def test_a_cifar_net_that_does_not_exist_is_refused(depth: int, arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        cifar_preact_resnet(depth, 10, **arguments)


def test_an_imagenet_net_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="18, 34, 50, 101, 152, 200 layers, got 20"):
        preact_resnet(20, 10)
    with pytest.raises(ConfigError, match="A, B, C, got 'none'"):
        preact_resnet(18, 10, "none")  # type: ignore[arg-type]


def test_a_net_can_be_exported():
    network = build("cifar_preact_resnet8", 10).eval()
    images = torch.randn(2, 3, 32, 32)
    program = torch.export.export(network, (images,))
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(images), network(images))
