"""Where a manifest's images come from: first of all a prefix (others: `uri_table.py`, `inventory.py`, `packed.py`).

A source streams record batches of `IMAGE_SCHEMA`, in a fixed order; nothing of it is held in memory but a label table.
"""

import csv
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import translate
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.errors import AccessDeniedError, ManifestError, ObjectNotFoundError, first_line

IMAGE_GLOBS = (
    *("*.jpg", "*.jpeg", "*.jpe", "*.jfif", "*.png", "*.gif", "*.webp", "*.bmp", "*.dib", "*.tif", "*.tiff"),
    *("*.avif", "*.heic", "*.heif", "*.ppm", "*.pgm", "*.pbm", "*.pnm", "*.jp2"),
)
LISTED_ROWS = 8192
TABLE_ROWS = 65536
_NO_DATA = re.compile("(?:^|/)[_.]")  # among parts, by convention of Spark and its like
_HIDDEN = re.compile(r"(?:^|/)(?:\.(?!\.?/)|__MACOSX/|@eaDir/)")  # by convention, by macOS, by Synology

LABEL_FIELD = pa.field("label", pa.string())
IMAGE_SCHEMA = pa.schema(
    [pa.field("uri", pa.string()), pa.field("size", pa.int64()), pa.field("etag", pa.string()), LABEL_FIELD]
)


LabelKind: TypeAlias = Literal["names", "ids", "text"]


class LabelTable(NamedTuple):
    """Labels by URI, and what kind of label all of them are."""

    labels: dict[str, str]
    kind: LabelKind


class Source(Protocol):
    """A stream of images; `skipped` and `label_kind` are complete once `batches` has ended.

    `label_kind`: labels are class `names`, class `ids` as decimal text, or `text` (ids if all of it are numbers).
    `is_packed`: batches also have the columns of `packed.PLACE_SCHEMA`, and never span two places.
    """

    is_packed: bool
    label_kind: LabelKind

    @property
    def skipped(self) -> Counter[str]: ...

    def batches(self) -> Iterator[pa.RecordBatch]: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(slots=True)
class Filters:
    """Which objects count as images; a glob's `*` also crosses slashes, and no glob minds case.

    `include` None means the known image suffixes; what is `hidden`, or in a hidden folder, counts only where that is
    asked for. Sizes are in bytes. Raises ManifestError where the sizes exclude all.
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    min_bytes: int = 0
    max_bytes: int | None = None
    hidden: bool = False
    skipped: Counter[str] = field(default_factory=Counter)
    _included: re.Pattern[str] = field(init=False)
    _excluded: re.Pattern[str] | None = field(init=False)

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise ManifestError(f"expected min_bytes <= max_bytes, got {self.min_bytes} > {self.max_bytes}")
        self._included = _any_glob(IMAGE_GLOBS if self.include is None else self.include)
        self._excluded = _any_glob(self.exclude) if self.exclude else None

    def accepts(self, name: str, size: int | None) -> bool:
        """Whether the object `name` (relative to its source) counts; the reason it does not is counted."""
        reason = self._reason_against(name, size)
        if reason:
            self.skipped[reason] += 1
        return not reason

    def describe(self) -> dict[str, Any]:
        """The settings, for the manifest's record of how it was made."""
        names = ("include", "exclude", "min_bytes", "max_bytes", "hidden")
        return {name: getattr(self, name) for name in names}

    def _reason_against(self, name: str, size: int | None) -> str | None:
        if not self._included.match(name):
            return "not_included"
        if not self.hidden and _HIDDEN.search(name):
            return "hidden"
        if self._excluded and self._excluded.match(name):
            return "excluded"
        if size is not None and size < self.min_bytes:
            return "too_small"
        if size is not None and self.max_bytes is not None and size > self.max_bytes:
            return "too_large"
        return None


def _any_glob(globs: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, globs)), re.IGNORECASE)


