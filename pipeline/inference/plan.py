"""What a run is, and what of it is still to do: plan = manifest − commits."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline import storage
from pipeline.cluster import Device, Node, default_batch_size
from pipeline.config import describe, refuse_change
from pipeline.data.manifest import Manifest, Shard
from pipeline.errors import ConfigError, ObjectExistsError, ObjectNotFoundError
from pipeline.inference import retries
from pipeline.inference.commit import committed_shard_ids, run_uri
from pipeline.inference.config import ComputeConfig, ImagesConfig, PredictConfig, TablesConfig
from pipeline.inference.layout import Layout
from pipeline.models import compiled, registry
from pipeline.models.bundle import Bundle
from pipeline.models.precision import AgreementLimits, AskedPrecision
from pipeline.tables.schemas import TableName

logger = logging.getLogger(__name__)

_COMPILED_FROM_IMAGES = 5_000  # compiling takes half a minute, which as many are classified faster by


class Model(BaseModel):
    """A bundle as a run refers to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str
    """`name/version`, as in the tables' `model` column."""
    uri: str
    digest: str
    embedding_size: int
    preprocessing_digest: str


class Run(BaseModel):
    """All that decides what a run writes; kept as `plan.json`, and the same at every resume."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    manifest_uri: str
    manifest_digest: str
    num_images: int
    num_shards: int
    output_uri: str
    models: tuple[Model, ...]
    tables: TablesConfig
    images: ImagesConfig
    device: Device
    decode: Literal["cpu", "gpu"] = "cpu"
    precision: AskedPrecision = "float32"  # the defaults are what runs did that were planned before there was a choice
    compile: Literal["auto", "always", "never"] = "never"
    agreement: AgreementLimits = AgreementLimits()
    batch_size: int
    num_threads: int
    """Of torch, per actor: on CPUs sums are ordered by it, so it decides the last bits and stays for the whole run."""
    software: dict[str, str] = Field(default_factory=dict)
    """Versions of what computes its tables, where it began; none in the plans of earlier versions."""

    @property
    def uri(self) -> str:
        """Where the run's records lie."""
        return run_uri(self.output_uri, self.run_id)

    @property
    def summary_uri(self) -> str:
        """Where it is told how its last attempt ended; nothing is there while one is at work, or was killed."""
        return storage.join(self.uri, "summary.json")

    @property
    def may_compile(self) -> bool:
        """Whether what is not compiled yet is compiled for it."""
        return self.compile == "always" or (self.compile == "auto" and self.num_images >= _COMPILED_FROM_IMAGES)

    @property
    def table_names(self) -> list[TableName]:
        """The tables it writes."""
        return [*self.tables.names, "errors"]

    @property
    def lineage(self) -> dict[str, str]:
        """What the tables' schema metadata tells of their origin."""
        return {
            "manifest_digest": self.manifest_digest,
            "models": json.dumps({model.name: model.digest for model in self.models}),
            "preprocessing": json.dumps({model.name: model.preprocessing_digest for model in self.models}),
            "embedding_size": json.dumps({model.name: model.embedding_size for model in self.models}),
            **({"decoded_on": "gpu"} if self.decode == "gpu" else {}),
            **({"reduced_decode": str(self.images.reduced_decode)} if self.images.reduced_decode else {}),
        }


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


def resolve_inputs(config: PredictConfig) -> tuple[Manifest, tuple[Model, ...]]:
    """The manifest and the bundles a config names, read and checked. Raises ConfigError, ManifestError, BundleError."""
    models = tuple(_resolve_model(reference, config.registry) for reference in config.bundles)
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ConfigError(f"bundles: expected different ones, got {', '.join(names)}")
    return Manifest.open(storage.normalise(config.manifest)), models


