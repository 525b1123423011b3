"""The wiring to Ray Train: workers for the loop, what they tell, and starting them again when one dies.

    driver: begin(run) ──► TorchTrainer ──► workers: train(run, …) ──► checkpoints
            progress  ◄── Bulletin (an actor) ◄── workers

Checkpoints are the run's own objects, not Ray's: a name never resumes by accident, and any fsspec URI will do. A worker
group that is started again goes on from the last one.
"""

import logging
import math
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import ray
import ray.train
import ray.train.torch
import torch

from pipeline.cluster import Node, in_words, nodes_in_words, num_fitting, start_here
from pipeline.data.training_set import TrainingSet
from pipeline.errors import AccessDeniedError, ConfigError, PipelineError, RunError, StorageError
from pipeline.training.bulletin import Bulletin, Status
from pipeline.training.config import TrainComputeConfig
from pipeline.training.loop import train
from pipeline.training.run import TrainingRun
from pipeline.training.worker import Notice, Worker
from pipeline.witness import arrive, heard

_POLL_S = 0.5
_END_WITHIN_S = 30.0
_STOP_WITHIN_S = 60.0
_MEET_WITHIN_S = 1800.0

_AFTER_DEATHS = (
    "A worker's process died or was lost: look for out-of-memory kills (a smaller batch_size, fewer workers), lost "
    "nodes, or an image whose decoder crashes (`python -m jobs.pack --check true` names it); then run again"
)

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Workers:
    """How many training processes there are, and of what size."""

    fewest: int
    most: int
    cpus_per_worker: int
    use_gpu: bool

    @property
    def each(self) -> str:
        """What each asks for, in words."""
        return in_words(self.cpus_per_worker, int(self.use_gpu))


def choose_workers(
    nodes: Sequence[Node],
    *,
    num_workers: Sequence[int] | None,
    cpus_per_worker: int | None,
    use_gpu: bool,
    num_lanes: int | None = None,
) -> Workers:
    """The workers that fit the cluster: `num_workers` are the fewest and the most, `num_lanes` the most there can be.

    None is one worker per GPU, or one where there is none, and a fair share of the smallest node's CPUs for each.
    Raises ConfigError where not even the fewest fit, saying what was asked and what there is: Ray would wait for ever.
    """
    num_gpus = sum(node.gpus for node in nodes)
    asked = list(num_workers or [min(num_gpus, num_lanes or num_gpus) if use_gpu else 1])
    fewest, most = asked[0], asked[-1]
    if not 1 <= fewest <= most or (num_lanes is not None and most > num_lanes):
        limit = "" if num_lanes is None else f", and at most data.num_lanes ({num_lanes})"
        raise ConfigError(f"compute.num_workers: expected at least 1{limit}, got {asked}")
    cpus = cpus_per_worker or _fair_share(nodes, most, use_gpu)
    fitting = num_fitting(nodes, cpus, use_gpu=use_gpu)
    workers = Workers(fewest, most, cpus, use_gpu)
    if fitting < fewest:
        raise ConfigError(
            f"compute.num_workers: {fewest} workers of {workers.each} each do not fit this cluster, {fitting} do "
            f"(nodes: {nodes_in_words(nodes)}); lower it or compute.cpus_per_worker, or add nodes"
        )
    if num_lanes is not None:
        _warn_of_idleness(most, num_lanes)
        if use_gpu and num_workers is None and num_gpus > num_lanes:
            logger.warning(
                "data.num_lanes: %d, the most workers there can be, leaves %d of %d GPUs idle; begin with more lanes",
                num_lanes,
                num_gpus - num_lanes,
                num_gpus,
            )
    return workers


