from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.catalog import build
from pipeline.models.resnet import (
    SHORTCUTS,
    BasicBlock,
    Block,
    Bottleneck,
    Shortcut,
    Subsample,
    cifar_resnet,
    resnet,
    zero_init_last_norm,
)

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "cifar_resnet20": 269_722,
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "cifar_resnet1202": 19_421_274,
}


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def randomise(network: nn.Module) -> nn.Module:
    """Batch norms with statistics of their own, so that a misplaced one shows."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.0)
    return network.eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_family_has_the_published_parameter_counts(name: str):
    with torch.device("meta"):
        network = build(name, 10 if name.startswith("cifar") else 1000)
    assert num_parameters(network) == PARAMETERS[name]


@pytest.mark.parametrize(
    "depth", [18, 34, 50, pytest.param(101, marks=pytest.mark.slow), pytest.param(152, marks=pytest.mark.slow)]
)
def test_weights_and_outputs_are_interchangeable_with_torchvision(depth: int):
    from torchvision import models

    ours = randomise(resnet(depth, 1000))
    theirs = models.get_model(f"resnet{depth}", weights=None).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(ours(images), theirs(images))


def test_the_gradients_and_the_order_of_parameters_are_those_of_torchvision():
    from torchvision import models

    ours = resnet(18, 10)
    theirs = models.get_model("resnet18", weights=None, num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)  # in float32, batch norms over few pixels amplify rounding
    for network in (ours, theirs):
        network.double().train()(images).square().sum().backward()
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_a_plain_net_is_the_same_layers_without_projections():
    projections = sum(64 * 2**k * 64 * 2 ** (k + 1) + 2 * 64 * 2 ** (k + 1) for k in range(3))
    assert num_parameters(resnet(18, 1000, "none")) == PARAMETERS["resnet18"] - projections
    assert num_parameters(cifar_resnet(20, 10, "none")) == PARAMETERS["cifar_resnet20"]


def test_a_plain_block_passes_nothing_but_its_branch():
    residual, plain = (cifar_resnet(8, 10, shortcut).eval() for shortcut in ("A", "none"))
    plain.load_state_dict(residual.state_dict())
    for network in (residual, plain):
        for parameter in network.layer1.parameters():
            nn.init.zeros_(parameter)
    x = torch.rand(1, 16, 8, 8)
    with torch.inference_mode():
        assert torch.equal(residual.layer1(x), x)
        assert not plain.layer1(x).any()


def test_option_a_takes_every_second_pixel_and_pads_channels_on_both_sides():
    x = torch.randn(1, 2, 5, 5)
    out = Subsample(2, 4, stride=2)(x)
    assert out.shape == (1, 4, 3, 3)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


@pytest.mark.parametrize(("shortcut", "projections"), [("A", 0), ("B", 3), ("C", 8), ("none", 0)])
def test_the_options_project_where_the_paper_says(shortcut: Shortcut, projections: int):
    names = resnet(18, 10, shortcut).state_dict()
    assert sum(name.endswith("downsample.0.weight") for name in names) == projections


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("size", [32, 33])
def test_every_option_runs_for_both_blocks_and_odd_sizes(shortcut: Shortcut, size: int):
    images = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        for network in (resnet(50, 7, shortcut), cifar_resnet(8, 7, shortcut)):
            assert network.eval()(images).shape == (1, 7)


def test_the_cifar_stem_keeps_the_resolution():
    network = cifar_resnet(20, 10).eval()
    features = network.layer1(network.maxpool(network.conv1(torch.randn(1, 3, 32, 32))))
    assert features.shape == (1, 16, 32, 32)
    assert network.layer3(network.layer2(features)).shape == (1, 64, 8, 8)


@pytest.mark.parametrize("depth", [2, 19, 21, 100])
def test_a_cifar_depth_other_than_6n_plus_2_is_refused(depth: int):
    with pytest.raises(ConfigError, match="6n\\+2"):
        cifar_resnet(depth, 10)


def test_an_unknown_depth_or_shortcut_is_refused():
    with pytest.raises(ConfigError, match="18, 34, 50, 101, 152 layers, got 20"):
        resnet(20, 10)
    with pytest.raises(ConfigError, match="A, B, C, none, got 'D'"):
        resnet(18, 10, "D")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet50", "cifar_preact_resnet8", "preact_resnet50"])
def test_zero_init_makes_every_block_its_shortcut_alone(name: str):
    network = build(name, 10).eval()
    zero_init_last_norm(network)
    calls = []
    for block in network.modules():
        if isinstance(block, Block) and block.downsample is None:
            block.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].clone()))
            block.register_forward_hook(lambda module, inputs, output: calls.append(output.clone()))
    with torch.inference_mode():
        network(torch.randn(2, 3, 32, 32))
    assert calls
    for before, after in zip(calls[::2], calls[1::2], strict=True):
        assert before.any()
        assert torch.equal(before, after)


@pytest.mark.parametrize(("name", "block"), [("resnet18", BasicBlock), ("resnet50", Bottleneck)])
def test_zero_init_touches_the_last_norm_of_each_branch_and_nothing_else(name: str, block: type[Block]):
    network = build(name, 10)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    zero_init_last_norm(network)
    changed = {key for key, tensor in network.state_dict().items() if not torch.equal(tensor, before[key])}
    last = "bn2" if block is BasicBlock else "bn3"
    assert changed == {
        f"{key.removeprefix('trunk.')}.{last}.weight"
        for key, module in network.named_modules()
        if isinstance(module, block)
    }


def test_zero_init_of_a_preactivation_net_touches_its_last_convolutions_and_nothing_else():
    network = build("cifar_preact_resnet29", 10)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    zero_init_last_norm(network)
    changed = {key for key, tensor in network.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {f"layer{stage}.{number}.conv3.weight" for stage in (1, 2, 3) for number in range(3)}


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_preact_resnet8"])
def test_what_was_zeroed_learns(name: str):
    network = build(name, 10)
    zero_init_last_norm(network)
    logits, _ = network(torch.randn(4, 3, 16, 16))
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    assert len(blocks) == 3
    for block in blocks:
        assert block.last_weight.grad.any()


def test_zero_init_takes_a_bare_net_too():
    network = cifar_resnet(8, 10)
    zero_init_last_norm(network)
    assert not network.layer2[0].bn2.weight.any()


def test_zero_init_of_a_plain_net_is_refused_and_leaves_it_as_it_was():
    network = build("cifar_plain8", 10)
    with pytest.raises(ConfigError, match="expected a net with shortcuts, got a plain one"):
        zero_init_last_norm(network)
    assert network.trunk.layer1[0].bn2.weight.all()


def test_zero_init_of_a_net_of_another_family_is_refused():
    with pytest.raises(ConfigError, match="ResNet family"):
        zero_init_last_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Many small layers on few cores: where threads wait for each other, they take a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["cifar_resnet1202", "cifar_preact_resnet1001"])
def test_the_deepest_nets_have_a_gradient_everywhere(name: str):
    network = build(name, 10)
    logits, _ = network(torch.randn(2, 3, 32, 32))
    nn.functional.cross_entropy(logits, torch.tensor([3, 7])).backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert all(parameter.grad.any() for parameter in (network.trunk.conv1.weight, network.head.weight))
