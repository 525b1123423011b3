"""What bounds a run: the seconds that an image costs each resource, against what there is of it.

    fused, CPUs     one pool: every stage takes its turn on the CPUs
    split, CPUs     the decode tasks' CPUs ─► the actors' CPUs: the slower of two pools
    GPUs            the CPUs, which fetch, decode and write ─► the GPUs: the slower of two pools; GPUs may decode

A store that gives or takes fewer images than the pools could work through bounds them too.
"""

import math
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal, TypeAlias

import numpy as np

from pipeline.cluster import Node
from pipeline.inference.commit import Receipt
from pipeline.inference.layout import STAGES, Layout, Stage


@dataclass(frozen=True, slots=True)
class StageCosts:
    """What an image costs: seconds of a CPU by stage, of a GPU for what the layout has on GPUs.

    `store_images_per_s` is what the store gives (`fetch`) or takes (`write`), however many CPUs there are.
    """

    fetch: float
    decode: float
    predict: float
    write: float
    store_images_per_s: dict[Stage, float] = field(default_factory=dict)

    def of(self, stages: Iterable[Stage]) -> float:
        """Seconds that an image costs in all of `stages`."""
        seconds: list[float] = [getattr(self, stage) for stage in stages]
        return sum(seconds)


@dataclass(frozen=True, slots=True)
class Timed:
    """What a stage, alone in its process, took for `num_images`: seconds of the wall, and of the process's CPUs."""

    num_images: int
    wall_s: float
    cpu_s: float

    @property
    def images_per_s(self) -> float:
        return self.num_images / self.wall_s


Rounds: TypeAlias = Sequence[Sequence[Timed]]
"""Of a stage: for each round, what each of the processes took that did it at once."""


