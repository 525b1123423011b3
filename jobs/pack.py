"""Pack the images of a manifest into Parquet shards to train from; run the same command again to resume.

python -m jobs.pack --config configs/pack.yaml
python -m jobs.pack --manifest URI --output URI --reencode.shorter_side 256

    <output>/manifest.json …          a manifest of the packed images; written last
    <output>/data/<shard>.parquet     the images: uri, size, etag, label, bytes; one row group
    <output>/errors/<shard>.parquet   those that could not be packed: uri, etag, stage, error, message
    <output>/_pack/                   plan.json, order/ (the shuffled manifest), commits/, summary.json

One Ray Data row is one shard, packed by one task of one CPU; a node needs some three times a shard's bytes for each of
its CPUs. The driver's memory is that of a 64th of the images' rows, never of their bytes.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from jobs import run_job
from pipeline import storage
from pipeline.cluster import connected_ray
from pipeline.config import ClusterConfig, JobConfig, refuse_change
from pipeline.data.manifest import Manifest, Shard, write_manifest
from pipeline.data.pack import Reencode, converting, encode, pack_images
from pipeline.data.packed import PackedSource
from pipeline.data.shuffle import ShuffledSource
from pipeline.errors import ConfigError, ObjectExistsError, ObjectNotFoundError, ReconcileError
from pipeline.inference.commit import Receipt, committed_shard_ids, read_receipts, refusing_unshared
from pipeline.inference.config import ImagesConfig
from pipeline.inference.reconcile import Totals, reconcile
from pipeline.tables import writing

_SHARD_SIZE = 1000
_COMPARED_BYTES = 16 << 20
Row = dict[str, Any]


class PackConfig(JobConfig):
    """Pack the images of a manifest into Parquet shards of encoded bytes and labels; run it again to resume."""

    resumes: ClassVar[bool] = True

    manifest: str
    """URI of the manifest (made by jobs.manifest)."""
    output: str
    """URI to write to; it becomes a manifest of the packed images."""
    shuffle_seed: int | None = Field(0, ge=0, lt=2**63)
    """Draws the order the images are packed in, so that a shard holds images of all classes; null: the manifest's order
    and shards, the only ones for images that are packed already."""
    shard_size: int | None = Field(None, ge=1, le=1_000_000)
    """Images in a packed shard; unset: 1000. In the manifest's order its shards stay as they are."""
    reencode: Reencode | None = None
    """Smaller JPEGs instead of the images' own bytes; unset: those, untouched."""
    check: bool = False
    """Decode each image, and make a row of the errors table of one that does not decode; reencode always does so."""
    images: ImagesConfig = ImagesConfig()
    """How images are read."""
    cluster: ClusterConfig = ClusterConfig()
    progress_interval_s: float = Field(5.0, gt=0)
    """Seconds between progress lines where standard error is no terminal."""


@dataclass(frozen=True)
class Work:
    """What packing a shard takes: where it is listed and written, and how its images are read and converted."""

    manifest_uri: str
    manifest_digest: str
    output_uri: str
    reencode: Reencode | None
    check: bool
    images: ImagesConfig

    @property
    def lineage(self) -> dict[str, str]:
        """What the files' schema metadata tells of their origin."""
        reencode = self.reencode.model_dump_json() if self.reencode else "null"
        return {"manifest_digest": self.manifest_digest, "reencode": reencode}


def main(config: PackConfig) -> dict[str, Any]:
    """Pack, or go on packing, what `config` describes."""
    start = time.monotonic()
    manifest = Manifest.open(storage.normalise(config.manifest))
    output = storage.normalise(config.output)
    records = storage.join(output, "_pack")
    ordered = _ordered(config, manifest, output, records)
    if config.reencode is None:
        _refuse_too_large(ordered)
    committed = committed_shard_ids(records)
    pending = [shard for shard in ordered.shards() if shard.shard_id not in committed]
    work = Work(ordered.uri, ordered.digest, output, config.reencode, config.check, config.images)
    images_per_s = _pack_and_commit(config, work, ordered, pending, records) if pending else 0.0
    for folder in ("data", "errors", "_pack"):
        storage.sweep_temporary_files(storage.join(output, folder))
    packed, totals = _publish(output, records, ordered, manifest.classes)
    summary = {
        "status": "done" if pending else "was done",
        "manifest": packed.uri,
        "digest": packed.digest,
        "num_images": totals.num_images,
        "num_packed": packed.num_images,
        "num_errors": totals.num_errors,
        "errors_by_kind": dict(totals.errors.most_common()),
        "num_shards": packed.num_shards,
        "num_bytes": packed.num_bytes,
        "images_per_s": images_per_s,
        "duration_s": round(time.monotonic() - start, 1),
        "seconds_by_stage": totals.as_dict()["seconds_by_stage"],
    }
    summary_uri = storage.join(records, "summary.json")
    if pending or not storage.exists(summary_uri):  # that of who did something says more
        storage.write(summary_uri, json.dumps(summary, indent=1).encode())
    return summary


