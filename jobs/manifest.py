"""Make a manifest: the frozen, ordered list of images that training and prediction read.

python -m jobs.manifest --config configs/manifest.yaml
python -m jobs.manifest --source.uri s3://bucket/photos --output s3://bucket/manifests/photos --labels.kind folders
"""

import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from jobs import run_job
from pipeline import storage
from pipeline.config import JobConfig, Section
from pipeline.data.inventory import InventorySource
from pipeline.data.manifest import write_manifest
from pipeline.data.packed import PackedSource, WebDatasetSource
from pipeline.data.sources import Filters, PrefixSource, Source
from pipeline.data.spool import Selection
from pipeline.data.uri_table import TableSource, read_labels
from pipeline.errors import ConfigError


class SourceConfig(Section):
    """Where the images are listed."""

    kind: Literal["prefix", "table", "inventory", "packed", "webdataset"] = "prefix"
    """prefix: list what lies below `uri`; table: CSV or Parquet of URIs; inventory: manifest.json of an S3 Inventory;
    packed: Parquet with columns uri, bytes and perhaps label; webdataset: tars. Of tables and the last two `uri` may
    be one or a prefix with many, of which names and folders that begin with _ or a dot are left out."""
    uri: str
    """URI of the prefix, the table, the inventory's manifest.json, the packed tables or the tars."""
    root: str | None = None
    """Where relative names in a table lie; unset: a table holds whole URIs."""
    uri_column: str = "uri"
    """Column of a table with the URIs."""
    label_column: str | None = None
    """Column of a table with the labels: strings are class names, integers class ids; unset: no labels."""
    size_column: str | None = None
    """Column of a table with the sizes in bytes, checked when the images are read; unset: unknown."""
    etag_column: str | None = None
    """Column of a table with the etags, checked when the images are read; unset: unknown."""


class LabelsConfig(Section):
    """Labels of images listed below a prefix."""

    kind: Literal["none", "folders", "table"] = "none"
    """folders: the first folder below the prefix names the class; table: a CSV or Parquet table of uri and label."""
    table: str | None = None
    """URI of the table of labels, which must fit memory; its relative names lie below the prefix."""
    uri_column: str = "uri"
    """Its column with the URIs."""
    label_column: str = "label"
    """Its column with the labels: strings are class names, integers class ids."""


class FiltersConfig(Section):
    """Which listed objects count as images (prefix, inventory, webdataset)."""

    include: list[str] | None = Field(None, min_length=1)
    """Globs on the name below the prefix; `*` crosses slashes, case is ignored; unset: the known image suffixes. They
    match the key in an inventory, the member's name in a tar."""
    exclude: list[str] = Field([])
    """Globs of what to leave out."""
    min_bytes: int = Field(0, ge=0)
    """Smallest size, in bytes."""
    max_bytes: int | None = Field(None, ge=1)
    """Largest size, in bytes; unset: any."""
    hidden: bool = False
    """Take what is hidden too: names and folders that begin with a dot, and the folders __MACOSX and @eaDir."""


class ManifestConfig(JobConfig):
    """Make a manifest of an image set; what is there already is never changed."""

    source: SourceConfig
    """Where the images are listed."""
    output: str
    """URI to write the manifest to."""
    labels: LabelsConfig = LabelsConfig()
    """Labels of images listed below a prefix."""
    filters: FiltersConfig = FiltersConfig()
    """Which listed objects count as images."""
    classes: list[str] | None = Field(None, min_length=1)
    """Class names in the order of their ids; unset: the sorted names that occur."""
    shard_size: int = Field(1000, ge=1, le=1_000_000)
    """Images in a shard, the unit of work, retry and commit; of packed ones a row group is one, as it was packed."""
    sample: float | None = Field(None, gt=0, le=1)
    """Fraction of the images to take, drawn by a hash of their uri; unset: all."""
    seed: int = Field(0, ge=0)
    """Another seed draws another sample."""
    limit: int | None = Field(None, ge=1)
    """Take the first so many images, after filters and sample; unset: all."""
    allowed_roots: list[str] = Field([f"{scheme}://" for scheme in storage.SCHEMES], min_length=1)
    """URI prefixes the images may lie under; any other is an error."""
    progress_interval_s: float = Field(5.0, gt=0)
    """Seconds between progress lines."""


