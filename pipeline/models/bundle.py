"""The bundle: a trained model with all that inference needs, as two objects below one URI.

    <bundle>/weights.safetensors   the network's state, under the classifier's own parameter names
    <bundle>/model.json            everything else; written last, so a bundle without it does not exist

A bundle never changes: both objects are written put-if-absent. Reading `model.json` needs no torch.
"""

import hashlib
import json
import platform
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, JsonValue, StringConstraints, ValidationError, field_validator

from pipeline import __version__, storage
from pipeline.config import Section, describe
from pipeline.data.transforms import Preprocessing
from pipeline.errors import BundleError, ConfigError, ObjectExistsError, ObjectNotFoundError

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.catalog import Network

MODEL_FILE = "model.json"
WEIGHTS_FILE = "weights.safetensors"

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
"""What names, versions and aliases are made of: they are folder names, and `/` and `@` have a meaning in references."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Architecture(Section):
    """A network of the catalog: its name and what its constructor takes besides the number of classes."""

    name: str
    arguments: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("arguments")
    @classmethod
    def _besides_the_number_of_classes(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if "num_classes" in arguments:
            raise ValueError("expected no num_classes among the arguments: it is the number of `classes`; leave it out")
        return arguments


def _refuse_text(asked: Architecture) -> Architecture:
    for name, value in asked.arguments.items():
        if isinstance(value, str) and _is_json(value.lower()):  # True is meant so too
            raise ValueError(f'expected arguments as JSON, {{"{name}": {value.lower()}}}, got the text {value!r}')
    return asked


def _is_json(text: str) -> bool:
    with suppress(ValueError):
        json.loads(text)
        return True
    return False


AskedArchitecture: TypeAlias = Annotated[Architecture, AfterValidator(_refuse_text)]
"""As a config asks for it: what a command line makes text of (`name=false`, which is true) is refused."""


class Metric(Section):
    """A figure with what makes it comparable: the images it was measured on, and how."""

    value: float
    protocol: str


class Bundle(Section):
    """What `model.json` says. `classes` are in the order of the logits; names may repeat, as ImageNet's do."""

    format: Literal[1] = 1
    name: Name
    version: Name
    architecture: Architecture
    classes: list[str] = Field(min_length=1)
    preprocessing: Preprocessing
    embedding_size: int = Field(gt=0)
    weights_digest: Digest
    metrics: dict[str, Metric] = Field(default_factory=dict)
    training: dict[str, JsonValue] = Field(default_factory=dict)
    software: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def load(cls, uri: str) -> "Bundle":
        """The bundle at `uri`, without its weights and without torch. Raises BundleError naming what is wrong."""
        model_uri = storage.join(storage.normalise(uri), MODEL_FILE)
        try:
            return cls.model_validate_json(storage.read(model_uri))
        except ObjectNotFoundError as error:
            raise BundleError(f"expected a bundle at {uri!r}, found no {MODEL_FILE} there") from error
        except ValidationError as error:
            raise BundleError(f"{model_uri} is damaged or of a later version: {describe(error)}") from error

    @property
    def digest(self) -> str:
        """SHA-256 over what determines the outputs: architecture, classes, preprocessing and weights."""
        determining = self.model_dump(
            mode="json", include={"architecture", "classes", "preprocessing", "weights_digest"}
        )
        return hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()


def pack(
    network: "Network",
    *,
    name: str,
    version: str,
    architecture: Architecture,
    classes: list[str],
    preprocessing: Preprocessing,
    metrics: Mapping[str, Metric] | None = None,
    training: Mapping[str, JsonValue] | None = None,
) -> tuple[Bundle, bytes]:
    """The bundle of `network` and its weights as safetensors bytes, ready for `save`.

    Raises BundleError where a field is wrong, or the number of classes is not the network's.
    """
    from safetensors.torch import save as to_safetensors

    if len(classes) != network.num_classes:
        raise BundleError(
            f"classes: expected {network.num_classes}, the width of the network's head, got {len(classes)}"
        )
    # Clones, because safetensors refuses tensors that share memory.
    weights: bytes = to_safetensors({key: value.detach().cpu().clone() for key, value in network.state_dict().items()})
    try:
        bundle = Bundle(
            name=name,
            version=version,
            architecture=architecture,
            classes=classes,
            preprocessing=preprocessing,
            embedding_size=network.embedding_size,
            weights_digest=hashlib.sha256(weights).hexdigest(),
            metrics=dict(metrics or {}),
            training=dict(training or {}),
            software=_software(),
        )
    except ValidationError as error:
        raise BundleError(describe(error)) from error
    return bundle, weights