def make_plan(config: PredictConfig, manifest: Manifest, models: tuple[Model, ...], layout: Layout) -> Plan:
    """The plan of `config` in `layout`: a new run's, or what an earlier attempt left over. Writes nothing.

    A run keeps how it computes, on CPUs also the number of torch threads it began with, whatever the cluster offers
    now, and, as far as the layout can, where it decodes.

    Raises ConfigError where the run exists with another config, naming the fields, and ReconcileError where a commit is
    damaged that may be one of `retry_errors`.
    """
    run = _describe_run(config, manifest, models, layout)
    earlier = _read_run(run.output_uri, run.run_id)
    if config.compute.compile == "auto":
        run = run.model_copy(update={"compile": _choose_compile(run, config.registry, earlier)})
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
    _refuse_change(earlier, run)
    committed = committed_shard_ids(run.uri)
    retried = retries.find(run.uri, committed, config.retry_errors)
    return Plan(run, manifest, committed - retried, retried)


def as_begun(
    config: PredictConfig, manifest: Manifest, models: tuple[Model, ...], nodes: Sequence[Node]
) -> ComputeConfig:
    """How a config computes; where it leaves the device open, on that of an earlier attempt.

    Raises ConfigError where that was on GPUs and there are none.
    """
    compute, earlier = config.compute, _read_run(storage.normalise(config.output), _run_id(config, manifest, models))
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
    earlier = _read_run(storage.normalise(config.output), _run_id(config, manifest, models))
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
    if _read_run(plan.run.output_uri, plan.run.run_id) is None:
        storage.write(storage.join(plan.run.uri, "config.yaml"), config.to_yaml().encode())
    try:
        storage.write(_plan_uri(plan.run.uri), plan.run.model_dump_json(indent=1).encode(), if_absent=True)
    except ObjectExistsError:
        earlier = _read_run(plan.run.output_uri, plan.run.run_id)
        assert earlier is not None
        _refuse_change(earlier, plan.run)
    if plan.num_pending:
        if storage.exists(plan.run.summary_uri):
            storage.delete(plan.run.summary_uri)
        if plan.committed or plan.retried:  # the errors of a first attempt are for the next
            retries.begin(plan.run.uri, plan.retried, config.retry_errors)
        _warn_of_other_software(plan.run)
        _warn_of_other_threads(plan.run, config)


def is_compiled(run: Run) -> bool:
    """Whether its networks were all compiled for such a run by this software, on whatever kind of CPU or GPU."""
    return _threads_of(run) in _threads_compiled_for(run)


def _threads_of(run: Run) -> int:
    """Of its forward passes, as far as they decide a compiled network."""
    return run.num_threads if run.device == "cpu" else 0


def _threads_compiled_for(run: Run) -> set[int]:
    """The `_threads_of` runs that all its networks were compiled for."""
    return set[int].intersection(
        *(
            compiled.recorded_threads(model.uri, model.digest, run.device, run.precision, batch_size=run.batch_size)
            for model in run.models
        )
    )


def read_run(output_uri: str, run_id: str) -> Run:
    """The run as recorded. Raises ConfigError where there is none, naming the runs there are."""
    run = _read_run(output_uri, run_id)
    if run is None:
        known = list_run_ids(output_uri)
        raise ConfigError(f"expected run {run_id!r} under {output_uri!r}, found {', '.join(known) or 'no run at all'}")
    return run


def list_run_ids(output_uri: str) -> list[str]:
    """The runs under an output that were begun, by name; one that was only estimated was not."""
    names = storage.list_folders(storage.join(output_uri, "_runs"))
    return [name for name in names if storage.exists(_plan_uri(run_uri(output_uri, name)))]


def _run_id(config: PredictConfig, manifest: Manifest, models: tuple[Model, ...]) -> str:
    """That of the config, or one of what decides the tables: the same command goes on with the same run."""
    if config.run_id:
        return config.run_id
    identity = json.dumps(
        [
            manifest.digest,
            [[model.name, model.digest] for model in models],
            config.tables.model_dump(),
            config.images.max_pixels,
            *_unlike_default(config),
        ]
    )
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def _describe_run(config: PredictConfig, manifest: Manifest, models: tuple[Model, ...], layout: Layout) -> Run:
    return Run(
        run_id=_run_id(config, manifest, models),
        manifest_uri=manifest.uri,
        manifest_digest=manifest.digest,
        num_images=manifest.num_images,
        num_shards=manifest.num_shards,
        output_uri=storage.normalise(config.output),
        models=models,
        tables=config.tables,
        images=config.images,
        device=layout.device,
        decode=layout.decode,
        precision=config.compute.precision,
        compile=config.compute.compile,
        agreement=config.compute.agreement,
        batch_size=config.compute.batch_size or default_batch_size(layout.device),
        num_threads=max(1, layout.cpus_per_actor),
        software=software(),
    )


