"""How often each shard was begun: what tells a shard that kills its process from one that is merely unlucky.

Kept apart from the graph: the process that counts starts beside the actors', and what it need not import they need not
wait for.
"""

from collections import Counter

from pipeline.cluster import Witness

MAX_DEATHS = 3
_MOST_BEGINNINGS = 10  # of a shard, done or not: what dies after a shard is done must not go on for ever either


class ShardAttempts(Witness):
    """How often each shard was begun in this flow; one actor, on the driver's node."""

    def __init__(self) -> None:
        super().__init__()
        self._begun: Counter[tuple[str, int]] = Counter()
        self._done: Counter[tuple[str, int]] = Counter()
        self._nodes: dict[tuple[str, int], str] = {}

    def begin(self, stage: str, shard_id: int, node: str, *, is_alone: bool = False) -> int:
        """The number of this attempt at a stage of the shard, from 1, those not counted that it is not to blame for.

        One after the first is begun, and counts, only where the shard `is_alone` in its process: who is told another
        number than 1 must see to that and ask again, for of shards beside each other all would be blamed for a death.
        """
        self.arrive(stage)
        key = (stage, shard_id)
        before = self._nodes.pop(key, None)
        if before is not None and before not in _nodes_alive():  # with its node, as spot nodes go
            self._done[key] += 1
        num_begun = self._begun[key] + 1
        attempt = num_begun - (self._done[key] if num_begun <= _MOST_BEGINNINGS else 0)
        if attempt == 1 or is_alone:
            self._begun[key] = num_begun
            self._nodes[key] = node
        return attempt

    def end(self, stage: str, shard_id: int) -> None:
        """The stage of the shard is done: should it be begun again, it is not to blame for what ended its task."""
        self._done[stage, shard_id] += 1
        self._nodes.pop((stage, shard_id), None)


def _nodes_alive() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
