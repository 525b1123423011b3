"""What the ranks of a training agree on."""

import pytest
import torch

from pipeline.training.worker import common_precision
from tests.ranks import on_ranks


@pytest.mark.parametrize(("devices", "expected"), [(["cpu", "meta"], "float32"), (["meta", "meta"], "bfloat16")])
def test_ranks_that_auto_finds_different_precisions_for_all_compute_in_float32(monkeypatch, devices, expected):
    monkeypatch.setattr(
        "pipeline.training.worker.float_precision",
        lambda asked, device: "bfloat16" if device.type == "meta" else "float32",
    )
    found = on_ranks(2, lambda peer: common_precision(peer, "auto"), device=lambda rank: torch.device(devices[rank]))
    assert found == [expected] * 2
