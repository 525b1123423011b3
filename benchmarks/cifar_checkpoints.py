"""Four published CIFAR-10 ResNets over 10,000 loose JPEGs in an object store, all in one pass: their test errors.

    python -m benchmarks.cifar_checkpoints --data ../shared/data --store s3://bucket [--precision bfloat16|int8]

DATA holds `cifar10-jpeg.tar.gz` and `cifar10-resnet-weights.tar`; the store is an empty prefix. Uploads, then runs the
jobs as a user would, printing each command: manifest, import_model four times, one predict, verify. The errors come
from the predictions table joined with the manifest's labels; exits 1 where one is further than TOLERANCE off. In
float32 the networks run as they are, otherwise compiled: what is lost by it is the difference. Without VNNI, int8 needs
`--min-cosine 0.998`.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.tables import open_table

EXPECTED_ERRORS = {  # percent, of the same weights on the same JPEGs decoded by Pillow, float32
    "cifar-resnet20/1": 18.97,
    "cifar-resnet32/1": 17.44,
    "cifar-resnet44/1": 17.33,
    "cifar-resnet56/1": 16.80,
}
TOLERANCE = 0.1
CONFIG = Path(__file__).parents[1] / "configs" / "import_cifar.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two archives")
    parser.add_argument("--store", required=True, help="URI of an empty prefix")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "int8"], default="float32")
    parser.add_argument("--min-cosine", default="0.999", help="embeddings' with float32's, below which none is run")
    arguments = parser.parse_args()
    store = storage.normalise(arguments.store)
    seconds = {"upload": upload(arguments.data, store)}
    summary = run_jobs(store, seconds, arguments.precision, arguments.min_cosine)
    errors = measure_errors(store, summary["run_id"])
    print("| bundle | test error | expected |\n|---|---|---|")
    for model, error in errors.items():
        print(f"| {model} | {error:.2f} % | {EXPECTED_ERRORS[model]:.2f} % |")
    print(json.dumps({"errors": errors, "seconds": seconds, "predict": summary}))
    sys.exit(0 if are_expected(errors) else 1)


def upload(data: Path, store: str) -> float:
    """The test images as loose objects `images/<class>/NNNN.jpg` and the checkpoints below `store`; the seconds."""
    start = time.monotonic()
    objects = {
        **{f"images/{name}": content for name, content in members(data / "cifar10-jpeg.tar.gz", "cifar10-jpeg/test/")},
        **{
            f"checkpoints/{name}": content
            for name, content in members(data / "cifar10-resnet-weights.tar", "cifar10-resnet-weights/")
        },
    }
    for _ in storage.map_concurrently(lambda name: storage.write(storage.join(store, name), objects[name]), objects):
        pass
    return round(time.monotonic() - start, 1)


def members(archive: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Names below `prefix`, and contents, of a tar's files."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith(prefix) and (file := tar.extractfile(member)) is not None:
                yield member.name.removeprefix(prefix), file.read()


def run_jobs(
    store: str, seconds: dict[str, float], precision: str = "float32", min_cosine: str = "0.999"
) -> dict[str, Any]:
    """Manifest, imports, one predict over all bundles, verify; predict's summary. Adds the `seconds` of each."""
    images, manifest, registry, tables = (
        storage.join(store, name) for name in ("images", "manifest", "registry", "tables")
    )
    listed = run_job("manifest", seconds, "--source.uri", images, "--labels.kind", "folders", "--output", manifest)
    assert (listed["num_images"], listed["num_classes"]) == (10_000, 10)
    for checkpoint in storage.list_objects(storage.join(store, "checkpoints")):
        depth = checkpoint.uri.rpartition("/resnet")[2].partition("-")[0]
        import_checkpoint(registry, checkpoint.uri, depth, seconds)
    bundles = [text for model in EXPECTED_ERRORS for text in ("--bundles", model.partition("/")[0])]
    places = ("--manifest", manifest, "--registry", registry, "--output", tables)
    compiled = "never" if precision == "float32" else "always"
    computed = ("--compute.precision", precision, "--compute.compile", compiled)
    agreeing = ("--compute.agreement.min_cosine", min_cosine)
    summary = run_job("predict", seconds, *places, *bundles, *computed, *agreeing)
    run_job("verify", seconds, "--output", tables, "--run_id", summary["run_id"])
    return summary


def import_checkpoint(registry: str, source: str, depth: str, seconds: dict[str, float]) -> None:
    name = ("--name", f"cifar-resnet{depth}", "--architecture.name", f"cifar_resnet{depth}")
    run_job("import_model", seconds, "--config", str(CONFIG), "--source", source, "--registry", registry, *name)


def run_job(job: str, seconds: dict[str, float], *flags: str) -> dict[str, Any]:
    """`python -m jobs.<job> <flags>`; its summary."""
    print(f"$ python -m jobs.{job} {' '.join(flags)}", file=sys.stderr, flush=True)
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", f"jobs.{job}", *flags], stdout=subprocess.PIPE, text=True, check=True)
    seconds[job] = round(seconds.get(job, 0.0) + time.monotonic() - start, 1)
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def measure_errors(store: str, run_id: str) -> dict[str, float]:
    """Percent of the manifest's images that each model labels wrongly, from the predictions table alone."""
    manifest = Manifest.open(storage.join(store, "manifest"))
    assert manifest.classes is not None
    labels = pa.concat_tables([manifest.images(shard) for shard in manifest.shards()]).select(["uri", "label"])
    truth = pa.table({"uri": labels["uri"], "true": pa.array(manifest.classes).take(labels["label"])})
    predictions = open_table(storage.join(store, "tables", "predictions"), run_id)
    joined = predictions.to_table(columns=["uri", "label", "model"]).join(truth, "uri", join_type="inner")
    is_wrong = pc.not_equal(joined["label"], joined["true"])
    wrong = (
        joined.append_column("is_wrong", is_wrong).group_by("model").aggregate([("is_wrong", "sum"), ([], "count_all")])
    )
    assert wrong["count_all"].to_pylist() == [manifest.num_images] * len(EXPECTED_ERRORS)
    rates = dict(zip(wrong["model"].to_pylist(), wrong["is_wrong_sum"].to_pylist(), strict=True))
    return {model: 100 * rates[model] / manifest.num_images for model in EXPECTED_ERRORS}


def are_expected(errors: dict[str, float]) -> bool:
    return all(abs(errors[model] - expected) <= TOLERANCE for model, expected in EXPECTED_ERRORS.items())


if __name__ == "__main__":
    main()
