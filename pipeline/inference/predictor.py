"""Networks on their device: pixels in, labels with scores and embeddings out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pipeline.data.transforms import Preprocessing
from pipeline.errors import BundleError
from pipeline.inference.plan import Model, Run
from pipeline.models.bundle import Bundle, load_network
from pipeline.models.precision import compute_repeatably

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What one model says of N images.

    `label_ids` int32 N×k, best first, with their softmax `scores` float32 N×k; `embeddings` N×d, or None where not
    asked for; `is_finite` bool N: whether every logit and embedding element is a finite number.
    """

    label_ids: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    embeddings: FloatArray | None
    is_finite: npt.NDArray[np.bool_]

    def select(self, keep: npt.NDArray[np.bool_]) -> "ModelOutput":
        """The outputs of the images for which `keep` holds."""
        embeddings = None if self.embeddings is None else self.embeddings[keep]
        return ModelOutput(self.label_ids[keep], self.scores[keep], embeddings, self.is_finite[keep])


class Predictor:
    """The networks of a run's bundles, in eval mode on one device; heavy, so built where it runs.

    `preprocessings` are the distinct ones among the bundles: a batch carries one pixel tensor for each, so that bundles
    that agree share theirs. Raises BundleError.
    """

    def __init__(self, run: Run) -> None:
        self.bundles = [_load_unchanged(model) for model in run.models]
        self.preprocessings = distinct_preprocessings(self.bundles)
        self._tables = run.tables
        self._device = torch.device(run.device)
        torch.set_num_threads(run.num_threads)  # the order of sums, hence the last bits; Ray's actors begin with 1
        if self._device.type == "cuda":
            compute_repeatably()
        self._networks = [
            load_network(model.uri).to(self._device).to(memory_format=torch.channels_last) for model in run.models
        ]

    @property
    def software(self) -> str:
        """Versions of what computes the tables, as JSON, for their lineage."""
        packages = ("image-batch-pipeline", "torch", "torchvision", "pillow", "pyarrow")
        return json.dumps({package: version(package) for package in packages})

    def __call__(self, pixels: Sequence[torch.Tensor]) -> list[ModelOutput]:
        """One output per bundle for a batch: uint8 N×3×H×W per preprocessing, in the order of `preprocessings`."""
        by_preprocessing = dict(zip((p.digest for p in self.preprocessings), pixels, strict=True))
        with torch.inference_mode():
            on_device = {
                digest: batch.to(self._device, non_blocking=True, memory_format=torch.channels_last)
                for digest, batch in by_preprocessing.items()
            }
            return [
                self._predict(network, bundle.preprocessing, on_device[bundle.preprocessing.digest])
                for network, bundle in zip(self._networks, self.bundles, strict=True)
            ]

    def _predict(self, network: torch.nn.Module, preprocessing: Preprocessing, batch: torch.Tensor) -> ModelOutput:
        logits, pooled = network(preprocessing.normalise(batch))
        scores, label_ids = logits.float().softmax(1).topk(min(self._tables.top_k, logits.shape[1]))
        embeddings = self._finish(pooled) if "embeddings" in self._tables.names else None
        is_finite = logits.isfinite().all(1).cpu().numpy()
        if embeddings is not None:
            is_finite &= np.isfinite(embeddings).all(1)  # float16 ends at 65,504
        return ModelOutput(label_ids.int().cpu().numpy(), scores.cpu().numpy(), embeddings, is_finite)

    def _finish(self, embeddings: torch.Tensor) -> FloatArray:
        embeddings = embeddings.float()
        if self._tables.l2_normalise:
            embeddings = F.normalize(embeddings)
        with np.errstate(over="ignore"):  # what overflows is told by `is_finite`
            return embeddings.cpu().numpy().astype(self._tables.embedding_type, copy=False)


def _load_unchanged(model: Model) -> Bundle:
    bundle = Bundle.load(model.uri)
    if bundle.digest != model.digest:
        raise BundleError(
            f"{model.uri}: expected the bundle the run began with ({model.digest}), found {bundle.digest}"
        )
    return bundle


def distinct_preprocessings(bundles: Sequence[Bundle]) -> list[Preprocessing]:
    """The preprocessings of `bundles`, each once, in order of first use."""
    return list({bundle.preprocessing.digest: bundle.preprocessing for bundle in bundles}.values())
