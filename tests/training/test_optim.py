"""Groups, LAMB against the paper's algorithm, the schedule against the papers' numbers, freezing."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.models.catalog import Network, build
from pipeline.training.config import OptimizerConfig, ScheduleConfig, StartConfig
from pipeline.training.optim import Lamb, freeze, learning_rate_at, make_optimizer, train_mode


@pytest.fixture
def network() -> Network:
    return build("cifar_resnet8", 10)


def names_of(network: nn.Module, group: dict[str, list[Tensor]]) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in network.named_parameters() if id(parameter) in ids}


def rate_at(step: int, num_steps: int = 1000, *, learning_rate: float = 0.1, **schedule: object) -> float:
    return learning_rate_at(
        step,
        num_steps=num_steps,
        steps_per_epoch=100,
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        schedule=ScheduleConfig.model_validate({"unit": "steps", **schedule}),
        batch_size=128,
    )


# Optimizers


@pytest.mark.parametrize("kind", ["sgd", "lamb"])
def test_norms_and_biases_do_not_decay_and_nothing_is_left_out(network: Network, kind: str):
    optimizer = make_optimizer(network, OptimizerConfig(kind=kind, weight_decay=0.02), batch_size=256)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.02, 0)
    assert names_of(network, decayed) | names_of(network, plain) == {name for name, _ in network.named_parameters()}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(network.parameters()))
    assert all("bn" in name or name.endswith("bias") for name in names_of(network, plain))
    assert not any("bn" in name or name.endswith("bias") for name in names_of(network, decayed))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)]
)
def test_every_kind_of_norm_is_known(norm: nn.Module):
    network = nn.Sequential(nn.Linear(4, 4), norm)
    decayed, plain = make_optimizer(network, OptimizerConfig(), batch_size=1).param_groups
    assert names_of(network, decayed) == {"0.weight"}
    assert names_of(network, plain) == {"0.bias", "1.weight", "1.bias"}


def test_the_biases_of_attention_are_biases():
    network = nn.MultiheadAttention(4, 2)
    _, plain = make_optimizer(network, OptimizerConfig(), batch_size=1).param_groups
    assert names_of(network, plain) == {"in_proj_bias", "out_proj.bias"}


def test_everything_decays_where_the_paper_is_followed(network: Network):
    (group,) = make_optimizer(network, OptimizerConfig(decay_norm_and_bias=True), batch_size=1).param_groups
    assert len(group["params"]) == len(list(network.parameters()))
    assert group["weight_decay"] == 1e-4


def test_frozen_parameters_are_left_out(network: Network):
    freeze(network, StartConfig(freeze="trunk"))
    optimizer = make_optimizer(network, OptimizerConfig(), batch_size=1)
    names = [names_of(network, group) for group in optimizer.param_groups]
    assert names == [{"head.weight"}, {"head.bias"}]


def test_sgd_takes_its_settings(network: Network):
    config = OptimizerConfig(learning_rate=0.4, learning_rate_batch=256, momentum=0.8, nesterov=True)
    optimizer = make_optimizer(network, config, batch_size=64)
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["nesterov"]) == (0.1, 0.8, True)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValidationError, match="expected a momentum above 0 with nesterov"):
        OptimizerConfig(nesterov=True, momentum=0)
    OptimizerConfig(kind="lamb", nesterov=True, momentum=0)


def lamb_by_the_paper(weights: Tensor, gradients: list[Tensor], *, decay: float, adapt: bool = True) -> Tensor:
    """Algorithm 2, line by line, in float64."""
    rate, beta1, beta2, eps = 0.01, 0.9, 0.99, 1e-6
    x, m, v = weights.double(), torch.zeros(weights.shape).double(), torch.zeros(weights.shape).double()
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g.double()
        v = beta2 * v + (1 - beta2) * g.double() ** 2
        r = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        update = r + decay * x
        has_ratio = adapt and x.norm() > 0 and update.norm() > 0
        x = x - rate * (x.norm() / update.norm() if has_ratio else 1.0) * update
    return x


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_lamb_is_the_papers_algorithm(decay: float):
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(5, 3, generator=generator), torch.randn(4, generator=generator), torch.zeros(3)]
    gradients = [[torch.randn(start.shape, generator=generator) for _ in range(6)] for start in starts]
    parameters = [nn.Parameter(start.clone()) for start in starts]
    optimizer = Lamb(parameters, lr=0.01, betas=(0.9, 0.99), weight_decay=decay)
    for step in range(6):
        for parameter, of_steps in zip(parameters, gradients, strict=True):
            parameter.grad = of_steps[step].clone()
        optimizer.step()
    for parameter, start, of_steps in zip(parameters, starts, gradients, strict=True):
        expected = lamb_by_the_paper(start, of_steps, decay=decay).float()
        assert torch.allclose(parameter.detach(), expected, atol=1e-6)


def test_lamb_leaves_weights_alone_that_have_neither_gradient_nor_decay():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    parameters[0].grad = torch.zeros(3)
    Lamb(parameters, lr=0.01).step()
    assert torch.equal(parameters[0], torch.ones(3))
    assert torch.equal(parameters[1], torch.ones(2))


def test_lamb_scales_norms_and_biases_by_no_trust_ratio():
    network = nn.Linear(3, 2)
    optimizer = make_optimizer(
        network, OptimizerConfig(kind="lamb", learning_rate=0.01, betas=(0.9, 0.99), weight_decay=0.1), batch_size=1
    )
    gradients = {name: torch.full_like(parameter, 0.5) for name, parameter in network.named_parameters()}
    starts = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for name, parameter in network.named_parameters():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    weight = lamb_by_the_paper(starts["weight"], [gradients["weight"]], decay=0.1)
    bias = lamb_by_the_paper(starts["bias"], [gradients["bias"]], decay=0, adapt=False)
    assert torch.allclose(network.weight.detach(), weight.float(), atol=1e-6)
    assert torch.allclose(network.bias.detach(), bias.float(), atol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "lamb"])
def test_an_optimizer_goes_on_from_its_state(kind: str):
    def train(network: nn.Linear, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            network(inputs).square().mean().backward()
            optimizer.step()

    config = OptimizerConfig(kind=kind, learning_rate=0.05)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = make_optimizer(first, config, batch_size=1)
    train(first, optimizer, range(4))
    second.load_state_dict(first.state_dict())
    resumed = make_optimizer(second, config, batch_size=1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else both would share it
    train(first, optimizer, range(4, 8))
    train(second, resumed, range(4, 8))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_lamb_returns_the_loss_of_a_closure():
    parameter = nn.Parameter(torch.ones(2))

    def closure() -> float:
        parameter.grad = None
        loss = parameter.square().sum()
        loss.backward()
        return float(loss.detach())

    assert Lamb([parameter], lr=0.1).step(closure) == 2
    assert (parameter < 1).all()


# The schedule


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.1), (31_999, 0.1), (32_000, 0.01), (47_999, 0.01), (48_000, 0.001), (63_999, 0.001)]
)
def test_the_papers_cifar_recipe(step: int, rate: float):
    assert rate_at(step, 64_000, kind="step", milestones=[32_000, 48_000]) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.01), (399, 0.01), (400, 0.1), (31_999, 0.1), (32_000, 0.01), (48_000, 0.001)]
)
def test_the_papers_warm_up_of_resnet110(step: int, rate: float):
    schedule = {"warmup": 400, "warmup_kind": "constant", "warmup_factor": 0.1}
    assert rate_at(step, 64_000, kind="step", milestones=[32_000, 48_000], **schedule) == pytest.approx(rate)


def test_a_linear_warm_up_goes_up_in_equal_steps_from_its_factor():
    rates = [rate_at(step, kind="constant", warmup=4, warmup_factor=0.2) for step in range(6)]
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


def test_a_cosine_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.001)
    for step in range(50):
        assert rate_at(step, 50, kind="cosine", final_factor=0.01) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_linear_runs_down_over_the_steps_after_the_warm_up():
    rates = [rate_at(step, 10, kind="linear", final_factor=0.1, warmup=2) for step in (2, 6, 10)]
    assert rates == pytest.approx([0.1, 0.055, 0.01])


def test_epochs_are_counted_in_steps_of_an_epoch():
    for step in (0, 150, 299, 300, 700, 999):
        in_epochs = rate_at(step, kind="step", milestones=[3, 7], warmup=2, unit="epochs")
        assert in_epochs == rate_at(step, kind="step", milestones=[300, 700], warmup=200, unit="steps")


def test_another_batch_scales_the_rate_linearly():
    for batch_size, rate in ((256, 0.1), (512, 0.2), (64, 0.025)):
        assert learning_rate_at(
            5,
            num_steps=10,
            steps_per_epoch=1,
            optimizer=OptimizerConfig(learning_rate=0.1, learning_rate_batch=256),
            schedule=ScheduleConfig(kind="constant"),
            batch_size=batch_size,
        ) == pytest.approx(rate)


SCHEDULES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["constant", "step", "cosine", "linear"]),
        "milestones": st.lists(st.floats(1, 400), min_size=1, max_size=3),
        "gamma": st.floats(0.01, 0.99),
        "final_factor": st.floats(0, 1),
        "warmup": st.floats(0, 250),
        "warmup_kind": st.sampled_from(["linear", "constant"]),
        "warmup_factor": st.floats(0, 1),
    }
).map(lambda schedule: schedule if schedule["kind"] == "step" else {**schedule, "milestones": []})


@given(schedule=SCHEDULES, num_steps=st.integers(1, 200))
@settings(deadline=None)
def test_a_rate_is_never_above_the_peak_nor_below_zero(schedule: dict[str, object], num_steps: int):
    assert all(0 <= rate_at(step, num_steps, **schedule) <= 0.1 for step in range(num_steps + 1))


@given(schedule=SCHEDULES, num_steps=st.integers(1, 200))
@settings(deadline=None)
def test_a_rate_goes_down_only_after_the_warm_up_and_up_only_within(schedule: dict[str, object], num_steps: int):
    rates = [rate_at(step, num_steps, **schedule) for step in range(num_steps + 1)]
    for step, (rate, following) in enumerate(itertools.pairwise(rates)):
        if step + 1 < schedule["warmup"]:
            assert following >= rate
        elif step >= schedule["warmup"]:
            assert following <= rate


@given(schedule=SCHEDULES, warmup=st.integers(1, 100))
@settings(deadline=None)
def test_a_linear_warm_up_ends_where_the_schedule_begins(schedule: dict[str, object], warmup: int):
    schedule |= {"warmup": warmup, "warmup_kind": "linear", "milestones": [900] * len(schedule["milestones"])}
    step_up = 0.1 * (1 - float(str(schedule["warmup_factor"]))) / warmup
    assert rate_at(warmup, 1000, **schedule) == pytest.approx(0.1)
    assert 0.1 - rate_at(warmup - 1, 1000, **schedule) == pytest.approx(step_up, abs=1e-12)


def test_a_warm_up_as_long_as_the_training_is_all_there_is():
    rates = [rate_at(step, 5, kind="cosine", warmup=5, warmup_factor=0) for step in range(6)]
    assert rates == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.1])
    assert math.isfinite(rate_at(7, 5, kind="linear", warmup=5))


# Freezing


def train_a_step(network: Network, config: StartConfig) -> dict[str, Tensor]:
    """The network's state before, after a step on noise."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    freeze(network, config)
    optimizer = make_optimizer(network, OptimizerConfig(), batch_size=4)
    train_mode(network, config)
    logits, _ = network(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    logits.square().sum().backward()
    optimizer.step()
    return before


def changed(network: Network, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}


def test_a_frozen_trunk_keeps_weights_and_statistics(network: Network):
    before = train_a_step(network, StartConfig(bundle="any", freeze="trunk"))
    assert changed(network, before) == {"fc.weight", "fc.bias"}


def test_frozen_norms_keep_weights_and_statistics(network: Network):
    before = train_a_step(network, StartConfig(bundle="any", freeze="norms"))
    assert changed(network, before) == {name for name in before if "bn" not in name}


def test_with_nothing_frozen_all_of_it_moves(network: Network):
    before = train_a_step(network, StartConfig())
    assert changed(network, before) == set(before)


def test_a_frozen_trunk_drops_nothing():
    network = Network(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 2)), "2")
    config = StartConfig(bundle="any", freeze="trunk")
    train_mode(network, config)
    assert network.training
    assert torch.equal(network.trunk(torch.ones(1, 3, 2, 2)), torch.ones(1, 12))