@dataclass(frozen=True, slots=True)
class Pool:
    """CPUs or GPUs that some stages share."""

    unit: Literal["CPU", "GPU"]
    size: int
    stages: tuple[Stage, ...]

    def images_per_s(self, costs: StageCosts) -> float:
        """What the pool could work through were it never waiting."""
        seconds = costs.of(self.stages)
        return self.size / seconds if seconds else math.inf

    def dearest(self, costs: StageCosts) -> Stage:
        """The stage that takes most of its time."""
        return max(self.stages, key=lambda stage: costs.of([stage]))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which stage binds, the rate its resource allows, the rate that was reached, and what would raise it."""

    binds: Stage
    bound_images_per_s: float
    images_per_s: float
    advice: str

    @property
    def share(self) -> float:
        """Of the bound, how much was reached."""
        return self.images_per_s / self.bound_images_per_s

    def as_dict(self) -> dict[str, Any]:
        """For the summary."""
        return {
            "binds": self.binds,
            "images_per_s": round(self.images_per_s, 1),
            "bound_images_per_s": round(self.bound_images_per_s, 1),
            "share": round(self.share, 3),
            "sentence": f"{self.binds}-bound: {self.advice}",
        }


_SHORTEST_S = 1e-3  # the receipts' times are rounded to that


class Observed:
    """What the receipts of an attempt tell of the work while it went on; its memory is 24 bytes to a shard."""

    def __init__(self) -> None:
        self.num_images = 0
        self.seconds: Counter[str] = Counter()
        self._images, self._began, self._ended = array("d"), array("d"), array("d")

    def noting(self, receipts: Iterable[Receipt]) -> Generator[Receipt, None, None]:
        """`receipts` as they come, added up in passing."""
        for receipt in receipts:
            self.num_images += receipt.num_images
            self.seconds.update(receipt.seconds)
            self._images.append(receipt.num_images)
            self._began.append(receipt.began_at)
            self._ended.append(receipt.ended_at)
            yield receipt

    @property
    def num_shards(self) -> int:
        return len(self._images)

    @property
    def shard_s(self) -> float:
        """Seconds that a shard took on its way, on average."""
        return float(np.mean(self._ended) - np.mean(self._began))

    @property
    def span_s(self) -> float:
        """Seconds from the first shard's begin to the last one's end."""
        return max(self._ended) - min(self._began)

    def working_s(self, num_workers: int) -> float:
        """Seconds from when the first `num_workers` shards were begun, on average, to when the last was done."""
        return max(self._ended) - float(np.mean(sorted(self._began)[:num_workers]))

    def images_per_s(self, num_workers: int) -> float:
        """The rate while all of `num_workers` had a shard: neither the first ones' lead nor the last one's tail.

        Where they never all had one, that from the first shard's begin to the last one's end.
        """
        images, began, ended = (np.array(values) for values in (self._images, self._began, self._ended))
        num_workers = min(num_workers, len(images))
        start, stop = np.sort(began)[num_workers - 1], np.sort(ended)[-num_workers]
        if stop <= start:
            start, stop = began.min(), ended.max()
        inside, lasted = np.minimum(ended, stop) - np.maximum(began, start), np.maximum(ended - began, _SHORTEST_S)
        return float((images * np.clip(inside / lasted, 0, 1)).sum() / max(stop - start, _SHORTEST_S))


def pools_of(layout: Layout, nodes: Sequence[Node]) -> list[Pool]:
    """The resources a run takes its rate from."""
    cpus, actors = sum(node.cpus for node in nodes), layout.num_actors * layout.cpus_per_actor
    if layout.device == "cuda":
        on_cpus = tuple(stage for stage in STAGES if stage not in layout.stages_on_gpu)
        pool = Pool("CPU", cpus if layout.form == "split" else actors, on_cpus)
        return [pool, Pool("GPU", layout.num_gpus, layout.stages_on_gpu)]
    if layout.form == "split":
        return [Pool("CPU", cpus - actors, ("fetch", "decode")), Pool("CPU", actors, ("predict", "write"))]
    return [Pool("CPU", actors, STAGES)]


def observed_costs(observed: Observed, layout: Layout) -> StageCosts:
    """What an image cost in a run, by its receipts; `fetch` is the waiting for bytes, which holds up its CPUs.

    Decoding on CPUs is told in their seconds; all else in those of the wall, so a store's answer to a write counts in
    full, and what a GPU does in an actor's share of it.
    """
    held = layout.cpus_per_actor if layout.form == "fused" else 1
    factors: dict[Stage, float] = {"fetch": held, "decode": 1, "predict": layout.cpus_per_actor, "write": held}
    factors |= dict.fromkeys(layout.stages_on_gpu, layout.gpu_share)
    each = {stage: factors[stage] * observed.seconds[stage] / observed.num_images for stage in STAGES}
    return StageCosts(each["fetch"], each["decode"], each["predict"], each["write"])


def measured_costs(timed: Mapping[Stage, Rounds], layout: Layout) -> StageCosts:
    """What an image costs by stages that were timed alone.

    Of CPUs it is the seconds that were used, so that neither waiting for a store counts, whose rate is a limit of its
    own, nor what else the machine does meanwhile; of GPUs it is the wall's, shared by the actors that share the GPU.
    """

    def seconds(stage: Stage) -> float:
        parts, is_on_gpu = list(chain.from_iterable(timed[stage])), stage in layout.stages_on_gpu
        spent = sum(part.wall_s * layout.gpu_share if is_on_gpu else part.cpu_s for part in parts)
        return spent / sum(part.num_images for part in parts)

    rates: dict[Stage, float] = {"fetch": rate_of(timed["fetch"]), "write": rate_of(timed["write"])}
    return StageCosts(seconds("fetch"), seconds("decode"), seconds("predict"), seconds("write"), rates)


def rate_of(rounds: Rounds) -> float:
    """Images per second of all processes of a round together; the mean of the rounds."""
    return sum(part.images_per_s for parts in rounds for part in parts) / len(rounds)


def judge(costs: StageCosts, pools: Sequence[Pool], images_per_s: float) -> Verdict:
    """The verdict on a rate that was reached, by what the stages cost each alone."""
    pool = min(pools, key=lambda pool: pool.images_per_s(costs))
    limit, store = pool.images_per_s(costs), costs.store_images_per_s
    store_limit = min(store.values(), default=math.inf)
    if store_limit < limit:
        stage = min(store, key=lambda stage: store[stage])
        return Verdict(stage, store_limit, images_per_s, _wish_for_a_store(stage, images_per_s, limit / store_limit))
    ceiling = min([store_limit, *(other.images_per_s(costs) for other in pools if other is not pool)])
    stage = pool.dearest(costs)
    num_gpus = sum(other.size for other in pools if other.unit == "GPU" != pool.unit)
    wish = _wish_for_units(pool, costs, ceiling, images_per_s, num_gpus)
    return Verdict(stage, limit, images_per_s, wish)


def judge_run(observed: Observed, num_shards: int, layout: Layout, nodes: Sequence[Node]) -> Verdict | None:
    """The verdict on what was done of a run of `num_shards`, by its receipts; None where nodes' clocks do not agree.

    Its bound is what its CPUs and GPUs would do were they never waiting, for bytes or for a CPU that others have, and
    never less than was reached: seconds of the wall make stages that overlap too dear, and what was done can be done.
    """
    costs, pools, workers = observed_costs(observed, layout), pools_of(layout, nodes), workers_of(layout, nodes)
    reached = observed.images_per_s(workers)
    without_waiting = replace(costs, fetch=0.0)
    limit = min(pool.images_per_s(without_waiting) for pool in pools)
    if len(pools) == 1 and observed.seconds["cpu"]:
        limit = pools[0].size * observed.num_images / observed.seconds["cpu"]
    bound = max(reached, limit)
    if not 0 < reached <= bound < math.inf:
        return None
    verdict = judge(costs, pools, reached)
    if observed.num_shards < workers:
        remedy = "smaller ones would keep more of them at work" if num_shards < workers else "no more were left to do"
        advice = f"of {workers} workers {observed.num_shards} had a shard: {remedy}"
    elif verdict.binds == "fetch":
        advice = _wish_for_a_store("fetch", reached, bound / reached)
    elif idle := _idle_units(layout, nodes, num_shards):
        remedy = "a larger compute.actors" if layout.num_actors < num_shards else "smaller shards (actors unset)"
        advice = f"{idle} had no part in it: {remedy} would give them one"
    else:
        advice = verdict.advice
    return Verdict(verdict.binds, bound, reached, advice)


def _idle_units(layout: Layout, nodes: Sequence[Node], num_shards: int) -> str:
    """What more actors would have, in words, where that is at least as much as these have; else nothing."""
    if layout.device == "cuda" and layout.gpus_per_actor == 1 and layout.num_actors >= num_shards:
        total, in_use = sum(node.gpus for node in nodes), layout.num_gpus
    elif layout.device == "cpu" and layout.form == "fused":
        total = sum(node.cpus // layout.cpus_per_actor for node in nodes) * layout.cpus_per_actor
        in_use = layout.num_actors * layout.cpus_per_actor
    else:
        return ""
    unit = "GPUs" if layout.device == "cuda" else "CPUs"
    return f"{total - in_use} of {total} {unit}" if total >= 2 * in_use else ""


def workers_of(layout: Layout, nodes: Sequence[Node]) -> int:
    """How many shards are worked on at once: by the actors, and by the tasks that decode for them."""
    return layout.num_actors + (pools_of(layout, nodes)[0].size if layout.form == "split" else 0)


def cpus_per_gpu(costs: StageCosts, pools: Sequence[Pool]) -> float | None:
    """The CPUs that keep up with one GPU; None where there is none to tell by."""
    by_unit = {pool.unit: costs.of(pool.stages) for pool in pools}
    return by_unit["CPU"] / by_unit["GPU"] if by_unit.get("GPU") else None


def _wish_for_units(pool: Pool, costs: StageCosts, ceiling: float, images_per_s: float, num_gpus: int) -> str:
    """As many more as the next limit has use for, at most as many again; of CPUs beside GPUs, per GPU."""
    useful = min(2 * pool.size, ceiling * costs.of(pool.stages)) - pool.size
    each = max(1, math.ceil(useful / max(1, num_gpus)))
    larger = replace(pool, size=pool.size + each * max(1, num_gpus))
    growth = min(ceiling, larger.images_per_s(costs)) / pool.images_per_s(costs)
    units = f"{each} more {pool.unit}{'s' if each > 1 else ''}{' per GPU' if num_gpus else ''}"
    return f"{units} would raise {images_per_s:,.0f} to {images_per_s * growth:,.0f} images/s"


def _wish_for_a_store(stage: Stage, images_per_s: float, growth: float) -> str:
    remedy = "make the shards larger"
    if stage == "fetch":
        remedy = "where the images are loose raise images.fetch_concurrency or pack them,"
    raised = f"{images_per_s:,.0f} to {images_per_s * growth:,.0f} images/s"
    return f"a store that kept up would raise {raised}: {remedy} or move nearer to it"
