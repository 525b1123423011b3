"""Make a bundle from a PyTorch checkpoint, from safetensors, or from torchvision's pretrained weights.

python -m jobs.import_model --config configs/import_model.yaml
python -m jobs.import_model --config configs/import_cifar.yaml --source s3://bucket/resnet20.th --name resnet20
"""

import sys
from typing import Any

from pydantic import Field

from jobs import run_job
from pipeline import storage
from pipeline.config import JobConfig
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ConfigError, ObjectNotFoundError
from pipeline.models import pretrained
from pipeline.models.bundle import Architecture, AskedArchitecture, Metric, Name, fill, pack
from pipeline.models.registry import publish, set_alias


class ImportConfig(JobConfig):
    """Which weights to take, what they mean, and where to publish the bundle made of them."""

    source: str
    """URI of a checkpoint or safetensors file, or the name of torchvision's weights (ResNet50_Weights.IMAGENET1K_V2),
    which bring their own architecture, classes, preprocessing and metrics"""
    key: str | None = None
    """Entry of the checkpoint that holds the state dict; found where there is only one"""
    rename: dict[str, str] = Field(default_factory=dict)
    """Names of modules or parameters in the checkpoint, old to new; prefixes of wrappers and a final linear layer
    under another name are found without"""
    architecture: AskedArchitecture | None = None
    """Network of the catalog and arguments of its constructor"""
    classes: list[str] | None = None
    """Class names in the order of the logits"""
    classes_from: str | None = None
    """Where to take the class names from instead: the URI of a file with one a line, or the name of torchvision's
    weights that have the same classes"""
    preprocessing: Preprocessing | None = None
    """What the network was evaluated with"""
    registry: str
    """URI of the registry"""
    name: Name
    """Name of the bundle in the registry"""
    version: Name
    """Version of the bundle, never published before"""
    alias: Name | None = None
    """Alias to point at the new bundle, such as production"""
    metrics: dict[str, Metric] = Field(default_factory=dict)
    """Figures known of these weights, each with the protocol it was measured by"""


def main(config: ImportConfig) -> dict[str, Any]:
    """Read, fit, publish. Raises ConfigError and BundleError before anything is written."""
    is_pretrained = pretrained.is_weights_name(config.source)
    architecture, classes, preprocessing, metrics = (_torchvision_meaning if is_pretrained else _given_meaning)(config)

    import torch  # which a config that is refused need not wait for

    from pipeline.models import foreign
    from pipeline.models.catalog import build, refuse_size

    if is_pretrained:
        weights = pretrained.read_weights(config.source)
    else:
        weights = foreign.read_weights(config.source, config.key)
    network = build(architecture.name, len(classes), **architecture.arguments)
    adapted = foreign.adapt(weights, network, config.rename)
    fill(network, adapted.weights, config.source)
    remedy = "change preprocessing.crop_size, or the architecture's arguments"
    size = preprocessing.crop_size
    refuse_size(network.eval(), size, size, torch.device("cpu"), remedy)
    bundle, data = pack(
        network,
        name=config.name,
        version=config.version,
        architecture=architecture,
        classes=classes,
        preprocessing=preprocessing,
        metrics=metrics | config.metrics,
    )
    uri = publish(config.registry, bundle, data)
    if config.alias is not None:
        set_alias(config.registry, config.name, config.alias, config.version)
    print(f"published {uri}", file=sys.stderr)
    return {
        "status": "done",
        "bundle": uri,
        "digest": bundle.digest,
        "weights_digest": bundle.weights_digest,
        "alias": config.alias,
        "architecture": architecture.name,
        "num_classes": len(classes),
        "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "embedding_size": bundle.embedding_size,
        "num_renamed": len(adapted.renamed),
    }


Meaning = tuple[Architecture, list[str], Preprocessing, dict[str, Metric]]
"""What a state dict alone does not say."""


def _torchvision_meaning(config: ImportConfig) -> Meaning:
    for field in ("key", "architecture", "classes", "classes_from", "preprocessing"):
        if getattr(config, field) is not None:
            raise ConfigError(f"{field}: torchvision's weights bring their own; leave it out")
    known = pretrained.describe(config.source)
    return known.architecture, known.classes, known.preprocessing, known.metrics


def _given_meaning(config: ImportConfig) -> Meaning:
    if config.architecture is None or config.preprocessing is None:
        field = "architecture" if config.architecture is None else "preprocessing"
        raise ConfigError(f"{field}: required with a checkpoint, which does not say it, but not given")
    return config.architecture, _class_names(config), config.preprocessing, {}


def _class_names(config: ImportConfig) -> list[str]:
    if (config.classes is None) == (config.classes_from is None):
        raise ConfigError("classes: required with a checkpoint, as either `classes` or `classes_from`")
    if config.classes is not None:
        return config.classes
    assert config.classes_from is not None
    if pretrained.is_weights_name(config.classes_from):
        return pretrained.classes(config.classes_from)
    try:
        lines = storage.read(storage.normalise(config.classes_from)).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"classes_from: expected UTF-8 in {config.classes_from}, got {error}") from error
    except ObjectNotFoundError as error:
        raise ConfigError(
            f"classes_from: expected a file of class names at {config.classes_from!r}, or the name of torchvision's "
            "weights, found neither"
        ) from error
    return [line for line in lines if line]


if __name__ == "__main__":
    run_job(ImportConfig, main)
