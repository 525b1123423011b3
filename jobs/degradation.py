"""The degradation experiment of He et al. 2015 (arXiv:1512.03385), figures 1 and 6: plain nets get worse when they are
made deeper, in training error too, and residual ones do not.

python -m jobs.degradation --config configs/degradation.yaml --train URI --evaluate_on URI --output URI ...

Every net is a training run of its own, `<run_id>-plain-20`; as many are trained at once as the cluster has room for.
The same command goes on with those that were cut short, and leaves finished ones alone.

<output>/<run_id>/degradation.svg    training and test error over the steps, plain beside residual
<output>/<run_id>/degradation.json   the curves
<output>/<run_id>/table.md           the last errors
<output>/<run_id>/summary.json       how it ended
"""

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from jobs import connected_ray, run_job
from pipeline import storage
from pipeline.cluster import Device, Node, choose_device
from pipeline.errors import ConfigError, RunError
from pipeline.models.bundle import Architecture
from pipeline.training.config import TrainConfig
from pipeline.training.run import TrainingRun, begin, make_run, read_run

if TYPE_CHECKING:
    from pipeline.report.degradation import Curve
    from pipeline.telemetry import TrainingProgress
    from pipeline.training.checkpoint import State
    from pipeline.training.trainer import Workers

Kind = Literal["plain", "residual"]

_ARCHITECTURES = {"plain": "cifar_plain", "residual": "cifar_resnet"}
_NUM_TRAINING_POINTS = 40  # of a curve: each the mean over as many steps


class DegradationConfig(TrainConfig):
    """Train plain and residual nets of several depths alike, and draw their errors; the same line goes on."""

    depths: list[int] = Field([20, 56], min_length=1)
    """Layers of the nets, 6n+2 each, for 32-pixel images."""
    kinds: list[Kind] = Field(["plain", "residual"], min_length=1)
    """Nets without and with shortcuts."""
    resume: bool = True
    """Go on with the nets that are recorded already; false: a name that is taken is refused."""
    architecture: Architecture | None = Architecture(name="cifar_resnet20")
    """Its place is taken by each net's own."""

    @model_validator(mode="after")
    def _of_different_nets(self) -> Self:
        for depth in self.depths:
            if depth < 8 or depth % 6 != 2:
                raise ValueError(f"expected depths of 6n+2 layers, 8 or more, got {depth}")
        for name, values in (("depths", self.depths), ("kinds", self.kinds)):
            if len(set(values)) < len(values):
                raise ValueError(f"expected each of {name} once, got {values}")
        return self


@dataclass(frozen=True, slots=True)
class Net:
    """One of the nets, and its training run."""

    kind: Kind
    depth: int
    run: TrainingRun

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.depth}"


def main(config: DegradationConfig) -> dict[str, Any]:
    """Train what is not trained yet, publish the nets, draw their errors."""
    start = time.monotonic()
    nets = [_make_net(config, kind, depth) for depth in config.depths for kind in config.kinds]
    from pipeline.report.charts import to_svg
    from pipeline.report.degradation import build_table, draw_degradation
    from pipeline.training.result import publish, write_records

    device = _train_all(nets, config)
    curves = []
    for net in nets:
        _, _, last = publish(net.run)
        write_records(net.run, last, {"device": device, "network": net.run.architecture.name})
        curves.append(make_curve(net, last))
    uri = storage.join(storage.normalise(config.output), config.run_id)
    errors = {net.name: _last_errors(curve) for net, curve in zip(nets, curves, strict=True)}
    summary: dict[str, Any] = {
        "status": "done",
        "run_id": config.run_id,
        "figure": storage.join(uri, "degradation.svg"),
        "table": storage.join(uri, "table.md"),
        "errors": errors,
        "deeper_is_worse_in_training": _compare(config, errors),
        "runs": {net.name: net.run.uri for net in nets},
        "num_steps": nets[0].run.num_steps,
        "num_images": nets[0].run.num_images,
        "device": device,
        "duration_s": round(time.monotonic() - start, 1),
    }
    files = {
        "degradation.svg": to_svg(draw_degradation(curves)),
        "degradation.json": _to_json({net.name: _points(curve) for net, curve in zip(nets, curves, strict=True)}),
        "table.md": build_table(curves).encode(),
        "summary.json": _to_json(summary),
    }
    for name, data in files.items():
        storage.write(storage.join(uri, name), data)
    return summary
