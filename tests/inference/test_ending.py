"""How a run ends, well or not, and what its summary says of it meanwhile."""

import json
from collections.abc import Generator, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import storage
from pipeline.errors import ReconcileError, RunError
from pipeline.inference import ending
from pipeline.inference.commit import Receipt, commit, committed_shard_ids
from pipeline.inference.ending import conclude, prove, recording_failure, report_finished, until_too_many_errors
from pipeline.inference.plan import finished_plan, record_run
from pipeline.inference.run import resolve_inputs
from tests.worlds import config_of, plan_of, run_without_ray


def summary_of(world: Path, run_id: str) -> dict:
    summary: dict = json.loads((world / "tables/_runs" / run_id / "summary.json").read_text())
    return summary


def end(world: Path, **fields) -> dict:
    """What jobs.predict does of a run whose shards are all done."""
    config = config_of(world, **fields)
    plan = finished_plan(config, *resolve_inputs(config))
    assert plan is not None
    return report_finished(plan, config)


def test_a_run_that_lost_a_file_since_it_ended_is_told_as_failed_until_it_is_whole_again(world):
    run = run_without_ray(world, run_id="lost")
    storage.write(run.summary_uri, json.dumps({"status": "done", "images_per_s": 7.0}).encode())
    table = world / "tables/predictions/run_id=lost/00000001.parquet"
    hidden = table.rename(world / "hidden.parquet")
    with pytest.raises(ReconcileError) as caught:
        end(world, run_id="lost")
    told = summary_of(world, "lost")
    assert (told["status"], told["error"], told["message"]) == ("failed", "ReconcileError", str(caught.value))
    assert told["images_per_s"] == 7
    hidden.rename(table)
    assert end(world, run_id="lost")["status"] == "was done"
    told = summary_of(world, "lost")
    assert (told["status"], told["images_per_s"], told["num_predicted"]) == ("done", 7, 27)
    assert not {"error", "message"} & told.keys()


def test_what_an_attempt_knows_is_told_where_it_fails(world):
    plan = plan_of(world, run_id="fails")
    with pytest.raises(RunError), recording_failure(plan, {"images_per_s": 7.0}):
        raise RunError("a worker failed")
    told = summary_of(world, "fails")
    assert (told["status"], told["error"], told["message"]) == ("failed", "RunError", "a worker failed")
    assert (told["num_pending"], told["images_per_s"]) == (4, 7)


def test_a_run_that_is_at_work_again_has_no_summary(world):
    run = run_without_ray(world, run_id="again")
    storage.write(run.summary_uri, b"{}")
    config = config_of(world, run_id="again")
    record_run(plan_of(world, run_id="again"), config)
    assert storage.exists(run.summary_uri)  # nothing was to do
    storage.delete(storage.join(run.uri, "commits", "00000002.json"))
    record_run(plan_of(world, run_id="again"), config)
    assert not storage.exists(run.summary_uri)


# --- too many errors --------------------------------------------------------------------------------------------------


def receipts(closed: list[bool]) -> Generator[Receipt, None, None]:
    """Ten shards of ten images, one of each an error."""
    try:
        for shard_id in range(10):
            yield Receipt(shard_id, 10, 9, 1, {"decode/truncated": 1}, [], {})
    finally:
        closed.append(True)


def watched(world: Path, closed: list[bool], max_error_rate: float, committed: int = 0) -> Iterator[Receipt]:
    plan = plan_of(world, run_id=f"errors-{committed}-{max_error_rate}")
    for shard_id in range(100, 100 + committed):
        commit(plan.run.uri, Receipt(shard_id, 10, 9, 1, {}, [], {}))
    run = plan.run.model_copy(update={"num_images": 100 + 10 * committed})
    plan = replace(plan, run=run, committed=committed_shard_ids(run.uri))
    config = config_of(world, max_error_rate=max_error_rate)
    return until_too_many_errors(receipts(closed), plan, config, num_left=100)


def test_a_run_stops_as_soon_as_it_has_more_errors_than_all_of_it_may_have(world):
    closed: list[bool] = []
    watching = watched(world, closed, 0.03)
    assert [receipt.shard_id for receipt in islice(watching, 4)] == [0, 1, 2, 3]
    told = r"at most 3% of 100 images .* \(max_error_rate\), 4 of the first 40 are; .* Raise it to go on from here"
    with pytest.raises(RunError, match=told):
        next(watching)
    assert closed


def test_errors_of_earlier_attempts_count(world):
    watching = watched(world, [], 0.03, committed=3)
    assert next(watching).shard_id == 0
    with pytest.raises(RunError, match=r"at most 3% of 130 images .* 4 of the first 40 are"):
        next(watching)


@pytest.mark.parametrize("max_error_rate", [0.1, 1.0, 0.099])
def test_a_run_that_may_have_its_errors_or_is_through_with_all_is_not_stopped(world, max_error_rate):
    assert len(list(watched(world, [], max_error_rate))) == 10


def test_as_many_errors_as_are_allowed_are_allowed_whatever_floats_make_of_the_share():
    for num_images in range(1, 120):
        for num_errors in range(num_images + 1):
            config = SimpleNamespace(max_error_rate=num_errors / num_images)
            assert not ending._are_too_many(num_errors, num_images, config)
            assert num_errors == num_images or ending._are_too_many(num_errors + 1, num_images, config)


def test_a_run_killed_before_its_proof_is_told_as_done_and_not_as_done_before(world):
    run_without_ray(world, run_id="unproven")
    config = config_of(world, run_id="unproven")
    plan = plan_of(world, run_id="unproven")
    assert conclude(plan, config, prove(plan.run), {})["status"] == "was done"
    assert summary_of(world, "unproven")["status"] == "done"
