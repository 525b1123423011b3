import shutil
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.cluster import Node
from pipeline.errors import ConfigError
from pipeline.inference import run as runs
from pipeline.inference.commit import Receipt, commit
from pipeline.inference.flow import predict
from pipeline.inference.plan import as_begun, finished_plan, make_plan, record_run
from pipeline.inference.run import list_run_ids, read_run, resolve_inputs
from tests.worlds import ONE_ACTOR, config_of, make_bundle, plan_of, record


def test_a_new_run_has_every_shard_to_do(world):
    plan = plan_of(world, run_id="new")
    assert (plan.num_pending, len(list(plan.pending_shards()))) == (4, 4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=16)
@given(st.sets(st.integers(0, 3)))
def test_the_plan_is_the_manifest_less_the_commits(world, committed):
    run = record(world, run_id=f"minus-{sum(2**shard for shard in committed)}")
    for shard_id in committed:
        commit(run.uri, Receipt(shard_id, 8, 8, 0, {}, [], {}))
    plan = plan_of(world, run_id=run.run_id)
    assert [shard.shard_id for shard in plan.pending_shards()] == sorted({0, 1, 2, 3} - committed)
    assert plan.num_pending == 4 - len(committed)


def test_planning_writes_nothing(world):
    plan = plan_of(world, run_id="untouched")
    assert "untouched" not in list_run_ids(plan.run.output_uri)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tables": {"top_k": 2}}, "tables"),
        ({"bundles": ["other"]}, "models"),
        ({"compute": {"batch_size": 7}}, "batch_size"),
        ({"images": {"max_pixels": 10}}, "images"),
        ({"images": {"allowed_roots": ["s3://bucket"]}}, "images"),
    ],
)
def test_a_run_cannot_go_on_with_what_would_change_its_bytes(world, change, field):
    record(world, run_id="fixed")
    with pytest.raises(ConfigError, match=rf"run 'fixed' began otherwise.*\n{field}: began with"):
        plan_of(world, run_id="fixed", **change)


def test_a_run_keeps_the_batch_size_it_began_with(world):
    record(world, run_id="batched", compute={"batch_size": 5})
    assert plan_of(world, run_id="batched").run.batch_size == 5


def test_a_run_keeps_the_number_of_threads_it_began_with_on_any_cluster(world):
    record(world, run_id="threads")
    config = config_of(world, run_id="threads")
    resumed = make_plan(config, *resolve_inputs(config), replace(ONE_ACTOR, cpus_per_actor=7))
    assert resumed.run.num_threads == plan_of(world, run_id="threads").run.num_threads == 2


def test_a_run_goes_on_with_the_device_it_began_with_where_the_config_leaves_it_open(world):
    record(world, run_id="on-cpus-first")
    config = config_of(world, run_id="on-cpus-first", dry_run=True)
    inputs, with_gpu = resolve_inputs(config), [Node(cpus=8, gpus=1)]
    assert predict(config, *inputs, with_gpu)["layout"]["device"] == "cpu"
    assert as_begun(config_of(world, run_id="new"), *inputs, with_gpu).device == "auto"
    with pytest.raises(ConfigError, match="device: began with 'cpu', now 'cuda'") as caught:
        make_plan(config, *inputs, replace(ONE_ACTOR, device="cuda"))
    assert "num_threads" not in str(caught.value)


def test_a_run_that_began_on_gpus_says_that_they_are_gone(world):
    config = config_of(world, run_id="gpus-gone")
    inputs = resolve_inputs(config)
    record_run(make_plan(config, *inputs, replace(ONE_ACTOR, device="cuda")), config)
    with pytest.raises(ConfigError, match=r"began on GPUs, and the cluster has none now: add one \(cluster\.gpus 1"):
        as_begun(config, *inputs, [Node(cpus=2)])


def test_a_run_that_keeps_its_threads_says_so_where_other_actors_are_asked_for(world, caplog):
    record(world, run_id="of-two")
    assert record(world, run_id="of-two", compute={"cpus_per_actor": 8}).num_threads == 2
    assert "began with actors of 2 threads and keeps these, though each now has 8 CPUs" in caplog.text


