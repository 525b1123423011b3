"""What networks compute in: float32 that means float32, or autocast to bfloat16."""

from typing import Literal, TypeAlias

import torch

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]


def autocast_type(precision: Precision, device: torch.device) -> torch.dtype | None:
    """What autocast computes in, None for float32 throughout; auto: bfloat16 on GPUs that have it."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if precision == "bfloat16" else None


def compute_repeatably() -> None:
    """Have this process's GPU give the same bytes at every attempt, and float32 where float32 was asked for."""
    torch.backends.cudnn.benchmark = False  # the same kernels, hence the same bytes
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
