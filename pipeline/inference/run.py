"""What a run is: all that decides what it writes, the same at every resume."""

import contextlib
import hashlib
import json
import logging
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline import __version__, storage
from pipeline.cluster import Device, default_batch_size
from pipeline.config import describe, refuse_change
from pipeline.data.manifest import Manifest
from pipeline.errors import BundleError, ConfigError, ObjectNotFoundError
from pipeline.inference.config import ComputeConfig, ImagesConfig, PredictConfig, TablesConfig
from pipeline.inference.layout import Layout
from pipeline.models import registry
from pipeline.models.bundle import Bundle
from pipeline.models.precision import AgreementLimits, AskedPrecision
from pipeline.tables.schemas import TableName

logger = logging.getLogger(__name__)

# compiling takes half a minute to a minute on CPUs, two on GPUs, which as many are classified faster by
_COMPILED_FROM_IMAGES: dict[Device, int] = {"cpu": 5_000, "cuda": 100_000}


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
    references: tuple[str, ...] = ()
    """What the config named them by; a run goes on with what that meant at its beginning. None in earlier plans."""
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
        return self.compile == "always" or (
            self.compile == "auto" and self.num_images >= _COMPILED_FROM_IMAGES[self.device]
        )

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


def resolve_inputs(config: PredictConfig) -> tuple[Manifest, tuple[Model, ...]]:
    """The manifest and the bundles a config names, read and checked; where the run that it names has begun with the
    same names of bundles, what these led to then.

    Raises ConfigError, ManifestError, BundleError.
    """
    models = tuple(_resolve_model(reference, config.registry) for reference in _references(config))
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ConfigError(f"bundles: expected different ones, got {', '.join(names)}")
    return Manifest.open(storage.normalise(config.manifest)), models


def run_id_of(config: PredictConfig, manifest: Manifest, models: tuple[Model, ...]) -> str:
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


def describe_run(config: PredictConfig, manifest: Manifest, models: tuple[Model, ...], layout: Layout) -> Run:
    """The run of a config in `layout`, as if it had not begun yet."""
    return Run(
        run_id=run_id_of(config, manifest, models),
        manifest_uri=manifest.uri,
        manifest_digest=manifest.digest,
        num_images=manifest.num_images,
        num_shards=manifest.num_shards,
        output_uri=storage.normalise(config.output),
        models=models,
        references=tuple(config.bundles),
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
    packages = ("torch", "torchvision", "pillow", "pyarrow")  # this one may be a Ray job's working folder
    return {"image-batch-pipeline": __version__, **{package: version(package) for package in packages}}


def read_run(output_uri: str, run_id: str) -> Run:
    """The run as recorded. Raises ConfigError where there is none, naming the runs there are."""
    run = find_run(output_uri, run_id)
    if run is None:
        known = list_run_ids(output_uri)
        raise ConfigError(f"expected run {run_id!r} under {output_uri!r}, found {', '.join(known) or 'no run at all'}")
    return run


def list_run_ids(output_uri: str) -> list[str]:
    """The runs under an output that were begun, by name; one that was only estimated was not."""
    names = storage.list_folders(storage.join(output_uri, "_runs"))
    return [name for name in names if storage.exists(plan_uri(run_uri(output_uri, name)))]


def find_run(output_uri: str, run_id: str) -> Run | None:
    """The run as recorded, where it is now: it may have been copied or moved since. None where there is none.

    Raises ConfigError for one of another version.
    """
    uri = plan_uri(run_uri(output_uri, run_id))
    try:
        run = Run.model_validate_json(storage.read(uri))
    except ObjectNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{uri}: not a plan of this version:\n{describe(error)}") from error
    return run.model_copy(update={"output_uri": output_uri})


def refuse_other(earlier: Run, now: Run) -> None:
    """Fields that decide the tables' bytes must be those it began with; places and how hard to fetch may change.

    Raises ConfigError, naming the others.
    """
    remedy = f"run {now.run_id!r} began otherwise; go back to that, or set another run_id"
    then, this = _deciding_fields(earlier), _deciding_fields(now)
    if "cuda" in (earlier.device, now.device):
        then["num_threads"] = this["num_threads"] = None
    refuse_change(then, this, remedy)


def _deciding_fields(run: Run) -> dict[str, Any]:
    fields = run.model_dump(exclude={"manifest_uri", "references", "software"})
    fields["models"] = [model.model_dump(exclude={"uri"}) for model in run.models]
    fields["tables"] = run.tables.deciding_fields()
    fields["images"] = run.images.deciding_fields()
    return fields


def run_uri(output_uri: str, run_id: str) -> str:
    """Where a run keeps its plan, commits and summary."""
    return storage.join(output_uri, "_runs", run_id)


def plan_uri(uri: str) -> str:
    """Where the run at `uri` is recorded."""
    return storage.join(uri, "plan.json")


def _references(config: PredictConfig) -> list[str]:
    """The bundles of a config; those of a run that goes on by the versions that their names led to at its beginning."""
    earlier = find_run(storage.normalise(config.output), config.run_id) if config.run_id else None
    if earlier is None or earlier.references != tuple(config.bundles):
        return config.bundles
    named = zip(config.bundles, earlier.models, strict=True)
    return [_as_it_began(reference, model, config) for reference, model in named]


def _as_it_began(reference: str, model: Model, config: PredictConfig) -> str:
    if registry.is_place(reference):
        return reference
    began = "/".join(model.uri.rsplit("/", 2)[1:])  # name and version in a registry, wherever that lies now
    leads_to = began
    with contextlib.suppress(BundleError):  # nowhere by now
        leads_to = registry.resolve(config.registry, reference)
    if not leads_to.endswith(began):
        logger.warning(
            "%s is another version by now; run %s goes on with %s, as it began; another run_id takes the new",
            reference,
            config.run_id,
            began,
        )
    return began


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


def _unlike_default(config: PredictConfig) -> list[Any]:
    """Other fields that decide the tables' bytes, where they are set; left out otherwise, as before there were any."""
    default, compute = ComputeConfig(), config.compute
    names = ("precision", "compile", "decode")
    fields: list[tuple[Any, Any]] = [(getattr(compute, name), getattr(default, name)) for name in names]
    fields += [(compute.agreement.model_dump(), default.agreement.model_dump()), (config.images.reduced_decode, None)]
    return [value for value, usual in fields if value != usual]
