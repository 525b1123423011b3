import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster import Node
from pipeline.inference.bound import (
    Observed,
    StageCosts,
    Timed,
    cpus_per_gpu,
    judge,
    judge_run,
    measured_costs,
    observed_costs,
    pools_of,
    rate_of,
)
from pipeline.inference.commit import Receipt
from pipeline.inference.config import ComputeConfig
from pipeline.inference.layout import STAGES, Layout, choose_layout

COSTS = StageCosts(fetch=0.0001, decode=0.002, predict=0.01, write=0.0001)
FUSED = Layout("fused", "cpu", num_actors=2, cpus_per_actor=1, gpus_per_actor=0)
SPLIT = Layout("split", "cuda", num_actors=2, cpus_per_actor=0, gpus_per_actor=1, num_gpus=2)

seconds = st.floats(1e-5, 1.0)
costs = st.builds(StageCosts, seconds, seconds, seconds, seconds) | st.builds(
    StageCosts, seconds, seconds, seconds, seconds, st.fixed_dictionaries({"fetch": st.floats(1, 1e5)})
)
layouts = st.tuples(st.integers(2, 64), st.integers(0, 8), st.sampled_from(["fused", "split"]))


def receipt(shard_id: int, began_at: float, ended_at: float, num_images: int = 100, **spent: float) -> Receipt:
    return Receipt(shard_id, num_images, num_images, 0, {}, [], spent, began_at=began_at, ended_at=ended_at)


def observed(*receipts: Receipt) -> Observed:
    seen = Observed()
    assert list(seen.noting(receipts)) == list(receipts)
    return seen


def test_on_cpus_alone_every_stage_takes_its_turn():
    pools = pools_of(FUSED, [Node(cpus=2)])
    verdict = judge(COSTS, pools, images_per_s=120.0)
    assert verdict.bound_images_per_s == pytest.approx(2 / 0.0122)
    assert (verdict.binds, verdict.advice) == ("predict", "2 more CPUs would raise 120 to 240 images/s")


def test_gpus_that_decode_pay_for_it_with_their_own_time():
    layout = replace(FUSED, device="cuda", gpus_per_actor=1, num_gpus=2, decode="gpu")
    verdict = judge(replace(COSTS, decode=0.0001), pools_of(layout, [Node(cpus=2, gpus=2)]), images_per_s=190.0)
    assert verdict.bound_images_per_s == pytest.approx(2 / 0.0101)
    part = [[Timed(num_images=10, wall_s=2.0, cpu_s=1.0)]]
    measured = measured_costs(dict.fromkeys(STAGES, part), layout)
    assert (measured.fetch, measured.decode, measured.predict, measured.write) == (0.1, 0.2, 0.2, 0.1)


def test_actors_that_share_a_gpu_are_not_counted_as_several():
    layout = replace(FUSED, device="cuda", num_actors=4, gpus_per_actor=0.5, num_gpus=2, decode="gpu")
    part = Timed(num_images=10, wall_s=2.0, cpu_s=1.0)
    measured = measured_costs({stage: [[part] * 4] for stage in STAGES}, layout)
    assert (measured.decode, measured.predict) == (0.1, 0.1)
    verdict = judge(measured, pools_of(layout, [Node(cpus=4, gpus=2)]), images_per_s=8.0)
    assert verdict.bound_images_per_s == pytest.approx(10)  # as it did, of images that wait for both stages
    spent = {"decode": 5.0, "predict": 5.0, "write": 0.1}
    run = observed(*(receipt(index, 0, 10.1, **spent) for index in range(4)))
    seen = observed_costs(run, layout)
    assert (seen.decode, seen.predict, seen.write) == (0.025, 0.025, 0.001)


def test_too_few_cpus_beside_gpus_are_counted_per_gpu():
    pools = pools_of(SPLIT, [Node(cpus=8, gpus=2)])
    verdict = judge(replace(COSTS, predict=0.0004), pools, images_per_s=3_600.0)
    assert verdict.as_dict() == {
        "binds": "decode",
        "images_per_s": 3600.0,
        "bound_images_per_s": 3636.4,
        "share": 0.99,
        "sentence": "decode-bound: 2 more CPUs per GPU would raise 3,600 to 4,950 images/s",
    }


def test_the_cpus_that_keep_up_with_a_gpu_are_told_where_there_is_one():
    dear = replace(COSTS, predict=0.0004)
    assert cpus_per_gpu(dear, pools_of(SPLIT, [Node(cpus=8, gpus=2)])) == pytest.approx(5.5)
    assert cpus_per_gpu(dear, pools_of(FUSED, [Node(cpus=2)])) is None


def test_a_store_slower_than_the_cpus_binds():
    slow = replace(COSTS, store_images_per_s={"fetch": 60.0, "write": 5_000.0})
    verdict = judge(slow, pools_of(FUSED, [Node(cpus=2)]), images_per_s=54.0)
    assert (verdict.binds, verdict.bound_images_per_s, verdict.share) == ("fetch", 60.0, 0.9)
    assert verdict.advice.startswith("a store that kept up would raise 54 to 148 images/s")


@given(costs, layouts)
def test_more_of_what_binds_never_lowers_the_bound_and_is_not_promised_to(costs, cluster):
    cpus, gpus, form = cluster
    nodes = [Node(cpus=max(cpus, gpus + 1), gpus=gpus)]
    pools = pools_of(choose_layout(nodes, ComputeConfig(form=form), num_shards=1000), nodes)
    before = judge(costs, pools, images_per_s=1.0).bound_images_per_s
    slowest = min(pools, key=lambda pool: pool.images_per_s(costs))
    larger = [replace(pool, size=pool.size + 1) if pool is slowest else pool for pool in pools]
    assert judge(costs, larger, images_per_s=1.0).bound_images_per_s >= before
    assert all(before <= pool.images_per_s(costs) for pool in pools)
    assert all(before <= limit for limit in costs.store_images_per_s.values())


