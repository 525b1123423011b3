import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

import jobs.degradation
from jobs.degradation import DegradationConfig, Net, Told, _make_net, main, num_at_once, train_together
from pipeline import storage
from pipeline.cluster import Node
from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError, RunError
from pipeline.telemetry import TrainingProgress
from pipeline.training.run import TrainingRun, begin, make_run
from pipeline.training.trainer import Workers
from tests.training_worlds import make_sets, make_square_sets, train_config, train_here
from tests.worlds import run_job

Observe = Callable[[dict[str, Any]], None]


class Waiting(BaseException):
    """The job waits for its cluster."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sets")
    make_sets(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": [20, 21]}, "6n.2"),
        ({"depths": [2]}, "8 at least"),
        ({"depths": [20, 20]}, "each of depths once"),
        ({"kinds": ["plain", "plain"]}, "each of kinds once"),
        ({"start": {"bundle": "tiny/1"}}, "no start.bundle"),
    ],
)
def test_nets_that_cannot_be_compared_are_refused(root, fields, message):
    with pytest.raises(ValidationError, match=message):
        DegradationConfig(**{**train_config(root).model_dump(), **fields})


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([Node(2)], Workers(1, 1, 1, use_gpu=False), 2),
        ([Node(2)], Workers(1, 1, 2, use_gpu=False), 1),
        ([Node(3), Node(3)], Workers(2, 2, 2, use_gpu=False), 1),
        ([Node(8, 2), Node(1, 2)], Workers(1, 1, 1, use_gpu=True), 3),
        ([Node(8, 2), Node(8, 2)], Workers(1, 4, 4, use_gpu=True), 1),
        ([Node(2)], Workers(1, 4, 1, use_gpu=False), 1),
    ],
)
def test_as_many_are_trained_at_once_as_the_cluster_has_room_for(nodes, workers, expected):
    assert num_at_once(nodes, workers) == expected


def test_a_net_that_fails_stops_those_beside_it_and_those_to_come(root, monkeypatch):
    nets = [Net("plain", depth, make_run(train_config(root, run_id=f"net-{depth}"))) for depth in (8, 14, 20)]
    seen = []

    def run_training(run: TrainingRun, workers: Workers, observe: Observe, look_out: Callable[[], None]) -> None:
        seen.append(run.config.run_id)
        if run.config.run_id == "net-8":
            raise RunError("expected a finite loss")
        for _ in range(10_000):  # and tells nothing, as one that waits for a full cluster
            look_out()
            time.sleep(0.01)
        seen.append("was not stopped")

    monkeypatch.setattr("pipeline.training.trainer.run_training", run_training)
    progress = TrainingProgress(num_steps=300, interval_s=60)
    told = Told(progress, {}, 300)
    with pytest.raises(RunError, match="finite loss"):
        train_together(nets, Workers(1, 1, 1, use_gpu=False), 2, told)
    assert sorted(seen) == ["net-14", "net-8"]


def test_a_name_that_leaves_no_room_for_the_nets_is_refused(root):
    config = DegradationConfig(**{**train_config(root).model_dump(), "run_id": "x" * 95})
    with pytest.raises(ConfigError, match=r"of the net plain-20:\n.*run_id"):
        _make_net(config, "plain", 20)


def test_the_name_of_a_training_is_refused_and_its_records_stay(root):
    run = make_run(train_config(root, run_id="a-training"))
    begin(run)
    storage.write(run.summary_uri, b"how it ended")
    with pytest.raises(ConfigError, match=r"run_id: 'a-training' is a training under .*; choose another name"):
        main(DegradationConfig(**{**train_config(root).model_dump(), "run_id": "a-training"}))
    assert storage.read(run.summary_uri) == b"how it ended"


def test_nets_that_are_all_trained_are_drawn_without_a_cluster_wherever_they_were_trained(tmp_path, monkeypatch):
    @contextmanager
    def connected(awaited: ClusterConfig) -> Iterator[list[Node]]:
        raise Waiting
        yield

    monkeypatch.setattr(jobs.degradation, "connected_ray", connected)
    make_square_sets(tmp_path)
    config = DegradationConfig(**{**train_config(tmp_path).model_dump(), "resume": True, "depths": [8]})
    for kind in config.kinds:
        with pytest.raises(Waiting):
            main(config)
        run = train_here(_make_net(config, kind, 8).run.config)
        begin(run.model_copy(update={"device": "cuda"}))

    summary_path = tmp_path / "runs" / "first" / "summary.json"
    drawn = main(config)
    assert (drawn["status"], drawn["device"]) == ("done", "cuda")
    recorded = {**json.loads(summary_path.read_text()), "duration_s": 3600.0}
    assert recorded == {**drawn, "duration_s": 3600.0}
    summary_path.write_text(json.dumps(recorded))
    again = main(config)
    assert again == {**drawn, "status": "was done", "duration_s": again["duration_s"]}
    assert json.loads(summary_path.read_text()) == recorded

    summary_path.write_text("{")
    assert main(config)["status"] == "done"
    assert json.loads(summary_path.read_text())["status"] == "done"
    storage.delete_folder(f"file://{tmp_path}/runs/first-residual-8/checkpoints")
    with pytest.raises(RunError, match=r"checkpoints of 'first-residual-8', which was published as .*-residual-8/1"):
        main(config.model_copy(update={"depths": [14, 8]}))
    with pytest.raises(ConfigError, match="seed"):
        main(config.model_copy(update={"seed": 7}))
    with pytest.raises(ConfigError, match="'first-plain-8' is there already"):
        main(config.model_copy(update={"resume": False, "version": "2"}))


def test_the_progress_is_that_of_all_nets():
    progress = TrainingProgress(num_steps=200, interval_s=60)
    told = Told(progress, {"plain-8": 100, "plain-14": 30}, 200)
    assert progress.status()["step"] == 130
    told.update("plain-14", {"step": 40, "loss": 1.25, "top1": 0.5})
    told.update("plain-14", {"evaluation_top1": 0.4, "evaluated_at": 40})
    status = progress.status()
    assert (status["step"], status["of"]) == (140, 200)
    assert status["plain-14"] == "step 40, loss 1.25, training error 50.0%"


@pytest.fixture(scope="module")
def fields(root) -> dict[str, Any]:
    config = train_config(root).model_dump(include={"train", "evaluate_on", "output", "registry", "name", "version"})
    return {
        **config,
        "run_id": "degradation",
        "depths": [8],
        "steps": 6,
        "batch_size": 8,
        "augment__crop": "center",
        "augment__size": 32,
        "evaluation__preprocessing__resize_size": 32,
        "evaluation__preprocessing__crop_size": 32,
        "checkpoint__every_steps": 3,
        "compute__num_workers": 1,
        "compute__cpus_per_worker": 1,
    }


@pytest.fixture(scope="module")
def plain(fields, jobs_share_ray) -> dict[str, Any]:
    return run_job("degradation", **fields, kinds=["plain"])


@dataclass
class Rerun:
    """What the command did with both kinds, the plain net being done but for its last steps."""

    summary: dict[str, Any]
    before: dict[Path, int]
    cut_short: Path


@pytest.fixture(scope="module")
def both(root, fields, plain) -> Rerun:
    before = checkpoint_times(root)
    [cut_short] = [path for path in before if path.name == "000000006.pt"]
    cut_short.unlink()
    return Rerun(run_job("degradation", **fields), before, cut_short)


def checkpoint_times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (root / "runs").glob("*/checkpoints/*.pt")}


@pytest.mark.ray
@pytest.mark.slow
def test_nets_are_trained_published_and_drawn(root, plain):
    assert tuple(plain["errors"]) == ("plain-8",)
    folder = root / "runs" / "degradation"
    assert ElementTree.parse(folder / "degradation.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    curves = json.loads((folder / "degradation.json").read_text())
    assert {name: curve["step"][-1] for name, curve in curves.items()} == dict.fromkeys(plain["errors"], 6)
    runs = {f"degradation-{name}" for name in plain["errors"]}
    assert {path.parent.name for path in (root / "runs").glob("*/report.html")} == runs
    assert {f"shapes-{name}" for name in plain["errors"]} <= {path.name for path in (root / "registry").iterdir()}


@pytest.mark.ray
@pytest.mark.slow
def test_nets_can_be_added_while_one_that_was_cut_short_goes_on(root, plain, both):
    after = checkpoint_times(root)
    rewritten = [path for path, written_at in both.before.items() if after[path] != written_at]
    assert rewritten == [both.cut_short]
    assert both.summary["errors"]["plain-8"] == plain["errors"]["plain-8"]
    rows = (root / "runs" / "degradation" / "table.md").read_text().splitlines()[2:]
    told = [both.summary["errors"][f"{kind}-8"] for kind in ("plain", "residual")]
    cells = [f"{100 * errors[name]:.2f}" for errors in told for name in ("training", "test")]
    assert rows == [f"| 8 | {' | '.join(cells)} |"]


@pytest.mark.ray
@pytest.mark.slow
def test_finished_nets_are_left_alone(root, fields, both):
    before = checkpoint_times(root)
    again = run_job("degradation", **fields)
    assert (again["status"], again["errors"]) == ("was done", both.summary["errors"])
    assert checkpoint_times(root) == before


@pytest.mark.ray
@pytest.mark.slow
def test_a_name_that_is_taken_is_refused_where_nothing_is_to_be_resumed(fields, plain):
    refused = run_job("degradation", expected_code=2, **{**fields, "version": "2"}, resume="false")
    assert "degradation-plain-8' is there already" in refused["message"]
