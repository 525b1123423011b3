"""A running average of a network, which is evaluated and published in its place."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training.config import EmaConfig


class Ema:
    """The exponential moving average of a network's weights and buffers, in float32 on the network's device.

    Made where `decay` is set only. Integer buffers, such as counts of batches, are copied.
    """

    def __init__(self, network: nn.Module, config: EmaConfig) -> None:
        assert config.decay is not None
        self._decay = config.decay
        self._every_steps = config.every_steps
        self._network = copy.deepcopy(network).float().requires_grad_(False).eval()

    @property
    def network(self) -> nn.Module:
        """The averaged network, in evaluation mode."""
        return self._network

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Draw the average towards `network` after its `step`-th step, counted from 1, if one is due.

        The t-th update keeps min(decay, (1 + t) / (10 + t)) of the average, so that the random weights of the start
        fade fast (as TensorFlow's ExponentialMovingAverage does, given the number of updates).
        """
        if step % self._every_steps:
            return
        number = step // self._every_steps
        decay = min(self._decay, (1 + number) / (10 + number))
        averages, values = [], []
        for average, value in zip(_tensors(self._network), _tensors(network), strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value.to(average.dtype))
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The averaged network's own."""
        return self._network.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; the position is in `step`."""
        self._network.load_state_dict(state)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
