"""Convolutions and linear layers in 8-bit integers, for CPUs: weights per channel, activations per tensor, their ranges
measured on images beforehand (Krishnamoorthi 2018, "Quantizing deep convolutional networks", sections 2 and 3).

What computes is PyTorch's own; torchao chooses what is quantised, and is needed only to compile.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import BundleError

_RELUS = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)


def quantised(trunk: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """A float32 trunk in integers, its batch norms folded before, for inputs of the shape that all `batches` have.

    Raises BundleError where this CPU has no instructions for it or torchao is not installed.
    """
    if not torch.cpu._is_avx2_supported():
        raise BundleError("precision int8: expected an x86 CPU with AVX2; use auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's and torchao's own deprecations
        try:
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
        except ImportError as error:
            raise BundleError(f"precision int8 needs the package torchao to compile ({error}): install it") from error
        exported = torch.export.export(trunk, (batches[0],)).module()
        _tell_relus_apart(exported)
        quantizer = x86.X86InductorQuantizer().set_global(
            _of_this_cpu(x86.get_default_x86_inductor_quantization_config())
        )
        prepared = prepare_pt2e(exported, quantizer)
        for batch in batches:
            prepared(batch)
        converted: nn.Module = convert_pt2e(prepared)
    return converted


def _of_this_cpu(config: Any) -> Any:
    """Without VNNI two products are added up in 16 bits, which hold those of 8 bits by 7; fewer of the weights' cost
    less accuracy than of the activations'."""
    if torch.cpu._is_vnni_supported():
        return config
    return replace(config, weight=replace(config.weight, quant_min=-64, quant_max=63))


def _tell_relus_apart(exported: Any) -> None:
    """Name each call of a ReLU by itself: a module called twice, as in He et al.'s blocks, counts as one otherwise."""
    for node in exported.graph.nodes:
        if node.target in _RELUS:
            node.meta["source_fn_stack"] = [(node.name, nn.ReLU)]
