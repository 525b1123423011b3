"""The YAML files of configs/ are complete and right."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from jobs.benchmark import BenchmarkConfig
from jobs.compile import CompileConfig
from jobs.degradation import DegradationConfig
from jobs.evaluate import EvaluateConfig
from jobs.import_model import ImportConfig
from jobs.manifest import ManifestConfig
from jobs.pack import PackConfig
from pipeline.config import JobConfig, load
from pipeline.inference.config import PredictConfig
from pipeline.training.config import TrainConfig

FOLDER = Path(__file__).parents[1] / "configs"
TYPES: dict[str, type[JobConfig]] = {
    "classify": PredictConfig,
    "embed": PredictConfig,
    "benchmark": BenchmarkConfig,
    "compile": CompileConfig,
    "manifest": ManifestConfig,
    "pack": PackConfig,
    "import_model": ImportConfig,
    "import_cifar": ImportConfig,
    "evaluate": EvaluateConfig,
    "train_cifar_10_epochs": TrainConfig,
    "train_cifar_paper": TrainConfig,
    "train_cifar_paper_110": TrainConfig,
    "train_imagenet_paper": TrainConfig,
    "train_imagenet_v1": TrainConfig,
    "train_imagenet_v2": TrainConfig,
    "train_imagenet_a3": TrainConfig,
    "degradation": DegradationConfig,
    "fine_tune": TrainConfig,
    "linear_probe": TrainConfig,
}


def missing_fields(model: type[BaseModel], given: dict[str, Any], path: str = "") -> list[str]:
    missing = []
    for name, field in model.model_fields.items():
        if name not in given:
            missing.append(path + name)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            missing += missing_fields(field.annotation, given[name], f"{path}{name}.")
    return missing


def test_every_config_file_is_known_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_a_config_file_loads(name):
    load(TYPES[name], ["--config", str(FOLDER / f"{name}.yaml")])


@pytest.mark.parametrize("name", ["classify", "embed", "benchmark", "compile", "evaluate"])
def test_the_configs_of_finished_weights_leave_no_field_out(name):
    assert missing_fields(TYPES[name], yaml.safe_load((FOLDER / f"{name}.yaml").read_text())) == []
