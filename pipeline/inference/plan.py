"""What a run is, and what of it is still to do: plan = manifest − commits."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline import storage
from pipeline.cluster import Device, default_batch_size
from pipeline.config import JobConfig, Section, describe, refuse_change
from pipeline.data.manifest import Manifest, Shard
from pipeline.data.readers import ReadLimits
from pipeline.errors import ConfigError, ObjectExistsError, ObjectNotFoundError
from pipeline.inference.commit import committed_shard_ids, run_uri
from pipeline.models import registry
from pipeline.models.bundle import Bundle
from pipeline.models.precision import AgreementLimits, AskedPrecision
from pipeline.tables.schemas import TABLES, EmbeddingType, TableName

_COMPILED_FROM_IMAGES = 5_000  # compiling takes half a minute, which as many are classified faster by


class TablesConfig(Section):
    """Which tables a run writes, and how."""

    names: list[Literal["predictions", "embeddings"]] = Field(["predictions"], min_length=1)
    """Tables to write, any of predictions and embeddings; `errors` is always written."""

    @field_validator("names")
    @classmethod
    def _each_once(cls, names: list[TableName]) -> list[TableName]:
        return [name for name in TABLES if name in names]

    top_k: int = Field(5, ge=1)
    """How many classes with scores a prediction lists (fewer where the model has fewer)."""
    embedding_type: EmbeddingType = "float32"
    """Element type of the embeddings."""
    l2_normalise: bool = False
    """Scale each embedding to unit length."""


class ImagesConfig(ReadLimits):
    """How images are read."""

    accept_lost_shards: bool = False
    """Make error rows of a shard none of whose images can be fetched; else that stops the run: a folder that is not
    mounted or a key that was withdrawn looks just so."""
    reduced_decode: bool = False
    """Decode JPEGs whose shorter side is at least four times `resize_size` at a half, a quarter or an eighth, never
    below twice that: up to three times faster on photos of many megapixels, pixels about one level of 255 off."""
    max_storage_errors: int = Field(10, ge=0)
    """More images than this of one shard lost to a failing store (5xx or time-outs after retries) stop the run, to be
    gone on with when the store is back; fewer become rows of the errors table."""

    def deciding_fields(self) -> dict[str, Any]:
        """Those that decide which images become rows of the errors table; how hard to fetch may change."""
        return self.model_dump(exclude={"fetch_concurrency", "max_storage_errors", "accept_lost_shards"})


class ComputeConfig(Section):
    """Where the work runs; found from the cluster unless set."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the networks; auto takes GPUs where the cluster has any."""
    form: Literal["auto", "fused", "split"] = "auto"
    """fused: one actor fetches, decodes, predicts and writes; split: CPU tasks decode for the actors."""
    precision: AskedPrecision = "auto"
    """What the networks compute in; auto: bfloat16 where the network is compiled and the device has instructions for
    it, float32 elsewhere. Name one where the outputs of several runs are compared, as embeddings are."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Run networks compiled ahead of time, kept beside the bundle and made on first use. auto: in runs of at least
    5,000 images with bundles from the registry, and where it cannot be done or agrees too little with float32, not;
    always: fail then. What a run's first attempt found stays for all of it."""
    agreement: AgreementLimits = AgreementLimits()
    """With float32, below which a compiled network is not used."""
    batch_size: int | None = Field(None, ge=1)
    """Images per forward pass; unset: 16 on CPUs, 256 on GPUs. A resumed run keeps the one it began with."""
    actors: int | None = Field(None, ge=1)
    """Number of actors; unset: as many as fit."""
    cpus_per_actor: int | None = Field(None, ge=1)
    """CPUs of one actor; unset: 1, or up to 4 where there are fewer shards than CPUs; on GPUs the CPUs there are to a
    GPU, or none in the split form."""


class PricesConfig(Section):
    """What the cluster costs, for estimates; 0 where it is not to be counted."""

    per_cpu_hour: float = Field(0.0, ge=0)
    """Of each CPU of the cluster, used or not."""
    per_gpu_hour: float = Field(0.0, ge=0)
    """Of each GPU of the cluster."""
    currency: str = "USD"
    """What prices are in."""


class PredictConfig(JobConfig):
    """Classify and embed every image of a manifest, shard by shard, into Parquet tables; run it again to resume."""

    manifest: str
    """URI of the manifest (made by jobs.manifest)."""
    output: str
    """URI below which the tables and the run's records are written."""
    bundles: list[str] = Field(min_length=1)
    """Bundles, all in one pass over one decode: name, name/version or name@alias in the registry, or a bundle's URI."""
    registry: str | None = None
    """URI of the registry that names of bundles are looked up in."""
    run_id: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run; unset: derived from what decides its tables, so that the same command is the same run."""
    tables: TablesConfig = TablesConfig()
    """Which tables, and how."""
    images: ImagesConfig = ImagesConfig()
    """How images are read."""
    compute: ComputeConfig = ComputeConfig()
    """Where the work runs."""
    dry_run: bool = False
    """Print the plan and touch nothing."""
    plan: bool = False
    """Do a few shards for trial, write no table, and tell how long the run will take and what it will cost."""
    prices: PricesConfig = PricesConfig()
    """What the cluster costs."""
    progress_interval_s: float = Field(5.0, gt=0)
    """Seconds between progress lines where standard error is no terminal."""


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
    precision: AskedPrecision = "float32"  # the defaults are what runs did that were planned before there was a choice
    compile: Literal["auto", "always", "never"] = "never"
    agreement: AgreementLimits = AgreementLimits()
    batch_size: int
    num_threads: int
    """Of torch, per actor: sums are ordered by it, so it decides the last bits and stays for the whole run."""

    @property
    def uri(self) -> str:
        """Where the run's records lie."""
        return run_uri(self.output_uri, self.run_id)

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
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """A run and what of it is still to do."""

    run: Run
    manifest: Manifest
    committed: set[int]

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


