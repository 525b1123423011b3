"""Names to networks: the ResNet family of this package, and every torchvision classifier that ends in a linear layer.

build("resnet50", num_classes=1000)              ours, weights interchangeable with torchvision's
build("plain34", 1000)                           ours, without shortcuts
build("cifar_resnet20", 10, shortcut="B")        ours, for 32-pixel images; any 6n+2
build("cifar_plain20", 10)
build("preact_resnet200", 1000)                  ours, activations before convolutions
build("cifar_preact_resnet1001", 10)             ours, for 32-pixel images; any 6n+2 or 9n+2
build("densenet121", 1000)                       torchvision's, by its name there
"""

import difflib
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, first_line
from pipeline.models.preact import PREACT_IMAGENET_STAGES, cifar_preact_resnet, preact_resnet
from pipeline.models.resnet import IMAGENET_STAGES, cifar_resnet, resnet

_IMAGENET_NAMES = (
    *(f"resnet{depth}" for depth in IMAGENET_STAGES),
    *("plain18", "plain34"),
    *(f"preact_resnet{depth}" for depth in PREACT_IMAGENET_STAGES),
)
_CIFAR_NAMES = (
    *(f"cifar_{kind}{depth}" for kind in ("resnet", "plain") for depth in (20, 32, 44, 56, 110, 1202)),
    *(f"cifar_preact_resnet{depth}" for depth in (20, 32, 44, 56, 110, 164, 1001)),
)
_FAMILY: dict[str, Callable[..., nn.Module]] = {
    "resnet": resnet,
    "plain": partial(resnet, shortcut="none"),
    "preact_resnet": preact_resnet,
    "cifar_resnet": cifar_resnet,
    "cifar_plain": partial(cifar_resnet, shortcut="none"),
    "cifar_preact_resnet": cifar_preact_resnet,
}

# torchvision warns unless told what to do about these; the auxiliary heads exist for training only.
_TORCHVISION_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


class Network(nn.Module):
    """A classifier cut before its final linear layer: images (N, 3, H, W) to logits and embeddings.

    `forward` returns (logits (N, num_classes), embedding (N, embedding_size)): the logits are the classifier's own to
    the bit, the embedding is what its final linear layer was given. `state_dict` and `load_state_dict` use the
    classifier's own parameter names, so weights stay interchangeable with it.
    """

    def __init__(self, classifier: nn.Module, head_name: str) -> None:
        super().__init__()
        head = classifier.get_submodule(head_name)
        assert isinstance(head, nn.Linear)
        classifier.set_submodule(head_name, nn.Identity())
        self.trunk = classifier
        self.head = head
        self.head_name = head_name
        self.register_state_dict_post_hook(_to_own_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_from_own_names)  # type: ignore[no-untyped-call]

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    @property
    def embedding_size(self) -> int:
        return self.head.in_features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.trunk(images)
        return self.head(embedding), embedding


def build(architecture: str, /, num_classes: int, **arguments: Any) -> Network:
    """The network of that name with random weights and `num_classes` logits; `arguments` go to its constructor.

    Raises ConfigError for a name or arguments that do not exist, and for a classifier without a final linear layer.
    """
    find = family_member(architecture) or torchvision_classifier(architecture)
    if find is None:
        raise ConfigError(_unknown(architecture))
    if "weights" in arguments:
        raise ConfigError(f"{architecture}: `weights` is no argument here; jobs.import_model makes a bundle of them")
    try:
        classifier = find(num_classes=num_classes, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{architecture} cannot be built with arguments {arguments}: {error}") from error
    return Network(classifier, _head_name(architecture, classifier))


def refuse_size(network: nn.Module, height: int, width: int, device: torch.device, remedy: str) -> None:
    """Raise ConfigError where the network, in the mode it is in, cannot take two images of that many pixels."""
    try:
        with torch.no_grad():
            network.forward(torch.zeros(2, 3, height, width, device=device))  # a call would compile what compiles
    except Exception as error:  # each network has its own
        raise ConfigError(
            f"expected a network that takes images of {height} by {width} pixels, got {type(error).__name__}: "
            f"{first_line(error)}; {remedy}"
        ) from error


def family_member(architecture: str) -> Callable[..., nn.Module] | None:
    """The constructor of a net of this package's ResNet family, or None where the name is not of it."""
    parts = re.fullmatch(r"(\D+)([1-9]\d{0,4})", architecture)
    if parts is None or parts[1] not in _FAMILY:
        return None
    kind, depth = parts[1], int(parts[2])
    if not kind.startswith("cifar_") and architecture not in _IMAGENET_NAMES:
        return None

    def construct(num_classes: int, **arguments: Any) -> nn.Module:
        if "plain" in kind and "shortcut" in arguments:
            raise ConfigError(f"{architecture}: a plain net has no shortcut to choose")
        return _FAMILY[kind](depth, num_classes, **arguments)

    return construct


def torchvision_classifier(architecture: str) -> Callable[..., nn.Module] | None:
    """The constructor of torchvision's classifier of that name, or None where it has none."""
    from torchvision import models  # 6 s, and the family does without

    if architecture not in models.list_models(module=models):
        return None

    def construct(**arguments: Any) -> nn.Module:
        classifier: nn.Module = models.get_model(
            architecture, weights=None, **{**_TORCHVISION_ARGUMENTS.get(architecture, {}), **arguments}
        )
        return classifier

    return construct


def names() -> list[str]:
    """Every architecture that `build` knows, sorted; of the CIFAR nets, other depths will do as well."""
    from torchvision import models

    return sorted({*_IMAGENET_NAMES, *_CIFAR_NAMES, *models.list_models(module=models)})


def _unknown(architecture: str) -> str:
    close = difflib.get_close_matches(architecture, names(), n=4)
    hint = f"; did you mean {', '.join(close)}?" if close else "; see pipeline.models.catalog.names()"
    return f"architecture: expected a name of the catalog, got {architecture!r}{hint}"


def _head_name(architecture: str, classifier: nn.Module) -> str:
    linear: list[str] = [name for name, module in classifier.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(
            f"{architecture} has no final linear layer, so it has no embedding; choose another architecture"
        )
    return linear[-1]  # the last constructed, which in every one of torchvision's classifiers is the last used


def _to_own_names(network: Network, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + _own_name(network, name.removeprefix(prefix))] = state.pop(name)
    versions = getattr(state, "_metadata", {})  # of the modules' formats; MNASNet goes by its own
    for name in [name for name in versions if name.startswith((f"{prefix}trunk", f"{prefix}head"))]:
        versions[(prefix + _own_name(network, name.removeprefix(prefix))).removesuffix(".")] = versions[name]


def _own_name(network: Network, inner: str) -> str:
    part, _, rest = inner.partition(".")
    return rest if part == "trunk" else f"{network.head_name}.{rest}"


def _from_own_names(network: Network, state: "OrderedDict[str, Tensor]", prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        of_head = own.removeprefix(f"{network.head_name}.")
        state[prefix + (f"head.{of_head}" if of_head != own else f"trunk.{own}")] = state.pop(name)
