"""A labelled manifest as training needs it: every label at hand, and no image in both training and evaluation."""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.data.manifest import Manifest, Shard
from pipeline.errors import ManifestError

_MD5 = re.compile(r"[0-9a-f]{32}")  # the etag of an object that came in one PUT: its content's
_NAMES_TOLD = 3
_MD5_OF_NOTHING = "d41d8cd98f00b204e9800998ecf8427e"  # all empty objects have it, and are no image


@dataclass(frozen=True)
class TrainingSet:
    """A manifest all of whose images are labelled: its shards, and the labels of each shard, int64."""

    manifest: Manifest
    shards: list[Shard]
    labels: list[npt.NDArray[np.int64]]

    @classmethod
    def open(cls, uri: str) -> "TrainingSet":
        """The set at `uri`. Raises ManifestError where images have no label, or one that is no class of the
        manifest's.
        """
        manifest = Manifest.open(uri)
        shards = list(manifest.shards())
        if not shards:
            raise ManifestError(f"expected images to train on or to evaluate in {manifest.uri!r}, found none")
        columns = storage.map_concurrently(lambda shard: manifest.images(shard)["label"], shards, 8)
        labels = [_labels(column, manifest.uri) for column in columns]
        found = np.unique(np.concatenate([np.unique(of_shard) for of_shard in labels]))
        num_classes = len(manifest.classes) if manifest.classes else int(found[-1]) + 1
        if found[-1] >= num_classes:
            raise ManifestError(f"expected labels below {num_classes} in {manifest.uri!r}, found {found[-1]}")
        return cls(manifest, shards, labels)

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the labels; where the manifest has only numbers, these."""
        if self.manifest.classes:
            return self.manifest.classes
        return [str(label) for label in range(max(int(labels.max()) for labels in self.labels) + 1)]

    @cached_property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        return np.array([shard.num_images for shard in self.shards], np.int64)

    @property
    def is_packed(self) -> bool:
        return self.shards[0].source is not None

    def class_counts(self, num_classes: int) -> npt.NDArray[np.int64]:
        """How many images each class has, int64 num_classes."""
        counts = sum(np.bincount(labels, minlength=num_classes) for labels in self.labels)
        return np.asarray(counts, np.int64)


def refuse_overlap(train: TrainingSet, evaluation: TrainingSet) -> None:
    """Raises ManifestError where an image is in both: the same uri, or the same content as far as MD5 etags tell it."""
    evaluated = {content: contents[0] for contents in _contents(evaluation.manifest) for content in contents}
    shared = [
        (contents[0], twins[0])
        for contents in _contents(train.manifest)
        if (twins := [evaluated[content] for content in contents if content in evaluated])
    ]
    if shared:
        trained_on, judged_by = shared[0]
        raise ManifestError(
            f"expected no image in both {train.manifest.uri!r} and {evaluation.manifest.uri!r}, found {len(shared)}, "
            f"e.g. {trained_on!r}, which is {judged_by!r} there: an evaluation on images that were trained on says "
            "nothing; make one of the manifests anew without them, by filters.exclude or another split"
        )


def refuse_one_class(train: TrainingSet) -> None:
    """Raises ManifestError where there is nothing to tell apart."""
    found = {int(label) for labels in train.labels for label in (labels.min(), labels.max())}
    if len(found) < 2:
        raise ManifestError(f"expected at least two classes in {train.manifest.uri!r}, found {len(found)}")


def refuse_other_classes(manifest: Manifest, classes: Sequence[str]) -> None:
    """Raises ManifestError where a label of the manifest means another class than in `classes`.

    It may have fewer classes, the first of these; bare ids are places in `classes` whatever they are.
    """
    names = manifest.classes or []
    for label, name in enumerate(names):
        meant = classes[label] if label < len(classes) else None
        if name != meant:
            raise ManifestError(
                f"expected the classes of {manifest.uri!r} to be the network's {len(classes)} in their order, got "
                f"{len(names)}, and label {label} is {name!r} where the network's is {meant!r}; make the manifest with "
                f"--classes {_on_a_command_line(classes)}, or with class ids as labels"
            )


def refuse_other_labels(train: TrainingSet, evaluation: TrainingSet) -> None:
    """Raises ManifestError where a label of the evaluation set is no class of the training set's, or means another."""
    refuse_other_classes(evaluation.manifest, train.classes)
    if len(evaluation.classes) > len(train.classes):
        raise ManifestError(
            f"expected labels of {evaluation.manifest.uri!r} to be ids of the training set's {len(train.classes)} "
            f"classes, got {len(evaluation.classes) - 1}; leave such images out, or train on them"
        )


def _on_a_command_line(names: Sequence[str]) -> str:
    told = json.dumps(names[:_NAMES_TOLD], ensure_ascii=False)
    return shlex.quote(told if len(names) <= _NAMES_TOLD else f"{told[:-1]}, …]")


def _labels(column: pa.ChunkedArray, uri: str) -> npt.NDArray[np.int64]:
    if column.null_count:
        raise ManifestError(
            f"expected a label for every image of {uri!r}, found {column.null_count} of {len(column)} in one shard "
            "without; list them with --labels.kind folders, or leave them out"
        )
    return np.asarray(column.to_numpy(), np.int64)


def _contents(manifest: Manifest) -> Iterator[list[str]]:
    """What tells each image's content: its name, and its etag where that is one of content."""
    for images in storage.map_concurrently(manifest.images, manifest.shards()):
        for uri, etag in zip(images["uri"].to_pylist(), images["etag"].to_pylist(), strict=True):
            content = (etag or "").strip('"')  # quoted in some tables
            yield [uri, content] if _MD5.fullmatch(content) and content != _MD5_OF_NOTHING else [uri]
