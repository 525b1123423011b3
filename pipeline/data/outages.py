"""A store that is down or shut, told from images that are bad: the one stops a run, the others become errors."""

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from pipeline import storage
from pipeline.data.manifest import Shard
from pipeline.errors import ImageError, StorageError

_WHY_LOST = {  # what loses all of a shard is rarely its images
    "not_found": "Is the folder mounted?",
    "access_denied": "Is the key valid?",
    "changed": "Were the images written anew after their manifest? Make another of them as they are.",
    "not_allowed": "Do images.allowed_roots name where they lie?",
}


def refusing_outages(
    encoded: Iterator[bytes | ImageError],
    shard: Shard,
    images: pa.Table,
    *,
    max_storage_errors: int,
    accept_lost_shards: bool,
) -> Iterator[bytes | ImageError]:
    """What `read_shard` yields, ended where it looks like a store that is down or shut rather than like bad images.

    Raises StorageError where more images than `max_storage_errors` are lost to a failing store, and, unless
    `accept_lost_shards`, where all are lost to one, where all of several are gone, denied, changed or not allowed, and
    where more than `max_storage_errors` are gone or denied and one that could be read no longer can.
    """
    most = max_storage_errors if accept_lost_shards else min(max_storage_errors, shard.num_images - 1)
    kinds: Counter[str] = Counter()
    readable: str | None = None
    for row, item in enumerate(encoded):
        if isinstance(item, ImageError):
            kinds[item.error] += 1
            if kinds["storage_error"] > most:
                raise StorageError(
                    f"shard {shard.shard_id}: expected at most {most} images lost to a failing store, got more, e.g. "
                    f"{item.with_cause}. Nothing of the shard is committed: run again when it is back; images that it "
                    "never gives become rows with a larger images.max_storage_errors and images.accept_lost_shards"
                )
        elif readable is None and item:  # an empty object has no range to read again
            readable = shard.source or images["uri"][row].as_py()
        yield item
    if accept_lost_shards:
        return
    lost = {kind: kinds[kind] for kind in _WHY_LOST if kinds[kind]}
    if sum(lost.values()) == shard.num_images > 1:
        raise _shard_lost(shard, lost, f"none of its {shard.num_images} images can be fetched")
    if readable is not None and kinds["not_found"] + kinds["access_denied"] > most:
        _require_open(shard, lost, readable)


def _require_open(shard: Shard, lost: dict[str, int], uri: str) -> None:
    """Raises StorageError where `uri` can no longer be read: then the others were lost as it was."""
    try:
        storage.read(uri, 0, 1)
    except StorageError as error:
        told = f"{sum(lost.values())} of its {shard.num_images} images cannot be fetched, nor now one that was: {error}"
        raise _shard_lost(shard, lost, told) from error


def _shard_lost(shard: Shard, lost: dict[str, int], told: str) -> StorageError:
    return StorageError(
        f"shard {shard.shard_id}: {told} ({lost}). {' '.join(_WHY_LOST[kind] for kind in lost)} Run again then, or "
        "with images.accept_lost_shards to make them error rows"
    )
