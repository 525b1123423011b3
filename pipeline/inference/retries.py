"""Errors that are tried again: which shards have them, and that a run is at it, for whatever stops it meanwhile.

`<run>/retrying.json` names the kinds of errors whose shards lost their commits, until the run has ended: an attempt
that finds its own kinds there withdraws no more, for what is still to be redone has no commit.
"""

import json
import logging
from collections.abc import Sequence

from pipeline import storage
from pipeline.errors import ObjectNotFoundError
from pipeline.inference.commit import committed_shard_ids, read_receipts, uncommit

logger = logging.getLogger(__name__)


def find(run_uri: str, committed: set[int], kinds: Sequence[str]) -> frozenset[int]:
    """The committed shards with errors of these kinds, `stage/error`; none where they are being tried again already.

    Raises ReconcileError on a damaged commit.
    """
    if not kinds or _begun(run_uri) == sorted(kinds):
        return frozenset()
    shards = _by_kind(run_uri, committed)
    found = frozenset(shard_id for kind in kinds for shard_id in shards.get(kind, ()))
    if shards and not found:
        logger.warning("%s has no errors of %s; it has %s", run_uri, ", ".join(kinds), ", ".join(sorted(shards)))
    return found


def begin(run_uri: str, found: frozenset[int], kinds: Sequence[str]) -> None:
    """Withdraw the commits of what was found, but not of what another driver has redone since without these errors."""
    if not kinds:
        return
    shards = _by_kind(run_uri, committed_shard_ids(run_uri) & found) if found else {}
    uncommit(run_uri, {shard_id for kind in kinds for shard_id in shards.get(kind, ())})
    storage.write(_uri(run_uri), json.dumps(sorted(kinds)).encode())


def end(run_uri: str) -> None:
    """The run has ended: what fails again, or anew, may be tried once more."""
    if storage.exists(_uri(run_uri)):
        storage.delete(_uri(run_uri))


def _begun(run_uri: str) -> list[str] | None:
    try:
        kinds: list[str] = json.loads(storage.read(_uri(run_uri)))
    except (ObjectNotFoundError, ValueError):
        return None
    return kinds


def _by_kind(run_uri: str, committed: set[int]) -> dict[str, set[int]]:
    shards: dict[str, set[int]] = {}
    for receipt in read_receipts(run_uri, committed):
        for kind in receipt.errors:
            shards.setdefault(kind, set()).add(receipt.shard_id)
    return shards


def _uri(run_uri: str) -> str:
    return storage.join(run_uri, "retrying.json")
