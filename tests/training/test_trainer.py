"""How many workers there are, and of what size, on clusters of all shapes; and what is told of their end."""

from concurrent.futures import Future
from functools import partial

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from pipeline.cluster import Node, start_here
from pipeline.errors import ConfigError, StorageError
from pipeline.training.bulletin import Bulletin
from pipeline.training.trainer import Workers, _cause, _follow, choose_workers, run_workers

AS_IT_COMES = {"num_workers": None, "cpus_per_worker": None}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([Node(2)], Workers(1, 1, 2, False)),
        ([Node(0), Node(4), Node(8)], Workers(1, 1, 4, False)),
        ([Node(8, 2), Node(6, 2), Node(4)], Workers(4, 4, 3, True)),
    ],
)
def test_unset_is_a_worker_for_each_gpu_or_one(nodes: list[Node], expected: Workers):
    assert choose_workers(nodes, **AS_IT_COMES, use_gpu=expected.use_gpu) == expected


def test_cpus_are_shared_fairly_and_a_pair_is_the_fewest_and_the_most():
    nodes = [Node(4), Node(4)]
    assert choose_workers(nodes, num_workers=[4], cpus_per_worker=None, use_gpu=False) == Workers(4, 4, 2, False)
    assert choose_workers(nodes, num_workers=[1, 8], cpus_per_worker=None, use_gpu=False) == Workers(1, 8, 1, False)
    assert choose_workers(nodes, num_workers=[2], cpus_per_worker=3, use_gpu=False) == Workers(2, 2, 3, False)


def test_workers_that_do_not_fit_are_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"3 workers of 2 CPUs each do not fit this cluster, 2 do \(nodes: 2 CPUs \+"):
        choose_workers([Node(2), Node(3)], num_workers=[3], cpus_per_worker=2, use_gpu=False)
    with pytest.raises(ConfigError, match="2 workers of 1 CPU and 1 GPU each do not fit this cluster, 1 do"):
        choose_workers([Node(4, 1)], num_workers=[2], cpus_per_worker=1, use_gpu=True)


@pytest.mark.parametrize("num_workers", [[0], [3, 2], [5], [1, 5]])
def test_no_workers_more_fewest_than_most_and_more_than_lanes_are_refused(num_workers: list[int]):
    with pytest.raises(ConfigError, match=rf"at most data.num_lanes \(4\), got \[{num_workers[0]}"):
        choose_workers([Node(8)], num_workers=num_workers, cpus_per_worker=1, use_gpu=False, num_lanes=4)


@pytest.mark.parametrize(("num_workers", "enough"), [(2, None), (8, None), (12, 8), (15, 8), (16, None)])
def test_workers_that_lanes_leave_idle_are_told_of(num_workers: int, enough: int | None, caplog):
    choose_workers([Node(64)], num_workers=[num_workers], cpus_per_worker=1, use_gpu=False, num_lanes=16)
    assert (enough is None) == (not caplog.records)
    assert enough is None or f"no faster than {enough} workers" in caplog.text


@pytest.mark.parametrize(("num_gpus", "idle"), [(4, None), (6, "leaves 2 of 6 GPUs idle")])
def test_gpus_that_lanes_leave_idle_are_told_of(num_gpus: int, idle: str | None, caplog):
    assert choose_workers([Node(64, num_gpus)], **AS_IT_COMES, use_gpu=True, num_lanes=4).most == 4
    assert (idle is None) == (not caplog.records)
    assert idle is None or idle in caplog.text


def test_without_lanes_there_may_be_as_many_workers_as_fit():
    assert choose_workers([Node(64)], num_workers=[40], cpus_per_worker=1, use_gpu=False).most == 40


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_on_a_full_cluster_says_what_it_waits_for(full_cluster, caplog):
    looks: list[int] = []
    workers, look_out = Workers(1, 1, 1, False), partial(looks.append, 1)
    answer = run_workers(lambda worker: worker.rank + 7, workers, name="waited", max_failures=0, look_out=look_out)
    assert answer == 7
    assert len(looks) > 2  # though nothing was told
    assert "not begun within 2 s: 1 workers of 1 CPU each; free" in caplog.text


DEATH = WorkerHealthCheckFailedError("worker 1 is gone", ActorDiedError())
ALONE = RuntimeError("Connection closed by peer")
DECODING = RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ")


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ([ALONE, DEATH, StorageError("503 at s3://set")], "503 at s3://set"),
        (
            [ALONE, DEATH],
            f"worker 1 is gone\n{ActorDiedError()}\nA worker's process died or was lost",
        ),
        ([ALONE, DECODING], f"{DECODING}\nA worker's process died or was lost"),
        ([ALONE], "Connection closed by peer"),
    ],
)
def test_the_rank_that_failed_is_told_and_not_those_it_left_alone(failures: list[Exception], told: str):
    assert _cause(WorkerGroupError("2 ranks failed", dict(enumerate(failures)))).startswith(told)


@pytest.mark.ray
def test_what_is_told_while_the_last_is_taken_in_is_taken_in_too(local_ray):
    bulletin, fit, observed = start_here(Bulletin), Future(), []

    def observe(status: dict[str, int]) -> None:
        observed.append(status["step"])
        if status["step"] == 1:  # an upload takes its time: the training goes on, and ends
            ray.get(bulletin.tell.remote({"step": 2}))
            fit.set_result(None)

    ray.get(bulletin.tell.remote({"step": 1}))
    _follow(fit, bulletin, observe, lambda: None)
    assert observed == [1, 2]


def test_workers_that_begin_again_in_another_number_were_not_killed_by_an_image():
    bulletin = Bulletin()
    assert not any(bulletin.begin(rank, 0, world_size=2) for rank in range(2))
    assert not any(bulletin.begin(rank, 0, world_size=8) for rank in range(8))
    assert bulletin.begin(0, 0, world_size=8)
