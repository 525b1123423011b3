"""The Ray Data graph of a run: one row is one shard, in either of two forms.

    fused   shards ──► actor: fetch, decode, predict, write ──► receipts                 CPUs, small clusters
    split   shards ──► CPU task: fetch, decode ──► actor: predict, write ──► receipts    many CPUs feeding a GPU
            shards ──► CPU task: fetch ──► actor: decode, predict, write ──► receipts    the same, decoding on the GPU

The driver turns receipts into commits; the tasks and actors are in `workers`. Ray retries what dies; `ShardAttempts`
counts the deaths, so that a shard that kills its process is retried with isolated decoding (of what a GPU decodes: at
last), and given up by name after three.
"""

import gc
import json
import logging
import math
import re
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any, Literal

import ray
import ray.data
from ray.data.block import BlockAccessor

from pipeline import errors
from pipeline.cluster import Node, in_words, results_of, start_here
from pipeline.data.manifest import Manifest, Shard
from pipeline.errors import ConfigError, PipelineError, RunError
from pipeline.inference import networks
from pipeline.inference.attempts import MAX_DEATHS, ShardAttempts
from pipeline.inference.bound import Observed
from pipeline.inference.commit import Receipt, commit, refusing_unshared
from pipeline.inference.config import PredictConfig
from pipeline.inference.ending import Summary, conclude, describe, prove, recording_failure, until_too_many_errors
from pipeline.inference.estimate import estimate_run, outcome
from pipeline.inference.layout import Form, Layout, choose_layout
from pipeline.inference.plan import Plan, as_begun, make_plan, record_run
from pipeline.inference.run import Model
from pipeline.inference.workers import (
    SHARDS_AT_ONCE,
    PredictDecoded,
    PredictFused,
    PredictPrepared,
    compile_networks,
    decode_shard,
    prepare_shard,
)
from pipeline.telemetry import RunProgress
from pipeline.witness import heard

_COMMITS_IN_FLIGHT = 16
_ENOUGH_TASKS = 1_000  # Ray Data does some eighty a second on two cores, and keeps some kilobytes of each
_TASKS_PER_PROCESSOR = 32  # a run's end waits for the last task
_IMAGES_PER_TASK = 10_000  # a task's receipts come at its end: what is not committed is done again after a kill
_TASKS_IN_FLIGHT = SHARDS_AT_ONCE + 1  # of an actor: the next is there when one ends; more would make a longer tail


def predict(config: PredictConfig, manifest: Manifest, models: tuple[Model, ...], nodes: Sequence[Node]) -> Summary:
    """One run from plan to summary, on a connected Ray of `nodes`; what earlier attempts committed is kept.

    Raises ConfigError, RunError, StorageError, and ReconcileError where the images do not add up in the end.
    """
    start = time.monotonic()
    layout = choose_layout(nodes, as_begun(config, manifest, models, nodes), manifest.num_shards)
    plan = make_plan(config, manifest, models, layout)
    layout = replace(layout, decode=plan.run.decode)  # an earlier attempt's
    described = {**describe(plan), "layout": asdict(layout)}
    if config.dry_run:
        return {"status": "dry run", **described}
    if config.plan:
        estimate = estimate_run(plan, layout, nodes, config, run_shards).model_dump() if plan.num_pending else {}
        return {"status": "estimated" if estimate else "was done", **described, **estimate}
    record_run(plan, config)
    return _attempt(plan, layout, nodes, config, start)


def _attempt(plan: Plan, layout: Layout, nodes: Sequence[Node], config: PredictConfig, start: float) -> Summary:
    """Do what is pending, prove all of the run, and say how it ended; it began at `start`, as time.monotonic tells."""
    observed = Observed()
    of_attempt: Summary = {"layout": asdict(layout)}
    num_images, num_left = plan.run.num_images, sum(shard.num_images for shard in plan.pending_shards())

    def figures() -> Summary:
        duration_s = time.monotonic() - start
        told = outcome(plan, layout, nodes, config, observed, duration_s)
        return {"duration_s": round(duration_s, 1), "computed_in": networks.describe(plan.run), **told}

    receipts = observed.noting(refusing_unshared(run_shards(plan, layout), plan.run.output_uri))
    with recording_failure(plan, of_attempt):
        of_attempt["images_per_s"] = commit_receipts(
            plan.run.uri,
            until_too_many_errors(receipts, plan, config, num_left=num_left),
            num_images=num_images,
            num_done=num_images - num_left,
            progress_interval_s=config.progress_interval_s,
        )
        of_attempt |= figures()  # should the proof fail
        totals = prove(plan.run)
    return conclude(plan, config, totals, of_attempt | figures())


