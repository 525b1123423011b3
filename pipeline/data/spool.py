"""The first pass of making a manifest: a source, filtered and checked, into one temporary file on the local disk.

What needs sight of the whole list (duplicates, class names) is found here without holding the list in memory.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.packed import PACKED_SCHEMA
from pipeline.data.sources import IMAGE_SCHEMA, Source
from pipeline.errors import ManifestError, StorageError

Hashes = npt.NDArray[np.uint64]
_BUCKET_BITS = 6  # 64 files of hashes: one of 10 million uris is 1.2 MB, of 1 billion 125 MB
_NAMED = 3
_SUSPECTS_AT_ONCE = 1_000  # where there are more, it is duplicates, and these name some of them
_MOST_LABELS = 1_000_000


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of a source's images are taken: a `sample` of them, the first `limit` of that.

    None of a source's images may lie outside `allowed_roots`.

    `sample` is a fraction in 0–1, drawn by a hash of the uri under `seed`: the same images in whatever order they come.
    """

    allowed_roots: Sequence[str] = tuple(f"{scheme}://" for scheme in storage.SCHEMES)
    sample: float | None = None
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Spool:
    """The images of a manifest to be, on disk, in order; labels as text."""

    path: Path
    labels: Counter[str]
    skipped: Counter[str]

    def batches(self) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(self.path)) as file, pa.ipc.open_stream(file) as stream:
            yield from stream


def spool(
    source: Source, selection: Selection, folder: Path, on_progress: Callable[[int], None] = lambda num_images: None
) -> Spool:
    """Read `source` to its end into `folder`, which needs some 30 to 100 bytes of room an image.

    Raises ManifestError for a duplicate uri, a uri outside the allowed roots, labels of more classes than there can be,
    and where no image is left; StorageError where the room is not there.
    """
    labels: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    num_images = 0
    path = folder / "images.arrow"
    schema = PACKED_SCHEMA if source.is_packed else IMAGE_SCHEMA
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    hashes = _HashFiles(folder)
    with (
        naming_full_disk(folder),
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, schema, options=options) as stream,
    ):
        for batch in _selected(source.batches(), selection, skipped):
            hashes.add(hash_uris(batch["uri"]))
            for entry in pc.value_counts(batch["label"].drop_null()).to_pylist():
                labels[entry["values"]] += entry["counts"]
            if not source.is_packed:  # whose labels are of a manifest
                _refuse_too_many(labels)
            stream.write_batch(batch)
            num_images += len(batch)
            on_progress(num_images)
    result = Spool(path, labels, source.skipped + skipped)
    if not num_images:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(result.skipped.items()))
        raise ManifestError(f"expected images at {source.describe()}, found none (skipped: {reasons or 'nothing'})")
    _refuse_duplicates(result, hashes.repeated())
    return result


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """What writing to the local `folder` raises where its disk is full says so, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(
            f"{folder}: expected room for 30 to 100 bytes an image, got {os.strerror(error.errno)!r}; make room, or "
            "set TMPDIR to a folder on a larger disk"
        ) from error


def _refuse_too_many(labels: Counter[str]) -> None:
    if len(labels) > _MOST_LABELS:
        named = ", ".join(map(repr, islice(labels, _NAMED)))
        raise ManifestError(
            f"expected labels of at most {_MOST_LABELS:,} classes, got more, such as {named}: do they tell images "
            "apart rather than classes? Take the column or the folders that name classes, or leave labels out"
        )


def _selected(
    batches: Iterator[pa.RecordBatch], selection: Selection, skipped: Counter[str]
) -> Iterator[pa.RecordBatch]:
    room = selection.limit
    for batch in batches:
        is_packed = "source" in batch.schema.names
        _refuse_strangers(batch["source"].unique() if is_packed else batch["uri"], selection.allowed_roots)
        taken = batch
        if selection.sample is not None:
            drawn = hash_uris(batch["uri"], selection.seed) < np.uint64(min(selection.sample, 1 - 2**-53) * 2.0**64)
            taken = batch.filter(pa.array(drawn))
            skipped["not_sampled"] += len(batch) - len(taken)
        if room is not None:
            taken = taken.slice(0, room)
            room -= len(taken)
        if len(taken):
            yield taken
        if room == 0:
            return


def _refuse_strangers(uris: pa.Array, allowed_roots: Sequence[str]) -> None:
    is_plain = pa.repeat(pa.scalar(False), len(uris))
    for root in allowed_roots:
        is_plain = pc.or_(is_plain, pc.starts_with(uris, root if root.endswith("/") else f"{root}/"))
    is_plain = pc.and_not(is_plain, pc.match_substring(uris, "/.."))  # may climb out: looked at one by one
    for uri in uris.filter(pc.invert(is_plain)).to_pylist():
        if not any(storage.is_under(uri, root) for root in allowed_roots):
            raise ManifestError(
                f"expected images under {', '.join(allowed_roots)}, got {uri!r}; change it or allowed_roots"
            )


def hash_uris(uris: pa.Array, seed: int | None = None) -> Hashes:
    """A 64-bit hash of each uri, another one under each `seed`."""
    import pandas.util  # type: ignore[import-untyped]  # half a second that readers of manifests need not wait

    key = "duplicate-search" if seed is None else f"{seed % 2**64:016x}"
    hashed: Hashes = pandas.util.hash_array(uris.to_numpy(zero_copy_only=False), hash_key=key, categorize=False)
    return hashed


class _HashFiles:
    """64-bit hashes on disk, spread over files by their top bits, so that equal ones meet in one small file."""

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / f"hashes-{bucket:02d}" for bucket in range(1 << _BUCKET_BITS)]

    def add(self, hashes: Hashes) -> None:
        ordered = np.sort(hashes)
        starts = np.searchsorted(ordered >> np.uint64(64 - _BUCKET_BITS), np.arange(1, 1 << _BUCKET_BITS))
        for path, part in zip(self._paths, np.split(ordered, starts), strict=True):
            with open(path, "ab") as file:  # opened anew: 64 open files at once are too many for some systems
                file.write(part.tobytes())  # not its own `tofile`, which does not notice a full disk

    def repeated(self) -> Hashes:
        """Every hash that was added more than once, in order."""
        found = []
        for path in self._paths:
            ordered = np.sort(np.fromfile(path, np.uint64))
            found.append(np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))
        return np.concatenate(found)


def _refuse_duplicates(spooled: Spool, suspects: Hashes) -> None:
    """Raises ManifestError naming uris that stand twice; equal hashes alone prove nothing, so the uris are compared."""
    for start in range(0, len(suspects), _SUSPECTS_AT_ONCE):
        twice = _find_twice(spooled, suspects[start : start + _SUSPECTS_AT_ONCE])
        if twice:
            more = " and more" if len(twice) >= _NAMED else ""
            named = ", ".join(map(repr, twice[:_NAMED]))
            raise ManifestError(f"expected every uri once, got twice: {named}{more}; drop the repeated rows")


def _find_twice(spooled: Spool, suspects: Hashes) -> list[str]:
    """Of the uris with these hashes some that stand twice, if any do."""
    counts: Counter[str] = Counter()
    twice: list[str] = []
    for batch in spooled.batches():
        counts.update(batch["uri"].filter(pa.array(np.isin(hash_uris(batch["uri"]), suspects))).to_pylist())
        twice = [uri for uri, count in counts.items() if count > 1]
        if len(twice) >= _NAMED:
            break
    return twice
