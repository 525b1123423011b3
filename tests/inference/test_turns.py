"""Shards of one process, one after the other at its networks."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.inference.turns import Turn, Turns

SHARDS = 4


def test_one_shard_at_a_time_has_the_networks():
    turns, inside, most = Turns(), [], []

    def work(shard: int) -> None:
        with turns.next(time.perf_counter()):
            inside.append(shard)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(shard)

    with ThreadPoolExecutor(SHARDS) as threads:
        list(threads.map(work, range(SHARDS)))
    assert most == [1] * SHARDS


def test_a_turn_begins_when_its_shard_did_or_when_the_one_before_it_ended():
    turns, begun = Turns(), time.perf_counter()
    with turns.next(begun) as first:
        pass
    with turns.next(begun) as hidden:
        pass
    later = time.perf_counter()
    with turns.next(later) as after_a_pause:
        pass
    assert first.began == begun < hidden.began < later == after_a_pause.began


def test_the_turns_of_a_process_use_all_its_cpu_seconds():
    before = time.process_time()
    turns, told = Turns(), []
    for _ in range(SHARDS):
        sum(range(200_000))  # what is done between turns is the next one's
        with turns.next(time.perf_counter()) as turn:
            sum(range(200_000))
        told.append(turn)
    used = time.process_time() - before
    assert all(turn.cpu_s > 0 for turn in told)
    assert sum(turn.cpu_s for turn in told) == pytest.approx(used, rel=0.1, abs=0.005)


def test_a_shard_that_fails_leaves_the_networks_to_the_next():
    turns, done = Turns(), threading.Event()
    with pytest.raises(ValueError, match="a shard's"), turns.next(time.perf_counter()):
        raise ValueError("a shard's")

    def work() -> None:
        with turns.next(time.perf_counter()) as turn:
            assert isinstance(turn, Turn)
            done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(5)