def main(config: ManifestConfig) -> dict[str, Any]:
    """Make the manifest that `config` describes."""
    _refuse_idle_settings(config)
    was_there = storage.exists(storage.join(storage.normalise(config.output), "manifest.json"))
    roots = [root if root.endswith("://") else storage.normalise(root) for root in config.allowed_roots]
    manifest = write_manifest(
        config.output,
        _source(config),
        shard_size=config.shard_size,
        classes=config.classes,
        selection=Selection(roots, config.sample, config.limit, config.seed),
        on_progress=_every(config.progress_interval_s),
    )
    return {
        "status": "unchanged" if was_there else "made",
        "manifest": manifest.uri,
        "digest": manifest.digest,
        "num_images": manifest.num_images,
        "num_shards": manifest.num_shards,
        "num_bytes": manifest.num_bytes,
        "num_classes": None if manifest.classes is None else len(manifest.classes),
        "num_labelled": manifest.made_from["num_labelled"],
        "skipped": manifest.made_from["skipped"],
    }


def _refuse_idle_settings(config: ManifestConfig) -> None:
    """Raises ConfigError for settings that would have no effect on this kind of source: they were meant to have one."""
    kind, source = config.source.kind, config.source
    columns = (source.root, source.label_column, source.size_column, source.etag_column)
    if kind != "table" and (any(columns) or source.uri_column != "uri"):
        raise ConfigError(f"source: expected root and column names with kind table alone, got kind {kind}")
    if kind != "prefix" and config.labels != LabelsConfig():
        raise ConfigError(f"labels: expected with source.kind prefix alone, got source.kind {kind}")
    if kind in ("table", "packed") and config.filters != FiltersConfig():
        raise ConfigError(f"filters: expected with source.kind prefix, inventory or webdataset, got {kind}")
    if (config.labels.kind == "table") != (config.labels.table is not None):
        raise ConfigError("labels: expected kind table and a table together, got only one of them")
    if config.labels.kind != "table" and config.labels != LabelsConfig(kind=config.labels.kind):
        raise ConfigError(f"labels: expected column names with kind table alone, got kind {config.labels.kind}")
    if kind == "packed" and config.shard_size != ManifestConfig.model_fields["shard_size"].default:
        raise ConfigError(
            "shard_size: expected with other kinds than packed, whose row groups are the shards; pack the images anew "
            "with it (jobs.pack)"
        )
    if config.sample is None and config.seed:
        raise ConfigError(f"seed: expected with sample alone, which it draws, got {config.seed}")


def _source(config: ManifestConfig) -> Source:
    kind, uri = config.source.kind, config.source.uri
    filters = Filters(**config.filters.model_dump())
    if kind == "table":
        return TableSource(**config.source.model_dump(exclude={"kind"}))
    if kind == "inventory":
        return InventorySource(uri, filters)
    if kind == "packed":
        return PackedSource(uri)
    if kind == "webdataset":
        return WebDatasetSource(uri, filters)
    labels = config.labels
    if labels.kind != "table":
        return PrefixSource(uri, filters, labels.kind)
    assert labels.table is not None
    columns = {"uri_column": labels.uri_column, "label_column": labels.label_column}
    return PrefixSource(uri, filters, read_labels(labels.table, root=uri, **columns))


def _every(interval_s: float) -> Callable[[str, int], None]:
    last = time.monotonic()

    def report(stage: str, num_images: int) -> None:
        nonlocal last
        if time.monotonic() - last >= interval_s:
            last = time.monotonic()
            print(f"manifest: {num_images:,} images {stage}", file=sys.stderr, flush=True)

    return report


if __name__ == "__main__":
    run_job(ManifestConfig, main)
