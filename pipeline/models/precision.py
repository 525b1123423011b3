"""What networks compute in: float32 that means float32, a type of 16 bits where the hardware has it, or 8-bit integers.

Torch is not needed to say it, only to do it.
"""

import logging
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field

from pipeline.config import Section

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FloatPrecision: TypeAlias = Literal["float32", "bfloat16", "float16"]
Precision: TypeAlias = FloatPrecision | Literal["int8"]
"""int8: compiled networks' on CPUs; never found by auto, for it may cost accuracy."""
AskedFloatPrecision: TypeAlias = FloatPrecision | Literal["auto"]
AskedPrecision: TypeAlias = Precision | Literal["auto"]
"""auto: found from the hardware."""


class AgreementLimits(Section):
    """The least agreement with the eager network in float32 with which a compiled one is used."""

    min_top1: float = Field(0.9, ge=0, le=1)
    """Share of the sample images whose best class must be float32's."""
    min_cosine: float = Field(0.999, ge=-1, le=1)
    """Mean cosine that the embeddings must have with float32's."""


def dtype_of(precision: Precision) -> "torch.dtype":
    """Torch's name of it; of integers, that of what goes in and comes out."""
    import torch

    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)


def float_precision(asked: AskedFloatPrecision, device: "torch.device") -> FloatPrecision:
    """What autocast computes in; auto: bfloat16 on GPUs that have it, float32 elsewhere."""
    if asked != "auto":
        return asked
    return "bfloat16" if device.type == "cuda" and has_fast_bfloat16(device) else "float32"


def autocast_type(asked: AskedFloatPrecision, device: "torch.device") -> "torch.dtype | None":
    """Torch's name of `float_precision`, None for float32 throughout."""
    precision = float_precision(asked, device)
    warn_if_emulated(precision, device)
    return None if precision == "float32" else dtype_of(precision)


def has_fast_bfloat16(device: "torch.device") -> bool:
    """Whether the device has instructions that multiply bfloat16, faster than float32."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def precisions(asked: AskedPrecision, device: "torch.device") -> list[Precision]:
    """What a compiled network may compute in on `device`, the fastest first."""
    if asked != "auto":
        warn_if_emulated(asked, device)
        return [asked]
    return ["bfloat16", "float32"] if has_fast_bfloat16(device) else ["float32"]


@cache  # once in a process
def warn_if_emulated(precision: Precision, device: "torch.device") -> None:
    """Say so where the device has no instructions for the precision."""
    if precision == "bfloat16" and device.type != "meta" and not has_fast_bfloat16(device):
        logger.warning(
            "bfloat16 was asked for, but this %s is not known to have instructions for it: emulated, it is slower than "
            "float32, on some by tens of times. Set the precision to auto or float32, or use other nodes",
            "GPU" if device.type == "cuda" else "CPU",
        )


def compute_repeatably() -> None:
    """Have this process's GPU give the same bytes at every attempt, and float32 where float32 was asked for."""
    import torch

    torch.backends.cudnn.benchmark = False  # the same kernels, hence the same bytes
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    torch.backends.cuda.matmul.allow_tf32 = False  # also where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set
