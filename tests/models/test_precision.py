import pytest
import torch

from pipeline.models.precision import autocast_type

CPU = torch.device("cpu")


@pytest.mark.parametrize(("has_it", "warnings"), [(True, 0), (False, 1)])
def test_bfloat16_that_a_device_emulates_is_warned_of(monkeypatch, caplog, has_it, warnings):
    monkeypatch.setattr("pipeline.models.precision.has_fast_bfloat16", lambda device: has_it)
    assert autocast_type("bfloat16", CPU) == torch.bfloat16
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warnings
    assert all("set the precision to auto or float32" in record.message for record in caplog.records)


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_cpus_train_and_evaluate_in_float32_unless_told_otherwise(caplog, precision):
    assert autocast_type(precision, CPU) is None
    assert not caplog.records
