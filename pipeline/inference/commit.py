"""Commits: the record that makes a shard count.

A worker writes a shard's table files and returns a `Receipt`; the driver commits it as
`<output>/_runs/<run_id>/commits/<shard>.json`. Resuming is one listing of that folder: what is not there is pending.
"""

import json
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import storage
from pipeline.errors import ObjectExistsError, ReconcileError, RunError
from pipeline.tables.writing import WrittenFile


@dataclass(frozen=True, slots=True)
class Receipt:
    """What writing a shard returns.

    `num_predicted` + `num_errors` = `num_images`; `errors` counts them by `stage/error`; `seconds` by stage, plus
    `total`, those of its turn at the networks, and `cpu`, those of the CPUs that the process used meanwhile; `attempt`
    is 1 unless earlier ones died; `node` is where it was done; `began_at` and `ended_at` are unix seconds. What another
    shard's turn hid is not in `total`, nor is `write`, which comes after the turn: the totals of a process's shards add
    up to the time it took.
    """

    shard_id: int
    num_images: int
    num_predicted: int
    num_errors: int
    errors: dict[str, int]
    files: list[WrittenFile]
    seconds: dict[str, float]
    attempt: int = 1
    node: str = ""
    began_at: float = 0.0
    ended_at: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Receipt":
        """Raises ValueError, KeyError or TypeError on anything but a receipt."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "files": [WrittenFile(**file) for file in fields["files"]]})


def commit(run_uri: str, receipt: Receipt) -> None:
    """Make the shard count. A second commit of the same bytes, a twin run's, changes nothing.

    Raises RunError where the twin wrote others; the shard then counts no more. Raises StorageError.
    """
    uri = _commit_uri(run_uri, receipt.shard_id)
    try:
        storage.write(uri, receipt.to_json().encode(), if_absent=True)
    except ObjectExistsError as error:
        if read_receipt(run_uri, receipt.shard_id).files == receipt.files:
            return
        storage.delete(uri)  # whose file lies there now is unknown
        raise RunError(
            f"shard {receipt.shard_id} was also written, with other bytes, by another driver of this run; "
            "stop the other, then run again"
        ) from error


def uncommit(run_uri: str, shard_ids: Iterable[int]) -> None:
    """Make shards count no more, so that they are done again."""
    uris = [_commit_uri(run_uri, shard_id) for shard_id in shard_ids]
    deque(storage.map_concurrently(storage.delete, uris), maxlen=0)


def refusing_unshared(receipts: Generator[Receipt, None, None], output_uri: str) -> Generator[Receipt, None, None]:
    """`receipts` as they come. Raises RunError at the first of a node whose files cannot be seen from here."""
    seen: set[str] = set()
    with closing(receipts):
        for receipt in receipts:
            if receipt.node not in seen and (lost := _first_missing(output_uri, receipt)):
                raise RunError(
                    f"expected {lost!r}, which a node has written, found none: the output is a folder that not all "
                    "nodes share. Use one that they do, or an object store; nothing of that node was committed"
                )
            seen.add(receipt.node)
            yield receipt


def _first_missing(output_uri: str, receipt: Receipt) -> str | None:
    uris = (storage.join(output_uri, file.path) for file in receipt.files)
    return next((uri for uri in uris if not storage.exists(uri)), None)


def committed_shard_ids(run_uri: str) -> set[int]:
    """The shards that count, from one listing. Raises ReconcileError on a name that no commit has."""
    folder = _commits_uri(run_uri)
    names = [info.uri.rpartition("/")[2] for info in storage.list_objects(folder)]
    strays = [name for name in names if not (name.endswith(".json") and name[:-5].isdigit())]
    if strays:
        raise ReconcileError(f"expected only <shard>.json under {folder!r}, found {strays[0]!r}: remove it")
    return {int(name[:-5]) for name in names}


def read_receipts(run_uri: str, shard_ids: set[int]) -> Iterator[Receipt]:
    """The committed receipts of `shard_ids`, streamed in ascending order. Raises ReconcileError on a damaged one."""
    return storage.map_concurrently(lambda shard_id: read_receipt(run_uri, shard_id), sorted(shard_ids))


def read_receipt(run_uri: str, shard_id: int) -> Receipt:
    """The committed receipt of one shard. Raises ReconcileError on a damaged one."""
    uri = _commit_uri(run_uri, shard_id)
    try:
        receipt = Receipt.from_json(storage.read(uri))
    except (ValueError, KeyError, TypeError) as error:
        raise ReconcileError(
            f"expected a commit at {uri!r}, found something else ({error}): delete it to redo the shard"
        ) from error
    if receipt.shard_id != shard_id:
        raise ReconcileError(f"expected the commit of shard {shard_id} at {uri!r}, found that of {receipt.shard_id}")
    return receipt


def _commits_uri(run_uri: str) -> str:
    return storage.join(run_uri, "commits")


def _commit_uri(run_uri: str, shard_id: int) -> str:
    return storage.join(_commits_uri(run_uri), f"{shard_id:08d}.json")
