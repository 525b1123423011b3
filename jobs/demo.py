"""The whole pipeline on a set of images drawn for it: list, train, classify and embed, verify, read back.

python -m jobs.demo [--root FOLDER]
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jobs import manifest, predict, run_job, verify
from jobs.demo_images import CLASSES, draw_set
from jobs.manifest import LabelsConfig, ManifestConfig, SourceConfig
from jobs.verify import VerifyConfig
from pipeline import storage
from pipeline.config import JobConfig
from pipeline.data.manifest import Manifest
from pipeline.inference.plan import PredictConfig, TablesConfig

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.transforms import Preprocessing
    from pipeline.models.catalog import Network

_NAME = "shapes"
_ARCHITECTURE = "cifar_resnet8"
_BATCH_SIZE = 64


class DemoConfig(JobConfig):
    """List, train, classify and embed a set of images drawn on the spot, in a local folder."""

    root: str = "demo"
    """Folder for the images, the manifest, the bundle and the tables."""
    num_train: int = 2_400
    """Images to train on."""
    num_images: int = 3_000
    """Other images, to classify and embed; some are broken on purpose."""
    epochs: int = 10
    """Passes over the training images."""


def main(config: DemoConfig) -> dict[str, Any]:
    """Every step of the pipeline, told as it goes."""
    start = time.monotonic()
    root = Path(config.root).absolute()
    _say(f"drawing {config.num_train} + {config.num_images} images of {len(CLASSES)} shapes under {root}")
    _draw(root / "train", num_images=config.num_train, seed=1)
    _draw(root / "images", num_images=config.num_images, seed=2, num_broken=config.num_images // 100)
    _say("listing them: two manifests")
    for name in ("train", "images"):
        manifest.main(_manifest_config(root, name))
    _say("training a ResNet-8 on the first")
    _train(root, config.epochs)
    _say("classifying and embedding the second")
    summary = predict.main(
        PredictConfig(
            manifest=str(root / "manifests" / "images"),
            registry=str(root / "registry"),
            bundles=[_NAME],
            output=str(root / "tables"),
            tables=TablesConfig(names=["predictions", "embeddings"], top_k=3),
        )
    )
    _say("verifying the run from its files")
    verify.main(VerifyConfig(output=str(root / "tables"), run_id=summary["run_id"]))
    accuracy = _accuracy(root, summary["tables"]["predictions"])
    _say(_closing_words(summary, accuracy, time.monotonic() - start))
    return {**summary, "accuracy": accuracy}


def _manifest_config(root: Path, name: str) -> ManifestConfig:
    return ManifestConfig(
        source=SourceConfig(uri=str(root / name)),
        output=str(root / "manifests" / name),
        labels=LabelsConfig(kind="folders"),
        shard_size=250,
    )


def _draw(folder: Path, **what: int) -> None:
    """Draw the set unless it is there; a set half-drawn by a killed demo is not there."""
    if not folder.exists():
        unfinished = folder.with_name(f".{folder.name}")
        draw_set(unfinished, **what)
        unfinished.rename(folder)


def _train(root: Path, epochs: int) -> None:
    """Put a small net, trained by a plain loop over the set in memory, in the registry."""
    from pipeline.data.transforms import Preprocessing
    from pipeline.models import registry
    from pipeline.models.bundle import Architecture, pack
    from pipeline.models.catalog import build

    if registry.list_versions(str(root / "registry"), _NAME):
        return
    preprocessing = Preprocessing(resize_size=32, crop_size=32)
    listed = Manifest.open(str(root / "manifests" / "train"))
    network = build(_ARCHITECTURE, len(CLASSES))
    _fit(network, *_load(listed, preprocessing), epochs)
    bundle, weights = pack(
        network,
        name=_NAME,
        version="1",
        architecture=Architecture(name=_ARCHITECTURE),
        classes=list(CLASSES),
        preprocessing=preprocessing,
        training={"epochs": epochs, "manifest_digest": listed.digest},
    )
    registry.publish(str(root / "registry"), bundle, weights)


def _load(listed: Manifest, preprocessing: "Preprocessing") -> "tuple[Tensor, Tensor]":
    """Every image of the manifest, float32 N×3×H×W, and its label, int64 N."""
    import torch

    from pipeline.data.images import decode

    rows = [row for shard in listed.shards() for row in listed.images(shard).to_pylist()]
    pixels = [preprocessing.apply(decode(storage.read(row["uri"]), max_pixels=10**6)) for row in rows]
    return preprocessing.normalise(torch.stack(pixels)), torch.tensor([row["label"] for row in rows])


def _fit(network: "Network", images: "Tensor", labels: "Tensor", epochs: int) -> None:
    """SGD with one cycle of the learning rate; a shape stays what it is when turned or mirrored."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    num_batches = -(-len(images) // _BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * num_batches)
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(images)).split(_BATCH_SIZE):
            batch = torch.rot90(images[chosen], int(torch.randint(4, ())), (2, 3))
            loss = F.cross_entropy(network(batch)[0], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        _say(f"  epoch {epoch + 1} of {epochs}: loss {total / num_batches:.3f}")
    network.eval()


def _accuracy(root: Path, predictions_uri: str) -> float:
    """The share of the predicted images whose label is that of the manifest."""
    import pyarrow.compute as pc

    from pipeline.tables import open_table

    listed = Manifest.open(storage.normalise(str(root / "manifests" / "images")))
    truth = pa.concat_tables([listed.images(shard) for shard in listed.shards()]).select(["uri", "label"])
    predicted = open_table(predictions_uri).to_table(columns=["uri", "label_id"])
    joined = predicted.join(truth, "uri")
    accuracy: float = pc.mean(pc.equal(joined["label_id"], joined["label"])).as_py()
    return round(accuracy, 4)


def _closing_words(summary: dict[str, Any], accuracy: float, seconds: float) -> str:
    predictions, embeddings = (
        summary["tables"][name].removeprefix("file://") for name in ("predictions", "embeddings")
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary["errors_by_kind"].items())
    return f"""
{summary["num_images"]} images: {summary["num_predicted"]} classified, {summary["num_errors"]} errors ({kinds})
accuracy {accuracy:.1%} on the classified ones; {summary["images_per_s"]} images/s; the whole demo took {seconds:.0f} s
tables  {predictions}
        {embeddings}
Python  from pipeline.tables import open_table
        print(open_table("{predictions}").to_table().to_pandas().head())
DuckDB  select label, count(*), avg(score) from '{predictions}/*.parquet' group by label;
        select uri, embedding[1:4] from '{embeddings}/*.parquet' limit 3;
"""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_job(DemoConfig, main)
