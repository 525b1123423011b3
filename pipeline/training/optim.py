"""How the weights move: optimizers, the learning rate of every step, and what is frozen."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from pipeline.models.catalog import Network
from pipeline.training.config import OptimizerConfig, ScheduleConfig, StartConfig

_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm)


def make_optimizer(network: nn.Module, config: OptimizerConfig, *, batch_size: int) -> torch.optim.Optimizer:
    """The optimizer of all parameters that are not frozen, at the highest learning rate of the schedule.

    Norms' parameters and all biases are a group without weight decay, unless `decay_norm_and_bias`; LAMB then takes
    them out of its layer-wise scaling too, as its authors' code does.
    """
    decayed, plain = _split(network, config.decay_norm_and_bias)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    rate = peak_learning_rate(config, batch_size)
    if config.kind == "lamb":
        groups[1]["adapt"] = False
        return Lamb([group for group in groups if group["params"]], lr=rate, betas=config.betas, eps=config.eps)
    return torch.optim.SGD(
        [group for group in groups if group["params"]], lr=rate, momentum=config.momentum, nesterov=config.nesterov
    )


def peak_learning_rate(config: OptimizerConfig, batch_size: int) -> float:
    """The highest learning rate of the schedule for this global batch (Goyal et al. 2017, section 2.1)."""
    return config.learning_rate * batch_size / (config.learning_rate_batch or batch_size)


def learning_rate_at(
    step: int,
    *,
    num_steps: int,
    steps_per_epoch: float,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    batch_size: int,
) -> float:
    """The learning rate of step `step` of `num_steps`, counted from 0; nothing else is remembered.

    The warm-up comes first. Cosine and linear run over the steps after it, and would reach `final_factor` at step
    `num_steps`; milestones count from step 0, warm-up or not.
    """
    unit = steps_per_epoch if schedule.unit == "epochs" else 1
    warmup = schedule.warmup * unit
    peak = peak_learning_rate(optimizer, batch_size)
    if step < warmup:
        share = step / warmup if schedule.warmup_kind == "linear" else 0.0
        return peak * (1 - (1 - schedule.warmup_factor) * (1 - share))
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "step":
        return peak * schedule.gamma ** sum(milestone * unit <= step for milestone in schedule.milestones)
    progress = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule.kind == "cosine" else 1 - progress
    return peak * (schedule.final_factor + (1 - schedule.final_factor) * remaining)


def freeze(network: Network, config: StartConfig) -> None:
    """Take the gradients from what `start.freeze` names; before the optimizer is made."""
    for module in _frozen(network, config):
        module.requires_grad_(False)


def train_mode(network: Network, config: StartConfig) -> None:
    """`network.train()`, but for frozen parts, which stay in evaluation mode: norms keep statistics, nothing drops."""
    network.train()
    for module in _frozen(network, config):
        module.eval()


class Lamb(torch.optim.Optimizer):
    """LAMB: Adam whose every step is as long as its layer's weights (You et al. 2019, arXiv:1904.00962, algorithm 2).

    Bias correction is the paper's, phi the identity, and the trust ratio 1 where weights or update are 0. Groups with
    `adapt` false take a trust ratio of 1 always. Gradients are dense.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": True, "step": 0}
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient; returns what `closure` does, where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                group["step"] += 1
                self._move(parameters, group)
        return loss

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        first, second = zip(*map(self._moments, parameters), strict=True)
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_div(second, 1 - beta2 ** group["step"])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(first, 1 - beta1 ** group["step"])
        torch._foreach_div_(updates, denominators)
        torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        if group["adapt"]:
            for update, ratio in zip(updates, _trust_ratios(parameters, updates), strict=True):
                update.mul_(ratio)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        if not state:
            state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state["first"], state["second"]


def _trust_ratios(parameters: Sequence[Tensor], updates: Sequence[Tensor]) -> Tensor:
    weights, lengths = (torch.stack(torch._foreach_norm(list(tensors))) for tensors in (parameters, updates))
    return torch.where((weights > 0) & (lengths > 0), weights / lengths, 1.0)


def _split(network: nn.Module, decay_norm_and_bias: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters that decay and those that do not, each once, in the order of the network."""
    decayed: dict[nn.Parameter, None] = {}
    plain: dict[nn.Parameter, None] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_plain = isinstance(module, _NORMS) or name.endswith("bias")
                (plain if is_plain and not decay_norm_and_bias else decayed).setdefault(parameter)
    return list(decayed), list(plain)


def _frozen(network: Network, config: StartConfig) -> Iterator[nn.Module]:
    if config.freeze == "trunk":
        yield network.trunk
    elif config.freeze == "norms":
        yield from (module for module in network.modules() if isinstance(module, _NORMS))
