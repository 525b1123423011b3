"""The exceptions of the pipeline, each of them part of its interface.

    PipelineError                 every error this package raises on purpose
    ├── ConfigError               a config field is unknown, ill-typed or impossible here           exit code 2
    ├── ManifestError             a source of images or a manifest cannot be used as it stands      exit code 2
    ├── BundleError               a bundle, a checkpoint or an alias cannot be used as it stands    exit code 2
    │   └── NotKeptError          what was compiled cannot be kept: the registry allows no writes
    ├── StorageError              an object store or file system refused or failed
    │   ├── ObjectNotFoundError
    │   ├── ObjectExistsError     put-if-absent found the object there already
    │   ├── ObjectTooLargeError   the object is larger than its reader will take
    │   └── AccessDeniedError
    ├── ImageError                one image cannot be used: becomes a row of the `errors` table
    ├── RunError                  a run cannot go on; what is committed stays                        exit code 1
    └── ReconcileError            a run or its verification found rows missing, double or altered    exit code 3

A message says what was expected, what came and what to do about it.
"""

from typing import Any


class PipelineError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what a job ends with when it meets one.

    `details` are added to the job's summary.
    """

    exit_code = 1

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details


class ConfigError(PipelineError):
    """A config field is unknown, ill-typed or impossible on this cluster."""

    exit_code = 2


class ManifestError(PipelineError):
    """A source of images or a manifest cannot be used as it stands."""

    exit_code = 2


class BundleError(PipelineError):
    """A bundle, a checkpoint or a registry alias cannot be used as it stands."""

    exit_code = 2


class NotKeptError(BundleError):
    """A network does compile, but the registry allows no writes: so it is with whatever else were compiled."""


class StorageError(PipelineError):
    """An object store or file system refused or failed."""


class ObjectNotFoundError(StorageError):
    """The object is not there."""


class ObjectExistsError(StorageError):
    """Put-if-absent found the object there already."""


class ObjectTooLargeError(StorageError):
    """The object is larger than its reader will take; `details` tell its `size`."""


class AccessDeniedError(StorageError):
    """The credentials in the environment do not allow this."""


class ImageError(PipelineError):
    """One image cannot be used; it becomes one row of the `errors` table and harms nothing else.

    `stage` is where it failed (`fetch`, `decode`, `preprocess`, `predict`, `encode`), `error` a stable snake_case
    kind to group by (`not_found`, `truncated`, …), the message the rest, the same in every run. `cause` is what a
    library told, for whoever stops because of it.
    """

    def __init__(self, stage: str, error: str, message: str, cause: str = "") -> None:
        super().__init__(message)
        self.stage, self.error, self.message, self.cause = stage, error, message, cause

    @property
    def with_cause(self) -> str:
        """The message, and what lies beneath."""
        return f"{self.message} ({self.cause})" if self.cause else self.message

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str, str, str]]:
        return type(self), (self.stage, self.error, self.message, self.cause)  # crosses process boundaries


class RunError(PipelineError):
    """A run cannot go on; what is committed stays, and the same command continues it."""


class ReconcileError(PipelineError):
    """A run or its verification found rows missing, double or altered."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """The first line of what an error says: libraries add traces, and lists of what else might be wrong."""
    return str(error).partition("\n")[0]
