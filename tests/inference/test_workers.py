"""What Ray's workers do about shards that kill them."""

import threading
import time
from types import SimpleNamespace

import pytest
import ray

from pipeline.data.manifest import Shard
from pipeline.inference import workers
from pipeline.inference.attempts import ShardAttempts
from pipeline.inference.flow import start_attempts
from pipeline.inference.workers import PredictFused, attempt_each, attempting


class Shards:
    """Works on shards in two threads of a process of its own."""

    def __init__(self, attempts) -> None:
        self._attempts, self._meeting = attempts, threading.Barrier(2)

    def meets_another(self, shard_id: int, wait_s: float) -> bool:
        with attempting(self._attempts, "all", Shard(shard_id, None, None, 1, num_bytes=0)):
            try:
                self._meeting.wait(wait_s)
            except threading.BrokenBarrierError:
                return False
        return True


@pytest.mark.ray
def test_shards_that_saw_their_process_die_are_done_one_at_a_time_and_others_are_not(local_ray):
    attempts, here = start_attempts(), ray.get_runtime_context().get_node_id()
    ray.get(attempts.begin.remote("all", [3, 4], "a node that was lost"))
    ray.get(attempts.begin.remote("all", [1, 2], here))  # and their process died

    def meet(*shard_ids: int, wait_s: float) -> list[bool]:
        worker = ray.remote(Shards).options(max_concurrency=2, num_cpus=0).remote(attempts)
        return ray.get([worker.meets_another.remote(shard_id, wait_s) for shard_id in shard_ids])

    assert meet(3, 4, wait_s=30) == [True, True]
    assert meet(1, 2, wait_s=0.2) == [False, False]
    ray.get(attempts.begin.remote("all", [1], here, is_alone=True))  # and it died again
    assert meet(1, 5, wait_s=0.2) == [False, False]


class Counting(ShardAttempts):
    """Keeps what it was told; `died` are shards whose process died before."""

    def __init__(self, died: list[int]) -> None:
        super().__init__()
        super().begin("all", died, ray.get_runtime_context().get_node_id())
        self.messages: list[tuple[str, list[int]]] = []

    def begin(self, stage, shard_ids, node, *, is_alone=False):
        self.messages.append(("begin alone" if is_alone else "begin", shard_ids))
        return super().begin(stage, shard_ids, node, is_alone=is_alone)

    def end(self, stage, shard_ids):
        self.messages.append(("end", shard_ids))
        super().end(stage, shard_ids)

    def told(self):
        return self.messages


def attempt_ten(died: list[int], work_s: float) -> tuple[set[tuple[int, int]], list[tuple[str, list[int]]]]:
    """The attempts at ten shards of a task that took `work_s` each, and the messages sent."""
    attempts = ray.remote(Counting).options(num_cpus=0).remote(died)
    ray.get(attempts.told.remote())  # it has started
    shards = [Shard(shard_id, None, None, 1, num_bytes=0) for shard_id in range(10)]

    def work(shard: Shard, attempt: int) -> tuple[int, int]:
        time.sleep(work_s)
        return shard.shard_id, attempt

    return set(attempt_each(attempts, "all", shards, work)), ray.get(attempts.told.remote())


@pytest.mark.ray
def test_short_shards_of_a_task_are_begun_and_ended_together(local_ray, monkeypatch):
    monkeypatch.setattr(workers, "_TOGETHER_S", 30)
    done, messages = attempt_ten(died=[], work_s=0.001)
    assert done == {(shard_id, 1) for shard_id in range(10)}
    assert messages == [(kind, ids) for ids in ([0], [1, 2, 3, 4], [5, 6, 7, 8, 9]) for kind in ("begin", "end")]


@pytest.mark.ray
def test_long_shards_of_a_task_are_begun_one_by_one(local_ray, monkeypatch):
    monkeypatch.setattr(workers, "_TOGETHER_S", 0.1)
    _, messages = attempt_ten(died=[], work_s=0.15)
    assert messages == [(kind, [shard_id]) for shard_id in range(10) for kind in ("begin", "end")]


@pytest.mark.ray
def test_of_a_tasks_shards_those_that_saw_a_death_are_done_alone_after_their_neighbours(local_ray, monkeypatch):
    monkeypatch.setattr(workers, "_TOGETHER_S", 30)
    done, messages = attempt_ten(died=[3, 5], work_s=0.001)
    assert done == {(shard_id, 2 if shard_id in (3, 5) else 1) for shard_id in range(10)}

    def alone(shard_id: int) -> list[tuple[str, list[int]]]:
        return [(kind, [shard_id]) for kind in ("begin", "begin alone", "end")]

    assert messages == [
        *[("begin", [0]), ("end", [0])],
        *[("begin", [1, 2, 3, 4]), ("end", [1, 2, 4]), *alone(3)],
        *[("begin", [5, 6, 7, 8, 9]), ("end", [6, 7, 8, 9]), *alone(5)],
    ]


@pytest.mark.ray
def test_a_shard_that_fails_is_not_ended_and_leaves_its_place(local_ray):
    attempts = ray.remote(Counting).options(num_cpus=0).remote([])

    def fail(shard: Shard, attempt: int) -> None:
        raise ValueError("no more")

    for _ in range(workers.SHARDS_AT_ONCE + 1):
        with pytest.raises(ValueError, match="no more"):
            list(attempt_each(attempts, "all", [Shard(0, None, None, 1, num_bytes=0)], fail))
    assert "end" not in dict(ray.get(attempts.told.remote()))


def test_gpus_decode_at_all_attempts_but_the_last():
    actor = object.__new__(PredictFused)
    actor._predictor = SimpleNamespace(decoder="the GPU's")
    assert [actor._decoder_at(attempt) for attempt in (1, 2, 3)] == ["the GPU's", "the GPU's", None]
