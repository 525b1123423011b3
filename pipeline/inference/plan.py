"""What of a run is still to do: plan = manifest − commits."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.cluster import Node
from pipeline.data.manifest import Manifest, Shard
from pipeline.errors import ConfigError, ObjectExistsError
from pipeline.inference import retries
from pipeline.inference.commit import committed_shard_ids
from pipeline.inference.config import ComputeConfig, PredictConfig
from pipeline.inference.layout import Layout
from pipeline.inference.networks import choose_compile
from pipeline.inference.run import Model, Run, describe_run, find_run, plan_uri, refuse_other, run_id_of, software

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """A run and what of it is still to do; `retried` are the shards of that whose commits go first."""

    run: Run
    manifest: Manifest
    committed: set[int]
    retried: frozenset[int] = frozenset()

    @property
    def num_pending(self) -> int:
        return self.run.num_shards - len(self.committed)

    def pending_shards(self) -> Iterator[Shard]:
        """The shards without a commit, in manifest order."""
        return (shard for shard in self.manifest.shards() if shard.shard_id not in self.committed)


def make_plan(config: PredictConfig, manifest: Manifest, models: tuple[Model, ...], layout: Layout) -> Plan:
    """The plan of `config` in `layout`: a new run's, or what an earlier attempt left over. Writes nothing.

    A run keeps how it computes, on CPUs also the number of torch threads it began with, whatever the cluster offers
    now, and, as far as the layout can, where it decodes.

    Raises ConfigError where the run exists with another config, naming the fields, and ReconcileError where a commit is
    damaged that may be one of `retry_errors`.
    """
    run = describe_run(config, manifest, models, layout)
    earlier = find_run(run.output_uri, run.run_id)
    if config.compute.compile == "auto":
        run = run.model_copy(update={"compile": choose_compile(run, config.registry, earlier)})
    if earlier is None:
        return Plan(run, manifest, committed=set())
    kept: dict[str, Any] = {"software": earlier.software}
    if run.device == "cpu":
        kept["num_threads"] = earlier.num_threads
    if config.compute.batch_size is None:
        kept["batch_size"] = earlier.batch_size
    if config.compute.compile == config.compute.precision == "auto":
        kept["precision"] = earlier.precision
    if config.compute.decode == "auto" and (earlier.decode == "cpu" or layout.device == "cuda"):
        kept["decode"] = earlier.decode
    run = run.model_copy(update=kept)
    refuse_other(earlier, run)
    committed = committed_shard_ids(run.uri)
    retried = retries.find(run.uri, committed, config.retry_errors)
    return Plan(run, manifest, committed - retried, retried)


def as_begun(
    config: PredictConfig, manifest: Manifest, models: tuple[Model, ...], nodes: Sequence[Node]
) -> ComputeConfig:
    """How a config computes; where it leaves the device open, on that of an earlier attempt.

    Raises ConfigError where that was on GPUs and there are none.
    """
    compute, earlier = config.compute, find_run(storage.normalise(config.output), run_id_of(config, manifest, models))
    if earlier is None or compute.device != "auto":
        return compute
    if earlier.device == "cuda" and not any(node.gpus for node in nodes):
        raise ConfigError(
            f"run {earlier.run_id!r} began on GPUs, and the cluster has none now: add one (cluster.gpus 1 waits for "
            "it), or set another run_id"
        )
    return compute.model_copy(update={"device": earlier.device})


def finished_plan(config: PredictConfig, manifest: Manifest, models: tuple[Model, ...]) -> Plan | None:
    """The plan of a run that an earlier attempt has finished, None of any other; asks no cluster what it has.

    Raises ConfigError as `make_plan` does.
    """
    earlier = find_run(storage.normalise(config.output), run_id_of(config, manifest, models))
    if earlier is None or not storage.exists(earlier.summary_uri):
        return None
    device = earlier.device if config.compute.device == "auto" else config.compute.device
    decode = earlier.decode if config.compute.decode == "auto" else config.compute.decode
    as_before = Layout("fused", device, 1, earlier.num_threads, gpus_per_actor=0, decode=decode)
    plan = make_plan(config, manifest, models, as_before)
    return plan if plan.num_pending == 0 else None


def record_run(plan: Plan, config: PredictConfig) -> None:
    """Write the run's `config.yaml` and `plan.json`, unless an attempt before did; from now on it has not ended.

    The commits of what is tried again go. Raises ConfigError, StorageError.
    """
    if find_run(plan.run.output_uri, plan.run.run_id) is None:
        storage.write(storage.join(plan.run.uri, "config.yaml"), config.to_yaml().encode())
    try:
        storage.write(plan_uri(plan.run.uri), plan.run.model_dump_json(indent=1).encode(), if_absent=True)
    except ObjectExistsError:
        earlier = find_run(plan.run.output_uri, plan.run.run_id)
        assert earlier is not None
        refuse_other(earlier, plan.run)
    if plan.num_pending:
        if storage.exists(plan.run.summary_uri):
            storage.delete(plan.run.summary_uri)
        if plan.committed or plan.retried:  # the errors of a first attempt are for the next
            retries.begin(plan.run.uri, plan.retried, config.retry_errors)
        _warn_of_other_software(plan.run)
        _warn_of_other_threads(plan.run, config)


def _warn_of_other_software(run: Run) -> None:
    """Not refused: a run that takes weeks may have to go on in another image."""
    began, now = run.software, software()
    if began and (others := [name for name in now if now[name] != began.get(name)]):
        logger.warning(
            "run %s began with %s and goes on with %s: decoders and kernels of another version may give other pixels "
            "and last bits. Each file's metadata tells its `software`; for tables of one kind set another run_id",
            run.run_id,
            *(", ".join(f"{name} {versions.get(name)}" for name in others) for versions in (began, now)),
        )


def _warn_of_other_threads(run: Run, config: PredictConfig) -> None:
    size = config.compute.cpus_per_actor
    if run.device == "cpu" and size not in (None, run.num_threads):
        logger.warning(
            "run %s began with actors of %d threads and keeps these, though each now has %d CPUs; for as many threads "
            "set another run_id",
            run.run_id,
            run.num_threads,
            size,
        )
