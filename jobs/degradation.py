"""The degradation experiment of He et al. 2015 (arXiv:1512.03385), figures 1 and 6: plain nets get worse when they are
made deeper, in training error too, and residual ones do not.

python -m jobs.degradation --config configs/degradation.yaml --train URI --evaluate_on URI --output URI ...

Every net is a training run of its own, `<run_id>-plain-20`; as many are trained at once as the cluster has room for.
The same command goes on with those that were cut short, and leaves finished ones alone; where all are, it draws them
anew and asks for no cluster.

<output>/<run_id>/degradation.svg    training and test error over the steps, plain beside residual
<output>/<run_id>/degradation.json   the curves
<output>/<run_id>/table.md           the last errors
<output>/<run_id>/summary.json       how it ended
"""

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from jobs import run_job
from pipeline import storage
from pipeline.cluster import Node, choose_device, connected_ray, num_fitting
from pipeline.config import describe
from pipeline.data.training_set import TrainingSet
from pipeline.errors import ConfigError, RunError
from pipeline.models import registry
from pipeline.models.bundle import Architecture
from pipeline.training.config import TrainConfig
from pipeline.training.run import TrainingRun, begin, begun_run, is_recorded, make_run, read_summary, refuse_name

if TYPE_CHECKING:
    from pipeline.report.degradation import Curve
    from pipeline.telemetry import TrainingProgress
    from pipeline.training.trainer import Workers

Kind = Literal["plain", "residual"]

_ARCHITECTURES: dict[Kind, str] = {"plain": "cifar_plain", "residual": "cifar_resnet"}


class DegradationConfig(TrainConfig):
    """Train plain and residual nets of several depths alike and draw their errors; the same line goes on."""

    depths: list[int] = Field([20, 56], min_length=1)
    """Layers of the nets, which are those of CIFAR: 6n+2."""
    kinds: list[Kind] = Field(["plain", "residual"], min_length=1)
    """Nets without and with shortcuts."""
    resume: bool | Literal["auto"] = True
    """Go on with the nets that are recorded already; false: refuse a name that is taken."""
    architecture: Architecture | None = Architecture(name="cifar_resnet20")
    """Of no account here, where each net has its own; so that the config of a single training is one of this job."""

    @model_validator(mode="after")
    def _of_comparable_nets(self) -> Self:
        for name, values in (("depths", self.depths), ("kinds", self.kinds)):
            if len(set(values)) < len(values):
                raise ValueError(f"expected each of {name} once, got {values}")
        if any(depth < 8 or depth % 6 != 2 for depth in self.depths):
            raise ValueError(f"expected depths of 6n+2 layers, 8 at least, got {self.depths}")
        if self.start.bundle is not None:
            raise ValueError("expected no start.bundle: the nets are compared from random weights on")
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
    """Train the nets that are not trained yet, publish all of them, draw their errors."""
    start = time.monotonic()
    uri = storage.join(storage.normalise(config.output), config.run_id)
    _refuse_name_of_a_training(config, uri)
    nets = [_make_net(config, kind, depth) for depth in config.depths for kind in config.kinds]
    for net in nets:
        refuse_name(net.run)
    trained = _all_trained(nets)
    recorded = None if trained is None else read_summary(uri)
    if trained is None:
        with connected_ray(config.cluster) as nodes:
            trained = _train_all(config, nets, nodes)
    summary = {**_draw(config.run_id, uri, trained), "duration_s": round(time.monotonic() - start, 1)}
    if recorded is None:
        storage.write(storage.join(uri, "summary.json"), _to_json(summary))
        return summary
    storage.write(storage.join(uri, "summary.json"), _to_json({**summary, "duration_s": recorded.get("duration_s")}))
    return {**summary, "status": "was done"}


