"""What a run tells of itself is right, bounded, the same on every rank, and outlives a restart."""

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.errors import ImageError, RunError
from pipeline.training import checkpoint
from pipeline.training.checkpoint import CheckpointWriter
from pipeline.training.config import CheckpointConfig
from pipeline.training.counts import from_entries
from pipeline.training.logbook import Logbook
from pipeline.training.worker import Notice, Worker
from tests.confusions import matrix_of
from tests.logbooks import OUTCOME, add, batch_of, names, run_of
from tests.manifests import fresh
from tests.ranks import Peer, on_ranks

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
