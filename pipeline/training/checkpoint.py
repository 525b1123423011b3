"""Checkpoints: the resumable state of a training run, one object each.

    <run>/checkpoints/<step>.pt    a PyTorch file that loads with weights_only

One object, written whole: half of one is never seen. Writing happens in a thread, from a copy of the state, so that
training goes on; the next one waits for it.
"""

import copy
import io
import logging
import re
import zipfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from typing import Any, Self, TypeAlias

import torch

from pipeline import storage
from pipeline.errors import RunError, StorageError, first_line
from pipeline.training.config import CheckpointConfig

State: TypeAlias = dict[str, Any]
"""Tensors, numbers, strings, lists and dicts; `step` is the number of steps done, `evaluations` a list of dicts with
`step` and `top1`."""

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the states of one run, keeps the last ones and the best ones by top-1 accuracy; rank 0 does the writing.

    `since` is the step that the run goes on from. Later checkpoints that are there by then are damaged, or were gone
    back from, and go with the first that is written; those that come later are a twin's, and stay.
    """

    def __init__(self, run_uri: str, config: CheckpointConfig, *, since: int) -> None:
        self._run_uri, self._config = run_uri, config
        self._gone_back_from = {step for step in list_steps(run_uri) if step > since}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def write(self, state: State) -> None:
        """Begin to write a copy of `state`; raises what the one before failed of: StorageError saying what to do."""
        self.wait()
        self._pending = self._thread.submit(self._write, _copied(state))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last one; where the training failed, that is the error to tell."""
        with suppress(StorageError) if kind is not None else nullcontext():
            self.wait()

    def wait(self) -> None:
        """Until the last one is there. Raises StorageError where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, state: State) -> None:
        data = io.BytesIO()
        torch.save(state, data)
        uri = checkpoint_uri(self._run_uri, state["step"])
        try:
            storage.write(uri, data.getvalue())
        except StorageError as error:
            raise type(error)(
                f"the checkpoint {uri!r} of {data.tell()} bytes cannot be written: {error}. Earlier ones stay: make "
                "room or give access, then run again with --resume auto"
            ) from error
        there = set(list_steps(self._run_uri))
        self._gone_back_from.discard(state["step"])
        until_now = {step for step in there - self._gone_back_from if step <= state["step"]}
        unwanted = until_now - steps_to_keep(until_now, state["evaluations"], self._config)
        for step in unwanted | (there & self._gone_back_from):
            storage.delete(checkpoint_uri(self._run_uri, step))
        self._gone_back_from.clear()


def steps_to_keep(steps: Iterable[int], evaluations: list[dict[str, Any]], config: CheckpointConfig) -> set[int]:
    """Of the checkpoints at `steps`, the last `keep_last` and the `keep_best` of highest top-1 (first of equals)."""
    written = sorted(steps)
    last = set(written[-config.keep_last :])
    judged = [(-evaluation["top1"], evaluation["step"]) for evaluation in evaluations if evaluation["step"] in written]
    return last | {step for _, step in sorted(judged)[: config.keep_best]}


def best_step(evaluations: list[dict[str, Any]]) -> int:
    """The step of the highest top-1 accuracy; of equals the earliest."""
    return int(min(evaluations, key=lambda evaluation: (-evaluation["top1"], evaluation["step"]))["step"])


def list_steps(run_uri: str) -> list[int]:
    """The steps that the run has checkpoints of, ascending."""
    names = [info.uri.rpartition("/")[2] for info in storage.list_objects(storage.join(run_uri, "checkpoints"))]
    return sorted(int(name[:-3]) for name in names if re.fullmatch(r"\d+\.pt", name))


def read_last(run_uri: str) -> State | None:
    """The newest checkpoint that can be read, on the CPU; None where there is none at all.

    Raises RunError where there are some, but every one is damaged.
    """
    steps = list_steps(run_uri)
    for step in reversed(steps):
        try:
            return read(run_uri, step)
        except RunError as error:
            logger.warning("%s; going back to the one before", error)
    if steps:
        raise RunError(f"expected a readable checkpoint of {len(steps)} under {run_uri!r}, found only damaged ones")
    return None


def read(run_uri: str, step: int) -> State:
    """The checkpoint of that step, on the CPU. Raises RunError where it is damaged, ObjectNotFoundError."""
    uri = checkpoint_uri(run_uri, step)
    data = io.BytesIO(storage.read(uri))
    try:
        if (altered := zipfile.ZipFile(data).testzip()) is not None:  # torch itself checks no sums
            raise ValueError(f"{altered} does not have its checksum")
        data.seek(0)
        state: State = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged bytes do to a parser
        raise RunError(f"expected a checkpoint at {uri!r}, found a damaged one: {first_line(error)}") from error
    return state


def checkpoint_uri(run_uri: str, step: int) -> str:
    """Where the checkpoint of a step lies."""
    return storage.join(run_uri, "checkpoints", f"{step:09d}.pt")


def _copied(value: Any) -> Any:
    """The same, its tensors cloned to the CPU: training changes the originals meanwhile."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # with the version that some networks' OrderedDicts carry
        copied.update({key: _copied(item) for key, item in value.items()})
        return copied
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
