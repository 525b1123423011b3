"""A worker's batches over a run: who decodes them, and what that needs."""

import multiprocessing
from dataclasses import replace

import pytest
import torch

from pipeline.data.training_set import TrainingSet
from pipeline.errors import ConfigError
from pipeline.training import feed
from pipeline.training.feed import batches_of, make_loader
from pipeline.training.run import make_run
from pipeline.training.worker import Worker
from tests.training_worlds import make_sets, train_config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    make_sets(folder)
    return folder


def needed_by(run):
    """Bytes of its batches, three ahead and one taken, of 8 images of 16 pixels a side, and of what else is told."""
    return 4 * 8 * 3 * 16**2 + 16 * run.num_images


def run_with(root, **data):
    return make_run(train_config(root, data=data, augment={"size": 16}))


def test_processes_hand_over_what_the_memory_of_the_workers_node_holds(root, monkeypatch):
    run, images = run_with(root, decode_processes=2), TrainingSet.open(str(root / "train"))
    needed = needed_by(run)
    monkeypatch.setattr(feed, "free_shared_memory", lambda: needed)
    batches_of(run, Worker(), make_loader(run, Worker(), images), 0)
    for free, worker in ((needed - 1, Worker()), (needed, Worker(num_on_node=2))):
        monkeypatch.setattr(feed, "free_shared_memory", lambda free=free: free)
        with pytest.raises(ConfigError, match=r"expected 0\.\d MB of shared memory .* or set it to 1"):
            batches_of(run, worker, make_loader(run, worker, images), 0)


def test_processes_that_nobody_asked_for_are_done_without_where_memory_lacks(root, monkeypatch, caplog):
    run, images = run_with(root), TrainingSet.open(str(root / "train"))
    monkeypatch.setattr(feed, "free_shared_memory", lambda: needed_by(run) - 1)
    loader = replace(make_loader(run, Worker(num_threads=8), images), pin_memory=False)
    batch = next(batches_of(run, Worker(num_threads=8, device=torch.device("cuda")), loader, 0))
    assert len(batch.labels) == run.config.batch_size
    assert multiprocessing.active_children() == []
    assert "one decodes" in caplog.text


def test_beside_a_gpu_every_two_decoding_threads_have_a_process(root, monkeypatch):
    started = []
    monkeypatch.setattr(feed, "decoded_by_processes", lambda *_, num_processes, **__: started.append(num_processes))
    run, images = run_with(root), TrainingSet.open(str(root / "train"))
    for num_threads in (5, 16):
        worker = Worker(num_threads=num_threads, device=torch.device("cuda"))
        batches_of(run, worker, make_loader(run, worker, images), 0)
    assert started == [2, 8]