@dataclass(slots=True)
class PrefixSource:
    """Every image below a prefix; labelled by the first folder below it, by a table (see `read_labels`), or not."""

    prefix: str
    filters: Filters = field(default_factory=Filters)
    labels: Literal["none", "folders"] | LabelTable = "none"
    is_packed: bool = field(default=False, init=False)
    label_kind: LabelKind = field(default="text", init=False)

    def __post_init__(self) -> None:
        self.prefix = storage.normalise(self.prefix)
        self.label_kind = self.labels.kind if isinstance(self.labels, LabelTable) else "names"

    @property
    def skipped(self) -> Counter[str]:
        return self.filters.skipped

    def batches(self) -> Iterator[pa.RecordBatch]:
        start = len(storage.join(self.prefix, ""))
        num_images = num_labelled = 0
        with readable(self.prefix, "a prefix to list"):
            found = storage.list_objects(self.prefix)
            accepted = (image for image in found if self.filters.accepts(image.uri[start:], image.size))
            while page := list(islice(accepted, LISTED_ROWS)):
                labels = [self._label_of(image.uri, image.uri[start:]) for image in page]
                num_images, num_labelled = num_images + len(page), num_labelled + len(page) - labels.count(None)
                uris = to_strings(image.uri for image in page)
                yield pa.record_batch(
                    [uris, [image.size for image in page], [image.etag for image in page], to_strings(labels)],
                    schema=IMAGE_SCHEMA,
                )
        if isinstance(self.labels, LabelTable) and num_images and not num_labelled:
            named = next(iter(self.labels.labels), "nothing")
            raise ManifestError(f"expected labels for images below {self.prefix!r}, got some for others, as {named!r}")

    def _label_of(self, uri: str, name: str) -> str | None:
        if isinstance(self.labels, LabelTable):
            return self.labels.labels.get(uri)
        folder, slash, _ = name.partition("/")
        return folder if slash and self.labels == "folders" else None

    def describe(self) -> dict[str, Any]:
        labels = "table" if isinstance(self.labels, LabelTable) else self.labels
        return {"source": "prefix", "uri": self.prefix, "labels": labels, **self.filters.describe()}


def to_strings(values: Iterable[str | None]) -> pa.Array:
    """An Arrow array of `values`. Raises ManifestError naming one that is not UTF-8, as file names may be."""
    listed = list(values)
    try:
        return pa.array(listed, pa.string())
    except UnicodeEncodeError as error:
        culprit = next(value for value in listed if value and not _is_utf8(value))
        raise ManifestError(f"expected names in UTF-8, got {culprit!r}; rename it or exclude it") from error


def _is_utf8(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def bare_etags(etags: pa.Array) -> pa.Array:
    """Etags, strings, without the quotes that stores answer them in and tables may keep; empty ones are unknown."""
    bare = pc.ascii_trim(etags, '"')
    return pc.if_else(pc.equal(bare, ""), pa.scalar(None, pa.string()), bare)


def require_columns(table: str, columns: Iterable[str], there: Sequence[str]) -> None:
    """Raises ManifestError naming the first of `columns` that is missing, and those that are there."""
    for column in columns:
        if column not in there:
            raise ManifestError(f"{table!r}: expected a column {column!r}, found {', '.join(there) or 'none'}")


def parts(uri: str, suffixes: tuple[str, ...]) -> list[str]:
    """`uri` itself where it is an object that ends with one of `suffixes`, else all such below it, in listing order.

    Left out are names and folders below it that begin with `_` or `.`. Raises ManifestError where there is none.
    """
    start = len(storage.join(uri, ""))
    with readable(uri, "an object or a prefix to list"):
        if uri.endswith(suffixes) and storage.exists(uri):
            return [uri]
        listed = (part.uri for part in storage.list_objects(uri) if not _NO_DATA.search(part.uri[start:]))
        found = [part for part in listed if part.endswith(suffixes)]
    if not found:
        raise ManifestError(f"expected objects ending in {' or '.join(suffixes)} at {uri!r}, found none")
    return found


@contextmanager
def readable(uri: str, expected: str) -> Iterator[None]:
    """What goes wrong in reading a source, as a ManifestError that says what was expected at `uri`."""
    try:
        yield
    except (ObjectNotFoundError, AccessDeniedError) as error:
        raise ManifestError(f"expected {expected}: {error}") from error
    except (pa.ArrowException, EOFError, OSError, zlib.error, csv.Error, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno:  # the file system's; damage that is found has no number
            raise
        raise ManifestError(
            f"expected {expected} at {uri!r}, got one that cannot be read: {first_line(error)}"
        ) from error
