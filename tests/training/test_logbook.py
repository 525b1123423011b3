"""What a run tells of itself is right, bounded, the same on every rank, and outlives a restart."""

import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.train_loader import TrainBatch
from pipeline.errors import ImageError, RunError
from pipeline.training import checkpoint, logbook
from pipeline.training.bound import Pace
from pipeline.training.checkpoint import CheckpointWriter
from pipeline.training.config import CheckpointConfig
from pipeline.training.counts import HardImage, Outcome, from_entries
from pipeline.training.logbook import Logbook
from pipeline.training.run import TrainingRun
from pipeline.training.worker import Notice, Worker
from tests.confusions import counts_of, matrix_of
from tests.manifests import fresh
from tests.training_worlds import train_config


def run_of(num_images: int = 100, batch_size: int = 10, **fields: Any) -> TrainingRun:
    config = train_config(Path("/nowhere"), batch_size=batch_size, **fields)
    return TrainingRun(
        config=config,
        train_digest="t",
        evaluation_digest="e",
        num_images=num_images,
        classes=["cat", "dog"],
        architecture=config.architecture,
        preprocessing=config.evaluation.preprocessing,
        start_uri=None,
        start_digest=None,
    )


def batch_of(uris: list[str], pixels: torch.Tensor | None = None) -> TrainBatch:
    nothing = torch.empty(0)
    return TrainBatch(0, len(uris), uris, nothing if pixels is None else pixels, nothing, nothing, nothing)


def add(log: Logbook, number: int, uris: list[str], *, loss: float = 1.0, right: int = 0, failed: int = 0) -> None:
    """A step on these images, of this mean loss."""
    counted = len(uris) - failed
    totals = torch.tensor([loss * counted, right, counted], dtype=torch.float64)
    log.add(number, number / 100, batch_of(uris), totals)


def names(count: int, rank: int = 0) -> list[str]:
    return [f"{rank}-{number}.jpg" for number in range(count)]


COUNTS = replace(counts_of([[3, 1], [0, 4]]), num_errors=2, top5=8, loss_sum=4.0)
OUTCOME = Outcome(COUNTS, [], [HardImage("s3://b/1.jpg", 0, 1, 0.9, 2.5)])


# --- several ranks, as threads ---------------------------------------------------------------------------------------


