"""What is known of an object, and the etag that tells its content."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing tells of one object; `etag` identifies its content (for `file`: mtime and size)."""

    uri: str
    size: int
    etag: str | None


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as read: its bytes and the etag they were read under."""

    data: bytes
    etag: str | None


def file_etag(status: os.stat_result) -> str:
    """The etag of a local file."""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def clean_etag(etag: str | None) -> str | None:
    """An etag without the quotes that only some of the libraries leave around it."""
    return etag.strip('"') if etag else None
