"""The whole pipeline on a set of images drawn for it: list, train, classify and embed, verify, read back.

python -m jobs.demo [--root FOLDER]
"""

import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from jobs import manifest, predict, run_job, train, verify
from jobs.demo_images import CLASSES, draw_set
from jobs.manifest import LabelsConfig, ManifestConfig, SourceConfig
from jobs.verify import VerifyConfig
from pipeline import storage
from pipeline.config import JobConfig
from pipeline.data.manifest import Manifest
from pipeline.data.transforms import Preprocessing
from pipeline.inference.config import PredictConfig, TablesConfig
from pipeline.models import registry
from pipeline.models.bundle import Architecture
from pipeline.training.config import (
    AugmentConfig,
    EvaluationConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

_NAME = "shapes"
_ARCHITECTURE = "cifar_resnet8"
_BATCH_SIZE = 64


class DemoConfig(JobConfig):
    """List, train, classify and embed a set of images drawn on the spot, in a local folder."""

    resumes: ClassVar[bool] = True

    root: str = "demo"
    """Folder for the images, the manifest, the bundle and the tables."""
    num_train: int = Field(2_400, ge=_BATCH_SIZE)
    """Images to train on."""
    num_images: int = Field(3_000, ge=1)
    """Other images, to classify and embed; some are broken on purpose."""
    epochs: int = Field(10, ge=1)
    """Passes over the training images."""


def main(config: DemoConfig) -> dict[str, Any]:
    """Every step of the pipeline, told as it goes."""
    start = time.monotonic()
    root = Path(config.root).absolute()
    _say(f"drawing {config.num_train} + {config.num_images} images of {len(CLASSES)} shapes under {root}")
    _draw(root / "train", num_images=config.num_train, seed=1)
    _draw(root / "evaluation", num_images=config.num_train // 8, seed=3)
    _draw(root / "images", num_images=config.num_images, seed=2, num_broken=config.num_images // 100)
    _say("listing them: three manifests")
    for name in ("train", "evaluation", "images"):
        manifest.main(_manifest_config(root, name))
    _say("training a ResNet-8 on the first, judging it by the second")
    _train(root, config.epochs)
    _say("classifying and embedding the third")
    summary = predict.main(
        PredictConfig(
            manifest=str(root / "manifests" / "images"),
            registry=str(root / "registry"),
            bundles=[f"{_NAME}/1"],
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
    """Put a small net, trained by the same job as any other, in the registry."""
    if registry.list_versions(str(root / "registry"), _NAME):
        return
    summary = train.main(
        TrainConfig(
            train=str(root / "manifests" / "train"),
            evaluate_on=str(root / "manifests" / "evaluation"),
            output=str(root / "training"),
            run_id=_NAME,
            resume="auto",
            registry=str(root / "registry"),
            name=_NAME,
            version="1",
            architecture=Architecture(name=_ARCHITECTURE),
            epochs=epochs,
            batch_size=_BATCH_SIZE,
            augment=AugmentConfig(crop="random_resized", scale=(0.6, 1.0), size=32),
            optimizer=OptimizerConfig(learning_rate=0.2, nesterov=True, weight_decay=5e-4),
            schedule=ScheduleConfig(kind="linear", warmup=min(2, epochs / 2)),
            evaluation=EvaluationConfig(preprocessing=Preprocessing(resize_size=32, crop_size=32), every_epochs=5),
        )
    )
    _say(f"  {summary['top1']:.1%} right on images kept apart; curves in {summary['report'].removeprefix('file://')}")


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
    speed = f"{summary['images_per_s']} images/s" if summary["status"] == "done" else "all of it was done before"
    return f"""
{summary["num_images"]} images: {summary["num_predicted"]} classified, {summary["num_errors"]} errors ({kinds})
accuracy {accuracy:.1%} on the classified ones; {speed}; the whole demo took {seconds:.0f} s
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
