"""The Ray Data graph of a run: one row is one shard, in either of two forms.

    fused   shards ──► actor: fetch, decode, predict, write ──► receipts            CPUs, small clusters
    split   shards ──► CPU task: fetch, decode ──► actor: predict, write ──► receipts    many CPUs feeding a GPU

The driver turns receipts into commits. Ray retries what dies; `ShardAttempts` counts the deaths, so that a shard that
kills its process is retried with isolated decoding (where GPUs decode: at last), and given up by name after three.
"""

import json
import logging
import math
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import storage
from pipeline.cluster import Node
from pipeline.data.manifest import Manifest, Shard
from pipeline.errors import RunError
from pipeline.inference import networks
from pipeline.inference.attempts import MAX_DEATHS, ShardAttempts
from pipeline.inference.bound import Observed
from pipeline.inference.commit import Receipt, commit, committed_shard_ids, read_receipts
from pipeline.inference.config import PredictConfig
from pipeline.inference.estimate import estimate_run, outcome
from pipeline.inference.layout import Layout, choose_layout
from pipeline.inference.plan import Model, Plan, Run, make_plan, record_run
from pipeline.inference.reconcile import reconcile
from pipeline.inference.turns import Room
from pipeline.tables.writing import table_uri
from pipeline.telemetry import RunProgress

if TYPE_CHECKING:
    from pipeline.data.transforms import Preprocessing  # torch's import, which the driver does without

_COMMITS_IN_FLIGHT = 16
_SHARDS_AT_ONCE = 2  # of an actor: while one is predicted, the next is fetched or the last written
_ENOUGH_TASKS = 1_000  # Ray Data does some eighty a second on two cores, and keeps some kilobytes of each
_TASKS_PER_PROCESSOR = 32  # a run's end waits for the last task
_IMAGES_PER_TASK = 25_000  # a task's receipts come at its end: what is not committed is done again after a kill
_TASKS_IN_FLIGHT = _SHARDS_AT_ONCE + 1  # of an actor: the next is there when one ends; more would make a longer tail
_room = Room(_SHARDS_AT_ONCE)  # of this process
Row = dict[str, Any]
Summary = dict[str, Any]


def predict(config: PredictConfig, manifest: Manifest, models: tuple[Model, ...], nodes: Sequence[Node]) -> Summary:
    """One run from plan to summary, on a connected Ray of `nodes`; what earlier attempts committed is kept.

    Raises ConfigError, RunError, StorageError, and ReconcileError where the images do not add up in the end.
    """
    start = time.monotonic()
    layout = choose_layout(nodes, config.compute, manifest.num_shards)
    plan = make_plan(config, manifest, models, layout)
    layout = replace(layout, decode=plan.run.decode)  # an earlier attempt's
    if config.dry_run:
        return {"status": "dry run", **_describe(plan, layout)}
    if config.plan:
        estimate = estimate_run(plan, layout, nodes, config, run_shards).model_dump() if plan.num_pending else {}
        return {"status": "estimated" if estimate else "was done", **_describe(plan, layout), **estimate}
    record_run(plan, config)
    observed = Observed()
    images_per_s = commit_receipts(
        plan.run.uri,
        observed.noting(run_shards(plan, layout)),
        num_images=manifest.num_images,
        num_done=manifest.num_images - sum(shard.num_images for shard in plan.pending_shards()),
        progress_interval_s=config.progress_interval_s,
    )
    tables = {name: table_uri(plan.run.output_uri, name, plan.run.run_id) for name in plan.run.table_names}
    for folder in (plan.run.uri, *tables.values()):
        storage.sweep_temporary_files(folder)
    totals = reconcile(plan.run, read_receipts(plan.run.uri, committed_shard_ids(plan.run.uri)))
    duration_s = time.monotonic() - start
    summary = {
        "status": "done" if plan.num_pending else "was done",
        **_describe(plan, layout),
        **totals.as_dict(),
        "images_per_s": images_per_s,
        "duration_s": round(duration_s, 1),
        "computed_in": networks.describe(plan.run),
        **outcome(plan, layout, nodes, config, observed, duration_s),
        "tables": tables,
    }
    storage.write(storage.join(plan.run.uri, "summary.json"), json.dumps(summary, indent=1).encode())
    return summary


