"""How long a run will take and what it will cost, from a trial of some of its shards; and how that compares.

A trial does the work as the run would, all workers at once, and writes to a place of its own that is removed after it.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage
from pipeline.cluster import Node
from pipeline.data.manifest import Shard
from pipeline.errors import ObjectNotFoundError, RunError, StorageError
from pipeline.inference import networks
from pipeline.inference.bound import Observed, cpus_per_gpu, judge_run, observed_costs, pools_of, workers_of
from pipeline.inference.commit import Receipt
from pipeline.inference.config import PredictConfig, PricesConfig
from pipeline.inference.layout import Layout
from pipeline.inference.plan import Plan
from pipeline.models import compiled
from pipeline.telemetry import RunProgress

_SAMPLE_IMAGES = 256  # per worker, in whole shards: some seconds' work
_TRIAL_PREFIX = "estimate-"
Work: TypeAlias = Callable[[Plan, Layout], Iterator[Receipt]]
"""Does the pending shards of a plan, as `flow.run_shards`."""


class Cost(BaseModel):
    """What the whole cluster costs for a time; prices are None where none is configured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    node_hours: float
    price: float | None
    price_per_million_images: float | None
    currency: str

    @classmethod
    def of(cls, duration_s: float, num_images: int, nodes: Sequence[Node], prices: PricesConfig) -> "Cost":
        """Of `nodes` for `duration_s`, in which they do `num_images`."""
        hours = duration_s / 3600
        per_hour = sum(node.cpus * prices.per_cpu_hour + node.gpus * prices.per_gpu_hour for node in nodes)
        price = per_hour * hours
        return cls(
            node_hours=round(len(nodes) * hours, 4),
            price=round(price, 4) if per_hour else None,
            price_per_million_images=round(price / num_images * 1e6, 4) if per_hour and num_images else None,
            currency=prices.currency,
        )


class Estimate(BaseModel):
    """What a trial foretells; kept as the run's `estimate.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_pending: int
    """Shards it is an estimate of."""
    layout: dict[str, Any]
    sample_shards: int
    sample_images: int
    start_up_s: float
    """Of the workers, and their end; compiling, which is done once, not counted."""
    images_per_s: float
    """While all workers work."""
    duration_s: float
    cost: Cost
    cpus_per_gpu: float | None
    """CPUs that keep up with one GPU; None on CPUs alone."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What was seen of a trial, and the seconds it took in all; `compile_s` of them went into compiling networks."""

    observed: Observed
    duration_s: float
    compile_s: float


def estimate_run(plan: Plan, layout: Layout, nodes: Sequence[Node], config: PredictConfig, work: Work) -> Estimate:
    """Try some of the pending shards, of which there must be any, and keep what that foretells of the run.

    Raises what `work` raises, and StorageError.
    """
    workers = min(workers_of(layout, nodes), plan.num_pending)  # more have nothing to do
    mean_images = sum(shard.num_images for shard in plan.pending_shards()) / plan.num_pending
    shards = choose_sample(plan, workers * shards_to_a_worker(layout, _SAMPLE_IMAGES, mean_images))
    scratch_uri = storage.join(plan.run.uri, f"{_TRIAL_PREFIX}{uuid4().hex[:12]}")
    trial = try_shards(plan, layout, shards, scratch_uri, work, config.progress_interval_s)
    observed, rate = trial.observed, trial.observed.images_per_s(workers)
    if not 0 < rate < math.inf:
        raise RunError(f"expected a rate of the trial, got {rate:g} images/s: do the nodes' clocks go together?")
    has_done_all = len(shards) == plan.num_pending
    worked_s = observed.span_s if has_done_all else observed.working_s(workers)
    start_up_s = max(0.0, trial.duration_s - trial.compile_s - worked_s)
    work_s = worked_s if has_done_all else _work_s(plan.num_pending, mean_images / rate, observed, layout, workers)
    duration_s = start_up_s + work_s
    estimate = Estimate(
        num_pending=plan.num_pending,
        layout=asdict(layout),
        sample_shards=len(shards),
        sample_images=observed.num_images,
        start_up_s=round(start_up_s, 1),
        images_per_s=round(rate, 1),
        duration_s=round(duration_s, 1),
        cost=Cost.of(duration_s, round(plan.num_pending * mean_images), nodes, config.prices),
        cpus_per_gpu=cpus_per_gpu(observed_costs(observed, layout), pools_of(layout, nodes)),
    )
    storage.write(_estimate_uri(plan), estimate.model_dump_json(indent=1).encode())
    return estimate