def test_a_run_on_gpus_takes_the_threads_that_the_cluster_offers_now(world):
    config = config_of(world, run_id="gpu-threads", compute={"device": "cuda"})
    on_gpus = replace(ONE_ACTOR, device="cuda")
    record_run(make_plan(config, *resolve_inputs(config), on_gpus), config)
    resumed = make_plan(config, *resolve_inputs(config), replace(on_gpus, cpus_per_actor=7))
    assert resumed.run.num_threads == 7
    record_run(resumed, config)


def test_a_run_that_gpus_decoded_is_not_gone_on_with_by_cpus(world):
    config = config_of(world, run_id="nvjpeg")
    plan = make_plan(config, *resolve_inputs(config), replace(ONE_ACTOR, decode="gpu"))
    record_run(plan, config)
    with pytest.raises(ConfigError, match=r"decode.*gpu"):
        plan_of(world, run_id="nvjpeg")
    on_gpus = replace(ONE_ACTOR, device="cuda")
    assert plan.run.lineage["decoded_on"] == "gpu"
    config = config_of(world, run_id="on-cpus", compute={"device": "cuda"})
    record_run(make_plan(config, *resolve_inputs(config), on_gpus), config)
    resumed = make_plan(config, *resolve_inputs(config), replace(on_gpus, decode="gpu"))
    assert resumed.run.decode == "cpu"  # CPUs were enough then, and still can


@pytest.mark.parametrize(("device", "decode"), [("cpu", "cpu"), ("cuda", "cpu"), ("cuda", "gpu")])
def test_a_finished_run_is_known_without_the_cluster_it_ran_on(world, device, decode):
    run_id = f"finished-{device}-{decode}"
    config = config_of(world, run_id=run_id)
    plan = make_plan(config, *resolve_inputs(config), replace(ONE_ACTOR, device=device, decode=decode))
    record_run(plan, config)

    def finished(**fields):
        config = config_of(world, run_id=run_id, **fields)
        return finished_plan(config, *resolve_inputs(config))

    assert finished() is None
    for shard in plan.pending_shards():
        commit(plan.run.uri, Receipt(shard.shard_id, shard.num_images, shard.num_images, 0, {}, [], {}))
    assert finished() is None  # killed before its sums were proven
    storage.write(plan.run.summary_uri, b"{}")
    assert (finished().run, finished().num_pending) == (plan.run, 0)
    with pytest.raises(ConfigError, match="precision"):
        finished(compute={"precision": "float32"})
    with pytest.raises(ConfigError, match="decode"):
        finished(compute={"decode": "cpu" if decode == "gpu" else "gpu"})
    storage.delete(storage.join(plan.run.uri, "commits", "00000001.json"))
    assert finished() is None


def test_a_run_that_never_began_is_not_finished(world):
    config = config_of(world, run_id="never")
    assert finished_plan(config, *resolve_inputs(config)) is None


def test_a_run_may_go_on_with_moved_bundles_and_fetch_harder(world, tmp_path):
    record(world, run_id="moved")
    make_bundle(tmp_path)
    plan = plan_of(world, run_id="moved", registry=str(tmp_path), images={"fetch_concurrency": 4})
    assert plan.run.images.fetch_concurrency == 4


def test_a_run_may_go_on_where_its_output_was_moved(world, tmp_path):
    run = record(world, run_id="moved-tables")
    moved = shutil.copytree(run.output_uri.removeprefix("file://"), tmp_path / "tables")
    plan = plan_of(world, run_id="moved-tables", output=str(moved))
    assert plan.run.output_uri == f"file://{moved}"
    assert read_run(f"file://{moved}", "moved-tables") == plan.run


def test_going_on_with_other_software_is_warned_of(world, monkeypatch, caplog):
    began = record(world, run_id="upgraded")
    record(world, run_id="upgraded")
    assert not caplog.text
    monkeypatch.setattr(runs, "version", lambda package: {"torch": "9.9"}.get(package, began.software[package]))
    assert record(world, run_id="upgraded").software == began.software
    told = f"run upgraded began with torch {began.software['torch']} and goes on with torch 9.9: decoders and kernels"
    assert caplog.text.count(told) == 1
