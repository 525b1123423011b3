"""Checkpoints: written beside the training, the right ones kept, damaged ones passed over."""

import logging
import threading
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import ObjectNotFoundError, RunError, StorageError
from pipeline.training import checkpoint
from pipeline.training.checkpoint import CheckpointWriter, best_step, list_steps, read, read_last, steps_to_keep
from pipeline.training.config import CheckpointConfig
from tests.manifests import fresh


def judged(*top1: float, every: int = 10) -> list[dict[str, Any]]:
    return [{"step": every * number, "top1": value} for number, value in enumerate(top1, start=1)]


def state_at(step: int, *top1: float) -> dict[str, Any]:
    return {"step": step, "network": {"weight": torch.full((3,), float(step))}, "evaluations": judged(*top1)}


def write_all(uri: str, states: list[dict[str, Any]], **fields: Any) -> None:
    writer = CheckpointWriter(uri, CheckpointConfig(**fields), since=max(list_steps(uri), default=0))
    for state in states:
        writer.write(state)
    writer.wait()


def damage(uri: str, step: int) -> None:
    """Leave half of it, as a copy that was cut off would."""
    place = checkpoint.checkpoint_uri(uri, step)
    content = storage.read(place)
    storage.write(place, content[: len(content) // 2])


# --- writing ---------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_again():
    uri = fresh()
    state = {
        **state_at(7, 0.25),
        "optimizer": {"state": {0: {"momentum": torch.randn(2, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "ema": None,
        "history": [{"loss": 1.5, "betas": (0.9, 0.999)}],
    }
    write_all(uri, [state])
    found = read(uri, 7)
    assert torch.equal(found["network"].pop("weight"), state["network"].pop("weight"))
    momenta = [each["optimizer"]["state"][0].pop("momentum") for each in (found, state)]
    assert torch.equal(*momenta)
    assert found == state


def test_a_state_is_the_one_of_its_moment_though_training_goes_on(monkeypatch):
    may_go_on = threading.Event()
    save = torch.save

    def slow_save(*args: Any) -> None:
        assert may_go_on.wait(30)
        save(*args)

    monkeypatch.setattr(torch, "save", slow_save)
    uri, state = fresh(), state_at(10, 0.5)
    writer = CheckpointWriter(uri, CheckpointConfig(), since=0)
    writer.write(state)
    assert list_steps(uri) == []  # training has its time back before anything is there
    state["network"]["weight"] += 1
    state["evaluations"][0]["top1"] = 0.9
    state["evaluations"].append({"step": 20, "top1": 1.0})
    may_go_on.set()
    writer.wait()
    assert read(uri, 10)["network"]["weight"].tolist() == [10.0] * 3
    assert read(uri, 10)["evaluations"] == judged(0.5)


def test_a_networks_state_keeps_its_version_which_some_networks_insist_on():
    uri, state = fresh(), torch.nn.BatchNorm2d(3).state_dict()
    write_all(uri, [{"step": 1, "network": state, "evaluations": []}])
    found = read(uri, 1)["network"]
    assert isinstance(found, OrderedDict)
    assert found._metadata == state._metadata
    assert found._metadata[""]["version"] == 2


def test_storage_that_refuses_says_which_checkpoint_and_what_to_do(tmp_path):
    (tmp_path / "checkpoints").write_bytes(b"a file where the folder should be")
    writer = CheckpointWriter(f"file://{tmp_path}", CheckpointConfig(), since=0)
    writer.write(state_at(10))
    expected = r"checkpoint 'file://.*/000000010\.pt' of \d{3,} bytes cannot be written: .*run again with --resume auto"
    with pytest.raises(StorageError, match=expected):
        writer.wait()
    writer.wait()  # told once


def test_a_failure_is_told_by_the_next_write(tmp_path):
    (tmp_path / "checkpoints").write_bytes(b"")
    writer = CheckpointWriter(f"file://{tmp_path}", CheckpointConfig(), since=0)
    writer.write(state_at(10))
    with pytest.raises(StorageError, match="make room or give access"):
        writer.write(state_at(20))


def test_a_failed_write_leaves_the_earlier_ones(tmp_path, monkeypatch):
    uri = f"file://{tmp_path}"
    write_all(uri, [state_at(10), state_at(20)], keep_last=1)

    def full(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_all(uri, [state_at(30)], keep_last=1)
    assert list_steps(uri) == [20]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000020.pt"]


def test_a_slower_twin_leaves_the_newer_checkpoints_of_the_run_alone():
    uri = fresh()
    slow, fast = (CheckpointWriter(uri, CheckpointConfig(keep_last=1), since=0) for _ in range(2))
    fast.write(state_at(40, 0.1))
    fast.wait()
    slow.write(state_at(30, 0.1))
    slow.wait()
    assert list_steps(uri) == [30, 40]


def test_later_checkpoints_that_a_run_went_back_from_go_with_its_first():
    uri = fresh()
    write_all(uri, [state_at(10), state_at(20), state_at(30)], keep_last=3)
    damage(uri, 30)
    writer = CheckpointWriter(uri, CheckpointConfig(keep_last=3), since=20)
    writer.write(state_at(25))
    writer.wait()
    assert list_steps(uri) == [10, 20, 25]
    writer.write(state_at(30))
    writer.wait()
    assert list_steps(uri) == [20, 25, 30]


# --- keeping ---------------------------------------------------------------------------------------------------------


def test_the_last_and_the_best_stay():
    uri = fresh()
    top1 = [0.3, 0.8, 0.5, 0.8, 0.6, 0.7]
    write_all(uri, [state_at(10 * done, *top1[:done]) for done in range(1, len(top1) + 1)], keep_last=2, keep_best=1)
    assert list_steps(uri) == [20, 50, 60]
    assert best_step(judged(*top1)) == 20


def test_what_is_no_checkpoint_is_left_alone():
    uri = fresh()
    for name in ("notes.txt", "000000001.pt.bak", "best.pt"):
        storage.write(f"{uri}/checkpoints/{name}", b"mine")
    write_all(uri, [state_at(step) for step in (1, 2, 3)], keep_last=1)
    assert list_steps(uri) == [3]
    assert len(list(storage.list_objects(f"{uri}/checkpoints"))) == 4


configs = st.builds(CheckpointConfig, keep_last=st.integers(1, 4), keep_best=st.integers(1, 4))
marks = st.lists(st.sampled_from([0.0, 0.5, 0.75, 1.0]), min_size=1, max_size=12)


@settings(deadline=None)
@given(configs, marks, st.integers(1, 3))
def test_the_best_so_far_and_the_last_are_always_there(config, top1, judged_every):
    kept: set[int] = set()
    for step in range(1, judged_every * len(top1) + 1):
        evaluations = judged(*top1[: step // judged_every], every=judged_every)
        written = kept | {step}
        kept = steps_to_keep(written, evaluations, config)
        assert kept <= written
        assert step in kept
        assert len(kept) <= config.keep_last + config.keep_best
        if evaluations:
            assert best_step(evaluations) in kept
    ranked = sorted(evaluations, key=lambda evaluation: (-evaluation["top1"], evaluation["step"]))
    assert {evaluation["step"] for evaluation in ranked[: config.keep_best]} <= kept


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_run_without_checkpoints_has_no_last_one():
    assert read_last(fresh()) is None


def test_the_last_is_that_of_the_highest_step():
    uri = fresh()
    write_all(uri, [state_at(step) for step in (9, 10, 100)], keep_last=3)
    last = read_last(uri)
    assert last is not None
    assert last["step"] == 100


def test_a_truncated_checkpoint_is_passed_over_with_a_warning(caplog):
    uri = fresh()
    write_all(uri, [state_at(10), state_at(20)])
    damage(uri, 20)
    with caplog.at_level(logging.WARNING):
        last = read_last(uri)
    assert last is not None
    assert last["step"] == 10
    assert "000000020.pt', found a damaged one" in caplog.text
    assert "going back to the one before" in caplog.text


def test_where_all_are_damaged_the_run_does_not_start_anew():
    uri = fresh()
    write_all(uri, [state_at(10), state_at(20)])
    damage(uri, 10)
    damage(uri, 20)
    with pytest.raises(RunError, match=r"readable checkpoint of 2 under .*, found only damaged ones"):
        read_last(uri)


def test_a_checkpoint_that_is_not_there_is_not_damaged():
    with pytest.raises(ObjectNotFoundError):
        read(fresh(), 10)


def test_a_checkpoint_cannot_run_code():
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return print, ("pwned",)

    uri = fresh()
    write_all(uri, [{**state_at(10), "network": Evil()}])
    with pytest.raises(RunError, match="found a damaged one"):
        read(uri, 10)


@pytest.fixture(scope="module")
def intact() -> bytes:
    uri = fresh()
    write_all(uri, [state_at(10, 0.5)])
    return storage.read(checkpoint.checkpoint_uri(uri, 10))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_checkpoint_cut_off_anywhere_is_damaged(intact, data):
    length = data.draw(st.integers(0, len(intact) - 1))
    uri = fresh()
    storage.write(checkpoint.checkpoint_uri(uri, 10), intact[:length])
    with pytest.raises(RunError, match="found a damaged one"):
        read(uri, 10)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_byte_that_flipped_is_found_or_harmless(intact, data):
    place = data.draw(st.integers(0, len(intact) - 1))
    flipped = bytearray(intact)
    flipped[place] ^= data.draw(st.integers(1, 255))
    uri = fresh()
    storage.write(checkpoint.checkpoint_uri(uri, 10), bytes(flipped))
    try:
        state = read(uri, 10)
    except RunError as error:
        assert "found a damaged one" in str(error)  # noqa: PT017 (both outcomes are right)
    else:
        assert state["network"]["weight"].tolist() == [10.0] * 3
        assert (state["step"], state["evaluations"]) == (10, judged(0.5))


def test_a_copy_of_a_state_lies_on_the_cpu_and_shares_nothing():
    tensor = torch.ones(2, requires_grad=True)
    copied = checkpoint._copied({"a": [tensor, (tensor, "text")]})
    assert copied["a"][0].data_ptr() != tensor.data_ptr()
    assert not copied["a"][0].requires_grad
    assert isinstance(copied["a"][1], tuple)
