"""Shards of one process: beside each other, or one after the other at its networks."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.inference.turns import Room, Turn, Turns

SHARDS = 4


def test_one_shard_at_a_time_has_the_networks():
    turns, inside, most = Turns(), [], []

    def work(shard: int) -> None:
        with turns.take(begun=time.perf_counter()):
            inside.append(shard)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(shard)

    with ThreadPoolExecutor(SHARDS) as threads:
        list(threads.map(work, range(SHARDS)))
    assert most == [1] * SHARDS


def test_a_turn_begins_when_its_shard_did_or_when_the_one_before_it_ended():
    turns, begun = Turns(), time.perf_counter()
    with turns.take(begun=begun) as first:
        pass
    with turns.take(begun=begun) as hidden:
        pass
    later = time.perf_counter()
    with turns.take(begun=later) as after_a_pause:
        pass
    assert first.began == begun < hidden.began < later == after_a_pause.began


def test_the_turns_of_a_process_use_all_its_cpu_seconds():
    before = time.process_time()
    turns, told = Turns(), []
    for _ in range(SHARDS):
        sum(range(200_000))  # what is done between turns is the next one's
        with turns.take(begun=time.perf_counter()) as turn:
            sum(range(200_000))
        told.append(turn)
    used = time.process_time() - before
    assert all(turn.cpu_s > 0 for turn in told)
    assert sum(turn.cpu_s for turn in told) == pytest.approx(used, rel=0.1, abs=0.005)


def test_a_shard_that_fails_leaves_the_networks_to_the_next():
    turns, done = Turns(), threading.Event()
    with pytest.raises(ValueError, match="a shard's"), turns.take(begun=time.perf_counter()):
        raise ValueError("a shard's")

    def work() -> None:
        with turns.take(begun=time.perf_counter()) as turn:
            assert isinstance(turn, Turn)
            done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(5)


def test_a_room_holds_its_size_of_shards_or_one_alone():
    room, both_there, inside = Room(2), threading.Barrier(2, timeout=5), []

    def work_beside() -> None:
        with room.beside_others():
            both_there.wait()

    def work_alone() -> None:
        with room.alone():
            inside.append(1)
            time.sleep(0.01)
            assert inside == [1]
            inside.clear()

    def pass_by() -> None:
        with room.beside_others():
            assert inside == []

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: work_beside(), range(2)))
    with ThreadPoolExecutor(SHARDS) as threads:
        for done in [threads.submit(work) for _ in range(5) for work in (work_alone, pass_by, work_alone)]:
            done.result(timeout=5)


def test_who_is_to_be_alone_waits_for_the_others():
    room, is_alone = Room(2), threading.Event()

    def work_alone() -> None:
        with room.alone():
            is_alone.set()

    with ThreadPoolExecutor(1) as threads:
        with room.beside_others():
            threads.submit(work_alone)
            assert not is_alone.wait(0.05)
        assert is_alone.wait(5)


def test_a_shard_that_fails_while_it_is_alone_gives_the_room_back():
    room = Room(2)
    with pytest.raises(ValueError, match="a shard's"), room.alone():
        raise ValueError("a shard's")
    with room.beside_others(), room.beside_others():
        pass
    with room.alone():
        pass


def test_who_waits_to_be_alone_comes_before_who_comes_again():
    room, came = Room(2), []

    def alone() -> None:
        with room.alone():
            came.append("alone")

    with ThreadPoolExecutor(1) as threads:
        for _ in range(20):
            with room.beside_others():
                waiting = threads.submit(alone)
                while not room._whole.locked():
                    time.sleep(0.001)
            with room.beside_others():
                came.append("again")
            waiting.result()
    assert came == ["alone", "again"] * 20