class Meeting:
    """Where ranks exchange values."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=30)
        self._values: list[Any] = [None] * world_size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


@dataclass(frozen=True)
class Peer(Worker):
    """A worker whose peers are threads."""

    meeting: Meeting | None = None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.copy_(torch.stack(self.gather(values.clone())).sum(0))

    def gather(self, value: Any) -> list[Any]:
        assert self.meeting is not None
        return self.meeting.exchange(self.rank, value)


def on_ranks(world_size: int, work: Callable[[Peer], Any], **fields: Callable[[int], Any]) -> list[Any]:
    """What `work` returns on each rank; `fields` are those of the workers, by rank."""
    meeting = Meeting(world_size)
    peers = [
        Peer(rank, world_size, meeting=meeting, **{name: of(rank) for name, of in fields.items()})
        for rank in range(world_size)
    ]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, peers))


# --- looks -----------------------------------------------------------------------------------------------------------


def test_an_entry_is_the_mean_over_the_images_that_counted():
    log = Logbook(run_of(data={"max_error_rate": 1}), Worker())
    add(log, 1, names(10), loss=2.0, right=5)
    add(log, 2, names(10), loss=1.0, right=3, failed=5)
    log.look()
    [entry] = log.history
    assert (entry["step"], entry["epoch"], entry["learning_rate"]) == (2, 0.2, 0.02)
    assert entry["loss"] == pytest.approx((10 * 2.0 + 5 * 1.0) / 15)
    assert entry["top1"] == pytest.approx(8 / 15)


def test_ranks_enter_the_same_figures_and_only_the_first_tells_them():
    told: dict[int, list[dict[str, Any]]] = {0: [], 1: [], 2: []}

    def work(peer: Peer) -> dict[str, Any]:
        log = Logbook(run_of(), peer)
        add(log, 1, names(peer.rank, peer.rank), loss=float(peer.rank), right=1 if peer.rank == 2 else 0)
        log.look()
        return log.history[0]

    entries = on_ranks(3, work, observe=lambda rank: told[rank].append)
    for entry in entries:
        assert entry["loss"] == pytest.approx((0 + 1 * 1 + 2 * 2) / 3)
        assert entry["top1"] == pytest.approx(1 / 3)
    assert [len(told[rank]) for rank in range(3)] == [1, 0, 0]
    assert told[0][0]["loss"] == entries[0]["loss"]
    assert told[0][0]["of"] == 20


def test_a_look_at_nothing_enters_nothing():
    log = Logbook(run_of(), Worker())
    assert log.look() == Notice()
    assert log.history == []


def test_what_one_rank_is_asked_for_is_done_by_all():
    notices = [Notice(), Notice(should_checkpoint=True), Notice(should_stop=True)]
    found = on_ranks(3, lambda peer: Logbook(run_of(), peer).look(), notice=lambda rank: lambda: notices[rank])
    assert found == [Notice(should_checkpoint=True, should_stop=True)] * 3


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 100_000))
@example(1)
@example(7_999)
@example(39_999)
@example(43_999)
@example(44_001)
def test_a_curve_has_enough_points_and_not_too_many(num_steps):
    log = Logbook(run_of(epochs=None, steps=num_steps), Worker())
    looks = sorted({0, num_steps, *filter(log.is_look_due, range(1, num_steps + 1))})
    entries = list(itertools.starmap(log.is_entry_due, itertools.pairwise(looks)))
    assert min(num_steps, 100) <= sum(entries) <= 4001
    assert entries[-1]  # the end, whatever the steps between


def test_images_are_let_go_before_the_look():
    log = Logbook(run_of(), Worker())
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    is_there = weakref.ref(pixels)
    log.add(1, 0.1, batch_of(names(4), pixels), torch.zeros(3, dtype=torch.float64))
    del pixels
    gc.collect()
    assert is_there() is None


# --- time ------------------------------------------------------------------------------------------------------------


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


# --- what stops a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_names_step_rate_and_images(loss):
    log = Logbook(run_of(), Worker())
    add(log, 1, ["fine.jpg"])
    add(log, 2, names(10), loss=loss)
    add(log, 3, ["later.jpg"], loss=loss)
    with pytest.raises(RunError, match=r"step 2: expected a finite loss, got none at learning rate 0\.02") as raised:
        log.look()
    assert raised.value.details == {"step": 2, "learning_rate": 0.02, "images": names(10)}
    assert "0-0.jpg, 0-1.jpg, " in str(raised.value)
    assert str(raised.value).endswith(" and 2 more")
    assert "optimizer.learning_rate" in str(raised.value)


def test_every_rank_names_the_images_of_the_one_that_met_no_number():
    def work(peer: Peer) -> str:
        log = Logbook(run_of(), peer)
        add(log, 1, names(2, peer.rank))
        add(log, 2, names(2, peer.rank), loss=float("nan") if peer.rank == 1 else 1.0)
        with pytest.raises(RunError) as raised:
            log.look()
        return str(raised.value)

    messages = set(on_ranks(3, work))
    assert len(messages) == 1
    assert "1-0.jpg, 1-1.jpg and 0 more" in messages.pop()


def test_too_many_images_that_cannot_be_used_stop_the_run():
    log = Logbook(run_of(data={"max_error_rate": 0.05}), Worker())
    add(log, 1, names(10), failed=5)
    log.look()
    add(log, 2, names(10), failed=1)
    with pytest.raises(RunError, match=r"at most 5% of 100 images .* \(data\.max_error_rate\), got 6 in 1 epochs"):
        log.look()


def see(log: Logbook, is_broken: list[list[bool]], batch_size: int, steps: range) -> None:
    """Steps over these images, an order for each epoch, with a look at every step."""
    per_epoch = -(-len(is_broken[0]) // batch_size)
    for step in steps:
        epoch, place = divmod(step, per_epoch)
        part = is_broken[epoch][place * batch_size :][:batch_size]
        add(log, step + 1, names(len(part)), failed=sum(part))
        log.look()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_only_a_set_with_more_broken_images_than_allowed_is_stopped(data):
    num_images = data.draw(st.integers(1, 30), "num_images")
    num_broken, num_allowed = (data.draw(st.integers(0, num_images)) for _ in range(2))
    batch_size = data.draw(st.integers(1, num_images), "batch_size")
    image = [True] * num_broken + [False] * (num_images - num_broken)
    orders = [data.draw(st.permutations(image)) for _ in range(3)]
    per_epoch = -(-num_images // batch_size)
    run = run_of(num_images, batch_size, data={"max_error_rate": num_allowed / num_images})
    if num_broken > num_allowed:
        with pytest.raises(RunError, match="max_error_rate"):
            see(Logbook(run, Worker()), orders, batch_size, range(per_epoch))
        return
    log, resumed = Logbook(run, Worker()), Logbook(run, Worker())
    cut = data.draw(st.integers(0, 3 * per_epoch), "cut")
    see(log, orders, batch_size, range(cut))
    resumed.load(log.state())
    see(resumed, orders, batch_size, range(cut, 3 * per_epoch))


# --- evaluations, and restarts ---------------------------------------------------------------------------------------


def test_an_evaluation_is_entered_and_told():
    told: list[dict[str, Any]] = []
    log = Logbook(run_of(), Worker(observe=told.append))
    log.judge(5, OUTCOME)
    assert log.evaluations == [
        {"step": 5, "epoch": 0.5, "top1": 7 / 8, "top5": 1.0, "loss": 0.5, "num_images": 8, "num_errors": 2}
    ]
    assert matrix_of(from_entries(log.last_outcome["confusion"], 2)) == [[3, 1], [0, 4]]
    assert log.last_outcome["hardest"][0]["uri"] == "s3://b/1.jpg"
    assert told[-1]["evaluation_top1"] == 7 / 8


def test_images_that_failed_on_any_rank_are_known_to_all():
    def work(peer: Peer) -> dict[str, list[str]]:
        log = Logbook(run_of(), peer)
        log.gather_errors({f"{peer.rank}.jpg": ImageError("decode", "truncated", "half of it")})
        return log.errors

    expected = {f"{rank}.jpg": ["decode", "truncated", "half of it"] for rank in range(3)}
    assert on_ranks(3, work) == [expected] * 3


def test_a_logbook_goes_on_from_a_checkpoint_as_if_nothing_had_been():
    def first_half(log: Logbook) -> Logbook:
        add(log, 1, names(10), failed=3)
        log.look()
        log.judge(1, OUTCOME)
        log.gather_errors({"a.jpg": ImageError("fetch", "not_found", "none")})
        return log

    run, uri = run_of(data={"max_error_rate": 0.04}), fresh()
    before = first_half(Logbook(run, Worker()))
    writer = CheckpointWriter(uri, CheckpointConfig(), since=0)
    writer.write({"step": 1, **before.state()})
    writer.wait()
    after = Logbook(run, Worker())
    after.load(checkpoint.read(uri, 1))
    for name in ("history", "evaluations", "errors"):
        assert getattr(after, name) == getattr(before, name)
        assert getattr(after, name)
    assert before.last_outcome["confusion"]["counts"].tolist() == after.last_outcome["confusion"]["counts"].tolist()
    assert after.last_outcome["hardest"] == before.last_outcome["hardest"]
    add(after, 2, names(10), failed=2)
    with pytest.raises(RunError, match="got 5 in 1 epochs"):  # those of before count
        after.look()


def test_what_was_loaded_is_not_shared():
    log = Logbook(run_of(), Worker())
    state = log.state()
    other = Logbook(run_of(), Worker())
    other.load(state)
    add(other, 1, names(1))
    other.look()
    assert state["history"] == []
