"""Proof that a run is row-complete: from its receipts when it ends, from its files alone when verified."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.manifest import Manifest, Shard
from pipeline.errors import ObjectNotFoundError, ReconcileError
from pipeline.inference.commit import Receipt, committed_shard_ids, read_receipt
from pipeline.inference.run import Run
from pipeline.tables.schemas import TABLES, TableName
from pipeline.tables.writing import shard_path, table_folder


class Whole(Protocol):
    """What receipts must add up to: a run, or the manifest that is worked through."""

    @property
    def num_images(self) -> int: ...

    @property
    def num_shards(self) -> int: ...


@dataclass(slots=True)
class Totals:
    """The receipts of a run, added up."""

    num_shards: int = 0
    num_images: int = 0
    num_predicted: int = 0
    num_errors: int = 0
    num_bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def add(self, receipt: Receipt) -> None:
        self.num_shards += 1
        self.num_images += receipt.num_images
        self.num_predicted += receipt.num_predicted
        self.num_errors += receipt.num_errors
        self.num_bytes += sum(file.num_bytes for file in receipt.files)
        self.errors.update(receipt.errors)
        self.seconds.update(receipt.seconds)

    def as_dict(self) -> dict[str, Any]:
        """For the summary: counts, errors by kind (most frequent first), seconds by stage over all actors."""
        return {
            "num_images": self.num_images,
            "num_predicted": self.num_predicted,
            "num_errors": self.num_errors,
            "errors_by_kind": dict(self.errors.most_common()),
            "num_shards": self.num_shards,
            "table_bytes": self.num_bytes,
            "seconds_by_stage": {stage: round(seconds, 1) for stage, seconds in self.seconds.items()},
        }


def reconcile(whole: Whole, receipts: Iterable[Receipt], output_uri: str, folders: Iterable[str]) -> Totals:
    """Add up the receipts of work that ended; every image must be accounted for, every file be there.

    `folders` of `output_uri` hold the files. Raises ReconcileError where the receipts do not add up to the images of
    `whole`, or a Parquet file is missing, of another size than committed, or committed by no shard.
    """
    totals = Totals()
    sizes: dict[str, int] = {}
    for receipt in receipts:
        if receipt.num_predicted + receipt.num_errors != receipt.num_images:
            raise ReconcileError(
                f"shard {receipt.shard_id}: expected {receipt.num_images} images accounted for, got "
                f"{receipt.num_predicted} with a result and {receipt.num_errors} errors",
                **totals.as_dict(),
            )
        totals.add(receipt)
        sizes.update({file.path: file.num_bytes for file in receipt.files})
    if (totals.num_shards, totals.num_images) != (whole.num_shards, whole.num_images):
        raise ReconcileError(
            f"expected {whole.num_images} images in {whole.num_shards} shards accounted for, got "
            f"{totals.num_images} in {totals.num_shards}; run the same command again",
            **totals.as_dict(),
        )
    _refuse_other_files(output_uri, folders, sizes)
    return totals


def _refuse_other_files(output_uri: str, folders: Iterable[str], sizes: dict[str, int]) -> None:
    start = len(storage.join(output_uri, ""))
    listed = (info for folder in folders for info in storage.list_objects(storage.join(output_uri, folder)))
    found = {info.uri[start:]: info.size for info in listed if info.uri.endswith(".parquet")}
    wrong = sorted(path for path in sizes | found if sizes.get(path) != found.get(path))
    if wrong:
        expected = f"{sizes[wrong[0]]} bytes" if wrong[0] in sizes else "no such file"
        there = f"{found[wrong[0]]} bytes" if wrong[0] in found else "none"
        raise ReconcileError(
            f"expected {expected} at {storage.join(output_uri, wrong[0])!r}, found {there}. Is the output a folder "
            "that not all nodes share? Else remove a stray file, or delete the commit of a shard that lost one, and "
            "run the same command again",
            num_faults=len(wrong),
        )


def find_faults(run: Run) -> Iterator[str]:
    """Everything wrong with a run, from its files alone, a sentence each; nothing where it is proven whole.

    Checks every shard for a commit, every committed file for its digest, every image of the manifest for exactly one
    place, in the tables asked for or in `errors`, embeddings against predictions, and the run's folders for stray
    files. Memory is that of a few shards and a number for each. Raises ManifestError and StorageError where it cannot
    look.
    """
    manifest = Manifest.open(run.manifest_uri)
    if manifest.digest != run.manifest_digest:
        yield f"manifest: expected digest {run.manifest_digest}, found {manifest.digest} at {run.manifest_uri}"
        return
    committed = committed_shard_ids(run.uri)
    known = {shard.shard_id for shard in manifest.shards()}

    def check(shard: Shard) -> list[str]:
        return _faults_of_shard(run, manifest, shard, is_committed=shard.shard_id in committed)

    for faults in storage.map_concurrently(check, manifest.shards(), concurrency=8):
        yield from faults
    yield from (f"shard {shard_id}: committed, but not in the manifest" for shard_id in sorted(committed - known))
    yield from _stray_files(run, known)


def _faults_of_shard(run: Run, manifest: Manifest, shard: Shard, *, is_committed: bool) -> list[str]:
    where = f"shard {shard.shard_id}"
    if not is_committed:
        return [f"{where}: no commit; run the same command again"]
    try:
        receipt = read_receipt(run.uri, shard.shard_id)
    except ReconcileError as error:
        return [f"{where}: {error}"]
    faults: list[str] = []
    tables: dict[TableName, pa.Table] = {}
    by_path = {file.path: file for file in receipt.files}
    for name in run.table_names:
        path = shard_path(name, run.run_id, shard.shard_id)
        committed_file = by_path.pop(path, None)
        if committed_file is None:
            faults.append(f"{where}: expected {path} in its commit, found none")
            continue
        try:
            data = storage.read(storage.join(run.output_uri, path))
        except ObjectNotFoundError:
            faults.append(f"{path}: committed, but gone")
            continue
        if hashlib.sha256(data).hexdigest() != committed_file.sha256:
            faults.append(f"{path}: expected sha256 {committed_file.sha256}, found other bytes")
            continue
        tables[name] = pq.read_table(pa.BufferReader(data))
    faults += [f"{where}: its commit names {path}, which no table has" for path in by_path]
    if len(tables) == len(run.table_names):
        counted = (receipt.num_images, receipt.num_predicted, receipt.num_errors, sum(receipt.errors.values()))
        num_errors = tables["errors"].num_rows
        if counted != (there := (shard.num_images, shard.num_images - num_errors, num_errors, num_errors)):
            faults.append(f"{where}: its commit counts {counted} images, predicted, errors, by kind, not {there}")
        faults += [f"{where}: {fault}" for fault in _faults_of_rows(run, manifest.images(shard), tables)]
    return faults


def _faults_of_rows(run: Run, images: pa.Table, tables: dict[TableName, pa.Table]) -> Iterator[str]:
    """Whether the rows of a shard's tables are the manifest's, each image once, in order, for every model."""
    models = [model.name for model in run.models]
    expected = images["uri"].to_pylist()
    failed = tables["errors"]["uri"].to_pylist()
    failed_set = set(failed)
    succeeded = [uri for uri in expected if uri not in failed_set]
    if [uri for uri in expected if uri in failed_set] != failed:
        yield "errors: " + _difference([uri for uri in expected if uri in failed_set], failed)
    pairs = [(uri, model) for uri in succeeded for model in models]
    for name in run.table_names:
        if name == "errors":
            continue
        found = list(zip(tables[name]["uri"].to_pylist(), tables[name]["model"].to_pylist(), strict=True))
        if found != pairs:
            yield f"{name}: " + _difference(pairs, found)


def _difference(expected: list[Any], found: list[Any]) -> str:
    missing, extra = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    if missing:
        return f"{sum(missing.values())} rows missing, first {next(iter(missing))!r}"
    if extra:
        return f"{sum(extra.values())} rows too many or in another table too, first {next(iter(extra))!r}"
    return "rows out of the manifest's order"


def _stray_files(run: Run, known: set[int]) -> Iterator[str]:
    expected = run.table_names
    for name in TABLES:
        folder = storage.join(run.output_uri, table_folder(name, run.run_id))
        for info in storage.list_objects(folder):
            file_name = info.uri.rpartition("/")[2]
            stem, _, suffix = file_name.partition(".")
            is_expected = name in expected and suffix == "parquet" and stem.isdigit() and int(stem) in known
            if not is_expected or info.uri != storage.join(run.output_uri, shard_path(name, run.run_id, int(stem))):
                yield f"{info.uri}: a stray file, of no shard of this run"
