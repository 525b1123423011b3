"""What `jobs.predict --plan true` foretells, beside what then happens.

    python -m benchmarks.plan_accuracy --images ../shared/data/imagenet-sample-700.tar --store s3://bucket/plan
        [--architectures resnet18 resnet50] [--num-images 2000] [--shard-size 100]

Each network over the same set of loose JPEGs, on the local disk and, with --store (an empty prefix), from there:
compiled beforehand, estimated, then run. A ratio is what the run took to what was foretold, as its summary tells.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.inference_speed import compile_bundle, list_images, publish_bundle, spread, upload
from benchmarks.running import run_job
from pipeline import storage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="tar of JPEGs")
    parser.add_argument("--store", help="URI of an empty prefix, for the set as loose objects")
    parser.add_argument("--architectures", nargs="+", default=["resnet18", "resnet50"], help="torchvision's names")
    parser.add_argument("--num-images", type=int, default=2000, help="images of the set")
    parser.add_argument("--shard-size", type=int, default=100, help="images in a shard")
    arguments = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory(prefix="plan-accuracy-") as folder:
        root = Path(folder)
        spread(arguments.images, root / "images", arguments.num_images)
        places = make_places(root, arguments)
        for name in arguments.architectures:
            publish_bundle(name, root)
            compile_bundle(name, root)
            for place, (manifest, output) in places.items():
                figures[f"{name}, {place}"] = compare(name, str(root / "registry"), manifest, output)
                print(f"{name}, {place}: {figures[f'{name}, {place}']}", file=sys.stderr)
    print(to_markdown(figures))
    print(json.dumps({"num_images": arguments.num_images, "num_cpus": os.cpu_count(), "figures": figures}))


def make_places(root: Path, arguments: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """By name, a manifest and where its runs write."""
    shard_size = ("--shard_size", str(arguments.shard_size))
    places = {"local": (list_images(str(root / "images"), str(root / "manifest"), *shard_size), str(root / "tables"))}
    if arguments.store is not None:
        store = storage.normalise(arguments.store)
        images, manifest, tables = (storage.join(store, name) for name in ("images", "manifest", "tables"))
        upload(root / "images", images)
        places["store"] = (list_images(images, manifest, *shard_size), tables)
    return places


def compare(name: str, registry: str, manifest: str, output: str) -> dict[str, Any]:
    """Seconds foretold, seconds taken, their ratio and that of the images/s."""
    places = ("--manifest", manifest, "--registry", registry, "--bundles", name, "--output", output, "--run_id", name)
    flags = (*places, "--compute.compile", "always", "--compute.agreement.min_top1", "0")
    run_job("predict", *flags, "--plan", "true")
    summary = run_job("predict", *flags).summary
    estimate = summary["estimate"]
    return {
        "foretold_s": estimate["duration_s"],
        "took_s": summary["duration_s"],
        **{f"{of}_ratio": ratio for of, ratio in estimate["actual_to_estimated"].items()},
    }


def to_markdown(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as the table of RESULTS.md."""
    lines = ["| network, images | foretold | took | ratio |", "|---|---|---|---|"]
    for name, found in figures.items():
        seconds = f"{found['foretold_s']:.1f} s | {found['took_s']:.1f} s"
        lines.append(f"| {name} | {seconds} | {found['duration_ratio']:.2f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
