"""What of `jobs.predict` is not the flow's."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import jobs.predict
from pipeline import storage
from pipeline.cluster import Node
from pipeline.config import ClusterConfig
from pipeline.errors import RunError
from tests.worlds import config_of, make_world, run_without_ray


class Waiting(BaseException):
    """The job waits for its cluster."""


def test_a_run_waits_for_its_cluster_and_a_dry_run_does_not_nor_one_that_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def connected(awaited: ClusterConfig) -> Iterator[list[Node]]:
        if awaited.cpus:
            raise Waiting
        yield [Node(cpus=2)]

    monkeypatch.setattr(jobs.predict, "connected_ray", connected)
    make_world(tmp_path)
    asked = {"run_id": "waits", "cluster": {"cpus": 8}}
    assert jobs.predict.main(config_of(tmp_path, dry_run=True, **asked))["status"] == "dry run"
    with pytest.raises(Waiting):
        jobs.predict.main(config_of(tmp_path, **asked))
    run = run_without_ray(tmp_path, run_id="waits")
    storage.write(run.summary_uri, b"{}")
    summary = jobs.predict.main(config_of(tmp_path, **asked))
    assert (summary["status"], summary["num_predicted"], summary["num_errors"]) == ("was done", 27, 3)
    for mode, status in (("dry_run", "dry run"), ("plan", "was done")):
        told = jobs.predict.main(config_of(tmp_path, max_error_rate=0.09, **asked, **{mode: True}))
        assert (told["status"], told["num_pending"]) == (status, 0)
    with pytest.raises(RunError, match="max_error_rate"):
        jobs.predict.main(config_of(tmp_path, max_error_rate=0.09, **asked))
    with pytest.raises(RunError) as failed:
        jobs.predict.main(config_of(tmp_path, max_error_rate=0.05, **asked))
    recorded = json.loads(storage.read(run.summary_uri))
    assert (recorded["status"], recorded["message"]) == ("failed", str(failed.value))
    assert jobs.predict.main(config_of(tmp_path, **asked))["status"] == "was done"
    recorded = json.loads(storage.read(run.summary_uri))
    assert (recorded["status"], recorded["num_predicted"], "message" in recorded) == ("done", 27, False)
    storage.delete(storage.join(run.uri, "commits", "00000003.json"))
    with pytest.raises(Waiting):
        jobs.predict.main(config_of(tmp_path, **asked))
