import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from pipeline.models import precision as precision_module
from pipeline.models.precision import autocast_type, float_precision, precisions

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    precision_module.warn_if_emulated.cache_clear()
    yield
    precision_module.warn_if_emulated.cache_clear()


@pytest.mark.parametrize("choose", [partial(autocast_type, "bfloat16"), partial(precisions, "bfloat16")])
@pytest.mark.parametrize(("device", "name"), [("cpu", "CPU"), ("cuda", "GPU")])
def test_bfloat16_that_a_device_emulates_is_warned_of_once(monkeypatch, caplog, choose, device, name):
    monkeypatch.setattr("pipeline.models.precision.has_fast_bfloat16", lambda device: False)
    for _ in range(2):
        assert choose(torch.device(device)) in (torch.bfloat16, ["bfloat16"])
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert f"this {name} is not known to have instructions for it" in record.message
    assert "Set the precision to auto or float32" in record.message


def test_bfloat16_that_a_device_has_is_not(monkeypatch, caplog):
    monkeypatch.setattr("pipeline.models.precision.has_fast_bfloat16", lambda device: True)
    assert autocast_type("bfloat16", CPU) == torch.bfloat16
    assert not caplog.records


def test_float32_is_float32_on_a_gpu_whatever_the_environment_says():
    script = (
        "import torch; from pipeline.models.precision import compute_repeatably as repeatably\n"
        "flags = torch.backends.cuda.matmul, torch.backends.cudnn\n"
        "for ready in (lambda: None, repeatably): ready(); print([flag.allow_tf32 for flag in flags])\n"
    )
    env = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[True, True]", "[False, False]"]


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_cpus_train_and_evaluate_in_float32_unless_told_otherwise(caplog, precision):
    assert autocast_type(precision, CPU) is None
    assert float_precision(precision, CPU) == "float32"
    assert not caplog.records


@pytest.mark.parametrize(("is_fast", "found"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_on_gpus_that_have_it(monkeypatch, is_fast, found):
    monkeypatch.setattr("pipeline.models.precision.has_fast_bfloat16", lambda device: is_fast)
    assert float_precision("auto", torch.device("cuda")) == found
    assert float_precision("float16", torch.device("cuda")) == "float16"