def commit_receipts(
    run_uri: str, receipts: Iterator[Receipt], *, num_images: int, num_done: int, progress_interval_s: float
) -> float:
    """Commit receipts as they come; the images per second of this attempt, the workers' start included.

    `num_done` of `num_images` were committed before. Raises what `receipts` raises, RunError, StorageError.
    """
    with (
        RunProgress(num_images=num_images, num_done=num_done, interval_s=progress_interval_s) as progress,
        ThreadPoolExecutor(_COMMITS_IN_FLIGHT, thread_name_prefix="commit") as pool,
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


def _describe(plan: Plan, layout: Layout) -> Summary:
    return {
        "run_id": plan.run.run_id,
        "output": plan.run.output_uri,
        "models": [model.name for model in plan.run.models],
        "num_images": plan.run.num_images,
        "num_shards": plan.run.num_shards,
        "num_pending": plan.num_pending,
        "batch_size": plan.run.batch_size,
        "layout": asdict(layout),
    }


def run_shards(plan: Plan, layout: Layout) -> Iterator[Receipt]:
    """Receipts of the plan's pending shards, as they are written, in no particular order.

    Needs a connected Ray. Raises RunError where a shard kills its process `MAX_DEATHS` times, or work on it fails.
    """
    shards = list(plan.pending_shards())
    if not shards:
        return
    if networks.should_compile_first(plan.run):
        compile_first(plan, layout)
    num_actors = min(layout.num_actors, len(shards))
    fair_share = math.ceil(len(shards) / num_actors)  # else the first actor that is ready takes the others'
    dataset = shard_dataset(shards)
    worker = {"run": plan.run, "attempts": start_attempts()}
    if layout.form == "split":
        dataset = dataset.map_batches(decode_shard, fn_kwargs=worker, batch_size=1, batch_format="numpy", num_cpus=1)
    dataset = dataset.map_batches(
        PredictSplit if layout.form == "split" else PredictFused,
        fn_constructor_kwargs=worker,
        batch_size=1,
        batch_format="numpy",
        num_cpus=layout.cpus_per_actor,
        num_gpus=layout.gpus_per_actor or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=num_actors,
            initial_size=num_actors,
            max_tasks_in_flight_per_actor=min(_TASKS_IN_FLIGHT, fair_share),
            max_concurrent_calls_per_actor=min(_SHARDS_AT_ONCE, fair_share),
            enable_true_multi_threading=True,
        ),
    )
    yield from receipts_of(dataset)


def compile_first(plan: Plan, layout: Layout) -> None:
    """Compile the run's networks in a task of an actor's size. Raises RunError where they must be and cannot be."""
    print("compiling the networks, once for this kind of device", file=sys.stderr, flush=True)
    options: dict[str, Any] = {"num_cpus": layout.cpus_per_actor, "num_gpus": layout.gpus_per_actor}
    try:
        ray.get(ray.remote(networks.decide).options(**options).remote(plan.run, plan.manifest))
    except ray.exceptions.RayError as error:
        raise RunError(_cause(error)) from error