def _warn_of_idleness(num_workers: int, num_lanes: int) -> None:
    """A worker has whole lanes, and each step waits for those that have the most."""
    most_lanes = -(-num_lanes // num_workers)
    enough = -(-num_lanes // most_lanes)
    if enough < num_workers:
        logger.warning(
            "%d workers share %d lanes, of which some have %d: no faster than %d workers. Take as many, or begin with "
            "data.num_lanes of a multiple of the workers",
            num_workers,
            num_lanes,
            most_lanes,
            enough,
        )


def run_training(
    run: TrainingRun, workers: Workers, observe: Callable[[Status], None], look_out: Callable[[], None] = lambda: None
) -> None:
    """Train to the run's end on a connected Ray. Raises as `run_workers` and `loop.train` do."""
    work = partial(_train, run.model_dump_json())
    failures = run.config.compute.max_failures
    run_workers(work, workers, name=run.config.run_id, max_failures=failures, observe=observe, look_out=look_out)


def run_workers(
    work: Callable[[Worker], T],
    workers: Workers,
    *,
    name: str,
    max_failures: int,
    observe: Callable[[Status], None] = lambda status: None,
    look_out: Callable[[], None] = lambda: None,
    stop_within_s: float = _STOP_WITHIN_S,
    meet_within_s: float = _MEET_WITHIN_S,
) -> T:
    """Do `work` on every rank, on a connected Ray; what it returns on rank 0.

    `observe` is called on this thread with what the ranks tell, `look_out` all the while, also where they tell nothing.
    An exception on this thread, theirs or a signal's, asks the workers to stop and waits for that, `stop_within_s` at
    most. A rank's death starts all of them again, `max_failures` times, unless it failed of what starting again would
    not change: that PipelineError is raised, as RunError is with whatever else a rank failed of. Ranks that exchange
    something wait `meet_within_s` for the last of them.
    """
    bulletin = start_here(Bulletin)
    # Ray's records of this attempt; nothing is resumed from them, and after a stop it may still be writing there
    with tempfile.TemporaryDirectory(prefix="ray-train-", ignore_cleanup_errors=True) as folder:
        being_workers = partial(_be_a_worker, work, bulletin, workers.cpus_per_worker)
        fitting = partial(_fit, being_workers, workers, name, max_failures, folder, meet_within_s)
        fit = _in_a_thread(fitting)  # not on the main thread, where Ray Train would put in a signal handler of its own
        try:
            with heard(bulletin, {"workers": f"{workers.fewest} workers of {workers.each} each"}):
                _follow(fit, bulletin, observe, look_out)
        except BaseException:
            bulletin.stop.remote()
            futures.wait([fit], stop_within_s)
            raise
    if (error := fit.exception()) is not None:
        raise RunError(_cause(error)) from error
    failure, result = ray.get(bulletin.ended.remote())
    if failure is not None:
        raise failure
    return cast(T, pickle.loads(result))


def _follow(
    fit: futures.Future[None], bulletin: Any, observe: Callable[[Status], None], look_out: Callable[[], None]
) -> None:
    """Until the workers are done, tell what they tell. Raises what one has failed of where the others do not end."""
    failed_at, is_last = math.inf, False
    while not is_last:
        is_last = bool(futures.wait([fit], _POLL_S).done)
        look_out()
        told, failure = ray.get(bulletin.take.remote())
        for status in told:
            observe(status)
        if failure is not None:
            failed_at = min(failed_at, time.monotonic())
            if time.monotonic() - failed_at > _END_WITHIN_S:  # the other ranks wait for one that has given up
                raise failure


def _train(run_json: str, worker: Worker) -> None:
    run = TrainingRun.model_validate_json(run_json)
    if run.device == "cuda":
        _choose_kernels(run.config.compute)
    train(run, worker, TrainingSet.open(run.config.train), TrainingSet.open(run.config.evaluate_on))


def _choose_kernels(compute: TrainComputeConfig) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False  # also where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set
    if compute.precision == "float32":
        torch.backends.cudnn.allow_tf32 = False  # convolutions have 10 bits of mantissa otherwise
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not compute.deterministic


def _be_a_worker(work: Callable[[Worker], Any], bulletin: Any, num_threads: int) -> None:
    context = ray.train.get_context()
    torch.set_num_threads(num_threads)  # Ray's actors begin with 1
    rank = context.get_world_rank()
    voice = _Voice(bulletin, rank)
    arrive(bulletin, "workers")
    worker = Worker(
        rank=rank,
        world_size=context.get_world_size(),
        num_on_node=context.get_local_world_size(),
        device=ray.train.torch.get_device(),
        num_threads=num_threads,
        begin=voice.begin,
        notice=voice.notice,
        observe=voice.observe,
    )
    failure, result = None, None
    try:
        result = work(worker)
    except PipelineError as error:
        if isinstance(error, StorageError) and not isinstance(error, AccessDeniedError):
            ray.get(bulletin.excuse.remote())
            raise  # perhaps it passes: start again
        failure = error
    if worker.rank == 0 or failure is not None:
        ray.get(bulletin.end.remote(failure, pickle.dumps(result)))


def _fit(
    work: Callable[[], None], workers: Workers, name: str, max_failures: int, folder: str, meet_within_s: float
) -> None:
    most, fewest = workers.most, workers.fewest
    trainer = ray.train.torch.TorchTrainer(
        work,
        torch_config=ray.train.torch.TorchConfig(timeout_s=round(meet_within_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus_per_worker, **({"GPU": 1} if workers.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=folder,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
        ),
    )
    trainer.fit()


def _in_a_thread(action: Callable[[], None]) -> futures.Future[None]:
    """`action` under way in a thread that keeps nobody from leaving.

    A future to wait for, since a signal's exception in Thread.join makes CPython 3.11 take the thread for ended.
    """
    future: futures.Future[None] = futures.Future()

    def act() -> None:
        try:
            action()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=act, name="ray-train", daemon=True).start()
    return future


class _Voice:
    """A worker's side of the bulletin; telling waits for no answer, the one before says whether to stop."""

    def __init__(self, bulletin: Any, rank: int) -> None:
        self._bulletin, self._rank = bulletin, rank
        self._answer: Any = None
        self._was_noticed = False

    def begin(self, step: int) -> bool:
        world_size = ray.train.get_context().get_world_size()
        return bool(ray.get(self._bulletin.begin.remote(self._rank, step, world_size)))

    def observe(self, status: Status) -> None:
        self._answer = self._bulletin.tell.remote(status)

    def notice(self) -> Notice:
        is_leaving = ray.train.get_preemption_info() is not None
        is_news, self._was_noticed = is_leaving and not self._was_noticed, is_leaving
        should_stop = self._answer is not None and ray.get(self._answer)
        return Notice(should_checkpoint=is_news, should_stop=bool(should_stop))


def _fair_share(nodes: Sequence[Node], num_workers: int, use_gpu: bool) -> int:
    if use_gpu:
        return max(1, min(node.cpus // node.gpus for node in nodes if node.gpus))
    smallest = min((node.cpus for node in nodes if node.cpus), default=1)
    return max(1, min(smallest, sum(node.cpus for node in nodes) // num_workers))


def _cause(error: BaseException) -> str:
    """What a worker raised, or how it died; Ray Train keeps the exceptions by rank, those of ranks left alone too."""
    failures = [_base(failure) for failure in (getattr(error, "worker_failures", None) or {}).values()]
    for failure in failures:
        if isinstance(failure, PipelineError):
            return str(failure)
    for failure in failures:
        is_death = isinstance(getattr(failure, "health_check_failure", failure), ray.exceptions.RayActorError)
        if is_death or str(failure).startswith("DataLoader worker"):  # a process of one that decodes for it
            return f"{failure}\n{_AFTER_DEATHS}"
    return str(failures[0] if failures else error)


def _base(failure: BaseException) -> BaseException:
    """The exception itself: Ray Train wraps what a worker raised."""
    base: BaseException = getattr(failure, "_base_exc", failure)
    return base
