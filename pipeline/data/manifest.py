"""The manifest: the frozen, ordered list of images, cut into shards.

    <uri>/images-<tag>-00000.parquet …   the images; row group k of a file is one shard
    <uri>/shards-<tag>.parquet           where each shard is, and where the bytes of a packed one are
    <uri>/manifest.json                  counts, classes, digest, how it was made; written last: makes it a manifest

The tag is the digest's beginning.

Made once, never changed. The digest covers the images (uri, size, etag, label), their order, the cut into shards, the
places of packed ones and the class names; not how it was stored.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import __version__, storage
from pipeline.data.shards import SHARD_SCHEMA, CutShard, Labelling, Shard, cut, digest_of, shards_file, write_files
from pipeline.data.sources import Source
from pipeline.data.spool import Selection, spool
from pipeline.errors import ManifestError, ObjectExistsError, ObjectNotFoundError, first_line

FORMAT_VERSION = 1
_FOOTERS_CACHED = 64
_TAG_LENGTH = 8

logger = logging.getLogger(__name__)

__all__ = ["Manifest", "Shard", "write_manifest"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest that is there. `classes` is None where labels are bare ids or there are none."""

    uri: str
    num_images: int
    num_shards: int
    num_bytes: int
    classes: list[str] | None
    digest: str
    made_from: dict[str, Any] = field(default_factory=dict, repr=False)
    """The source, the selection, how many images were skipped for which reason, how many have a label."""

    @classmethod
    def open(cls, uri: str) -> "Manifest":
        """The manifest at `uri`. Raises ManifestError where there is none, or one this version cannot read."""
        uri = storage.normalise(uri)
        try:
            content = json.loads(storage.read(_json_uri(uri)))
            version = content["version"]
        except ObjectNotFoundError as error:
            raise ManifestError(f"expected a manifest at {uri!r}, found none; make one with jobs.manifest") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(f"expected a manifest at {uri!r}, found a damaged manifest.json: {error!r}") from error
        if version != FORMAT_VERSION:
            raise ManifestError(
                f"expected a manifest of version {FORMAT_VERSION} at {uri!r}, found version {version!r}"
            )
        try:
            names = ("num_images", "num_shards", "num_bytes", "classes", "digest", "made_from")
            return cls(uri, **{name: content[name] for name in names})
        except KeyError as error:
            raise ManifestError(
                f"expected {error} in the manifest.json at {uri!r}, found none; it is damaged"
            ) from error

    def shards(self) -> Iterator[Shard]:
        """All shards in order, streamed. Raises ManifestError where they are not all there."""
        name = shards_file(self.digest[:_TAG_LENGTH])
        num_shards = num_images = 0
        with (
            _undamaged(self.uri, name),
            storage.open_file(storage.join(self.uri, name)) as file,
        ):
            table = pq.ParquetFile(file)
            if table.schema_arrow.names != SHARD_SCHEMA.names:
                raise pa.ArrowInvalid(f"expected columns {SHARD_SCHEMA.names}, found {table.schema_arrow.names}")
            for batch in table.iter_batches(1024):
                for row in batch.to_pylist():
                    shard = Shard(**row)
                    num_shards, num_images = num_shards + 1, num_images + shard.num_images
                    yield shard
        if (num_shards, num_images) != (self.num_shards, self.num_images):
            raise ManifestError(
                f"expected {self.num_shards} shards with {self.num_images} images at {self.uri!r}, "
                f"found {num_shards} with {num_images}; it is damaged"
            )

    def images(self, shard: Shard) -> pa.Table:
        """The images of one shard, in order: `uri string, size int64, etag string, label int32`, all but uri nullable.

        Raises ManifestError where they are not all there.
        """
        uri = storage.join(self.uri, shard.file)
        with _undamaged(self.uri, shard.file), storage.open_file(uri) as file:
            footer = _footer(uri, self.digest)
            images = pq.ParquetFile(file, metadata=footer).read_row_group(shard.row_group, use_threads=False)
        if images.num_rows != shard.num_images:
            raise ManifestError(
                f"expected {shard.num_images} images in shard {shard.shard_id} of {self.uri!r}, "
                f"found {images.num_rows}; it is damaged"
            )
        return images