# --- the plan --------------------------------------------------------------------------------------------------------


def _ordered(config: PackConfig, manifest: Manifest, output: str, records: str) -> Manifest:
    """The manifest whose shards are packed, one by one: a shuffled one, made once, or the images' own.

    Raises ConfigError where the output began under another config, or belongs to something else.
    """
    if config.shuffle_seed is None and config.shard_size is not None:
        raise ConfigError("shard_size: expected with a shuffle_seed alone; the manifest's order keeps its shards too")
    if config.images.reduced_decode is not None:
        raise ConfigError("images.reduced_decode: is for predictions; reencode.shorter_side packs smaller images")
    shuffled = None if config.shuffle_seed is None else ShuffledSource(manifest, config.shuffle_seed)
    _record_plan(_deciding_fields(config, manifest), output, records)
    if shuffled is None:
        return manifest
    uri = storage.join(records, "order")
    if storage.exists(storage.join(uri, "manifest.json")):
        return Manifest.open(uri)
    return write_manifest(uri, shuffled, shard_size=config.shard_size or _SHARD_SIZE, classes=manifest.classes)


def _refuse_too_large(ordered: Manifest) -> None:
    """Raises ConfigError for a shard that no store takes as one object."""
    for shard in ordered.shards():
        if shard.num_bytes > storage.LARGEST_BYTES:
            raise ConfigError(
                f"shard_size: expected shards of at most {storage.LARGEST_BYTES / 1e9:,.1f} GB, got "
                f"{shard.num_bytes / 1e9:,.1f} GB of {shard.num_images} images in shard {shard.shard_id}; "
                "pack to another output with a smaller shard_size, or from a manifest of smaller shards"
            )


def _record_plan(fields: dict[str, Any], output: str, records: str) -> None:
    uri = storage.join(records, "plan.json")
    if storage.exists(storage.join(output, "manifest.json")) and not storage.exists(uri):
        raise ConfigError(f"output: expected no manifest at {output!r} yet, found one that was not packed there")
    try:
        storage.write(uri, json.dumps(fields, indent=1).encode(), if_absent=True)
    except ObjectExistsError:
        remedy = f"the packing at {output!r} began otherwise; go back to that, or set another output"
        refuse_change(json.loads(storage.read(uri)), fields, remedy)


def _deciding_fields(config: PackConfig, manifest: Manifest) -> dict[str, Any]:
    """Fields that decide the files' bytes, which must stay; places and how hard to fetch may change."""
    return {
        "manifest": manifest.digest,
        "shuffle_seed": config.shuffle_seed,
        "shard_size": None if config.shuffle_seed is None else config.shard_size or _SHARD_SIZE,
        "reencode": config.reencode.model_dump() if config.reencode else None,
        "check": config.check,
        "images": config.images.deciding_fields(),
    }


# --- the graph -------------------------------------------------------------------------------------------------------


def _pack_and_commit(
    config: PackConfig, work: Work, ordered: Manifest, pending: Sequence[Shard], records: str
) -> float:
    """Do what is pending; the images per second of this attempt."""
    with connected_ray(config.cluster) as nodes:
        if not any(node.cpus for node in nodes):
            raise ConfigError("expected a cluster with at least one CPU, got none; add nodes")
        from pipeline.inference.flow import commit_receipts, receipts_of, shard_dataset, start_attempts

        attempts = start_attempts()
        dataset = shard_dataset(pending).map_batches(
            pack_shard,
            fn_kwargs={"work": work, "attempts": attempts},
            batch_size=1,
            batch_format="numpy",
            num_cpus=1,
        )
        return commit_receipts(
            records,
            refusing_unshared(receipts_of(dataset, attempts, {"pack": "tasks of 1 CPU each"}), work.output_uri),
            num_images=ordered.num_images,
            num_done=ordered.num_images - sum(shard.num_images for shard in pending),
            progress_interval_s=config.progress_interval_s,
        )


