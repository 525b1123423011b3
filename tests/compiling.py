"""What networks are compiled for, for tests."""

import torch

from pipeline.models import compiler
from pipeline.models.bundle import Bundle
from pipeline.models.compiled import Target

CPU = torch.device("cpu")


def target_of(uri: str, **fields) -> Target:
    options = {"precision": "float32", "batch_size": 4, "num_threads": 1, **fields}
    return compiler.target_here(Bundle.load(uri), CPU, **options)
