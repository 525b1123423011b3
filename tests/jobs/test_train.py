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
from pipeline.errors import ConfigError
from pipeline.models.bundle import Bundle
from pipeline.training import checkpoint
from pipeline.training.run import begin
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