def num_at_once(nodes: Sequence[Node], workers: "Workers") -> int:
    """How many trainings of these workers the cluster has room for, one at least."""
    return max(1, num_fitting(nodes, workers.cpus_per_worker, use_gpu=workers.use_gpu) // workers.most)


def _refuse_name_of_a_training(config: DegradationConfig, uri: str) -> None:
    """Raises ConfigError where a training has the name: its summary, by which it is known to have ended, lies there."""
    if is_recorded(uri):
        raise ConfigError(
            f"run_id: {config.run_id!r} is a training under {config.output!r}, whose records the experiment's would "
            "replace; choose another name"
        )


def _make_net(config: DegradationConfig, kind: Kind, depth: int) -> Net:
    run_id = f"{config.run_id}-{kind}-{depth}"
    of_net = {
        "run_id": run_id,
        "name": f"{config.name}-{kind}-{depth}",
        "architecture": {"name": f"{_ARCHITECTURES[kind]}{depth}"},
        "resume": "auto" if config.resume else False,
    }
    shared = config.model_dump(exclude={"depths", "kinds"})
    try:
        of_run = TrainConfig(**{**shared, **of_net})
    except ValidationError as error:
        raise ConfigError(f"of the net {kind}-{depth}:\n{describe(error)}") from error
    return Net(kind, depth, make_run(of_run))


def _all_trained(nets: Sequence[Net]) -> list[Net] | None:
    """The nets, each on the device that it was trained on, where none is left to train; else None. Needs no cluster.

    Raises RunError where one would be trained again unasked.
    """
    from pipeline.training import checkpoint
    from pipeline.training.result import is_finished

    trained = []
    for net in nets:
        run = begun_run(net.run)
        last = None if run is None else checkpoint.read_last(run.uri)
        if run is not None and last is None:
            _refuse_to_train_again(run)
        if run is not None and is_finished(last, run):
            trained.append(replace(net, run=run))
    return trained if len(trained) == len(nets) else None


def _refuse_to_train_again(run: TrainingRun) -> None:
    """Raises RunError where a run without checkpoints has been published: nobody wants it trained once more unasked."""
    name, version = run.config.name, run.config.version
    if version in registry.list_versions(run.config.registry, name):
        raise RunError(
            f"expected the checkpoints of {run.config.run_id!r}, which was published as {name}/{version}, to draw its "
            f"curves of, found them gone from {run.uri!r}: restore them, or choose another run_id and version"
        )


def _train_all(config: DegradationConfig, nets: list[Net], nodes: list[Node]) -> list[Net]:
    """Train every net to its end; the nets, their device known."""
    from pipeline.telemetry import TrainingProgress
    from pipeline.training import checkpoint
    from pipeline.training.loop import refuse_impossible
    from pipeline.training.result import is_finished
    from pipeline.training.trainer import choose_workers

    device = choose_device(nodes, config.compute.device)
    nets = [replace(net, run=net.run.model_copy(update={"device": device})) for net in nets]
    workers = choose_workers(
        nodes,
        num_workers=config.compute.num_workers,
        cpus_per_worker=config.compute.cpus_per_worker,
        use_gpu=device == "cuda",
        num_lanes=config.data.num_lanes,
    )
    train_set = TrainingSet.open(nets[0].run.config.train)
    for net in nets:
        refuse_impossible(net.run, train_set)
    for net in nets:
        begin(net.run)
    done: dict[str, int] = {}
    unfinished: list[Net] = []
    for net in nets:
        last = checkpoint.read_last(net.run.uri)
        done[net.name] = 0 if last is None else last["step"]
        if not is_finished(last, net.run):
            unfinished.append(net)
    total = sum(net.run.num_steps for net in nets)
    with TrainingProgress(num_steps=total, interval_s=config.progress_interval_s) as progress:
        train_together(unfinished, workers, num_at_once(nodes, workers), Told(progress, done, total))
    return nets


def train_together(nets: Sequence[Net], workers: "Workers", at_once: int, told: "Told") -> None:
    """Train the nets, so many at a time; where one fails, or a signal comes, those under way stop at their next look.

    Raises what the first of them failed of.
    """
    from pipeline.training.tracking import Tracker
    from pipeline.training.trainer import run_training

    is_stopping = threading.Event()

    def train(net: Net) -> None:
        def look_out() -> None:
            if is_stopping.is_set():
                raise _CutShortError

        def observe(status: dict[str, Any]) -> None:
            told.update(net.name, status)
            tracker.update(status)

        if is_stopping.is_set():
            return
        try:
            with Tracker(net.run) as tracker:
                run_training(net.run, workers, observe, look_out)
        except _CutShortError:
            return
        except BaseException:
            is_stopping.set()
            raise

    with ThreadPoolExecutor(at_once, thread_name_prefix="net") as pool:
        futures = [pool.submit(train, net) for net in nets]
        try:
            for future in futures:
                future.result()
        finally:
            is_stopping.set()


class _CutShortError(BaseException):
    """A net is stopped for another's sake, or a signal's; its last checkpoint is what the same command goes on from.

    No failure of the net's own, so no Exception: what is told of its end tells them apart.
    """


class Told:
    """One progress of all nets, which tell theirs in threads of their own."""

    def __init__(self, progress: "TrainingProgress", done: dict[str, int], num_steps: int) -> None:
        self._progress, self._done, self._num_steps = progress, dict(done), num_steps
        self._lock = threading.Lock()
        progress.update({"step": sum(done.values()), "of": num_steps})

    def update(self, name: str, status: dict[str, Any]) -> None:
        """What rank 0 of a net told."""
        if "step" not in status:
            return
        with self._lock:
            self._done[name] = status["step"]
            words = f"step {status['step']}, loss {status['loss']:.3g}, training error {1 - status['top1']:.1%}"
            self._progress.update({"step": sum(self._done.values()), "of": self._num_steps, name: words})


def _draw(run_id: str, uri: str, nets: Sequence[Net]) -> dict[str, Any]:
    """Publish the nets, write their records, figure, curves and table below `uri`; what the summary says of them."""
    from pipeline.report.charts import to_svg
    from pipeline.report.degradation import build_table, draw_degradation

    curves = {net.name: _conclude(net) for net in nets}
    drawn = list(curves.values())
    storage.write(storage.join(uri, "degradation.svg"), to_svg(draw_degradation(drawn)))
    columns = {name: curve.columns() for name, curve in curves.items()}
    storage.write(storage.join(uri, "degradation.json"), _to_json(columns))
    storage.write(storage.join(uri, "table.md"), build_table(drawn).encode())
    return {
        "status": "done",
        "run_id": run_id,
        "figure": storage.join(uri, "degradation.svg"),
        "table": storage.join(uri, "table.md"),
        "errors": {name: curve.last_errors() for name, curve in curves.items()},
        "runs": {net.name: net.run.uri for net in nets},
        "num_steps": nets[0].run.num_steps,
        "num_images": nets[0].run.num_images,
        "device": nets[0].run.device,
    }


def _conclude(net: Net) -> "Curve":
    """Publish a net, write its records; its curve."""
    from pipeline.report.degradation import Curve
    from pipeline.training.result import publish, write_records

    _, _, last = publish(net.run)
    write_records(net.run, last, {"device": net.run.device, "network": net.run.architecture.name})
    is_residual, num_steps = net.kind == "residual", net.run.num_steps
    return Curve.of(net.depth, is_residual, last["history"], last["evaluations"], num_steps)


def _to_json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


if __name__ == "__main__":
    run_job(DegradationConfig, main)
