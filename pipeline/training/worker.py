"""One training process among its peers: who it is, and the few words it exchanges with the others."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.models.precision import AskedFloatPrecision, FloatPrecision, float_precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Notice:
    """What the outside asks of a worker: a checkpoint now, since its node goes soon, or an end."""

    should_checkpoint: bool = False
    should_stop: bool = False


@dataclass(frozen=True, slots=True)
class Worker:
    """A rank, one of `num_on_node` on its node. Where `world_size` is over 1, torch.distributed's default group must be
    there.

    `begin` is told the step that the work begins from, and tells whether it has begun there before; `notice` is asked
    every few steps, by all ranks at the same one; `observe` is told the progress: a training's on rank 0, an
    evaluation's on each.
    """

    rank: int = 0
    world_size: int = 1
    num_on_node: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_threads: int = 1
    begin: Callable[[int], bool] = lambda step: False
    notice: Callable[[], Notice] = Notice
    observe: Callable[[dict[str, Any]], None] = lambda status: None

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on each."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def should_isolate(self, step: int) -> bool:
        """Whether images shall be decoded isolated by the work that begins from `step`: a rank has begun there before,
        and an image may be to blame that it ended. Every rank calls it.
        """
        should_isolate = any(self.gather(self.begin(step)))
        if should_isolate:
            logger.warning(
                "the workers begin again from step %d: images are decoded one by one, slowly, in case that one kills "
                "its decoder",
                step,
            )
        return should_isolate

    def share_buffers(self, network: nn.Module) -> None:
        """Give all ranks rank 0's buffers: each keeps norms' statistics of its own images."""
        if self.world_size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)


def common_precision(worker: Worker, asked: AskedFloatPrecision) -> FloatPrecision:
    """What all ranks compute in: float32 where `auto` finds different precisions on them. Every rank calls it."""
    found = set(worker.gather(float_precision(asked, worker.device)))
    return found.pop() if len(found) == 1 else "float32"
