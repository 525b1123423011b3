"""A cluster to be struck."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    """A head without CPUs and two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()