def make_plan(
    config: PredictConfig, manifest: Manifest, models: tuple[Model, ...], *, device: Device, num_threads: int
) -> Plan:
    """The plan of `config` on `device`: a new run's, or what an earlier attempt left over. Writes nothing.

    A run keeps the number of torch threads it began with, whatever the cluster offers now, and how it computes.

    Raises ConfigError where the run exists with another config, naming the fields.
    """
    run = _describe_run(config, manifest, models, device, num_threads)
    earlier = _read_run(run.uri)
    if earlier is None:
        return Plan(run, manifest, committed=set())
    kept: dict[str, Any] = {"num_threads": earlier.num_threads}
    if config.compute.batch_size is None:
        kept["batch_size"] = earlier.batch_size
    if config.compute.compile == config.compute.precision == "auto":
        kept |= {"compile": earlier.compile, "precision": earlier.precision}
    run = run.model_copy(update=kept)
    _refuse_change(earlier, run)
    return Plan(run, manifest, committed_shard_ids(run.uri))


def record_run(plan: Plan, config: PredictConfig) -> None:
    """Write the run's `config.yaml` and `plan.json`, unless an attempt before did. Raises ConfigError, StorageError."""
    if _read_run(plan.run.uri) is None:
        storage.write(storage.join(plan.run.uri, "config.yaml"), config.to_yaml().encode())
    try:
        storage.write(_plan_uri(plan.run.uri), plan.run.model_dump_json(indent=1).encode(), if_absent=True)
    except ObjectExistsError:
        earlier = _read_run(plan.run.uri)
        assert earlier is not None
        _refuse_change(earlier, plan.run)


def read_run(output_uri: str, run_id: str) -> Run:
    """The run as recorded. Raises ConfigError where there is none, naming the runs there are."""
    run = _read_run(run_uri(output_uri, run_id))
    if run is None:
        known = list_run_ids(output_uri)
        raise ConfigError(f"expected run {run_id!r} under {output_uri!r}, found {', '.join(known) or 'no run at all'}")
    return run


def list_run_ids(output_uri: str) -> list[str]:
    """The runs under an output, by name."""
    return storage.list_folders(storage.join(output_uri, "_runs"))


def _describe_run(
    config: PredictConfig, manifest: Manifest, models: tuple[Model, ...], device: Device, num_threads: int
) -> Run:
    identity = json.dumps(
        [
            manifest.digest,
            [[model.name, model.digest] for model in models],
            config.tables.model_dump(),
            config.images.max_pixels,
            *_unlike_default(config),
        ]
    )
    return Run(
        run_id=config.run_id or hashlib.sha256(identity.encode()).hexdigest()[:12],
        manifest_uri=manifest.uri,
        manifest_digest=manifest.digest,
        num_images=manifest.num_images,
        num_shards=manifest.num_shards,
        output_uri=storage.normalise(config.output),
        models=models,
        tables=config.tables,
        images=config.images,
        device=device,
        precision=config.compute.precision,
        compile=_should_compile(config, manifest, models),
        agreement=config.compute.agreement,
        batch_size=config.compute.batch_size or default_batch_size(device),
        num_threads=num_threads,
    )


def _unlike_default(config: PredictConfig) -> list[Any]:
    """Other fields that decide the tables' bytes, where they are set; left out otherwise, as before there were any."""
    default, compute = ComputeConfig(), config.compute
    fields: list[tuple[Any, Any]] = [(compute.precision, default.precision), (compute.compile, default.compile)]
    fields += [(compute.agreement.model_dump(), default.agreement.model_dump()), (config.images.reduced_decode, False)]
    return [value for value, usual in fields if value != usual]


def _should_compile(
    config: PredictConfig, manifest: Manifest, models: tuple[Model, ...]
) -> Literal["auto", "always", "never"]:
    """Unless asked for, only where it is worth it, and native code comes from the registry that the config trusts."""
    registry_uri = None if config.registry is None else storage.normalise(config.registry)
    is_trusted = registry_uri is not None and all(storage.is_under(model.uri, registry_uri) for model in models)
    is_worth_it = manifest.num_images >= _COMPILED_FROM_IMAGES
    return "never" if config.compute.compile == "auto" and not (is_trusted and is_worth_it) else config.compute.compile


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


def _read_run(uri: str) -> Run | None:
    try:
        return Run.model_validate_json(storage.read(_plan_uri(uri)))
    except ObjectNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{_plan_uri(uri)}: not a plan of this version:\n{describe(error)}") from error


def _refuse_change(earlier: Run, now: Run) -> None:
    """Fields that decide the tables' bytes must be those it began with; places and how hard to fetch may change."""
    remedy = f"run {now.run_id!r} began otherwise; go back to that, or set another run_id"
    refuse_change(_deciding_fields(earlier), _deciding_fields(now), remedy)


def _deciding_fields(run: Run) -> dict[str, Any]:
    fields = run.model_dump(exclude={"manifest_uri"})
    fields["models"] = [model.model_dump(exclude={"uri"}) for model in run.models]
    fields["images"] = run.images.deciding_fields()
    return fields


def _plan_uri(uri: str) -> str:
    return storage.join(uri, "plan.json")
