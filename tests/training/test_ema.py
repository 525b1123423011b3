"""The average against its formula, on the family's nets with their buffers."""

import pytest
import torch
from torch import nn

from pipeline.models.catalog import Network, build
from pipeline.training.config import EmaConfig
from pipeline.training.ema import Ema


@pytest.fixture
def network() -> Network:
    return build("cifar_resnet8", 10)


def move(network: nn.Module, seed: int) -> None:
    """New weights and statistics, as a training step would leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            else:
                tensor.add_(1)


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_the_average_begins_as_the_network_and_in_evaluation_mode(network: Network):
    network.train()
    ema = Ema(network, EmaConfig(decay=0.9))
    assert not any(module.training for module in ema.network.modules())
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    assert network.training
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in ema.network.state_dict().items())


def test_weights_and_buffers_follow_the_formula(network: Network):
    ema = Ema(network, EmaConfig(decay=0.5))
    expected = state(network)
    for step in range(1, 13):
        move(network, step)
        ema.update(network, step)
        decay = min(0.5, (1 + step) / (10 + step))  # 0.5 from the 8th on
        for name, tensor in network.state_dict().items():
            is_float = tensor.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * tensor if is_float else tensor.clone()
    averaged = ema.network.state_dict()
    assert any("running_var" in name for name in averaged)
    assert all(torch.allclose(averaged[name], tensor, atol=1e-5) for name, tensor in expected.items())
    assert all(int(averaged[name]) == 12 for name in averaged if "num_batches" in name)


def test_the_network_itself_is_left_alone(network: Network):
    ema = Ema(network, EmaConfig(decay=0.9))
    move(network, 1)
    before = state(network)
    ema.update(network, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not torch.equal(ema.network.head.weight, network.head.weight)  # type: ignore[union-attr]


def test_updates_happen_every_so_many_steps(network: Network):
    rare, each = Ema(network, EmaConfig(decay=0.9, every_steps=3)), Ema(network, EmaConfig(decay=0.9))
    for step in range(1, 8):
        move(network, step)
        rare.update(network, step)
        if step % 3 == 0:
            each.update(network, step // 3)
    pairs = zip(rare.network.state_dict().values(), each.network.state_dict().values(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_an_average_goes_on_from_its_state(network: Network):
    through, first = Ema(network, EmaConfig(decay=0.9)), Ema(network, EmaConfig(decay=0.9))
    for step in (1, 2, 3):
        move(network, step)
        through.update(network, step)
        first.update(network, step)
    second = Ema(build("cifar_resnet8", 10), EmaConfig(decay=0.9))
    second.load_state_dict(first.state_dict())
    move(network, 4)
    through.update(network, 4)
    second.update(network, 4)
    pairs = zip(through.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_the_average_is_float32_whatever_the_network_is():
    network = nn.Linear(2, 2).bfloat16()
    ema = Ema(network, EmaConfig(decay=0.9))
    ema.update(network, 1)
    assert {parameter.dtype for parameter in ema.network.parameters()} == {torch.float32}
