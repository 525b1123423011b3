"""torchvision's pretrained weights, by the name of their enum: `ResNet50_Weights.IMAGENET1K_V2`.

Their architecture, classes, preprocessing and published figures come with the package; only the weights are
downloaded, into torch's hub folder, and not again where they are there already.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.data.transforms import Preprocessing
from pipeline.errors import BundleError, ConfigError
from pipeline.models.bundle import Architecture, Metric

_OLD_DENSENET_NAME = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)")


@dataclass(frozen=True)
class Pretrained:
    """What torchvision says of pretrained weights; figures are in percent."""

    architecture: Architecture
    classes: list[str]
    preprocessing: Preprocessing
    metrics: dict[str, Metric]


def is_weights_name(text: str) -> bool:
    """Whether `text` has the form of an enum name of torchvision's weights."""
    return re.fullmatch(r"\w+_Weights\.[A-Z][A-Z0-9_]*", text) is not None


def describe(weights_name: str) -> Pretrained:
    """What comes with the weights, without downloading them. Raises ConfigError where there are none of the name."""
    weights = _find(weights_name)
    protocol = f"percent on the validation set, as torchvision publishes it for {weights_name}"
    return Pretrained(
        Architecture(name=_architecture_name(weights), arguments=_arguments(weights)),
        classes(weights_name),
        Preprocessing.from_torchvision(weights.transforms()),
        {
            f"{images} {figure}": Metric(value=value, protocol=protocol)
            for images, figures in weights.meta["_metrics"].items()
            for figure, value in figures.items()
        },
    )


def classes(weights_name: str) -> list[str]:
    """The class names of the weights, in the order of the logits. Raises ConfigError where they have none."""
    names = _find(weights_name).meta["categories"]
    if names is None:
        raise ConfigError(f"{weights_name} are no classifier's weights: torchvision gives them no classes")
    return list(names)


def read_weights(weights_name: str) -> dict[str, Tensor]:
    """The state dict, from torch's hub folder or else downloaded into it.

    Raises BundleError where the download fails, naming the file and where to put it by hand.
    """
    import torch

    weights = _find(weights_name)
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise BundleError(
            f"{weights_name}: cannot get {weights.url}: {error}; put that file into {torch.hub.get_dir()}/checkpoints"
        ) from error
    return {_OLD_DENSENET_NAME.sub(r"\1\2", name): tensor for name, tensor in state.items()}


def _find(weights_name: str) -> Any:
    from torchvision import models

    try:
        return models.get_weight(weights_name)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"expected weights of torchvision, such as ResNet50_Weights.DEFAULT, got {weights_name!r}"
        ) from error


def _architecture_name(weights: Any) -> str:
    from torchvision import models

    for name in models.list_models(module=models):
        if weights in models.get_model_weights(name):
            return str(name)
    raise ConfigError(f"{weights!s} are not a classifier's weights")


def _arguments(weights: Any) -> dict[str, Any]:
    """What torchvision's constructors set when they are given the weights."""
    name = _architecture_name(weights)
    if name in ("googlenet", "inception_v3"):
        return {"transform_input": True}
    size = weights.meta["min_size"][0]
    return {"image_size": size} if name.startswith("vit_") and size != 224 else {}
