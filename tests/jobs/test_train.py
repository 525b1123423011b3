"""What of `jobs.train` is neither the loop's nor the trainer's."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import jobs.train
from pipeline import storage
from pipeline.cluster import Node
from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError, RunError
from pipeline.models.bundle import Bundle
from pipeline.training import checkpoint
from pipeline.training.checkpoint import CheckpointWriter
from pipeline.training.result import publish
from pipeline.training.run import begin
from pipeline.training.trainer import Workers
from tests.training_worlds import make_square_sets, train_config, train_here


class Waiting(BaseException):
    """The job waits for its cluster."""


def test_a_training_waits_for_its_cluster_and_one_that_is_finished_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def connected(awaited: ClusterConfig) -> Iterator[list[Node]]:
        raise Waiting
        yield

    monkeypatch.setattr(jobs.train, "connected_ray", connected)
    make_square_sets(tmp_path)
    config = train_config(tmp_path, resume="auto")
    with pytest.raises(Waiting):
        jobs.train.main(config)
    run = train_here(config)
    begin(run)
    with pytest.raises(Waiting):  # for what comes after the last step
        jobs.train.main(config)

    storage.write(run.summary_uri, b'{"status": "done", "num_workers": 2}')
    summary = jobs.train.main(config)
    assert (summary["status"], summary["num_workers"]) == ("was done", 2)
    assert Bundle.load(summary["bundle"]).digest == summary["digest"]
    renamed = jobs.train.main(config.model_copy(update={"version": "2"}))
    assert (renamed["status"], Bundle.load(renamed["bundle"]).version) == ("was done", "2")
    recorded = json.loads(storage.read(run.summary_uri))
    assert (recorded["status"], recorded["bundle"]) == ("done", renamed["bundle"])
    with pytest.raises(ConfigError, match="seed"):
        jobs.train.main(config.model_copy(update={"seed": 7}))
    with pytest.raises(ConfigError, match="there already"):
        jobs.train.main(config.model_copy(update={"resume": False, "version": "3"}))

    for damaged in (b'{"status": "do', b"\xff", b"[]"):
        storage.write(run.summary_uri, damaged)
        with pytest.raises(Waiting):  # to tell it anew
            jobs.train.main(config)
    storage.write(run.summary_uri, json.dumps(recorded).encode())

    storage.delete(checkpoint.checkpoint_uri(run.uri, run.num_steps))
    with pytest.raises(Waiting):
        jobs.train.main(config)


def test_a_finished_training_whose_checkpoints_are_gone_is_not_done_again(tmp_path: Path) -> None:
    make_square_sets(tmp_path)
    config = train_config(tmp_path, resume="auto", checkpoint={"keep_last": 1})
    run = train_here(config)
    begin(run)
    bundle, uri, _ = publish(run)
    storage.write(run.summary_uri, json.dumps({"status": "done", "bundle": uri, "digest": bundle.digest}).encode())
    for step in checkpoint.list_steps(run.uri):
        storage.delete(checkpoint.checkpoint_uri(run.uri, step))
    summary = jobs.train.main(config)
    assert (summary["status"], summary["bundle"]) == ("was done", uri)
    with pytest.raises(RunError, match=r"expected the checkpoints of 'first', which has ended, to publish shapes/2 of"):
        jobs.train.main(config.model_copy(update={"version": "2"}))


def test_a_finished_training_of_which_only_the_best_checkpoint_is_gone_is_done_too(tmp_path: Path) -> None:
    make_square_sets(tmp_path)
    config = train_config(tmp_path, resume="auto")
    run = train_here(config)
    begin(run)
    bundle, uri, last = publish(run)
    storage.write(run.summary_uri, json.dumps({"status": "done", "bundle": uri, "digest": bundle.digest}).encode())
    judged = [{"step": 1, "top1": 1.0}, *last["evaluations"]]  # another was the best
    written = {**checkpoint.read(run.uri, run.num_steps), "evaluations": judged}
    storage.delete(checkpoint.checkpoint_uri(run.uri, run.num_steps))
    with CheckpointWriter(run.uri, config.checkpoint, since=run.num_steps - 1) as writer:
        writer.write(written)
    assert jobs.train.main(config)["status"] == "was done"


def test_a_run_that_an_earlier_version_trained_to_its_end_is_concluded(tmp_path: Path) -> None:
    make_square_sets(tmp_path)
    run = train_here(train_config(tmp_path))
    last = {**checkpoint.read(run.uri, run.num_steps)}
    del last["pace"], last["num_workers"]
    storage.delete(checkpoint.checkpoint_uri(run.uri, run.num_steps))
    with CheckpointWriter(run.uri, run.config.checkpoint, since=run.num_steps - 1) as writer:
        writer.write(last)
    summary = jobs.train._conclude(run, Workers(2, 2, 1, False), 0.0)
    assert (summary["num_workers"], summary["verdict"]) == (2, None)
