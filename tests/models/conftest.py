"""Networks of which the shapes are enough."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors and networks that are made have shapes and no numbers, which takes neither time nor memory."""
    from torchvision.models.regnet import BlockParams

    compute_blocks = BlockParams.from_init_params.__func__

    def compute_blocks_with_numbers(*arguments: object, **fields: object) -> BlockParams:
        with torch.device("cpu"):
            return compute_blocks(*arguments, **fields)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(compute_blocks_with_numbers))
    with torch.device("meta"):
        yield