def commit_receipts(
    run_uri: str,
    receipts: Generator[Receipt, None, None],
    *,
    num_images: int,
    num_done: int,
    progress_interval_s: float,
) -> float:
    """Commit receipts as they come; the images per second of this attempt, the workers' start included.

    `num_done` of `num_images` were committed before. Raises what `receipts` raises, RunError, StorageError.
    """
    with (
        RunProgress(num_images=num_images, num_done=num_done, interval_s=progress_interval_s) as progress,
        ThreadPoolExecutor(_COMMITS_IN_FLIGHT, thread_name_prefix="commit") as pool,
        closing(receipts),  # else the work would go on for as long as somebody keeps what a commit raises
    ):
        commits: deque[Future[None]] = deque()
        for receipt in receipts:
            commits.append(pool.submit(commit, run_uri, receipt))
            while len(commits) > _COMMITS_IN_FLIGHT or (commits and commits[0].done()):
                commits.popleft().result()
            progress.update(num_images=receipt.num_images, num_errors=receipt.num_errors, seconds=receipt.seconds)
        for pending in commits:
            pending.result()
        rate: float = progress.status()["images_per_s"]
        return rate


def run_shards(plan: Plan, layout: Layout) -> Generator[Receipt, None, None]:
    """Receipts of the plan's pending shards, as they are written, in no particular order.

    Needs a connected Ray. Raises RunError where a shard kills its process `MAX_DEATHS` times, or work on it fails.
    """
    shards = list(plan.pending_shards())
    if not shards:
        return
    attempts = start_attempts()
    if networks.should_compile_first(plan.run):
        compile_first(plan, layout, attempts)
    num_actors = min(layout.num_actors, len(shards))
    fair_share = math.ceil(len(shards) / num_actors)  # else the first actor that is ready takes the others'
    num_gpus = 1 if num_actors <= layout.num_gpus else layout.gpus_per_actor  # few leave none idle
    asked = {"actors": f"{num_actors} actors of {in_words(layout.cpus_per_actor, num_gpus)} each"}
    dataset = shard_dataset(shards)
    worker = {"run": plan.run, "attempts": attempts}
    task, actor = _stages(layout.form, plan.run.decode)
    if task is not None:
        asked["decode"] = "tasks of 1 CPU each"
        dataset = dataset.map_batches(
            task,
            fn_kwargs=worker,
            batch_size=1,
            batch_format="numpy",
            num_cpus=1,
            memory=1,  # a byte unlike the actor's: Ray Data does tasks of the same resources in the actor
        )
    dataset = dataset.map_batches(
        actor,
        fn_constructor_kwargs=worker,
        batch_size=1 if task or num_gpus else None,  # all of a task's shards, which Ray Data refuses on a GPU
        batch_format="numpy",
        num_cpus=layout.cpus_per_actor,
        num_gpus=num_gpus or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=num_actors,
            initial_size=num_actors,
            max_tasks_in_flight_per_actor=min(_TASKS_IN_FLIGHT, fair_share),
            max_concurrent_calls_per_actor=min(SHARDS_AT_ONCE, fair_share),
            enable_true_multi_threading=True,
        ),
    )
    yield from receipts_of(dataset, attempts, asked)


def _stages(form: Form, decode: Literal["cpu", "gpu"]) -> tuple[Callable[..., Any] | None, type]:
    """What tasks do before the actors, where they do anything, and the actors."""
    if form == "fused":
        return None, PredictFused
    return (prepare_shard, PredictPrepared) if decode == "gpu" else (decode_shard, PredictDecoded)


def compile_first(plan: Plan, layout: Layout, attempts: Any) -> None:
    """Compile the run's networks in a task of an actor's size. Raises BundleError where they must be and cannot be."""
    print("compiling the networks, once for this kind of device", file=sys.stderr, flush=True)
    # Not by `.options`, after which the process of a GPU's task stays, and with it what it has of the GPU's memory.
    resources: dict[str, Any] = {"num_cpus": layout.cpus_per_actor, "num_gpus": layout.gpus_per_actor}
    compiling = ray.remote(**resources)(compile_networks)
    try:
        size = in_words(layout.cpus_per_actor, layout.gpus_per_actor)
        with heard(attempts, {"compile": f"a task of {size}"}):
            results_of([compiling.remote(plan.run, plan.manifest, attempts)])
    except ray.exceptions.RayError as error:
        raise _failure(error) from error


