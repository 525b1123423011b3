"""The same job on clusters of every shape: one CPU, two CPUs, several nodes."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.inference.commit import committed_shard_ids, read_receipts
from pipeline.inference.plan import read_run
from tests.worlds import make_world, run_job

pytestmark = [pytest.mark.slow, pytest.mark.ray]

NUM_SHARDS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_world(root, num_images=60, shard_size=5)
    return root


@pytest.fixture
def cluster(request) -> Iterator[Any]:
    """Nodes of as many CPUs as the parameter says, the first of them the head."""
    from ray.cluster_utils import Cluster

    head, *others = request.param
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head, "include_dashboard": False})
    for cpus in others:
        cluster.add_node(num_cpus=cpus)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def predict(world: Path, run_id: str, cluster: Any, **fields: Any) -> dict[str, Any]:
    places = {name: world / name for name in ("manifest", "registry")}
    env = {**os.environ, "RAY_ADDRESS": cluster.address}
    return run_job("predict", **places, output=world / "tables", bundles="tiny", run_id=run_id, env=env, **fields)


@pytest.mark.parametrize(("cluster", "run_id"), [([1], "one-cpu"), ([2], "two-cpus")], indirect=["cluster"])
def test_a_cluster_of_one_or_two_cpus_finishes(world, cluster, run_id):
    summary = predict(world, run_id, cluster)
    assert (summary["status"], summary["num_predicted"], summary["num_errors"]) == ("done", 57, 3)
    assert run_job("verify", output=world / "tables", run_id=run_id)["status"] == "verified"


@pytest.mark.parametrize("cluster", [[0, 1, 1, 1]], indirect=True)
def test_several_nodes_share_the_shards(world, cluster):
    summary = predict(world, "shared", cluster)
    assert summary["layout"]["num_actors"] == 3
    run = read_run(summary["output"], "shared")
    receipts = list(read_receipts(run.uri, committed_shard_ids(run.uri)))
    assert len(receipts) == NUM_SHARDS
    assert len({receipt.node for receipt in receipts}) >= 2


@pytest.mark.parametrize("cluster", [[1]], indirect=True)
def test_what_does_not_fit_the_cluster_is_refused_at_once(world, cluster):
    refusal = predict(world, "too-big", cluster, compute__actors=4, expected_code=2)
    assert "4 actors of 1 CPUs each do not fit this cluster, 1 do" in refusal["message"]
    assert not (world / "tables/_runs/too-big").exists()


@pytest.mark.parametrize("cluster", [[2]], indirect=True)
def test_the_same_run_twice_at_once_ends_whole(world, cluster):
    with ThreadPoolExecutor(2) as pool:
        options = {"compute__actors": 1, "compute__cpus_per_actor": 1}
        twins = [pool.submit(predict, world, "twins", cluster, **options) for _ in range(2)]
        assert [twin.result()["num_predicted"] for twin in twins] == [57, 57]
    assert run_job("verify", output=world / "tables", run_id="twins")["status"] == "verified"
