"""How a run's networks are run: compiled or as they are, in which precision. Decided once, by the first who needs it,
and kept as `<run>/networks.json`, so that every actor and every later attempt does the same.

A run that compiles nothing needs no record: its precision is that of its plan.
"""

import hashlib
import logging
from collections.abc import Sequence
from functools import partial
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.errors import BundleError, NotKeptError, ObjectExistsError, ObjectNotFoundError, RunError
from pipeline.inference.run import Model, Run
from pipeline.models import compiled
from pipeline.models.bundle import Bundle
from pipeline.models.precision import Precision, precisions, warn_if_emulated

logger = logging.getLogger(__name__)


class Choice(BaseModel):
    """How a network is run; `refused` says what better ways will not do, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Precision
    is_compiled: bool
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.precision}, {'compiled' if self.is_compiled else 'eager'}"


_CHOICES = TypeAdapter(dict[str, Choice])


def choose_compile(run: Run, registry_uri: str | None, earlier: Run | None) -> Literal["auto", "always", "never"]:
    """What is done where it is not told: as the run began, whatever has been compiled since; at its beginning, compiled
    where it is large or finds that done. Native code comes only from the registry that the config trusts.
    """
    if earlier is not None and earlier.compile != "auto":
        return earlier.compile
    trusted = None if registry_uri is None else storage.normalise(registry_uri)
    if trusted is None or not all(storage.is_under(model.uri, trusted) for model in run.models):
        return "never"
    if earlier is not None or run.may_compile:
        return "auto"
    found = _threads_compiled_for(run)
    if _threads_of(run) in found:
        return "auto"
    if found:
        logger.warning(
            "the networks are compiled for %s threads, and the run's actors have %d: it does without. Set "
            "compute.cpus_per_actor, or compile for %d (jobs.compile --cpus_per_actor %d)",
            ", ".join(map(str, sorted(found))),
            *[run.num_threads] * 3,
        )
    return "never"


def is_compiled(run: Run) -> bool:
    """Whether its networks were all compiled for such a run by this software, on whatever kind of CPU or GPU."""
    return _threads_of(run) in _threads_compiled_for(run)


def choices(run: Run) -> dict[str, Choice] | None:
    """What was decided, by model name; None where it is still to be. Raises StorageError."""
    if run.compile == "never":
        return {model.name: _eager(run) for model in run.models}
    try:
        return _CHOICES.validate_json(storage.read(_uri(run)))
    except ObjectNotFoundError:
        return None


def decide(run: Run, manifest: Manifest) -> dict[str, Choice]:
    """What was decided, or is now, for this machine; compiles what is not compiled yet, where the run may.

    Raises BundleError where a network must be compiled and cannot be, StorageError.
    """
    with compiled.alone_on_this_machine(hashlib.sha256(_uri(run).encode()).hexdigest()[:16]):
        return choices(run) or _decide(run, manifest)


def _decide(run: Run, manifest: Manifest) -> dict[str, Choice]:
    mine = {model.name: _choose(run, manifest, model) for model in run.models}
    try:
        storage.write(_uri(run), _CHOICES.dump_json(mine, indent=1), if_absent=True)
    except ObjectExistsError:
        return _CHOICES.validate_json(storage.read(_uri(run)))
    return mine


def hand_on(run: Run, to: Run) -> None:
    """Have another run do as was decided for this one, where it was. Raises StorageError."""
    if run.compile != "never" and (decided := choices(run)) is not None:
        storage.write(_uri(to), _CHOICES.dump_json(decided, indent=1))


def describe(run: Run) -> dict[str, str]:
    """How each network was run, for the summary, and why not better."""
    return {name: "; not ".join([str(choice), *choice.refused]) for name, choice in (choices(run) or {}).items()}


def should_compile_first(run: Run) -> bool:
    """Whether a run is about to compile: that is one process's work, before the others are started."""
    return run.may_compile and choices(run) is None and not is_compiled(run)


def record_of(
    run: Run, manifest: Manifest, model: Model, precision: Precision, *, may_compile: bool = True
) -> compiled.Record:
    """The record of the model, compiled for this machine; now where it is not yet and it `may_compile`.

    Raises BundleError where there is none, StorageError.
    """
    import torch

    from pipeline.data.loader import sample_pixels
    from pipeline.models import compiler

    bundle = Bundle.load(model.uri)
    target = compiler.target_here(
        bundle, torch.device(run.device), precision, batch_size=run.batch_size, num_threads=run.num_threads
    )
    if not may_compile:
        if (record := compiled.find(model.uri, target)) is None:
            raise BundleError("not compiled yet")
        return record
    samples = partial(sample_pixels, manifest, run.images, bundle.preprocessing, compiler.NUM_SAMPLES)
    return compiler.ensure(model.uri, target, samples)


def compiled_as_decided(run: Run, manifest: Manifest, model: Model, choice: Choice) -> compiled.Record:
    """The record of a model that the run decided to run compiled. Raises RunError where this machine cannot."""
    import torch

    warn_if_emulated(choice.precision, torch.device(run.device))  # decided on a node of another kind
    try:
        record = record_of(run, manifest, model, choice.precision)
        fault = record.agreement.fault(run.agreement)
    except BundleError as error:
        fault = str(error)
    if fault is not None:
        raise RunError(
            f"{model.name}: the run began with {choice}, and this node cannot do that: {fault}. Use nodes of one kind, "
            "or compute.compile never with another run_id"
        )
    return record


def _choose(run: Run, manifest: Manifest, model: Model) -> Choice:
    import torch

    refused: list[str] = []
    may_compile = run.may_compile
    for precision in precisions(run.precision, torch.device(run.device)):
        try:
            fault = record_of(run, manifest, model, precision, may_compile=may_compile).agreement.fault(run.agreement)
        except BundleError as error:
            fault = str(error)
            if isinstance(error, NotKeptError):  # nor would it be kept in another precision
                logger.warning("%s: %s", model.name, error)
                may_compile = False
        if fault is None:
            return Choice(precision=precision, is_compiled=True, refused=tuple(refused))
        refused.append(f"{precision}, compiled: {fault}")
    if run.compile == "always":
        raise BundleError(f"{model.uri} must be compiled (compute.compile always) and cannot be: {'; '.join(refused)}")
    return _eager(run, refused)


def _eager(run: Run, refused: Sequence[str] = ()) -> Choice:
    precision = "float32" if run.precision == "auto" else run.precision
    return Choice(precision=precision, is_compiled=False, refused=tuple(refused))


def _uri(run: Run) -> str:
    return storage.join(run.uri, "networks.json")


def _threads_of(run: Run) -> int:
    """Of its forward passes, as far as they decide a compiled network."""
    return run.num_threads if run.device == "cpu" else 0


def _threads_compiled_for(run: Run) -> set[int]:
    """The `_threads_of` runs that all its networks were compiled for."""
    return set[int].intersection(
        *(
            compiled.recorded_threads(model.uri, model.digest, run.device, run.precision, batch_size=run.batch_size)
            for model in run.models
        )
    )