def shard_dataset(shards: Sequence[Shard]) -> ray.data.Dataset:
    """A dataset of one row for each shard: `shard_of` reads it back. A task takes one, of very many shards several.

    Needs a connected Ray, for whose CPUs and GPUs there are tasks enough.
    """
    _configure_ray_data()
    rows = [{"shard": json.dumps(asdict(shard))} for shard in shards]
    there_is, num_images = ray.cluster_resources(), sum(shard.num_images for shard in shards)
    num_processors = round(max(there_is.get("CPU", 1), there_is.get("GPU", 1)))
    most_tasks = max(_ENOUGH_TASKS, _TASKS_PER_PROCESSOR * num_processors, num_images // _IMAGES_PER_TASK)
    return ray.data.from_items(rows, override_num_blocks=min(len(rows), most_tasks))


def receipts_of(dataset: ray.data.Dataset) -> Iterator[Receipt]:
    """The receipts that a dataset's last stage made with `receipt_row`, as they come.

    Raises RunError with the reason where a worker failed.
    """
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            for text in batch["receipt"].to_pylist():
                yield Receipt.from_json(text)
    except Exception as error:  # Ray's and Ray Data's own have no common base
        raise RunError(_cause(error)) from error


def _cause(error: BaseException) -> str:
    """What a worker raised: Ray tells it as text only, wrapped in its own exceptions and their tracebacks."""
    raised = [line for line in str(error).splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
    ours = [line for line in raised if line.startswith("pipeline.errors.")]
    if ours:
        return ours[-1].partition(": ")[2]
    logging.getLogger(__name__).error("a worker failed: %s", error)  # unforeseen, so the traceback is wanted
    return ([line for line in raised if not line.startswith("ray.")] or [str(error)])[-1]


class _Predicting:
    """An actor with the run's networks."""

    def __init__(self, run: Run, attempts: Any) -> None:
        from pipeline.inference.predictor import Predictor

        self._run, self._attempts = run, attempts
        self._manifest = open_unchanged(run.manifest_uri, run.manifest_digest)
        self._predictor = Predictor(run, self._manifest)


class PredictFused(_Predicting):
    """An actor that takes a shard from fetch to written tables, batches streaming inside."""

    def __call__(self, rows: Row) -> Row:
        from pipeline.data.loader import LoadLog
        from pipeline.inference.shard import load_shard, predict_shard

        run, manifest, shard = self._run, self._manifest, shard_of(rows)
        with attempting(self._attempts, "all", shard) as attempt, self._predictor.own_stream():
            log = LoadLog()
            batches = load_shard(
                run,
                manifest,
                shard,
                self._predictor.preprocessings,
                num_threads=run.num_threads,
                isolated=should_isolate(run, attempt),
                log=log,
                pin_memory=self._predictor.uses_pinned_memory,
            )
            receipt = predict_shard(run, manifest, shard, batches, self._predictor, log=log, attempt=attempt)
        return receipt_row(receipt)


def decode_shard(rows: Row, run: Run, attempts: Any) -> Row:
    """A CPU task that fetches and decodes a shard to one uint8 block per preprocessing."""
    from pipeline.data.loader import LoadLog
    from pipeline.inference.shard import DecodedShard, load_shard

    shard, log = shard_of(rows), LoadLog()
    manifest = open_unchanged(run.manifest_uri, run.manifest_digest)
    preprocessings = _preprocessings_of(run.models)
    with attempting(attempts, "decode", shard) as attempt:
        isolated, batch_size = should_isolate(run, attempt), shard.num_images
        batches = load_shard(
            run, manifest, shard, preprocessings, num_threads=1, isolated=isolated, log=log, batch_size=batch_size
        )
        return DecodedShard.gather(shard, attempt, batches, preprocessings, log).to_row()


@cache  # a process has many tasks of one run
def _preprocessings_of(models: tuple[Model, ...]) -> list["Preprocessing"]:
    from pipeline.inference.predictor import distinct_preprocessings, load_unchanged

    return distinct_preprocessings([load_unchanged(model) for model in models])


class PredictSplit(_Predicting):
    """An actor that predicts and writes shards that tasks have decoded."""

    def __call__(self, rows: Row) -> Row:
        from pipeline.inference.shard import DecodedShard, predict_shard

        decoded = DecodedShard.from_row(rows)
        with attempting(self._attempts, "predict", decoded.shard):
            receipt = predict_shard(
                self._run,
                self._manifest,
                decoded.shard,
                decoded.batches(self._run.batch_size, pin_memory=self._predictor.uses_pinned_memory),
                self._predictor,
                log=decoded.log,
                attempt=decoded.attempt,
            )
        return receipt_row(receipt)


def should_isolate(run: Run, attempt: int) -> bool:
    """Whether an attempt decodes in child processes, on CPUs; where GPUs decode, only the last: its pixels differ."""
    return attempt > (1 if run.decode == "cpu" else MAX_DEATHS - 1)


@cache
def open_unchanged(manifest_uri: str, digest: str) -> Manifest:
    """The manifest of a run under way, opened once per process. Raises RunError where another has taken its place."""
    manifest = Manifest.open(manifest_uri)
    if manifest.digest != digest:
        raise RunError(f"{manifest_uri}: expected the manifest the run began with, found another in its place")
    return manifest


def receipt_row(receipt: Receipt) -> Row:
    """What a worker returns for a shard that it has written."""
    return {"receipt": np.array([replace(receipt, node=_node_id()).to_json()], dtype=object)}


@cache
def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


@contextmanager
def attempting(attempts: Any, stage: str, shard: Shard) -> Iterator[int]:
    """Around a stage of the shard; the number of this attempt at it, from 1. Raises RunError after `MAX_DEATHS`.

    A shard that has seen its process die has the next one to itself: beside another one either might be the killer.
    """
    with ExitStack() as room:
        room.enter_context(_room.beside_others())
        attempt: int = ray.get(attempts.begin.remote(stage, shard.shard_id))
        if attempt > 1:
            room.close()
            room.enter_context(_room.alone())
            attempt = ray.get(attempts.begin.remote(stage, shard.shard_id, is_alone=True))
        if attempt > MAX_DEATHS:
            raise RunError(
                f"shard {shard.shard_id} was begun {MAX_DEATHS} times and its process died each time, with isolated "
                "decoding too, so no decoder is to blame: look for out-of-memory kills (smaller batches or shards, "
                "fewer actors) or lost nodes, then run again"
            )
        yield attempt
        attempts.end.remote(stage, shard.shard_id)


def start_attempts() -> Any:
    """A handle on a new `ShardAttempts`."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(ShardAttempts).options(**options).remote()


def shard_of(rows: Row) -> Shard:
    """The shard of a row of `shard_dataset`."""
    return Shard(**json.loads(rows["shard"][0]))


def _configure_ray_data() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a large shard on a slow actor may take longer than any limit
    context.max_consecutive_actor_init_deaths = MAX_DEATHS  # a node lost while its actor loads is no reason to stop
    scaling = context.autoscaling_config
    scaling.actor_pool_util_upscaling_threshold = 1.0  # all busy: Ray waits for more than we queue
    scaling.actor_pool_util_downscaling_threshold = -1.0  # an actor that is idle for a moment took long to start
    logging.getLogger("ray.data").setLevel(logging.ERROR)
