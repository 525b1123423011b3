"""The Ray Data graph on a real two-CPU Ray."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import ray

from pipeline.data.manifest import Shard
from pipeline.errors import BundleError, ManifestError, RunError, StorageError
from pipeline.inference import blocks
from pipeline.inference.blocks import PreparedShard
from pipeline.inference.flow import _failure, run_shards, shard_dataset
from pipeline.inference.layout import Layout
from pipeline.inference.reconcile import find_faults
from pipeline.inference.run import read_run
from pipeline.inference.workers import (
    PredictDecoded,
    PredictFused,
    PredictPrepared,
    decode_shard,
    prepare_shard,
)
from pipeline.tables import open_table
from tests.jpegs import NvjpegOnCpu
from tests.worlds import files_of, have_tasks, make_world, plan_of, run_with_ray, run_without_ray

TABLES = {"names": ["predictions", "embeddings"]}


@pytest.fixture
def no_collector():
    """What only the garbage collector frees stays, as it may for very long in a process of many objects; no log does,
    which pytest would keep, with what Ray Data puts in its records.
    """
    gc.disable()
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


@pytest.mark.ray
def test_fused_and_split_write_the_bytes_of_a_run_without_ray(world, local_ray):
    run_without_ray(world, run_id="alone", tables=TABLES)
    for form in ("fused", "split"):
        summary = run_with_ray(world, run_id=form, tables=TABLES, compute={"form": form})
        assert (summary["status"], summary["layout"]["form"]) == ("done", form)
        assert (summary["num_predicted"], summary["num_errors"]) == (27, 3)
        assert list(find_faults(read_run(summary["output"], form))) == []
        assert files_of(world, form) == files_of(world, "alone")


@pytest.mark.ray
@pytest.mark.parametrize(("most_images", "num_tasks"), [(0, 1_000), (7, 1)])
def test_actors_decode_the_shards_that_are_too_large_for_tasks(world, local_ray, monkeypatch, most_images, num_tasks):
    def decode_what_is_small(rows, run, attempts):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "_MOST_PIXELS", most_images * 3 * 32 * 32)
            return decode_shard(rows, run, attempts)

    run_id = f"large-{most_images}"
    run_without_ray(world, run_id=f"{run_id}-alone", tables=TABLES)
    monkeypatch.setattr("pipeline.inference.flow.decode_shard", decode_what_is_small)
    monkeypatch.setattr("pipeline.inference.flow._ENOUGH_TASKS", num_tasks)
    monkeypatch.setattr("pipeline.inference.flow._TASKS_PER_PROCESSOR", 0)
    summary = run_with_ray(world, run_id=run_id, tables=TABLES, compute={"form": "split"})
    assert (summary["status"], summary["num_predicted"], summary["num_errors"]) == ("done", 27, 3)
    assert files_of(world, run_id) == files_of(world, f"{run_id}-alone")


@pytest.mark.ray
@pytest.mark.parametrize(
    ("most_bytes", "deaths"), [(2**28, 0), (1000, 0), pytest.param(2**28, 2, marks=pytest.mark.slow)]
)
def test_shards_that_tasks_fetch_for_gpus_give_the_tables_of_other_forms(
    world, local_ray, tmp_path, monkeypatch, most_bytes, deaths
):
    processes = tmp_path

    class OnPretendedGpu(PredictPrepared):
        def __init__(self, run, attempts):
            import torch  # of an actor's process, which ends with the test

            (processes / f"actor-{os.getpid()}").touch()
            torch.ops.image.decode_jpegs_cuda = NvjpegOnCpu()
            super().__init__(run, attempts)

        def __call__(self, rows):
            prepared = PreparedShard.from_row(rows)
            assert (prepared.images is None) == (most_bytes < prepared.shard.num_bytes)
            return super().__call__(rows)

        def _predict(self, shard, batches, log, attempt):
            if shard.shard_id == 1 and attempt <= deaths:
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._predict(shard, batches, log, attempt)

    def prepare_as_much(rows, run, attempts):
        (processes / f"task-{os.getpid()}").touch()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "_MOST_BYTES", most_bytes)
            return prepare_shard(rows, run, attempts)

    monkeypatch.setattr("pipeline.inference.flow.PredictPrepared", OnPretendedGpu)
    monkeypatch.setattr("pipeline.inference.flow.prepare_shard", prepare_as_much)
    run_id = f"fetched-{most_bytes}-{deaths}"
    plan = plan_of(world, run_id=run_id, tables=TABLES)
    run = plan.run.model_copy(update={"decode": "gpu"})
    layout = Layout("split", "cpu", num_actors=1, cpus_per_actor=1, gpus_per_actor=0, decode="gpu")
    receipts = list(run_shards(replace(plan, run=run), layout))
    assert sum(receipt.num_predicted for receipt in receipts) == 27
    assert max(receipt.attempt for receipt in receipts) == 1 + deaths
    tasks, actors = ({path.name.split("-")[1] for path in processes.glob(f"{kind}-*")} for kind in ("task", "actor"))
    assert (len(actors), tasks & actors) == (1 + deaths, set())
    run_without_ray(world, run_id="cpus", tables=TABLES)
    for name in ("predictions", "embeddings", "errors"):
        expected, found = (open_table(str(world / "tables" / name), each).to_table() for each in ("cpus", run_id))
        assert found.drop_columns(["run_id"]).equals(expected.drop_columns(["run_id"]))


@pytest.mark.ray
@pytest.mark.slow
def test_a_compiled_run_writes_the_same_bytes_again_and_says_how_it_computed(tmp_path, local_ray):
    make_world(tmp_path)  # of its own: what is compiled there others would use
    for run_id in ("compiled", "again"):
        summary = run_with_ray(
            tmp_path, run_id=run_id, tables=TABLES, compute={"compile": "always", "precision": "bfloat16"}
        )
        assert (summary["status"], summary["num_predicted"]) == ("done", 27)
        assert list(find_faults(read_run(summary["output"], run_id))) == []
    assert files_of(tmp_path, "compiled") == files_of(tmp_path, "again")
    metadata = open_table(str(tmp_path / "tables" / "predictions"), "compiled").schema.metadata
    assert json.loads(metadata[b"computed_in"]) == {"tiny/1": "bfloat16, compiled"} == summary["computed_in"]


@pytest.mark.ray
def test_tasks_decode_apart_from_the_actors_of_one_cpu_that_predict(world, local_ray, tmp_path, monkeypatch):
    processes = tmp_path

    def decode_and_tell(rows, run, attempts):
        (processes / f"task-{os.getpid()}").touch()
        return decode_shard(rows, run, attempts)

    class Telling(PredictDecoded):
        def __call__(self, rows):
            (processes / f"actor-{os.getpid()}").touch()
            return super().__call__(rows)

    monkeypatch.setattr("pipeline.inference.flow.decode_shard", decode_and_tell)
    monkeypatch.setattr("pipeline.inference.flow.PredictDecoded", Telling)
    summary = run_with_ray(world, run_id="apart", compute={"form": "split", "cpus_per_actor": 1})
    assert summary["status"] == "done"
    tasks, actors = ({path.name.split("-")[1] for path in processes.glob(f"{kind}-*")} for kind in ("task", "actor"))
    assert (bool(tasks), len(actors), tasks & actors) == (True, 1, set())


@pytest.mark.ray
def test_a_rerun_does_only_what_is_not_committed(world, local_ray):
    run_without_ray(world, run_id="resumed")
    commits = world / "tables/_runs/resumed/commits"
    untouched = (commits / "00000000.json").read_bytes()
    (commits / "00000002.json").unlink()
    summary = run_with_ray(world, run_id="resumed")
    assert (summary["status"], summary["num_pending"], summary["num_images"]) == ("done", 1, 30)
    assert (commits / "00000000.json").read_bytes() == untouched
    kept = (commits.parent / "summary.json").read_bytes()
    with pytest.raises(RunError, match=r"at most 9% of 30 images .* \(max_error_rate\), 3 are") as caught:
        run_with_ray(world, run_id="resumed", max_error_rate=0.09)
    assert caught.value.details["num_errors"] == 3
    recorded = json.loads((commits.parent / "summary.json").read_text())
    assert (recorded["status"], recorded["message"]) == ("failed", str(caught.value))
    again = run_with_ray(world, run_id="resumed")
    assert (again["status"], again["num_pending"], again["num_predicted"]) == ("was done", 0, 27)
    assert (commits.parent / "summary.json").read_bytes() == kept


def test_a_dry_run_touches_nothing(world):
    summary = run_with_ray(world, run_id="dry", dry_run=True)
    assert (summary["status"], summary["num_pending"]) == ("dry run", 4)
    assert not (world / "tables/_runs/dry").exists()


@pytest.mark.ray
def test_an_estimate_writes_no_table_and_the_run_is_compared_with_it(world, local_ray):
    prices = {"per_cpu_hour": 0.5, "currency": "EUR"}
    estimate = run_with_ray(world, run_id="tried", plan=True, prices=prices)
    assert (estimate["status"], estimate["num_pending"], estimate["sample_images"]) == ("estimated", 4, 30)
    assert list((world / "tables").glob("*/run_id=tried")) == []
    assert [path.name for path in (world / "tables/_runs/tried").iterdir()] == ["estimate.json"]
    summary = run_with_ray(world, run_id="tried", prices=prices)
    assert list(find_faults(read_run(summary["output"], "tried"))) == []
    told = summary["estimate"]
    assert (told["duration_s"], told["cost"]["currency"]) == (estimate["duration_s"], "EUR")
    assert told["actual_to_estimated"]["duration"] == pytest.approx(
        summary["duration_s"] / estimate["duration_s"], abs=0.1
    )
    assert 0 < summary["verdict"]["share"] <= 1


@pytest.mark.ray
def test_what_stops_a_worker_stops_the_run_with_its_reason_and_frees_its_cpus(world, local_ray, no_collector):
    blocked = world / "blocked"
    blocked.mkdir()
    (blocked / "predictions").write_text("a file where a folder should be")
    with pytest.raises(RunError, match="blocked/predictions") as caught:
        run_with_ray(world, run_id="blocked", output=str(blocked))
    assert_all_cpus_come_free(caught.value)


@pytest.mark.ray
def test_a_run_that_fails_after_its_first_commits_frees_its_cpus(world, local_ray, no_collector, monkeypatch):
    commits = world / "tables/_runs/fails-late/commits"

    class FailsLate(PredictFused):
        def _take(self, shard, attempt):
            if shard.shard_id == 3:
                while not list(commits.glob("*.json")):
                    time.sleep(0.05)
                raise RunError("no more")
            return super()._take(shard, attempt)

    monkeypatch.setattr("pipeline.inference.flow.PredictFused", FailsLate)
    with pytest.raises(RunError, match="no more") as caught:
        run_with_ray(world, run_id="fails-late")
    assert_all_cpus_come_free(caught.value)


@pytest.mark.ray
def test_a_commit_that_fails_ends_the_work_and_frees_its_cpus(world, local_ray, no_collector, monkeypatch):
    def fail(run_uri, receipt):
        raise StorageError("no space left")

    monkeypatch.setattr("pipeline.inference.flow.commit", fail)
    with pytest.raises(StorageError, match="no space left") as caught:
        run_with_ray(world, run_id="full-disk")
    assert_all_cpus_come_free(caught.value)


def assert_all_cpus_come_free(error):
    assert error.__context__ is None  # who keeps the error keeps no actors
    deadline = time.monotonic() + 60
    while (num_free := ray.available_resources().get("CPU", 0)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert num_free == 2


@pytest.mark.ray
def test_bad_input_that_a_worker_meets_is_told_as_such(local_ray, tmp_path):
    make_world(tmp_path)
    for images in (tmp_path / "manifest").glob("images-*.parquet"):
        images.unlink()
    with pytest.raises(ManifestError, match=r"^expected a readable images-\w+-00000\.parquet in the manifest at"):
        run_with_ray(tmp_path, run_id="without-images")


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "  File x\npipeline.errors.BundleError: it lacks:\nfc.weight\n\nThe above",
            BundleError,
            "it lacks:\nfc.weight",
        ),
        ("pipeline.errors.StorageError: 503\n\nray.exceptions.RayTaskError: more", RunError, "503"),
        (
            "torch.OutOfMemoryError: CUDA out of memory.\n\nray.exceptions.RayTaskError(OutOfMemoryError): more",
            RunError,
            "torch.OutOfMemoryError: CUDA out of memory. Set a smaller compute.batch_size and another run_id",
        ),
        ("its last words", RunError, "its last words"),
    ],
)
def test_the_innermost_failure_is_told_whole(text, kind, message):
    failure = _failure(Exception(text))
    assert (type(failure), str(failure)) == (kind, message)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("num_shards", "num_images", "expected"), [(10, 100, 10), (2_000, 100, 1_000), (1_500, 8_000, 1_200)]
)
def test_very_many_shards_are_fewer_tasks_of_a_bounded_size(local_ray, num_shards, num_images, expected):
    shards = [Shard(index, "shards.parquet", index, num_images, num_bytes=0) for index in range(num_shards)]
    assert shard_dataset(shards).materialize().num_blocks() == expected


@pytest.mark.ray
def test_a_task_may_have_several_shards(world, local_ray, monkeypatch):
    have_tasks(monkeypatch, 2)
    for form in ("fused", "split"):
        summary = run_with_ray(world, run_id=f"several-{form}", compute={"form": form})
        assert (summary["status"], summary["num_shards"], summary["num_predicted"]) == ("done", 4, 27)
        assert list(find_faults(read_run(summary["output"], f"several-{form}"))) == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_on_a_full_cluster_says_what_it_waits_for(world, full_cluster, caplog):
    summary = run_with_ray(world, run_id="waited", compute={"form": "split", "cpus_per_actor": 1})
    assert summary["status"] == "done"
    assert "not begun within 2 s: 1 actors of 1 CPU each, tasks of 1 CPU each; free" in caplog.text


@pytest.mark.ray
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_ray_data_takes_the_graph_of_either_form_on_gpus(world, local_ray, monkeypatch, decode):
    datasets = []
    monkeypatch.setattr("pipeline.inference.flow.receipts_of", lambda dataset, *_: iter([datasets.append(dataset)]))
    plan = plan_of(world, run_id="on-gpus")
    plan = replace(plan, run=plan.run.model_copy(update={"decode": decode, "compile": "never"}))
    for form in ("fused", "split"):
        layout = Layout(form, "cuda", num_actors=1, cpus_per_actor=1, gpus_per_actor=1, num_gpus=1, decode=decode)
        list(run_shards(plan, layout))
    assert len(datasets) == 2


def test_the_driver_does_without_torch():
    imports = "import sys, jobs.predict, jobs.verify, pipeline.inference.flow; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imports], check=False).returncode == 0
