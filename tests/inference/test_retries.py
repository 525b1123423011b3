"""Errors that are tried again: once, whatever stops it, and nothing else is."""

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.data.manifest import Manifest
from pipeline.inference.commit import commit, committed_shard_ids, read_receipts, uncommit
from pipeline.inference.ending import conclude, prove
from pipeline.inference.plan import record_run
from pipeline.inference.reconcile import find_faults
from tests.manifests import uris_of
from tests.worlds import config_of, make_world, plan_of, record, run_without_ray


def test_shards_with_errors_that_are_retried_are_done_again_and_no_others(tmp_path):
    make_world(tmp_path, num_broken=1)
    uris = [uri for uri in uris_of(Manifest.open(str(tmp_path / "manifest"))) if not uri.endswith(".txt")]
    away = Path(uris[20].removeprefix("file://"))
    kept = away.rename(tmp_path / "away")
    run = run_without_ray(tmp_path, run_id="retry")
    totals = prove(run)
    assert (totals.num_errors, totals.errors["fetch/not_found"]) == (2, 1)

    def pending(**fields) -> list[int]:
        return [shard.shard_id for shard in plan_of(tmp_path, run_id="retry", **fields).pending_shards()]

    assert (pending(), pending(retry_errors=["fetch/storage_error"])) == ([], [])
    assert pending(retry_errors=["fetch/storage_error", "fetch/not_found"]) == [2]
    assert committed_shard_ids(run.uri) == {0, 1, 2, 3}  # a plan changes nothing
    kept.rename(away)
    run_without_ray(tmp_path, run_id="retry", retry_errors=["fetch/not_found"])
    assert prove(run).num_errors == 1
    assert list(find_faults(run)) == []


def test_a_retry_that_is_stopped_goes_on_and_does_not_begin_again(world, caplog):
    run = run_without_ray(world, run_id="stopped-retry")
    kinds = sorted(prove(run).errors)
    fields = {"run_id": "stopped-retry", "retry_errors": kinds}
    pending = [shard.shard_id for shard in plan_of(world, **fields).pending_shards()]
    receipts = list(read_receipts(run.uri, set(pending)))
    assert len(pending) > 1
    record(world, **fields)
    assert committed_shard_ids(run.uri) == {0, 1, 2, 3} - set(pending)
    commit(run.uri, receipts[0])  # has the same errors again; then it is killed
    assert [shard.shard_id for shard in plan_of(world, **fields).pending_shards()] == pending[1:]
    run_without_ray(world, **fields)
    conclude(plan_of(world, **fields), config_of(world, **fields), prove(run), {})
    assert plan_of(world, **fields).num_pending == len(pending)  # asked for once more


def test_a_retry_leaves_what_another_driver_has_mended_since(world):
    run = run_without_ray(world, run_id="two-retries")
    fields = {"run_id": "two-retries", "retry_errors": sorted(prove(run).errors)}
    stale = plan_of(world, **fields)
    mended, *others = sorted(stale.retried)
    receipt = next(read_receipts(run.uri, {mended}))
    uncommit(run.uri, {mended})
    commit(run.uri, replace(receipt, num_predicted=receipt.num_images, num_errors=0, errors={}))
    record_run(stale, config_of(world, **fields))
    assert committed_shard_ids(run.uri) == {0, 1, 2, 3} - set(others)


def test_a_kind_of_error_that_a_run_has_not_is_told_with_those_it_has(world, caplog):
    run_without_ray(world, run_id="mistyped")
    assert plan_of(world, run_id="mistyped", retry_errors=["decode/mistyped"]).num_pending == 0
    assert "_runs/mistyped has no errors of decode/mistyped; it has decode/" in caplog.text


@pytest.mark.parametrize("kind", ["storage_error", "fetch/", "store/error", "fetch/Not found"])
def test_what_is_no_kind_of_error_cannot_be_retried(world, kind):
    with pytest.raises(ValidationError, match="retry_errors"):
        config_of(world, retry_errors=[kind])


def test_errors_of_the_attempt_that_began_with_retrying_them_are_retried_by_the_next(tmp_path):
    make_world(tmp_path)
    fields = {"run_id": "scheduled", "retry_errors": ["decode/too_many_pixels"]}
    run = run_without_ray(tmp_path, **fields)
    kinds = prove(run).errors
    assert "decode/too_many_pixels" in kinds
    uncommit(run.uri, {0})  # it was stopped before its end
    pending = {shard.shard_id for shard in plan_of(tmp_path, **fields).pending_shards()}
    assert pending > {0}