@given(costs, st.integers(1, 64))
def test_a_dearer_stage_never_raises_the_bound(costs, cpus):
    pools = pools_of(replace(FUSED, num_actors=cpus), [Node(cpus=cpus)])
    bounds = [judge(replace(costs, decode=costs.decode * factor), pools, 1.0).bound_images_per_s for factor in (1, 2)]
    assert bounds[1] <= bounds[0]


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0.5, 20)), min_size=1, max_size=12), st.integers(1, 4))
def test_no_run_reaches_more_than_its_bound(spans, num_actors):
    seen = observed(
        *(receipt(index, begin, begin + length, decode=length / 4) for index, (begin, length) in enumerate(spans))
    )
    verdict = judge_run(seen, 12, replace(FUSED, num_actors=num_actors), [Node(cpus=num_actors)])
    assert 0 < verdict.share <= 1


def test_the_rate_leaves_out_the_first_workers_lead_and_the_last_ones_tail():
    lead, tail = receipt(0, 0, 15), receipt(3, 25, 40)
    seen = observed(lead, receipt(1, 10, 20), receipt(2, 15, 25), receipt(4, 20, 30), tail)
    inside = 100 * 5 / 15 + 300 + 100 * 5 / 15
    assert seen.images_per_s(2) == pytest.approx(inside / 20)
    assert seen.working_s(2) == 35


def test_waiting_for_bytes_binds_a_run_and_is_not_part_of_its_bound():
    spent = {"fetch": 6.0, "decode": 1.0, "predict": 2.0, "write": 1.0}
    seen = observed(*(receipt(index, 0, 10, **spent) for index in range(2)))
    verdict = judge_run(seen, 2, FUSED, [Node(cpus=2)])
    assert (verdict.binds, verdict.images_per_s) == ("fetch", pytest.approx(20))
    assert verdict.bound_images_per_s == pytest.approx(50)


def test_stages_cost_the_cpu_they_use_and_a_store_limits_by_its_rate():
    one = Timed(num_images=100, wall_s=2.0, cpu_s=0.5)
    timed = {stage: [[one, one], [one, one]] for stage in STAGES}
    found = measured_costs(timed, FUSED)
    assert (found.fetch, found.decode, found.predict, found.write) == (0.005, 0.005, 0.005, 0.005)
    assert found.store_images_per_s == {"fetch": 100.0, "write": 100.0}
    assert rate_of(timed["decode"]) == 100.0


def test_a_gpu_is_taken_for_as_long_as_it_predicts():
    timed = {stage: [[Timed(num_images=100, wall_s=1.0, cpu_s=0.2)]] for stage in STAGES}
    assert measured_costs(timed, SPLIT).predict == 0.01


def test_a_run_whose_cpus_others_have_too_is_judged_by_what_it_used():
    spent = {"decode": 4.0, "predict": 16.0, "write": 0.0, "cpu": 5.0}
    verdict = judge_run(observed(*(receipt(index, 0, 10, **spent) for index in range(2))), 2, FUSED, [Node(cpus=2)])
    assert (verdict.binds, verdict.share) == ("predict", pytest.approx(0.5))


def test_where_there_are_fewer_shards_than_workers_smaller_ones_are_advised():
    spent = {"decode": 4.0, "predict": 6.0, "cpu": 10.0}
    done, nodes = observed(receipt(0, 0, 10, **spent)), [Node(cpus=2)]
    assert judge_run(done, 1, FUSED, nodes).as_dict()["sentence"] == (
        "predict-bound: of 2 workers 1 had a shard: smaller ones would keep more of them at work"
    )
    assert judge_run(done, 50, FUSED, nodes).advice == "of 2 workers 1 had a shard: no more were left to do"


def test_nodes_whose_clocks_do_not_go_together_get_no_verdict():
    spent = {"fetch": 6.0, "decode": 1.0, "predict": 2.0, "write": 1.0}
    assert judge_run(observed(receipt(0, 10, 5, **spent)), 1, FUSED, [Node(cpus=2)]) is None


def test_verdicts_do_without_torch_and_ray():
    imports = "import sys, pipeline.inference.bound; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imports], check=False).returncode == 0


@pytest.mark.parametrize(
    ("nodes", "compute", "num_shards", "advice"),
    [
        ([Node(cpus=64)], {}, 1, "60 of 64 CPUs had no part in it: smaller shards"),
        ([Node(cpus=64)], {}, 3, "52 of 64 CPUs had no part in it: smaller shards"),
        (
            [Node(cpus=8)],
            {"actors": 2},
            9,
            "6 of 8 CPUs had no part in it: a larger compute.actors would",
        ),
        ([Node(cpus=8, gpus=8)], {"form": "fused"}, 2, "6 of 8 GPUs had no part in it: smaller shards"),
        ([Node(cpus=3), Node(cpus=3)], {"cpus_per_actor": 2}, 2, "4 more CPUs would raise"),
        ([Node(cpus=8)], {"actors": 7}, 9, "7 more CPUs would raise"),
    ],
)
def test_more_is_not_advised_where_most_stands_idle(nodes, compute, num_shards, advice):
    layout = choose_layout(nodes, ComputeConfig(**compute), num_shards)
    spent = {"decode": 4.0, "predict": 6.0, "write": 0.1}
    done = observed(*(receipt(index, 0, 10, **spent) for index in range(num_shards)))
    assert advice in judge_run(done, num_shards, layout, nodes).advice