def save(uri: str, bundle: Bundle, weights: bytes) -> None:
    """Write the bundle to `uri`, once; an equal bundle there already is left as it is.

    Raises BundleError where another bundle, or the weights of another, are there.
    """
    assert hashlib.sha256(weights).hexdigest() == bundle.weights_digest
    weights_uri, model_uri = storage.join(uri, WEIGHTS_FILE), storage.join(uri, MODEL_FILE)
    if storage.exists(model_uri):
        _expect_equal(uri, bundle)
        if not storage.exists(weights_uri):  # lost since
            storage.write(weights_uri, weights)
        return
    try:
        storage.write(weights_uri, weights, if_absent=True)
    except ObjectExistsError as error:
        if hashlib.sha256(storage.read(weights_uri)).hexdigest() != bundle.weights_digest:
            raise BundleError(
                f"{uri}: expected a free place, found other weights there: another bundle is being published, or was "
                f"left half-written; choose another version, or delete {weights_uri} if no one is writing it"
            ) from error
    try:
        storage.write(model_uri, _to_json(bundle), if_absent=True)
    except ObjectExistsError:
        _expect_equal(uri, bundle)


def load_network(uri: str) -> "Network":
    """The network of the bundle at `uri`, on the CPU, in eval mode, its weights checked against their digest.

    Raises BundleError for a missing or altered file, an unknown architecture, and weights that do not fit it.
    """
    from safetensors.torch import load as from_safetensors

    from pipeline.models.catalog import build

    bundle = Bundle.load(uri)
    weights_uri = storage.join(storage.normalise(uri), WEIGHTS_FILE)
    try:
        weights = storage.read(weights_uri)
    except ObjectNotFoundError as error:
        raise BundleError(f"expected a bundle at {uri!r}, found no {WEIGHTS_FILE} there") from error
    digest = hashlib.sha256(weights).hexdigest()
    if digest != bundle.weights_digest:
        raise BundleError(f"{weights_uri} was altered: expected sha256 {bundle.weights_digest}, got {digest}")
    try:
        network = build(bundle.architecture.name, len(bundle.classes), **bundle.architecture.arguments)
    except ConfigError as error:
        raise BundleError(f"{uri}: {error}") from error
    if network.embedding_size != bundle.embedding_size:
        raise BundleError(
            f"{uri}: embedding_size: expected {network.embedding_size}, which is that of "
            f"{bundle.architecture.name}, got {bundle.embedding_size}"
        )
    fill(network, from_safetensors(weights), uri)
    return network.eval()


def fill(network: "Network", weights: "Mapping[str, Tensor]", source: str) -> None:
    """Load `weights` into `network`; every name must fit.

    Raises BundleError naming `source` and all that is missing, unexpected or of another shape.
    """
    expected = network.state_dict()
    problems = [f"{name} {_shape(expected[name])} is missing" for name in expected if name not in weights]
    problems += [f"{name} {_shape(weights[name])} is unexpected" for name in weights if name not in expected]
    problems += [
        f"{name}: expected {_shape(expected[name])}, got {_shape(weights[name])}"
        for name in expected
        if name in weights and expected[name].shape != weights[name].shape
    ]
    if any(problem.startswith(f"{network.head_name}.") and "expected (" in problem for problem in problems):
        problems.append(f"the network was built for {network.num_classes} classes, the weights are for another number")
    if problems:
        raise BundleError(f"{source}: the weights do not fit the architecture:\n" + "\n".join(problems))
    state = OrderedDict(weights)
    state._metadata = expected._metadata  # type: ignore[attr-defined]  # the format's version; MNASNet insists on it
    network.load_state_dict(state)


def _expect_equal(uri: str, bundle: Bundle) -> None:
    """The versions of the software that wrote a bundle do not make it another one."""
    if Bundle.load(uri).model_copy(update={"software": {}}) != bundle.model_copy(update={"software": {}}):
        raise BundleError(
            f"{uri}: expected a free place, found another bundle, and bundles never change; choose a new version"
        )


def _to_json(bundle: Bundle) -> bytes:
    return (bundle.model_dump_json(indent=2) + "\n").encode()


def _shape(tensor: "Tensor") -> tuple[int, ...]:
    return tuple(tensor.shape)


def _software() -> dict[str, str]:
    versions: dict[str, Any] = {"image-batch-pipeline": __version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "safetensors"):
        with suppress(PackageNotFoundError):
            versions[package] = package_version(package)
    return versions
