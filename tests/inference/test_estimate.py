"""Estimates from trials whose work is played: shards that take as long as they say."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.cluster import Node
from pipeline.errors import RunError, StorageError
from pipeline.inference import networks
from pipeline.inference.bound import Observed
from pipeline.inference.commit import Receipt
from pipeline.inference.config import PricesConfig
from pipeline.inference.estimate import Cost, choose_sample, estimate_run, outcome, sweep_trials, try_shards
from pipeline.inference.layout import Layout
from pipeline.inference.networks import Choice
from pipeline.inference.plan import Plan
from tests.worlds import config_of, list_images, make_bundle, plan_of

LAYOUT = Layout("fused", "cpu", num_actors=2, cpus_per_actor=1, gpus_per_actor=0)
NODES = [Node(cpus=2)]
SECONDS = {"fetch": 0.1, "decode": 1.0, "predict": 3.0, "write": 0.1, "total": 4.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """2,000 images in 20 shards, of which only the names are there, and a bundle."""
    root = tmp_path_factory.mktemp("world")
    (root / "images").mkdir()
    for index in range(2000):
        (root / "images" / f"{index:04d}.jpg").touch()
    list_images(root / "images", root / "manifest", shard_size=100)
    make_bundle(root / "registry")
    return root


def play(plan: Plan, layout: Layout) -> Iterator[Receipt]:
    """Two actors, each at 25 images/s, as their receipts say."""
    start = time.time() + 2
    for turn, shard in enumerate(plan.pending_shards()):
        began_at = start + 4 * (turn // 2)
        yield Receipt(shard.shard_id, 100, 100, 0, {}, [], SECONDS, began_at=began_at, ended_at=began_at + 4.0)


def test_a_sample_is_spread_evenly_over_what_is_pending(world):
    plan = plan_of(world)
    assert [shard.shard_id for shard in choose_sample(plan, 4)] == [2, 7, 12, 17]
    assert [shard.shard_id for shard in choose_sample(plan, 50)] == list(range(20))
    rest = Plan(plan.run, plan.manifest, committed=set(range(18)))
    assert [shard.shard_id for shard in choose_sample(rest, 1)] == [19]


def test_an_estimate_is_the_samples_pace_over_all_that_is_pending(world):
    estimate = estimate_run(plan_of(world), LAYOUT, NODES, config_of(world), play)
    assert (estimate.sample_shards, estimate.sample_images, estimate.num_pending) == (6, 600, 20)
    assert estimate.images_per_s == pytest.approx(50, rel=0.01)
    assert estimate.duration_s == pytest.approx(2000 / 50 + estimate.start_up_s, abs=0.2)


def test_workers_that_have_no_shard_are_not_waited_for(world):
    plan = plan_of(world, run_id="few")
    rest = Plan(plan.run, plan.manifest, committed=set(range(17)))
    many = Layout("fused", "cpu", num_actors=64, cpus_per_actor=1, gpus_per_actor=0)
    estimate = estimate_run(rest, many, [Node(cpus=64)], config_of(world), play)
    assert estimate.duration_s == pytest.approx(8 + estimate.start_up_s, abs=0.2)  # three shards, two at a time


def play_split(plan: Plan, layout: Layout) -> Iterator[Receipt]:
    """Four CPUs decode for a GPU, which takes a second for what one of them takes two for, as their receipts say."""
    cpus, gpu = [time.time() + 2] * 4, 0.0
    for shard in plan.pending_shards():
        began_at = min(cpus)
        cpus[cpus.index(began_at)] = decoded_at = began_at + 2
        waited, gpu = max(gpu - decoded_at, 0), max(gpu, decoded_at) + 1
        times = {"began_at": began_at + waited, "ended_at": gpu}
        yield Receipt(shard.shard_id, shard.num_images, shard.num_images, 0, {}, [], SECONDS, **times)


@pytest.mark.parametrize("num_pending", [14, 13, 5, 1])
def test_tasks_and_actors_are_stages_of_one_pipe(world, num_pending):
    list_images(world / "images", world / "large", shard_size=150)
    plan = plan_of(world, manifest=str(world / "large"), run_id=f"split-{num_pending}")
    rest = Plan(plan.run, plan.manifest, committed=set(range(14 - num_pending)))
    layout = Layout("split", "cuda", num_actors=1, cpus_per_actor=0, gpus_per_actor=1, num_gpus=1)
    estimate = estimate_run(rest, layout, [Node(cpus=4, gpus=1)], config_of(world), play_split)
    assert estimate.duration_s == pytest.approx(num_pending + 2 + estimate.start_up_s, abs=1.1)


def test_a_trial_without_a_rate_is_refused(world):
    def play_backwards(plan: Plan, layout: Layout) -> Iterator[Receipt]:
        for receipt in play(plan, layout):
            yield replace(receipt, began_at=receipt.ended_at, ended_at=receipt.began_at)

    with pytest.raises(RunError, match="do the nodes' clocks go together"):
        estimate_run(plan_of(world, run_id="skewed"), LAYOUT, NODES, config_of(world), play_backwards)


def test_a_run_is_compared_only_with_an_estimate_of_the_same_work(world):
    plan, config = plan_of(world, run_id="compared"), config_of(world, run_id="compared")
    estimate = estimate_run(plan, LAYOUT, NODES, config, play)
    observed = Observed()
    assert len(list(observed.noting(play(plan, LAYOUT)))) == 20
    told = outcome(plan, LAYOUT, NODES, config, observed, duration_s=2 * estimate.duration_s)["estimate"]
    assert told["actual_to_estimated"] == {"duration": 2.0, "images_per_s": pytest.approx(1, abs=0.01)}
    resumed = Plan(plan.run, plan.manifest, committed={0})
    assert outcome(resumed, LAYOUT, NODES, config, observed, duration_s=10.0)["estimate"] is None


@pytest.mark.parametrize("is_failing", [False, True])
def test_a_trial_leaves_nothing_behind_however_it_ends(world, is_failing):
    def work(plan: Plan, layout: Layout) -> Iterator[Receipt]:
        storage.write(storage.join(plan.run.output_uri, "errors/00000000.parquet"), b"")
        yield from play(plan, layout)
        if is_failing:
            raise RunError("a worker failed")

    plan = plan_of(world, run_id="left")
    scratch = storage.join(plan.run.uri, "estimate")
    try:
        try_shards(plan, LAYOUT, choose_sample(plan, 2), scratch, work, progress_interval_s=60)
    except RunError:
        assert is_failing
    assert list(storage.list_objects(plan.run.uri)) == []


def test_a_trial_that_fails_and_leaves_what_cannot_be_removed_tells_why_it_failed(world, monkeypatch):
    def work(plan: Plan, layout: Layout) -> Iterator[Receipt]:
        yield from play(plan, layout)
        raise RunError("a worker failed")

    def refuse(uri: str) -> None:
        raise StorageError("Directory not empty")

    plan = plan_of(world, run_id="stuck")
    monkeypatch.setattr(storage, "delete_folder", refuse)
    with pytest.raises(RunError, match="a worker failed"):
        try_shards(plan, LAYOUT, choose_sample(plan, 2), f"{plan.run.uri}/estimate", work, progress_interval_s=60)


def test_a_trial_of_a_run_that_has_begun_runs_its_networks_as_the_run_does(world):
    plan, seen = plan_of(world, run_id="begun", compute={"compile": "always"}), []
    decided = {"tiny/1": Choice(precision="float32", is_compiled=False)}
    storage.write(networks._uri(plan.run), networks._CHOICES.dump_json(decided))

    def work(part: Plan, layout: Layout) -> Iterator[Receipt]:
        seen.append(networks.choices(part.run))
        yield from play(part, layout)

    try_shards(plan, LAYOUT, choose_sample(plan, 2), f"{plan.run.uri}/estimate", work, progress_interval_s=60)
    assert seen == [decided]


def test_what_a_killed_trial_left_is_swept_and_nothing_else(world):
    plan = plan_of(world, run_id="swept")
    for name in ("estimate-0123/errors/00000000.parquet", "commits/00000000.json", "estimate.json"):
        storage.write(storage.join(plan.run.uri, name), b"")
    sweep_trials(plan)
    left = [info.uri.removeprefix(f"{plan.run.uri}/") for info in storage.list_objects(plan.run.uri)]
    assert sorted(left) == ["commits/00000000.json", "estimate.json"]


def test_prices_are_of_the_whole_cluster_and_unsaid_where_there_are_none():
    nodes = [Node(cpus=16, gpus=1), Node(cpus=64)]
    cost = Cost.of(1800, 500_000, nodes, PricesConfig(per_cpu_hour=0.05, per_gpu_hour=2))
    assert (cost.node_hours, cost.price, cost.price_per_million_images) == (1.0, 3.0, 6.0)
    assert Cost.of(1800, 500_000, nodes, PricesConfig()).price is None
