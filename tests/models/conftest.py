"""Networks of which the shapes are enough, and compiled ones of which that they are there."""

from collections.abc import Iterator

import pytest
import torch

from pipeline.models import compiler
from pipeline.models.compiled import Agreement
from tests.worlds import make_bundle


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


@pytest.fixture
def bundle_uri(tmp_path):
    return make_bundle(tmp_path)


@pytest.fixture
def packages(monkeypatch):
    """What a compiler makes that makes nothing: a new package each time it is asked."""
    made = []

    def compile_network(network, preprocessing, target, pixels):
        made.append(f"package {len(made)}".encode())
        return made[-1]

    monkeypatch.setattr(compiler, "compile_network", compile_network)
    monkeypatch.setattr(compiler, "_open", lambda package, target: None)
    monkeypatch.setattr(compiler, "measure_agreement", lambda *_: Agreement.of(8, 8, 8.0))
    return made
