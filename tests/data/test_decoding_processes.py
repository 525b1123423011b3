"""Batches that processes of a worker decode, beside those that it decodes itself."""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.decoders import Caution
from pipeline.data.decoding_processes import _Parts, decoded_by_processes
from pipeline.data.readers import ReadLimits
from pipeline.data.train_loader import TrainBatch, TrainLoader
from pipeline.errors import StorageError
from tests.data.test_train_loader import NUM_IMAGES, SIZE, assert_same, make_loader
from tests.training_worlds import make_loose_and_packed_sets

pytestmark = pytest.mark.slow  # each process imports torch


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sets")
    make_loose_and_packed_sets(folder, num_images=NUM_IMAGES)
    return folder


STEPS = range(2, 9)  # of two epochs


def size_at(step: int) -> int:
    return SIZE + step


def decoded_here(loader: TrainLoader, rank: int = 0, world_size: int = 1) -> list[TrainBatch]:
    return list(loader.batches(STEPS, rank=rank, world_size=world_size, size_at=size_at))


def decoded_by_two(loader: TrainLoader, num_ahead: int = 2, **place: int) -> Iterator[TrainBatch]:
    place = {"rank": 0, "world_size": 1, **place}
    return decoded_by_processes(loader, STEPS, size_at=size_at, num_processes=2, num_ahead=num_ahead, **place)


class TwoBatchesAndAnOutage(TrainLoader):
    def batches(self, steps: range, **place) -> Iterator[TrainBatch]:
        yield from islice(super().batches(steps, **place), 2)
        raise StorageError("the store is down")


@pytest.mark.parametrize(("kind", "rank", "world_size", "isolated"), [("packed", 0, 1, False), ("train", 1, 2, True)])
def test_batches_are_those_that_the_worker_would_decode_itself(root, kind, rank, world_size, isolated):
    loader = make_loader(root / kind, caution=Caution(isolated=isolated))
    expected = decoded_here(make_loader(root / kind), rank, world_size)
    assert_same(list(decoded_by_two(loader, rank=rank, world_size=world_size)), expected)


def test_what_a_process_is_told_does_not_hold_up_the_start_of_the_next(root):
    loader = make_loader(root / "packed")
    large = replace(loader, images=replace(loader.images, labels=[np.arange(100_000)]))
    assert len(ForkingPickler.dumps(_Parts(large, STEPS, 0, 1, size_at))) < 1 << 14  # a pipe takes 64 KB


def test_images_that_fail_in_a_process_are_the_loaders_errors(root):
    loader = make_loader(root / "train", limits=ReadLimits(allowed_roots=["s3://"]))
    batches = list(decoded_by_two(loader))
    assert not any(batch.weights.any() for batch in batches)
    here = make_loader(root / "train", limits=ReadLimits(allowed_roots=["s3://"]))
    decoded_here(here)
    assert {error.error for error in loader.errors.values()} == {"not_allowed"}
    assert loader.errors.keys() == here.errors.keys()


def test_what_ends_a_process_ends_the_batches_at_its_turn(root):
    loader = make_loader(root / "packed")
    failing = TwoBatchesAndAnOutage(**{field.name: getattr(loader, field.name) for field in fields(loader)})
    decoded = decoded_by_two(failing)
    assert_same([next(decoded), next(decoded)], decoded_here(loader)[:2])
    with pytest.raises(StorageError, match="the store is down"):
        next(decoded)


def test_a_process_that_is_killed_is_noticed_and_none_outlives_the_batches(root):
    loader = make_loader(root / "packed")
    decoded = decoded_by_two(loader, num_ahead=1)
    next(decoded)
    started = multiprocessing.active_children()
    assert len(started) == 2

    def kill_and_go_on() -> None:
        started[0].kill()
        list(decoded)

    # torch tells where its wait finds the process gone, or wherever the signal of its end is met, at the kill even; or
    # a batch under way is cut short
    told = r"exited unexpectedly|killed by signal|reset by peer"
    with pytest.raises((RuntimeError, ConnectionResetError, EOFError), match=told + "|^$"):
        kill_and_go_on()
    decoded.close()
    assert multiprocessing.active_children() == []


def test_none_outlives_a_worker_that_is_killed(root):
    code = (
        "import multiprocessing, sys, time\n"
        "from pathlib import Path\n"
        "from tests.data.test_decoding_processes import decoded_by_two, make_loader\n"
        "if __name__ == '__main__':\n"
        "    batches = decoded_by_two(make_loader(Path(sys.argv[1])), num_ahead=1)\n"
        "    next(batches)\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(root / "packed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as worker:
        pids = [int(pid) for pid in worker.stdout.readline().split()]
        worker.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.5)
