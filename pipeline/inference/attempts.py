"""How often each shard was begun: what tells a shard that kills its process from one that is merely unlucky.

Kept apart from the graph: the process that counts starts beside the actors', and what it need not import they need not
wait for.
"""

from collections import Counter
from collections.abc import Sequence

from pipeline.witness import Witness

MAX_DEATHS = 3
_MOST_BEGINNINGS = 10  # of a shard, done or not: what dies after a shard is done must not go on for ever either


class ShardAttempts(Witness):
    """How often each shard was begun in this flow; one actor, on the driver's node."""

    def __init__(self) -> None:
        super().__init__()
        self._begun: Counter[tuple[str, int]] = Counter()
        self._done: Counter[tuple[str, int]] = Counter()
        self._nodes: dict[tuple[str, int], str] = {}

    def begin(self, stage: str, shard_ids: Sequence[int], node: str, *, is_alone: bool = False) -> list[int]:
        """The number of this attempt at a stage of each shard, from 1, those not counted that it is not to blame for.

        One after the first is begun, and counts, only where the shard `is_alone` in its process: who is told another
        number than 1 must see to that and ask again, for of shards beside each other all would be blamed for a death.
        """
        self.arrive(stage)
        keys = [(stage, shard_id) for shard_id in shard_ids]
        self._excuse_lost(keys)
        return [self._begin(key, node, is_alone) for key in keys]

    def _excuse_lost(self, keys: Sequence[tuple[str, int]]) -> None:
        """What was begun on a node that is lost, as spot nodes go, was not what ended it."""
        nodes = {key: self._nodes[key] for key in keys if key in self._nodes}
        alive = _nodes_alive() if nodes else set()
        for key, node in nodes.items():
            if node not in alive:
                self._done[key] += 1
                del self._nodes[key]

    def _begin(self, key: tuple[str, int], node: str, is_alone: bool) -> int:
        num_begun = self._begun[key] + 1
        attempt = num_begun - (self._done[key] if num_begun <= _MOST_BEGINNINGS else 0)
        attempt = max(attempt, 1)  # a beginning may be forgotten, with the process that counts, and its end come after
        if attempt == 1 or is_alone:
            self._begun[key] = num_begun
            self._nodes[key] = node
        return attempt

    def end(self, stage: str, shard_ids: Sequence[int]) -> None:
        """The stage of these shards is done: should they be begun again, they did not end their task."""
        for shard_id in shard_ids:
            self._done[stage, shard_id] += 1
            self._nodes.pop((stage, shard_id), None)


def _nodes_alive() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
