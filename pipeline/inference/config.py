"""What a predict run is told: which images, bundles and tables, where the work runs, what it costs."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from pipeline.config import ClusterConfig, JobConfig, Section
from pipeline.data.manifest import Shard
from pipeline.data.outages import refusing_outages
from pipeline.data.readers import ReadLimits, read_shard
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError
from pipeline.models.precision import AgreementLimits, AskedPrecision
from pipeline.tables.schemas import TABLES, EmbeddingType, TableName

if TYPE_CHECKING:
    from pipeline.data.images import DecodeOptions  # torch's import, which the driver does without


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

    def deciding_fields(self) -> dict[str, Any]:
        """All of them, those of tables that are not written as if they were not set."""
        idle = {
            *(["top_k"] if "predictions" not in self.names else []),
            *(["embedding_type", "l2_normalise"] if "embeddings" not in self.names else []),
        }
        return {**self.model_dump(), **TablesConfig().model_dump(include=idle)}


class ImagesConfig(ReadLimits):
    """How images are read."""

    accept_lost_shards: bool = False
    """Make error rows of a shard none of whose images can be fetched, or none any longer; else that stops the run: a
    folder that is not mounted, a key that was withdrawn, a manifest that is out of date or a root that was left out
    looks just so."""
    reduced_decode: int | None = Field(None, ge=2, le=16)
    """Decode JPEGs at a half, a quarter or an eighth of their size, as long as the shorter side stays at this many
    times `resize_size`: at 2 up to three times faster on photos of many megapixels. It costs accuracy: published
    CIFAR-10 networks some three points at 2, half a point at 4. Try it on labelled images first. Unset: whole."""

    @field_validator("reduced_decode", mode="before")
    @classmethod
    def _was_a_flag(cls, value: Any) -> Any:
        """In the plans of earlier runs, which can still be verified and, by their `run_id`, resumed."""
        return {False: None, True: 2}[value] if isinstance(value, bool) else value

    max_storage_errors: int = Field(10, ge=0)
    """More images than this of one shard lost to a failing store (5xx or time-outs after retries) stop the run, to be
    gone on with when the store is back; fewer become rows of the errors table."""

    def fetch(self, shard: Shard, images: pa.Table) -> Iterator[bytes | ImageError]:
        """The encoded images of a shard, the rows of which are `images`, or why they cannot be had, in order.

        Raises StorageError where that looks like an outage, as `refusing_outages` says.
        """
        encoded = read_shard(
            shard,
            images,
            allowed_roots=self.allowed_roots,
            max_bytes=self.max_bytes,
            concurrency=self.fetch_concurrency,
        )
        return refusing_outages(
            encoded,
            shard,
            images,
            max_storage_errors=self.max_storage_errors,
            accept_lost_shards=self.accept_lost_shards,
        )

    def decode_options(self, preprocessings: Sequence[Preprocessing]) -> "DecodeOptions":
        """For `images.decode`, of images that all of `preprocessings` are applied to."""
        factor = self.reduced_decode
        shrink_to = None if factor is None else factor * max(each.resize_size for each in preprocessings)
        return {"max_pixels": self.max_pixels, "shrink_to": shrink_to}

    def deciding_fields(self) -> dict[str, Any]:
        """Those that decide which images become rows of the errors table; how hard to fetch may change."""
        return self.model_dump(exclude={"fetch_concurrency", "max_storage_errors", "accept_lost_shards"})


class ComputeConfig(Section):
    """Where the work runs; found from the cluster unless set."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the networks; auto: what the run began with, at its beginning GPUs where the cluster has any."""
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    """Where JPEGs are decoded; gpu: by the GPUs that predict; auto: so in the fused form where there is a single CPU to
    an actor. A GPU's pixels are not quite a CPU's: name one where several runs' outputs are compared. A GPU that
    decodes wants a C compiler on its node."""
    form: Literal["auto", "fused", "split"] = "auto"
    """fused: one actor fetches, decodes, predicts and writes; split: CPU tasks fetch for the actors, and decode what
    the actors' GPUs do not, where what they hand on of a shard is no more than 512 MB, or decoded 1 GB."""
    precision: AskedPrecision = "auto"
    """What the networks compute in; auto: bfloat16 where the network is compiled and the device has instructions for
    it, float32 elsewhere. Name one where the outputs of several runs are compared, as embeddings are. int8: faster
    again on x86 CPUs, at some cost in accuracy; the agreement tells how much. With compile always, and the package
    torchao where it compiles."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Run networks compiled ahead of time and kept beside the bundle. auto: with bundles from the registry that are all
    compiled already, and in runs of at least 5,000 images, on GPUs 100,000, on first use; where it cannot be done or
    agrees too little with float32, not; always: fail then. What a run's first attempt found stays for all of it, eager
    too."""
    agreement: AgreementLimits = AgreementLimits()
    """With float32, below which a compiled network is not used."""
    batch_size: int | None = Field(None, ge=1)
    """Images per forward pass; unset: 16 on CPUs, 256 on GPUs. A resumed run keeps the one it began with."""
    actors: int | None = Field(None, ge=1)
    """Number of actors; unset: as many as fit."""
    actors_per_gpu: int = Field(1, ge=1, le=16)
    """Actors that share a GPU, at most, each with networks and batches of its own in its memory. For GPUs that a single
    process cannot feed: on an H200 one of the fused form had 3,000 to 4,000 images a second decoded by the GPU."""
    cpus_per_actor: int | None = Field(None, ge=1)
    """CPUs of one actor; unset: 1, or up to 4 where there are fewer shards than CPUs; on GPUs its part of the CPUs
    there are to a GPU, or none in the split form."""

    @model_validator(mode="after")
    def _integers_are_compiled(self) -> "ComputeConfig":
        if self.precision == "int8" and self.compile != "always":
            raise ValueError(f"expected compile always with precision int8, which is compiled only; got {self.compile}")
        return self


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

    resumes: ClassVar[bool] = True

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
    max_error_rate: float = Field(1.0, ge=0, le=1)
    """Share of the images that may be rows of `errors` and of no other table; with more the run fails, as soon as that
    is certain, so that nobody goes on with next to nothing. What is done stays: a larger share goes on from there."""
    retry_errors: list[Annotated[str, Field(pattern=r"^(fetch|decode|preprocess|predict|encode)/\w+$")]] = Field([])
    """Kinds of errors, as `fetch/storage_error`: shards with rows of these are done again, which replaces all their
    rows. For what has been mended since, a store's failures above all. Once, until the run has ended: what is stopped
    meanwhile goes on."""
    compute: ComputeConfig = ComputeConfig()
    """Where the work runs."""
    dry_run: bool = False
    """Print the plan and touch nothing."""
    plan: bool = False
    """Do a few shards for trial, write no table, and tell how long the run will take and what it will cost."""
    prices: PricesConfig = PricesConfig()
    """What the cluster costs."""
    cluster: ClusterConfig = ClusterConfig()
    progress_interval_s: float = Field(5.0, gt=0)
    """Seconds between progress lines where standard error is no terminal."""
