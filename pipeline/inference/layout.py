"""From a cluster's resources to actors: their number, size and the graph's form."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pipeline.cluster import Device, Node, choose_device, nodes_in_words
from pipeline.errors import ConfigError
from pipeline.inference.config import ComputeConfig

Stage: TypeAlias = Literal["fetch", "decode", "predict", "write"]
Form: TypeAlias = Literal["fused", "split"]
STAGES: tuple[Stage, ...] = ("fetch", "decode", "predict", "write")

_MOST_CPUS_PER_ACTOR = 4  # a forward pass scales little beyond
_PARTS_OF_A_GPU = 10_000  # Ray rounds to these: six times a sixth would be more than the whole


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run spreads over the cluster."""

    form: Form
    device: Device
    num_actors: int
    cpus_per_actor: int
    gpus_per_actor: float  # a part of one where several actors share it
    decode: Literal["cpu", "gpu"] = "cpu"
    num_gpus: int = 0  # in use

    @property
    def gpu_share(self) -> float:
        """How much of a second that an actor spends on its GPU is to be counted: the GPU serves others meanwhile."""
        return self.num_gpus / self.num_actors

    @property
    def stages_on_gpu(self) -> tuple[Stage, ...]:
        """What an image takes a GPU's time for."""
        if self.device == "cpu":
            return ()
        return ("decode", "predict") if self.decode == "gpu" else ("predict",)


def choose_layout(nodes: Sequence[Node], compute: ComputeConfig, num_shards: int) -> Layout:
    """The layout that fits the cluster, never more actors than shards.

    Raises ConfigError where it cannot fit, saying what was asked and what there is: Ray would wait for ever.
    """
    device = choose_device(nodes, compute.device)
    if compute.decode == "gpu" and device == "cpu":
        raise ConfigError("compute.decode: gpu needs GPUs, got device cpu; leave it at auto, or add nodes with GPUs")
    if compute.precision == "int8" and device == "cuda":
        raise ConfigError("compute.precision: int8 is for CPUs, got GPUs; use auto, or compute.device cpu")
    return _on_gpus(nodes, compute, num_shards) if device == "cuda" else _on_cpus(nodes, compute, num_shards)


def _on_cpus(nodes: Sequence[Node], compute: ComputeConfig, num_shards: int) -> Layout:
    form = "fused" if compute.form == "auto" else compute.form
    total = sum(node.cpus for node in nodes)
    size = compute.cpus_per_actor or _cpus_to_a_shard(nodes, total - (form == "split"), num_shards)
    fitting = sum(node.cpus // size for node in nodes)
    if form == "split":
        fitting = _leaving_one_cpu(fitting, size, total)
    num_actors = _num_actors(fitting, compute, num_shards, f"{size} CPUs each", nodes)
    return Layout(form, "cpu", num_actors, size, gpus_per_actor=0)


def _cpus_to_a_shard(nodes: Sequence[Node], total: int, num_shards: int) -> int:
    """One, but where there are fewer shards than CPUs: two forward passes on a CPU each do more than one on both."""
    smallest = min((node.cpus for node in nodes if node.cpus), default=0)
    return max(1, min(total // max(1, num_shards), smallest, _MOST_CPUS_PER_ACTOR))


def _on_gpus(nodes: Sequence[Node], compute: ComputeConfig, num_shards: int) -> Layout:
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    form = compute.form
    if form == "auto":
        form = "split" if cpus >= 2 * gpus else "fused"
    sharers = _sharers_of_a_gpu(nodes, compute, form, num_shards)
    places = _places_on_gpus(nodes, compute, form, sharers)
    decode = compute.decode
    if decode == "auto":
        has_too_few = (compute.cpus_per_actor or _cpus_to_an_actor(nodes, 1)) < 2  # for what any GPU predicts
        decode = "gpu" if form == "fused" and has_too_few else "cpu"
    each = f"{'1 GPU' if sharers == 1 else f'1/{sharers} GPU'} and {places.cpus_per_actor} CPUs each"
    num_actors = _num_actors(places.fitting, compute, num_shards, each, nodes)
    return Layout(
        form,
        "cuda",
        num_actors,
        places.cpus_per_actor,
        gpus_per_actor=math.floor(_PARTS_OF_A_GPU / sharers) / _PARTS_OF_A_GPU,
        decode=decode,
        num_gpus=places.gpus_taken_by(num_actors),
    )


@dataclass(frozen=True, slots=True)
class _Places:
    """Of actors on GPUs, `sharers` to each: how many there are on each node, and how many of all may be taken."""

    sharers: int
    cpus_per_actor: int
    by_node: list[int]
    fitting: int

    def gpus_taken_by(self, num_actors: int) -> int:
        """At the least, where there are more places: Ray fills one GPU of a node before it begins the next."""
        by_node = self.by_node if num_actors == sum(self.by_node) else [num_actors]
        return sum(math.ceil(actors / self.sharers) for actors in by_node)


def _places_on_gpus(nodes: Sequence[Node], compute: ComputeConfig, form: Form, sharers: int) -> _Places:
    # In the split form the CPUs are the tasks'; the actor only feeds its GPU.
    share = 0 if form == "split" else _cpus_to_an_actor(nodes, sharers)
    size = share if compute.cpus_per_actor is None else compute.cpus_per_actor
    by_node = [min(node.gpus * sharers, node.cpus // size if size else node.gpus * sharers) for node in nodes]
    fitting = sum(by_node)
    if form == "split":
        fitting = _leaving_one_cpu(fitting, size, sum(node.cpus for node in nodes))
    return _Places(sharers, size, by_node, fitting)


def _sharers_of_a_gpu(nodes: Sequence[Node], compute: ComputeConfig, form: Form, num_shards: int) -> int:
    """The fewest actors to a GPU with which the most GPUs, and then the most actors, have work."""

    def work(sharers: int) -> tuple[int, int, int]:
        places = _places_on_gpus(nodes, compute, form, sharers)
        num_actors = min(places.fitting, num_shards, compute.actors or places.fitting)
        return min(places.fitting, compute.actors or 1), places.gpus_taken_by(num_actors), num_actors

    return max(range(1, compute.actors_per_gpu + 1), key=work)  # the first of equals


def _cpus_to_an_actor(nodes: Sequence[Node], sharers: int) -> int:
    return max(1, min(node.cpus // (node.gpus * sharers) for node in nodes if node.gpus))


def _leaving_one_cpu(fitting: int, size: int, cpus: int) -> int:
    """How many of `fitting` actors leave a CPU for the tasks that work for them; without one all would wait."""
    return min(fitting, (cpus - 1) // size) if size else fitting * (cpus > 0)


def _num_actors(fitting: int, compute: ComputeConfig, num_shards: int, each: str, nodes: Sequence[Node]) -> int:
    wanted = compute.actors or 1
    if fitting < wanted:
        raise ConfigError(
            f"compute: {wanted} actors of {each} do not fit this cluster, {fitting} do (nodes: "
            f"{nodes_in_words(nodes)}); lower compute.actors or compute.cpus_per_actor, raise compute.actors_per_gpu "
            "where there are GPUs, use compute.form fused, or add nodes"
        )
    return max(1, min(compute.actors or fitting, num_shards))
