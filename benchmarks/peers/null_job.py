"""What a Ray Data job over two actors costs before it does anything: says so when its first result is there."""

from typing import Any

import ray


class Empty:
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


def main() -> None:
    ray.init("local", include_dashboard=False)
    rows = ray.data.from_items([{"row": 0}, {"row": 1}])
    results = rows.map_batches(Empty, compute=ray.data.ActorPoolStrategy(size=2))
    next(iter(results.iter_rows()))
    print("first result", flush=True)


if __name__ == "__main__":
    main()
