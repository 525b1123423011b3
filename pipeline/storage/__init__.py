"""Object storage: URIs in, bytes out. The only room that knows it.

A URI is `scheme://` followed by the raw object name, never percent-encoded: `s3://bucket/50% off #1?.jpg` is what it
looks like. A plain path means `file://`. Bulk requests go through obstore where it serves the scheme; listings, and the
few names that obstore refuses (control characters, empty segments), go through fsspec. Credentials, region and
endpoint come from the environment and ~/.aws alone.

Source of the names' rules: object_store `Path`, S3 "Naming Amazon S3 objects".
"""

from pipeline.storage.concurrency import map_concurrently, run_ahead
from pipeline.storage.listing import list_folders, list_objects
from pipeline.storage.names import SCHEMES, is_under, join, normalise, split
from pipeline.storage.objects import ObjectInfo, StoredObject
from pipeline.storage.reading import exists, head, open_file, read, read_object
from pipeline.storage.stores import filesystem
from pipeline.storage.writing import LARGEST_BYTES, delete, delete_folder, sweep_temporary_files, write

__all__ = [
    "LARGEST_BYTES",
    "SCHEMES",
    "ObjectInfo",
    "StoredObject",
    "delete",
    "delete_folder",
    "exists",
    "filesystem",
    "head",
    "is_under",
    "join",
    "list_folders",
    "list_objects",
    "map_concurrently",
    "normalise",
    "open_file",
    "read",
    "read_object",
    "run_ahead",
    "split",
    "sweep_temporary_files",
    "write",
]
