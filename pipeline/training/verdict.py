"""The verdict on a bundle: the network judged over all ranks, and what is written of that.

<output>/config.yaml       what was asked, there before an image is read
<output>/evaluation.json   every figure: counts, accuracy by class, confusion
<output>/errors.parquet    the images that could not be judged
<output>/report.html       the same to look at
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from pipeline import storage
from pipeline.data.decoders import Caution
from pipeline.data.manifest import Manifest
from pipeline.data.readers import ReadLimits
from pipeline.models.bundle import Bundle, load_network
from pipeline.models.catalog import build, refuse_size
from pipeline.models.precision import (
    AskedFloatPrecision,
    FloatPrecision,
    autocast_type,
    compute_repeatably,
)
from pipeline.report.thumbnail import make_thumbnail
from pipeline.report.training import HardImage, TrainingReport, render
from pipeline.tables import schemas
from pipeline.tables.writing import encode
from pipeline.training.counts import Outcome, to_entries
from pipeline.training.evaluate import Setup, evaluate_together
from pipeline.training.protocol import Protocol
from pipeline.training.worker import Worker, common_precision


def refuse_scales(bundle: Bundle, protocol: Protocol) -> None:
    """Raise ConfigError where `protocol` shows whole images, which are seldom square, and the network takes none.

    It is shown one of each scale, without weights but where it cannot be made without; nothing is computed.
    """
    if protocol.views != "multi_scale":
        return
    architecture, nowhere = bundle.architecture, torch.device("meta")
    make = partial(build, architecture.name, len(bundle.classes), **architecture.arguments)
    try:
        with nowhere:
            network = make()
    except NotImplementedError:  # torchvision's RegNets compute with tensors while they are made
        network = make().to(nowhere)
    remedy = "protocol.views: multi_scale shows whole images, use one_crop or ten_crop, or larger protocol.scales"
    for scale in protocol.scales:
        refuse_size(network.eval(), scale, 3 * scale // 2, nowhere, remedy)


def judge_bundle(
    bundle_uri: str, manifest_uri: str, setup: Setup, asked: AskedFloatPrecision, worker: Worker
) -> tuple[Outcome, FloatPrecision]:
    """The work of one rank, and what it was computed in; its device and threads go over those of `setup`, as that does.

    Of ranks that auto finds different precisions for, each computes in float32, as a GPU then does for `predict`.
    Raises as `evaluate`, and BundleError.
    """
    precision = common_precision(worker, asked)
    if worker.device.type == "cuda" and precision == "float32":
        compute_repeatably()
    network = load_network(bundle_uri).to(worker.device)
    outcome = evaluate_together(
        network.to(memory_format=torch.channels_last),
        Manifest.open(manifest_uri),
        replace(
            setup,
            device=worker.device,
            precision=autocast_type(precision, worker.device),
            num_threads=worker.num_threads,
            caution=Caution(isolated=worker.should_isolate(0)),
        ),
        worker,
        on_progress=lambda num_images: worker.observe({"rank": worker.rank, "images": num_images}),
    )
    return outcome, precision


@dataclass(frozen=True)
class Verdict:
    """What was found of a bundle on a manifest, by a protocol, computed in `precision`."""

    bundle: Bundle
    bundle_uri: str
    manifest: Manifest
    protocol: Protocol
    precision: FloatPrecision
    outcome: Outcome

    def summary(self) -> dict[str, Any]:
        """The figures for JSON; `num_images` were judged, `num_errors` could not be, together they are all."""
        return {
            "bundle": f"{self.bundle.name}/{self.bundle.version}",
            "bundle_uri": self.bundle_uri,
            "bundle_digest": self.bundle.digest,
            "manifest": self.manifest.uri,
            "manifest_digest": self.manifest.digest,
            "protocol": self.protocol.describe(self.bundle.preprocessing),
            "precision": self.precision,
            **self.outcome.counts.as_dict(),
            "errors_by_kind": self._errors_by_kind(),
        }

    def write(self, output_uri: str, config_yaml: str, facts: Mapping[str, str], limits: ReadLimits) -> None:
        """Write what was found; `facts` stand in the report, whose pictures are read within `limits`.

        Raises StorageError.
        """
        files = {
            "evaluation.json": json.dumps(self._everything(), allow_nan=False).encode(),
            "errors.parquet": encode(self._errors_table()),
            "report.html": render(self._report(config_yaml, facts, limits)).encode(),
        }
        for name, data in files.items():
            storage.write(storage.join(output_uri, name), data)

    def _everything(self) -> dict[str, Any]:
        """The summary, the figures of each class, and the confusion as three columns, of what is not zero in it."""
        counts = self.outcome.counts
        confusion = {name: column.tolist() for name, column in to_entries(counts.confusion).items()}
        return {**self.summary(), "classes": counts.by_class(self.bundle.classes), "confusion": confusion}

    def _errors_by_kind(self) -> dict[str, int]:
        return dict(Counter(f"{failed.stage}/{failed.error}" for failed in self.outcome.errors).most_common())

    def _errors_table(self) -> pa.Table:
        lineage = {"manifest_digest": self.manifest.digest, "bundle_digest": self.bundle.digest}
        rows = [asdict(failed) for failed in self.outcome.errors]
        return pa.Table.from_pylist(rows, schemas.schema("errors", lineage=lineage))

    def _report(self, config_yaml: str, facts: Mapping[str, str], limits: ReadLimits) -> TrainingReport:
        counts, classes = self.outcome.counts, self.bundle.classes
        return TrainingReport(
            title=f"{self.bundle.name} {self.bundle.version}",
            run_id="evaluation",
            status="done",
            facts={
                "top-1 error": f"{counts.top1_error:.2%}",
                "top-5 error": f"{counts.top5_error:.2%}",
                "protocol": self.protocol.describe(self.bundle.preprocessing),
                "precision": self.precision,
                "manifest": self.manifest.uri,
                **facts,
            },
            config_yaml=config_yaml,
            history={"evaluations": [{"top1": counts.top1_accuracy, "num_images": counts.num_images}]},
            classes=classes,
            confusion=counts.confusion,
            hardest=[
                HardImage(
                    hard.uri,
                    classes[hard.label_id],
                    classes[hard.predicted_id],
                    hard.score,
                    make_thumbnail(hard.uri, limits),
                )
                for hard in self.outcome.hardest
            ],
            errors=self._errors_by_kind(),
        )