def software() -> dict[str, str]:
    """Versions of what computes the tables, by package."""
    packages = ("image-batch-pipeline", "torch", "torchvision", "pillow", "pyarrow")
    return {package: version(package) for package in packages}


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


def _unlike_default(config: PredictConfig) -> list[Any]:
    """Other fields that decide the tables' bytes, where they are set; left out otherwise, as before there were any."""
    default, compute = ComputeConfig(), config.compute
    names = ("precision", "compile", "decode")
    fields: list[tuple[Any, Any]] = [(getattr(compute, name), getattr(default, name)) for name in names]
    fields += [(compute.agreement.model_dump(), default.agreement.model_dump()), (config.images.reduced_decode, None)]
    return [value for value, usual in fields if value != usual]


def _choose_compile(run: Run, registry_uri: str | None, earlier: Run | None) -> Literal["auto", "always", "never"]:
    """What is done where it is not told: as the run began, whatever has been compiled since; at its beginning, compiled
    where it is large or finds that done. Native code comes only from the registry that the config trusts.
    """
    if earlier is not None and earlier.compile != "auto":
        return earlier.compile
    trusted = None if registry_uri is None else storage.normalise(registry_uri)
    if trusted is None or not all(storage.is_under(model.uri, trusted) for model in run.models):
        return "never"
    if earlier is not None or run.may_compile:
        return "auto"
    found = _threads_compiled_for(run)
    if _threads_of(run) in found:
        return "auto"
    if found:
        logger.warning(
            "the networks are compiled for %s threads, and the run's actors have %d: it does without. Set "
            "compute.cpus_per_actor, or compile for %d (jobs.compile --cpus_per_actor %d)",
            ", ".join(map(str, sorted(found))),
            *[run.num_threads] * 3,
        )
    return "never"


def _resolve_model(reference: str, registry_uri: str | None) -> Model:
    uri = registry.resolve(registry_uri, reference)
    bundle = Bundle.load(uri)
    return Model(
        name=f"{bundle.name}/{bundle.version}",
        uri=uri,
        digest=bundle.digest,
        embedding_size=bundle.embedding_size,
        preprocessing_digest=bundle.preprocessing.digest,
    )


def _read_run(output_uri: str, run_id: str) -> Run | None:
    """The run as recorded, where it is now: it may have been copied or moved since."""
    uri = _plan_uri(run_uri(output_uri, run_id))
    try:
        run = Run.model_validate_json(storage.read(uri))
    except ObjectNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{uri}: not a plan of this version:\n{describe(error)}") from error
    return run.model_copy(update={"output_uri": output_uri})


def _refuse_change(earlier: Run, now: Run) -> None:
    """Fields that decide the tables' bytes must be those it began with; places and how hard to fetch may change."""
    remedy = f"run {now.run_id!r} began otherwise; go back to that, or set another run_id"
    then, this = _deciding_fields(earlier), _deciding_fields(now)
    if "cuda" in (earlier.device, now.device):
        then["num_threads"] = this["num_threads"] = None
    refuse_change(then, this, remedy)


def _deciding_fields(run: Run) -> dict[str, Any]:
    fields = run.model_dump(exclude={"manifest_uri", "software"})
    fields["models"] = [model.model_dump(exclude={"uri"}) for model in run.models]
    fields["tables"] = run.tables.deciding_fields()
    fields["images"] = run.images.deciding_fields()
    return fields


def _plan_uri(uri: str) -> str:
    return storage.join(uri, "plan.json")
