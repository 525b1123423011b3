"""Networks on their device: pixels in, labels with scores and embeddings out."""

import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pipeline import storage
from pipeline.data.gpu_loader import GpuDecoder
from pipeline.data.loader import Batch
from pipeline.data.manifest import Manifest
from pipeline.data.transforms import Preprocessing
from pipeline.errors import BundleError
from pipeline.inference import networks
from pipeline.inference.networks import Choice
from pipeline.inference.run import Model, Run, software
from pipeline.inference.turns import Turns
from pipeline.models.bundle import Bundle, load_network
from pipeline.models.compiler import Program, load
from pipeline.models.precision import FloatPrecision, autocast_type, compute_repeatably

FloatArray = npt.NDArray[np.floating]

_BATCHES_ON_GPU = 2  # and as many again waiting


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


@dataclass(frozen=True, slots=True)
class Predicted:
    """A batch behind the networks: its images' positions in the shard, an output per bundle, when it went in and came
    out, in seconds of `time.perf_counter`.
    """

    rows: list[int]
    outputs: list[ModelOutput]
    start: float
    end: float


class Predictor:
    """The networks of a run's bundles on one device, compiled where the run says so; heavy, so built where it runs.

    `preprocessings` are the distinct ones among the bundles: a batch carries one pixel tensor for each, so that bundles
    that agree share theirs. A network that is compiled on first use is tried on images of the manifest. Raises
    BundleError, and RunError where GPUs are to decode and this one cannot. Who calls it from several threads takes
    `turns`.
    """

    def __init__(self, run: Run, manifest: Manifest) -> None:
        self.bundles = [load_unchanged(model) for model in run.models]
        self.preprocessings = distinct_preprocessings(self.bundles)
        self._input_of_each = [self.preprocessings.index(bundle.preprocessing) for bundle in self.bundles]
        self._tables = run.tables
        self._device = torch.device(run.device)
        self._streams = threading.local()
        self._batches_at_once = 1 if self._device.type == "cpu" else _BATCHES_ON_GPU
        self._threads = ThreadPoolExecutor(_BATCHES_ON_GPU, thread_name_prefix="stream")  # started when first used
        self._num_threads = run.num_threads
        torch.set_num_threads(run.num_threads)  # the order of sums, hence the last bits; Ray's actors begin with 1
        if self._device.type == "cuda":
            compute_repeatably()
        self.decoder = None
        if run.decode == "gpu":
            options = run.images.decode_options(self.preprocessings)
            self.decoder = GpuDecoder(self._device, self.preprocessings, options)
        choices = networks.decide(run, manifest)
        self.computed_in = json.dumps({name: str(choice) for name, choice in choices.items()})
        self._programs = [
            _program(run, manifest, model, bundle, choices[model.name], self._device)
            for model, bundle in zip(run.models, self.bundles, strict=True)
        ]
        self.turns = Turns()
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # weights are moved by a stream that those of the batches do not wait for

    @cached_property
    def software(self) -> str:
        """Versions of what computes the tables, as JSON, for their lineage."""
        versions = software()
        if self.decoder is not None:
            import triton

            versions["triton"] = triton.__version__
        return json.dumps(versions)

    @property
    def uses_pinned_memory(self) -> bool:
        """Whether batches in pinned memory reach the device faster."""
        return self._device.type == "cuda"

    def map(self, batches: Iterable[Batch]) -> Iterator[Predicted]:
        """What the networks say of every batch, in order.

        On a GPU several batches are under way, each on a stream of its own, so that copies and kernels overlap; on CPUs
        one, for there are as many processes as CPUs.
        """

        def predict(batch: Batch) -> Predicted:
            start = time.perf_counter()
            outputs = self(batch.pixels)
            return Predicted(batch.rows, outputs, start, time.perf_counter())

        if self._batches_at_once == 1:
            return map(predict, batches)
        return storage.map_concurrently(predict, batches, self._batches_at_once, pool=self._threads)

    def __call__(self, pixels: Sequence[torch.Tensor]) -> list[ModelOutput]:
        """One output per bundle for a batch: uint8 N×3×H×W per preprocessing, in the order of `preprocessings`."""
        assert len(pixels) == len(self.preprocessings)
        torch.set_num_threads(self._num_threads)  # a thread's own: shards are worked on in several
        with torch.inference_mode(), self.own_stream():
            inputs = [each.to(self._device, non_blocking=True, memory_format=torch.channels_last) for each in pixels]
            return [
                self._output_of(*program(inputs[index]))
                for program, index in zip(self._programs, self._input_of_each, strict=True)
            ]

    def own_stream(self) -> AbstractContextManager[Any]:
        """This thread's stream of the GPU: memory that a kernel of it still reads is given to no other thread."""
        if self._device.type == "cpu":
            return nullcontext()
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream()
        return torch.cuda.stream(self._streams.own)

    def _output_of(self, logits: torch.Tensor, pooled: torch.Tensor) -> ModelOutput:
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


def load_unchanged(model: Model) -> Bundle:
    """The model's bundle. Raises BundleError where it is not the one that the run began with."""
    bundle = Bundle.load(model.uri)
    if bundle.digest != model.digest:
        raise BundleError(
            f"{model.uri}: expected the bundle the run began with ({model.digest}), found {bundle.digest}"
        )
    return bundle


def distinct_preprocessings(bundles: Sequence[Bundle]) -> list[Preprocessing]:
    """The preprocessings of `bundles`, each once, in order of first use."""
    return list({bundle.preprocessing.digest: bundle.preprocessing for bundle in bundles}.values())


def _program(
    run: Run, manifest: Manifest, model: Model, bundle: Bundle, choice: Choice, device: torch.device
) -> Program:
    if choice.is_compiled:
        return load(model.uri, networks.compiled_as_decided(run, manifest, model, choice))
    assert choice.precision != "int8"
    return _eager(model.uri, bundle, device, choice.precision)


def _eager(uri: str, bundle: Bundle, device: torch.device, precision: FloatPrecision) -> Program:
    network = load_network(uri).to(device).to(memory_format=torch.channels_last)
    dtype = autocast_type(precision, device)

    def run(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Without autocast's cache of weights: it is one for all threads, whose streams would not wait for each other.
        with torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False):
            outputs: tuple[torch.Tensor, torch.Tensor] = network(bundle.preprocessing.normalise(pixels))
        return outputs

    return run
