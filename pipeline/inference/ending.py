"""How a run ends: its receipts proven against its tables, judged, and told in `summary.json`. Needs no cluster."""

import json
import time
from collections.abc import Container, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from pipeline import storage
from pipeline.errors import ObjectNotFoundError, PipelineError, RunError, StorageError
from pipeline.inference import networks, retries
from pipeline.inference.commit import Receipt, committed_shard_ids, read_receipts
from pipeline.inference.config import PredictConfig
from pipeline.inference.estimate import sweep_trials
from pipeline.inference.plan import Plan
from pipeline.inference.reconcile import Totals, reconcile
from pipeline.inference.run import Run
from pipeline.tables.writing import table_folder

Summary = dict[str, Any]


def describe(plan: Plan) -> Summary:
    """What a plan is of, for every summary."""
    return {
        "run_id": plan.run.run_id,
        "output": plan.run.output_uri,
        "models": [model.name for model in plan.run.models],
        "num_images": plan.run.num_images,
        "num_shards": plan.run.num_shards,
        "num_pending": plan.num_pending,
        "batch_size": plan.run.batch_size,
    }


@contextmanager
def recording_failure(plan: Plan, known: Summary) -> Iterator[None]:
    """What ends the block by raising a PipelineError is told in `summary.json` too, where that can be written, with
    what is `known` by then.
    """
    try:
        yield
    except PipelineError as error:
        with suppress(StorageError):
            _record(plan, {"status": "failed", **describe(plan), **known}, error)
        raise


def until_too_many_errors(
    receipts: Generator[Receipt, None, None], plan: Plan, config: PredictConfig, *, num_left: int
) -> Generator[Receipt, None, None]:
    """The receipts of the `num_left` images that are still to do, as they come.

    Raises RunError once these and those committed before have more errors than the config allows of all the run, and
    more are still to come.
    """
    num_images = plan.run.num_images
    earlier = read_receipts(plan.run.uri, plan.committed) if config.max_error_rate < 1 else ()
    num_done, num_errors = num_images - num_left, sum(receipt.num_errors for receipt in earlier)
    with closing(receipts):
        for receipt in receipts:
            num_done += receipt.num_images
            num_errors += receipt.num_errors
            yield receipt
            if _are_too_many(num_errors, num_images, config) and num_done < num_images:
                raise RunError(
                    f"expected at most {100 * config.max_error_rate:g}% of {num_images} images to be without a result "
                    f"(max_error_rate), {num_errors} of the first {num_done} are; the errors table says why. Raise it "
                    "to go on from here"
                )


def _are_too_many(num_errors: int, num_images: int, config: PredictConfig) -> bool:
    return num_errors / num_images > config.max_error_rate  # not a product: 0.29 * 100 is less than 29


def prove(run: Run) -> Totals:
    """The receipts of a run that has ended, held against its tables; what killed attempts have left there goes.

    Raises ReconcileError where the images do not add up.
    """
    for uri in (run.uri, *_tables_of(run).values()):
        storage.sweep_temporary_files(uri)
    receipts = read_receipts(run.uri, committed_shard_ids(run.uri))
    return reconcile(run, receipts, run.output_uri, [table_folder(name, run.run_id) for name in run.table_names])


def conclude(plan: Plan, config: PredictConfig, totals: Totals, of_attempt: Summary) -> Summary:
    """The summary of a run that is proven, with what its last attempt has to say; written beside its records.

    Raises RunError where more images have no result than the config allows.
    """
    retries.end(plan.run.uri)
    summary = {
        "status": "done" if plan.num_pending else "was done",
        **describe(plan),
        **totals.as_dict(),
        **of_attempt,
        "tables": _tables_of(plan.run),
    }
    failure = None
    if _are_too_many(totals.num_errors, totals.num_images, config):
        failure = RunError(
            f"expected at most {100 * config.max_error_rate:g}% of {totals.num_images} images to be without a result "
            f"(max_error_rate), {totals.num_errors} are; the errors table says why",
            **_without(summary, ["status"]),
        )
    _record(plan, summary, failure)
    sweep_trials(plan)
    if failure is not None:
        raise failure
    return summary


def report_finished(plan: Plan, config: PredictConfig) -> Summary:
    """What a run of `finished_plan` came to, added up anew but for dry runs and estimates.

    Raises as `prove` and `conclude`.
    """
    start = time.monotonic()
    if config.dry_run or config.plan:
        return {"status": "dry run" if config.dry_run else "was done", **describe(plan)}
    with recording_failure(plan, {}):
        totals = prove(plan.run)
    of_attempt = {
        "images_per_s": 0.0,  # of this attempt
        "duration_s": round(time.monotonic() - start, 1),
        "computed_in": networks.describe(plan.run),
    }
    return conclude(plan, config, totals, of_attempt)


def _record(plan: Plan, summary: Summary, failure: PipelineError | None) -> None:
    """Write `summary.json`, which says of the end what the job's own last line does.

    That of an attempt which did something says more than that of one which found all of it done, whose judgement alone
    is new: it may allow another share of errors.
    """
    earlier = None if plan.num_pending else _read(plan.run)
    if earlier is not None and earlier.get("message") == (None if failure is None else str(failure)):
        return
    told = (summary if earlier is None else earlier | _without(summary, earlier)) | {"status": "done"}
    kept = _without(told, ("status", "error", "message"))
    judged = {"status": told["status"]}
    if failure is not None:
        judged = {"status": "failed", "error": type(failure).__name__, "message": str(failure)}
    storage.write(plan.run.summary_uri, json.dumps({**judged, **kept}, indent=1).encode())


def _without(summary: Summary, names: Container[str]) -> Summary:
    return {name: value for name, value in summary.items() if name not in names}


def _read(run: Run) -> Summary | None:
    try:
        summary: Summary = json.loads(storage.read(run.summary_uri))
    except (ObjectNotFoundError, ValueError):  # gone, or damaged
        return None
    return summary


def _tables_of(run: Run) -> dict[str, str]:
    return {name: storage.join(run.output_uri, table_folder(name, run.run_id)) for name in run.table_names}