def pack_shard(rows: Row, work: Work, attempts: Any) -> Row:
    """A CPU task that packs a shard; one that follows a death decodes each image in a child process."""
    from pipeline.inference.workers import attempting, open_unchanged, receipt_rows, shards_of

    [shard] = shards_of(rows)
    manifest = open_unchanged(work.manifest_uri, work.manifest_digest)
    with attempting(attempts, "pack", shard) as attempt:
        return receipt_rows([pack_and_write(work, manifest, shard, attempt)])


def pack_and_write(work: Work, manifest: Manifest, shard: Shard, attempt: int = 1) -> Receipt:
    """Pack a shard and write its two files; knows nothing of Ray. Raises StorageError."""
    start = time.perf_counter()
    images, pixels = manifest.images(shard), work.images.max_pixels
    with converting(work.reencode, check=work.check, max_pixels=pixels, isolated=attempt > 1) as convert:
        packed = pack_images(images, work.images.fetch(shard, images), convert, work.lineage)
    write_start = time.perf_counter()
    errors = writing.errors_table(images, packed.errors, work.lineage)
    files = [
        _write(work.output_uri, f"data/{shard.shard_id:08d}.parquet", packed.table.num_rows, encode(packed.table)),
        _write(work.output_uri, f"errors/{shard.shard_id:08d}.parquet", errors.num_rows, writing.encode(errors)),
    ]
    end = time.perf_counter()
    seconds = {**packed.seconds, "write": end - write_start, "total": end - start}
    kinds = Counter(f"{error.stage}/{error.error}" for error in packed.errors.values())
    return Receipt(
        shard_id=shard.shard_id,
        num_images=shard.num_images,
        num_predicted=packed.table.num_rows,
        num_errors=errors.num_rows,
        errors=dict(sorted(kinds.items())),
        files=files,
        seconds={stage: round(value, 4) for stage, value in seconds.items()},
        attempt=attempt,
    )


def _write(output: str, path: str, num_rows: int, data: bytes) -> writing.WrittenFile:
    """Write a file, but leave one alone that holds the same: its etag, which the manifest keeps, may tell its age.

    Not put-if-absent, which is one request however large; what a twin writes here is equal, or its receipt refused.
    """
    uri = storage.join(output, path)
    if not _holds(uri, data):
        storage.write(uri, data)
    return writing.WrittenFile.of(path, num_rows, data)


def _holds(uri: str, data: bytes) -> bool:
    """Whether there is an object of these bytes; read in parts, since a whole may not come in time."""
    try:
        with storage.open_file(uri) as file:
            return all(
                file.read(_COMPARED_BYTES) == data[start : start + _COMPARED_BYTES]
                for start in range(0, len(data) + 1, _COMPARED_BYTES)
            )
    except ObjectNotFoundError:
        return False


# --- the proof -------------------------------------------------------------------------------------------------------


def _publish(output: str, records: str, ordered: Manifest, classes: list[str] | None) -> tuple[Manifest, Totals]:
    """Make the output a manifest, once every image is accounted for and every file is there.

    Raises ReconcileError where that is not so.
    """
    totals = reconcile(ordered, read_receipts(records, committed_shard_ids(records)), output, ("data", "errors"))
    source = _AllPacked(storage.join(output, "data"), totals.num_predicted)
    return write_manifest(output, source, shard_size=_SHARD_SIZE, classes=classes), totals


@dataclass(slots=True)
class _AllPacked(PackedSource):
    """The packed images, refused at their end, when no manifest is written yet, where they are not `num_images`."""

    num_images: int

    def batches(self) -> Iterator[pa.RecordBatch]:
        num_found = 0
        for batch in PackedSource.batches(self):
            num_found += len(batch)
            yield batch
        if num_found != self.num_images:
            raise ReconcileError(f"expected {self.num_images} images in {self.uri!r}, found {num_found}")


if __name__ == "__main__":
    run_job(PackConfig, main)
