"""What a Ray cluster offers, as far as the pipeline asks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import ConfigError

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Node:
    """What one node of the cluster offers."""

    cpus: int
    gpus: int = 0


def choose_device(nodes: Sequence[Node], asked: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device of the networks. Raises ConfigError where `cuda` is asked of a cluster without GPUs."""
    has_gpus = any(node.gpus for node in nodes)
    if asked == "cuda" and not has_gpus:
        raise ConfigError("compute.device: cuda asked for, but no node of the cluster has a GPU; use cpu or auto")
    if asked == "auto":
        return "cuda" if has_gpus else "cpu"
    return asked


def default_batch_size(device: Device) -> int:
    """Images per forward pass: on a CPU few enough that a ResNet's maps stay near it, on a GPU enough to fill it."""
    return 256 if device == "cuda" else 16