def shard_dataset(shards: Sequence[Shard]) -> ray.data.Dataset:
    """A dataset of one row for each shard, as `workers.shards_of` reads them. A task takes one, of very many several.

    Needs a connected Ray, for whose CPUs and GPUs there are tasks enough; an autoscaler is asked for no others.
    """
    rows = [{"shard": json.dumps(asdict(shard))} for shard in shards]
    there_is, num_images = ray.cluster_resources(), sum(shard.num_images for shard in shards)
    _configure_ray_data(there_is)
    num_processors = round(max(there_is.get("CPU", 1), there_is.get("GPU", 1)))
    most_tasks = max(_ENOUGH_TASKS, _TASKS_PER_PROCESSOR * num_processors, num_images // _IMAGES_PER_TASK)
    return ray.data.from_items(rows, override_num_blocks=min(len(rows), most_tasks))


def receipts_of(dataset: ray.data.Dataset, attempts: Any, asked: Mapping[str, str]) -> Generator[Receipt, None, None]:
    """The receipts that a dataset's last stage made with `workers.receipt_rows`, as they come.

    `asked` is what the dataset asks of the cluster, as `witness.heard` takes it: one may have to wait for it.
    Raises RunError with the reason where a worker failed, ConfigError and its like where it must fail again.
    """
    failure: PipelineError | None = None
    try:
        with heard(attempts, asked):
            for bundle in dataset.iter_internal_ref_bundles():
                for block in ray.get([entry.ref for entry in bundle.blocks]):
                    for text in BlockAccessor.for_block(block).to_arrow()["receipt"].to_pylist():
                        yield Receipt.from_json(text)
    except Exception as error:  # Ray's and Ray Data's own have no common base
        failure = _failure(error)
    finally:
        gc.collect()  # what Ray Data leaves holds actors in cycles, and these their CPUs
    if failure is not None:
        raise failure  # not from the error, whose frames hold them too


def _failure(error: BaseException) -> PipelineError:
    """What a worker raised: Ray tells it as text only, wrapped in its own exceptions and their tracebacks."""
    text = str(error)
    if ours := re.findall(r"^pipeline\.errors\.(\w+): ((?:.+\n?)+)", text, re.MULTILINE):
        name, message = ours[-1]
        kind = getattr(errors, name)
        return (kind if kind.exit_code == ConfigError.exit_code else RunError)(message.rstrip("\n"))
    whole = "".join(traceback.format_exception(error))  # unforeseen, so wanted; as text, which holds no actors
    logging.getLogger(__name__).error("a worker failed:\n%s", whole)
    raised = re.findall(r"^(?!ray\.)[\w.]+(?:Error|Exception)\b.*", text, re.MULTILINE)
    cause = (raised or [text])[-1]
    remedy = " Set a smaller compute.batch_size and another run_id" if "torch.OutOfMemoryError" in cause else ""
    return RunError(cause + remedy)


def start_attempts() -> Any:
    """A handle on a new `ShardAttempts`."""
    return start_here(ShardAttempts, max_restarts=-1, max_task_retries=-1)


def _configure_ray_data(there_is: Mapping[str, float]) -> None:
    context = ray.data.DataContext.get_current()
    limits = ray.data.ExecutionResources.for_limits(cpu=there_is.get("CPU", 0), gpu=there_is.get("GPU", 0))
    context.execution_options.resource_limits = limits  # else it would have a busy cluster grow without end
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a large shard on a slow actor may take longer than any limit
    context.max_consecutive_actor_init_deaths = MAX_DEATHS  # a node lost while its actor loads is no reason to stop
    scaling = context.autoscaling_config
    scaling.actor_pool_util_upscaling_threshold = 1.0  # all busy: Ray waits for more than we queue
    scaling.actor_pool_util_downscaling_threshold = -1.0  # an actor that is idle for a moment took long to start
    logging.getLogger("ray.data").setLevel(logging.ERROR)
