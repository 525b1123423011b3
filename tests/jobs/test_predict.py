"""What of `jobs.predict` is not the flow's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import jobs.predict
from pipeline.cluster import Node
from pipeline.config import ClusterConfig
from tests.worlds import config_of, make_world


class Waiting(BaseException):
    """The job waits for its cluster."""


def test_a_run_waits_for_its_cluster_and_a_dry_run_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
