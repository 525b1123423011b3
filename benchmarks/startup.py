"""Seconds from the command to the first forward pass, beside a Ray Data job of two actors that do nothing.

    python -m benchmarks.startup --images ../shared/data/imagenet-sample-700.tar [--rounds 5]

    null    benchmarks/peers/null_job.py: ray.init, two rows over two empty actors, until the driver has a result
    ours    jobs.predict with a compiled ResNet-18 over shards of one batch, until the driver has its first receipt

A receipt comes when a shard is fetched, decoded, classified, written and told; the first forward pass lies between the
shard's beginning and that. The two jobs alternate, each in a process of its own; figures are medians.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.inference_speed import compile_bundle, list_images, publish_bundle, spread
from benchmarks.running import predict, run_command

ARCHITECTURE = "resnet18"
_BATCH = 16  # of a forward pass on CPUs, and here a shard
_NULL_JOB = Path(__file__).parent / "peers" / "null_job.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="tar of JPEGs")
    parser.add_argument("--num-images", type=int, default=320, help="images of a run")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    arguments = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # the null job asks no one either
    seconds: dict[str, list[float]] = {"null": [], "ours": [], "of that shard": []}
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        root = Path(folder)
        spread(arguments.images, root / "images", arguments.num_images)
        list_images(str(root / "images"), str(root / "manifest"), "--shard_size", str(_BATCH))
        publish_bundle(ARCHITECTURE, root)
        compile_bundle(ARCHITECTURE, root)
        for number in range(arguments.rounds):
            seconds["null"].append(time_null_job())
            first_receipt_s, shard_s = time_ours(root, f"round-{number}")
            seconds["ours"].append(first_receipt_s)
            seconds["of that shard"].append(shard_s)
            last = {name: round(values[-1], 2) for name, values in seconds.items()}
            print(f"round {number + 1} of {arguments.rounds}: {last}", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(to_markdown(medians))
    figures = {
        "median_s": {name: round(value, 2) for name, value in medians.items()},
        "difference_s": round(medians["ours"] - medians["null"], 2),
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "num_cpus": os.cpu_count(),
    }
    print(json.dumps(figures))


def time_null_job() -> float:
    """Seconds to its first result."""
    return next(at for at, line in run_command([sys.executable, str(_NULL_JOB)]).stdout if line == "first result")


def time_ours(root: Path, run_id: str) -> tuple[float, float]:
    """Seconds to the first receipt, and those that its shard took of them."""
    places = ("--manifest", str(root / "manifest"), "--registry", str(root / "registry"), "--output", str(root / "out"))
    ran = predict(*places, "--bundles", ARCHITECTURE, "--run_id", run_id, "--compute.agreement.min_top1", "0")
    return ran.first_receipt_s, ran.first_receipt_s - ran.begun_s


def to_markdown(medians: dict[str, float]) -> str:
    """The figures as the table of RESULTS.md."""
    begun = medians["ours"] - medians["of that shard"]
    lines = [
        "| from the command | seconds |",
        "|---|---|",
        f"| null job: first result | {medians['null']:.1f} |",
        f"| ours: first shard begun | {begun:.1f} (+ {begun - medians['null']:.1f}) |",
        f"| ours: first receipt | {medians['ours']:.1f} (+ {medians['ours'] - medians['null']:.1f}) |",
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