def shards_to_a_worker(layout: Layout, num_images: int, mean_images: float) -> int:
    """Of a trial of so many images, at least, to a worker.

    Two in the split form: while the first ones pass, either the tasks or the actors wait for the others.
    """
    return max(math.ceil(num_images / mean_images), 2 if layout.form == "split" else 1)


def _work_s(num_shards: int, shard_s: float, observed: Observed, layout: Layout, workers: int) -> float:
    """Seconds that `workers` take for the shards, of which one is done every `shard_s` while all are at work."""
    if layout.form == "split":  # a pipe, through which the last one goes too
        return num_shards * shard_s + observed.shard_s
    return math.ceil(num_shards / workers) * workers * shard_s  # the last round may leave workers idle


def sweep_trials(plan: Plan) -> None:
    """Remove what trials of the run left that were killed, as far as that can be done."""
    with suppress(StorageError):
        for name in storage.list_folders(plan.run.uri):
            if name.startswith(_TRIAL_PREFIX):
                storage.delete_folder(storage.join(plan.run.uri, name))


def choose_sample(plan: Plan, num_shards: int) -> list[Shard]:
    """Up to `num_shards` of the pending shards, evenly spread, for images of a kind often lie together."""
    step = max(1.0, plan.num_pending / num_shards)
    chosen = {int(step * (index + 0.5)) for index in range(min(num_shards, plan.num_pending))}
    return [shard for position, shard in enumerate(plan.pending_shards()) if position in chosen]


def try_shards(
    plan: Plan, layout: Layout, shards: Sequence[Shard], scratch_uri: str, work: Work, progress_interval_s: float
) -> Trial:
    """Do `shards` as the run would, but write below `scratch_uri`, which is removed afterwards, and commit nothing."""
    others = {shard.shard_id for shard in plan.manifest.shards()} - {shard.shard_id for shard in shards}
    part = Plan(plan.run.model_copy(update={"output_uri": scratch_uri}), plan.manifest, committed=others)
    compiled_before, observed, start = _compilations(plan), Observed(), time.monotonic()
    num_images = sum(shard.num_images for shard in shards)
    networks.hand_on(plan.run, part.run)
    try:
        with (
            RunProgress(num_images=num_images, num_done=0, interval_s=progress_interval_s) as progress,
            closing(observed.noting(work(part, layout))) as receipts,
        ):
            for receipt in receipts:
                progress.update(num_images=receipt.num_images, num_errors=receipt.num_errors, seconds=receipt.seconds)
        duration_s = time.monotonic() - start
    except BaseException:
        with suppress(StorageError):  # workers may still be at a shard; what failed shall be told
            storage.delete_folder(scratch_uri)
        raise
    storage.delete_folder(scratch_uri)
    compiled_since = {uri: seconds for uri, seconds in _compilations(plan).items() if uri not in compiled_before}
    return Trial(observed, duration_s, sum(compiled_since.values()))


def outcome(
    plan: Plan,
    layout: Layout,
    nodes: Sequence[Node],
    config: PredictConfig,
    observed: Observed,
    duration_s: float,
) -> dict[str, Any]:
    """For the summary: what bound the run, what it cost, and what had been foretold of it, where it was."""
    verdict = judge_run(observed, plan.run.num_shards, layout, nodes) if observed.num_images else None
    if verdict is None:
        return {}
    return {
        "verdict": verdict.as_dict(),
        "cost": Cost.of(duration_s, observed.num_images, nodes, config.prices).model_dump(),
        "estimate": _compared(plan, layout, duration_s, verdict.images_per_s),
    }


def _compared(plan: Plan, layout: Layout, duration_s: float, images_per_s: float) -> dict[str, Any] | None:
    """What the estimate said, and the actual divided by it; None without one, or with one of other work."""
    try:
        estimate = Estimate.model_validate_json(storage.read(_estimate_uri(plan)))
    except (ObjectNotFoundError, ValidationError):
        return None
    if (estimate.num_pending, estimate.layout) != (plan.num_pending, asdict(layout)):
        return None
    if not (estimate.duration_s and estimate.images_per_s):  # rounded
        return None
    return {
        **estimate.model_dump(include={"duration_s", "images_per_s", "cost"}),
        "actual_to_estimated": {
            "duration": round(duration_s / estimate.duration_s, 3),
            "images_per_s": round(images_per_s / estimate.images_per_s, 3),
        },
    }


def _compilations(plan: Plan) -> dict[str, float]:
    """The records of the networks' compilations there are, and the seconds each took."""
    return {
        compiled.record_uri(model.uri, record.target): record.compile_s
        for model in plan.run.models
        for record in compiled.records(model.uri)
    }


def _estimate_uri(plan: Plan) -> str:
    return storage.join(plan.run.uri, "estimate.json")
