"""What Ray's workers do about shards that kill them."""

import threading
from types import SimpleNamespace

import pytest
import ray

from pipeline.data.manifest import Shard
from pipeline.inference.flow import start_attempts
from pipeline.inference.workers import PredictFused, attempting


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
    ray.get([attempts.begin.remote("all", shard_id, "a node that was lost") for shard_id in (3, 4)])
    ray.get([attempts.begin.remote("all", shard_id, here) for shard_id in (1, 2)])  # and their process died

    def meet(*shard_ids: int, wait_s: float) -> list[bool]:
        worker = ray.remote(Shards).options(max_concurrency=2, num_cpus=0).remote(attempts)
        return ray.get([worker.meets_another.remote(shard_id, wait_s) for shard_id in shard_ids])

    assert meet(3, 4, wait_s=30) == [True, True]
    assert meet(1, 2, wait_s=0.2) == [False, False]
    ray.get([attempts.begin.remote("all", 1, here, is_alone=True)])  # and it died again
    assert meet(1, 5, wait_s=0.2) == [False, False]


def test_gpus_decode_at_all_attempts_but_the_last():
    actor = object.__new__(PredictFused)
    actor._predictor = SimpleNamespace(decoder="the GPU's")
    assert [actor._decoder_at(attempt) for attempt in (1, 2, 3)] == ["the GPU's", "the GPU's", None]
