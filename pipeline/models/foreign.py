"""Weights from elsewhere: read a checkpoint or a safetensors file, and bring its names to those of a network here.

Nothing in a checkpoint is ever executed: PyTorch files are read with `weights_only=True`.
"""

import io
import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline import storage
from pipeline.errors import BundleError, ObjectNotFoundError, first_line
from pipeline.models.catalog import Network

_WRAPPERS = ("module.", "_orig_mod.", "model.")  # DataParallel and DDP, torch.compile, Lightning and its like
_NOT_WEIGHTS = ("n_averaged",)  # torch.optim.swa_utils.AveragedModel's counter
_TRAINING_ONLY = ("AuxLogits.", "aux1.", "aux2.")  # the auxiliary heads of Inception and GoogLeNet


@dataclass(frozen=True)
class Adapted:
    """Weights under the names of a network, and which names that took (old to new)."""

    weights: dict[str, Tensor]
    renamed: dict[str, str] = field(default_factory=dict)


def read_weights(uri: str, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a safetensors file or a PyTorch checkpoint, told apart by their content.

    In a checkpoint it may be bare or an entry of it: the one named `key`, or without `key` the only one there is.
    Raises BundleError where the file is missing or damaged, holds anything but plain data, or holds no or several state
    dicts.
    """
    try:
        data = storage.read(storage.normalise(uri))
    except ObjectNotFoundError as error:
        raise BundleError(f"{uri}: expected a PyTorch checkpoint or a safetensors file, found nothing there") from error
    is_safetensors = data[8:9] == b"{"  # after the header's length; format of huggingface/safetensors
    try:
        content = _read_safetensors(data) if is_safetensors else _read_checkpoint(data)
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        raise BundleError(
            f"{uri}: expected a PyTorch checkpoint of tensors and plain containers, or safetensors; got "
            f"{type(error).__name__}: {first_line(error)}; save the model's state_dict() alone and try that"
        ) from error
    return _state_dict_in(content, key, uri)


def adapt(weights: Mapping[str, Tensor], network: Network, rename: Mapping[str, str]) -> Adapted:
    """`weights` under `network`'s names, as far as that can be told; what does not fit is left for `fill` to name.

    In turn: wrappers' prefixes go; `rename` maps names of parameters or of modules, old to new; a final linear layer
    under another name is found by its shape; auxiliary heads go, which only training uses; and `num_batches_tracked`
    counters, which checkpoints of PyTorch before 0.4.1 lack, start at 0. Dtypes become the network's.
    Raises BundleError where `rename` gives two the same name.
    """
    expected = network.state_dict()
    names = _new_names(weights, rename)
    for old, new in _head_by_shape(names, weights, network).items():
        names[new] = names.pop(old)
    for name in [name for name in names if name not in expected and name.startswith(_TRAINING_ONLY)]:
        del names[name]
    adapted = {
        new: weights[old].to(expected[new].dtype) if new in expected else weights[old] for new, old in names.items()
    }
    counters = [name for name in expected if name.endswith(".num_batches_tracked") and name not in adapted]
    return Adapted(
        adapted | {name: expected[name] for name in counters},
        {old: new for new, old in names.items() if old != new},
    )


def _read_safetensors(data: bytes) -> Any:
    from safetensors.torch import load

    return load(data)


def _read_checkpoint(data: bytes) -> Any:
    with torch.serialization.safe_globals([Namespace]):  # argparse's, beside the weights in many a script's checkpoint
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _state_dict_in(content: Any, key: str | None, uri: str) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise BundleError(f"{uri}: expected a state dict, or a mapping that holds one, got a {type(content).__name__}")
    nested = {str(name): found for name, value in content.items() if (found := _tensors(value))}
    if key is not None:
        if key not in nested:
            raise BundleError(
                f"key: expected an entry of {uri} that holds a state dict, {_listed(nested)}, got {key!r}"
            )
        return nested[key]
    if len(nested) > 1:
        raise BundleError(f"{uri} holds several state dicts; set `key` to one of {_listed(nested)}")
    found = next(iter(nested.values())) if nested else _tensors(content)
    if not found:
        raise BundleError(f"{uri}: expected a state dict, found none; its entries are {_listed(content)}")
    return found


def _tensors(value: object) -> dict[str, Tensor]:
    """The tensors of a state dict, or nothing where `value` is none."""
    if not isinstance(value, Mapping):
        return {}
    return {name: tensor for name, tensor in value.items() if isinstance(name, str) and isinstance(tensor, Tensor)}


def _listed(names: Mapping[Any, Any]) -> str:
    return ", ".join(json.dumps(str(name)) for name in names) or "nothing"


def _new_names(weights: Mapping[str, Tensor], rename: Mapping[str, str]) -> dict[str, str]:
    """New to old names, without the prefixes of wrappers that all share, and after `rename`."""
    old_names = [name for name in weights if name not in _NOT_WEIGHTS]
    prefix = _wrapping(old_names)
    names: dict[str, str] = {}
    for old in old_names:
        new = _renamed(old.removeprefix(prefix), rename)
        if new in names:
            raise BundleError(f"rename: {names[new]} and {old} both become {new}; name only one of them")
        names[new] = old
    return names


def _wrapping(names: list[str]) -> str:
    """The prefix of wrappers that all names share, such as `module._orig_mod.`."""
    prefix = ""
    while names and (
        found := [wrapper for wrapper in _WRAPPERS if all(name.startswith(prefix + wrapper) for name in names)]
    ):
        prefix += found[0]
    return prefix


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    for old, new in rename.items():
        if name == old:
            return new
        if name.startswith(f"{old}."):
            return f"{new}{name.removeprefix(old)}".removeprefix(".")  # an empty `new` drops the module's name
    return name


def _head_by_shape(names: Mapping[str, str], weights: Mapping[str, Tensor], network: Network) -> dict[str, str]:
    """Old to new names of a final linear layer that goes by another name, where exactly one layer can be meant."""
    expected = network.state_dict()
    head = {
        name.removeprefix(network.head_name): value.shape
        for name, value in expected.items()
        if name.startswith(f"{network.head_name}.")
    }
    if any(network.head_name + part in names for part in head):
        return {}
    unexpected = {name: weights[old].shape for name, old in names.items() if name not in expected}
    modules = {name.rpartition(".")[0] for name in unexpected}
    fitting = [
        module for module in modules if all(unexpected.get(module + part) == shape for part, shape in head.items())
    ]
    return {fitting[0] + part: network.head_name + part for part in head} if len(fitting) == 1 else {}
