"""What a run tells of its time: rate, data-wait, and how far the device is behind."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.training import logbook
from pipeline.training.bound import Pace
from pipeline.training.logbook import Logbook
from pipeline.training.worker import Worker
from tests.logbooks import OUTCOME, add, batch_of, names, run_of
from tests.ranks import Peer, on_ranks


class Clock(threading.local):
    """A clock moved by hand, each thread's its own."""

    now = 0.0

    def move(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The logbook's."""
    found = Clock()
    monkeypatch.setattr(logbook, "time", found)
    return found


def steps_of(log: Logbook, clock: Clock, *, wait_s: float, work_s: float, num_steps: int = 2) -> None:
    """Steps of ten images, each waited for and worked on that long; then a look."""

    def batches():
        for _ in range(num_steps):
            clock.move(wait_s)
            yield batch_of(names(10))

    for number, batch in enumerate(log.timed(batches()), start=1):
        clock.move(work_s)
        add(log, number, batch.uris)
    log.look()


def test_rate_and_data_wait_are_those_since_the_last_look(clock):
    told: list[dict[str, Any]] = []
    log = Logbook(run_of(epochs=1), Worker(observe=told.append))
    steps_of(log, clock, wait_s=3, work_s=1)
    steps_of(log, clock, wait_s=0, work_s=5)
    assert [entry["data_wait_share"] for entry in log.history] == [0.75, 0]
    assert [entry["images_per_s"] for entry in log.history] == [2.5, 2]
    assert told[0]["eta_s"] == 8 * 4


def test_the_pace_is_that_of_all_steps_in_every_attempt(clock):
    log = Logbook(run_of(epochs=1), Worker())
    steps_of(log, clock, wait_s=3, work_s=1)
    clock.move(1000)
    resumed = Logbook(run_of(epochs=1), Worker())
    resumed.load(log.state())
    steps_of(resumed, clock, wait_s=0, work_s=5)
    pace = Pace.of(resumed.state())
    looks = resumed.history
    assert pace.train_s == sum(20 / look["images_per_s"] for look in looks)
    assert pace.images_per_s == 40 / pace.train_s
    assert pace.data_wait_share == 6 / pace.train_s


def test_what_goes_into_a_start_is_no_step(clock):
    log = Logbook(run_of(epochs=1), Worker())
    clock.move(1000)  # a cache is filled
    steps_of(log, clock, wait_s=1, work_s=1)
    assert log.history[0]["images_per_s"] == 5


class Working(torch.Tensor):
    """Totals on a device that is done only after a while."""

    clock: Clock

    def tolist(self):
        self.clock.move(6)
        return super().tolist()


def test_how_far_the_device_is_behind_the_loop_is_told_in_steps(clock, monkeypatch):
    log = Logbook(run_of(epochs=1), Worker())
    monkeypatch.setattr(Working, "clock", clock, raising=False)
    for number in (1, 2):
        clock.move(1)
        log.add(number, 0.1, batch_of(names(10)), torch.tensor([0.0, 0.0, 10.0]).as_subclass(Working))
    log.look()
    assert log.history[0]["device_lag"] == 6 / 4  # two steps took eight seconds
    assert log.history[0]["images_per_s"] == 20 / 8


def test_the_seconds_of_an_evaluation_are_not_trainings(clock):
    log = Logbook(run_of(), Worker())
    steps_of(log, clock, wait_s=1, work_s=1)
    clock.move(1000)
    log.judge(2, OUTCOME)
    steps_of(log, clock, wait_s=1, work_s=1)
    assert log.history[0]["images_per_s"] == log.history[1]["images_per_s"] == 5


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(*[st.floats(1e-3, 1e3)] * 2), min_size=1, max_size=3))
def test_the_data_wait_is_a_share_however_the_ranks_clocks_run(seconds):
    def work(peer: Peer) -> float:
        log = Logbook(run_of(), peer)
        wait_s, work_s = seconds[peer.rank]
        steps_of(log, clock, wait_s=wait_s, work_s=work_s)
        return log.history[0]["data_wait_share"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logbook, "time", clock := Clock())
        shares = on_ranks(len(seconds), work)
    expected = sum(wait_s for wait_s, _ in seconds) / sum(map(sum, seconds))
    assert shares == pytest.approx([expected] * len(seconds))
    assert all(0 <= share <= 1 for share in shares)
