"""The networks of a run on one device, called by several threads."""

import pytest
import torch

from pipeline.inference import predictor
from pipeline.inference.predictor import Predictor
from tests.worlds import make_world, plan_of


def test_threads_do_not_share_the_weights_that_autocast_has_rounded(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """On a GPU one thread's stream would read what another's has not yet written, or has given back."""
    make_world(tmp_path)
    found: list[tuple[torch.dtype, bool]] = []

    class Looking(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found.append((torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()))
            return pixels.mean((2, 3)), pixels.mean((2, 3))

    monkeypatch.setattr(predictor, "load_network", lambda uri: Looking())
    plan = plan_of(tmp_path, run_id="eager", compute={"precision": "bfloat16", "compile": "never"})
    Predictor(plan.run, plan.manifest)([torch.zeros(2, 3, 32, 32, dtype=torch.uint8)])
    assert found == [(torch.bfloat16, False)]