def write_manifest(
    uri: str,
    source: Source,
    *,
    shard_size: int,
    classes: Sequence[str] | None = None,
    selection: Selection = Selection(),  # noqa: B008 (frozen)
    on_progress: Callable[[str, int], None] = lambda stage, num_images: None,
) -> Manifest:
    """Make the manifest of `source` at `uri`, `shard_size` images a shard (a packed row group stays one shard).

    Labels that are class names become their rank among the sorted names, or their place in `classes` where that is
    given; class ids stay. Making a manifest again that is there already does nothing. Memory is bounded, whatever the
    number of images; the local temporary folder takes some 30 to 100 bytes an image meanwhile.

    Raises ManifestError for a source that cannot be used, and where another manifest is at `uri`.
    """
    uri = storage.normalise(uri)
    if shard_size < 1:
        raise ManifestError(f"expected a shard_size of at least 1 image, got {shard_size}")
    existing = Manifest.open(uri) if storage.exists(_json_uri(uri)) else None
    with tempfile.TemporaryDirectory(prefix="manifest-") as folder:
        spooled = spool(source, selection, Path(folder), lambda count: on_progress("read", count))
        labelling = Labelling.of(spooled.labels, source.label_kind, classes)
        digest = digest_of(cut(spooled.batches(), labelling, shard_size), labelling.classes)
        if existing is not None:
            return _same_or_refused(existing, digest)
        shards = cut(spooled.batches(), labelling, shard_size)
        made_from = {
            **source.describe(),
            "shard_size": shard_size,
            "selection": asdict(selection),
            "skipped": dict(sorted(spooled.skipped.items())),
            "num_labelled": spooled.labels.total(),
        }
        return _write(uri, digest, shards, labelling.classes, made_from, lambda count: on_progress("written", count))


def _same_or_refused(existing: Manifest, digest: str) -> Manifest:
    if existing.digest != digest:
        raise ManifestError(
            f"expected no manifest at {existing.uri!r}, found another one (digest {existing.digest}, this one would be "
            f"{digest}); a manifest never changes, so write to a new uri"
        )
    logger.info("%s already holds this manifest: nothing to do", existing.uri)
    return existing


def _write(
    uri: str,
    digest: str,
    shards: Iterator[CutShard],
    classes: list[str] | None,
    made_from: dict[str, Any],
    on_progress: Callable[[int], None],
) -> Manifest:
    """Images, then shards, then `manifest.json`, without which there is no manifest.

    Names carry the digest, so that of two different manifests made here at once neither overwrites the other's files.
    What a stopped one leaves stays: a twin, whose files are the very same, may be about to finish with them.
    """

    def put(name: str, data: bytes) -> None:
        storage.write(storage.join(uri, name), data)

    try:
        totals = write_files(shards, put, on_progress, tag=digest[:_TAG_LENGTH])
        assert totals.digest(classes) == digest
        content = {
            "version": FORMAT_VERSION,
            "num_images": totals.num_images,
            "num_shards": totals.num_shards,
            "num_bytes": totals.num_bytes,
            "classes": classes,
            "digest": digest,
            "made_from": made_from,
            "created_by": {"image-batch-pipeline": __version__, "pyarrow": pa.__version__},
        }
        storage.write(_json_uri(uri), json.dumps(content, indent=1).encode(), if_absent=True)
    except ObjectExistsError:
        return _same_or_refused(Manifest.open(uri), digest)
    return Manifest.open(uri)


def _json_uri(uri: str) -> str:
    return storage.join(uri, "manifest.json")


@lru_cache(_FOOTERS_CACHED)
def _footer(uri: str, digest: str) -> pq.FileMetaData:
    """The footer of an images file; `digest` keeps manifests apart that stood at one uri one after the other."""
    with storage.open_file(uri) as file:
        return pq.read_metadata(file)


@contextmanager
def _undamaged(uri: str, name: str) -> Iterator[None]:
    try:
        yield
    except (ObjectNotFoundError, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the file system's; damage pyarrow tells of has no number
            raise
        raise ManifestError(f"expected a readable {name} in the manifest at {uri!r}: {first_line(error)}") from error
