"""Measure what bounds `predict` here: each stage alone on all CPUs or GPUs, and the whole, on the same images.

python -m jobs.benchmark --config configs/benchmark.yaml
python -m jobs.benchmark --manifest URI --registry URI --bundles NAME --output URI

Nothing is left below the output. Networks that are compiled on first use are kept beside their bundles, as by predict.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any
from uuid import uuid4

from pydantic import Field

from jobs import run_job
from pipeline import storage
from pipeline.cluster import Node, connected_ray, in_words, results_of, start_here
from pipeline.config import ClusterConfig, JobConfig
from pipeline.data.manifest import Shard
from pipeline.inference import networks
from pipeline.inference.bound import Timed, judge, measured_costs, pools_of, rate_of, workers_of
from pipeline.inference.config import ComputeConfig, ImagesConfig, PredictConfig, TablesConfig
from pipeline.inference.estimate import choose_sample, shards_to_a_worker, try_shards
from pipeline.inference.layout import STAGES, Layout, Stage, choose_layout
from pipeline.inference.plan import make_plan
from pipeline.inference.run import Run, resolve_inputs
from pipeline.witness import Witness, arrive, heard

_SHARDS_TO_AN_ACTOR = 8  # with a GPU, or where tasks work for it: it does all their stages itself


class BenchmarkConfig(JobConfig):
    """Measure what bounds `predict` on this cluster and store, and how much of that it reaches."""

    manifest: str
    """URI of the manifest (made by jobs.manifest)."""
    output: str
    """URI of a place to write to for trial; all of it is removed again."""
    bundles: list[str] = Field(min_length=1)
    """Bundles, as in predict."""
    registry: str | None = None
    """URI of the registry that names of bundles are looked up in."""
    num_images: int = Field(2000, ge=1)
    """Images to measure on, in whole shards and as many to each worker; held in memory, 0.3 MB each."""
    measure_again: bool = True
    """Measure the stages after the whole too, for a machine that others use meanwhile."""
    tables: TablesConfig = TablesConfig()
    """Which tables, and how."""
    images: ImagesConfig = ImagesConfig()
    """How images are read."""
    compute: ComputeConfig = ComputeConfig()
    """Where the work runs."""
    cluster: ClusterConfig = ClusterConfig()
    progress_interval_s: float = Field(5.0, gt=0)
    """Seconds between progress lines where standard error is no terminal."""

    def as_predict(self) -> PredictConfig:
        """The run that is measured."""
        return PredictConfig(**self.model_dump(exclude={"num_images", "measure_again"}), run_id="benchmark")


def main(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure the stages, the whole, and the stages again if so asked; what bound it, and the share reached."""
    scratch_uri = storage.join(storage.normalise(config.output), f"benchmark-{uuid4().hex[:12]}")
    of_run = config.as_predict().model_copy(update={"output": scratch_uri})
    manifest, models = resolve_inputs(of_run)
    from pipeline.inference.flow import run_shards

    try:
        with connected_ray(config.cluster) as nodes:
            layout = choose_layout(nodes, config.compute, manifest.num_shards)
            plan = make_plan(of_run, manifest, models, layout)
            workers = workers_of(layout, nodes)
            mean_images = manifest.num_images / manifest.num_shards
            each = shards_to_a_worker(layout, math.ceil(config.num_images / workers), mean_images)
            shards = choose_sample(plan, workers * each)
            measure = partial(measure_stages, plan.run, layout, nodes, shards)
            before = measure()
            computed_in = networks.describe(plan.run)  # goes with the trial's records
            trial = try_shards(plan, layout, shards, scratch_uri, run_shards, config.progress_interval_s)
            rounds_of_stages = [before, *([measure()] if config.measure_again else [])]
    finally:  # the workers have ended: they write there until they do
        storage.delete_folder(scratch_uri)
    timed = {stage: [parts for measured in rounds_of_stages for parts in measured[stage]] for stage in STAGES}
    costs, observed = measured_costs(timed, layout), trial.observed
    verdict = judge(costs, pools_of(layout, nodes), observed.images_per_s(workers))
    return {
        "status": "done",
        "models": [model.name for model in models],
        "layout": asdict(layout),
        "num_images": observed.num_images,
        "computed_in": computed_in,
        "alone_images_per_s": {stage: round(rate_of(timed[stage]), 1) for stage in STAGES},
        "seconds_by_stage": {stage: round(seconds, 1) for stage, seconds in observed.seconds.items()},
        "cpu_s_per_image": {
            **{stage: round(costs.of([stage]), 5) for stage in STAGES},
            "whole": round(observed.seconds["cpu"] / observed.num_images, 5),
        }
        if (layout.form, layout.device) == ("fused", "cpu")
        else None,
        "verdict": verdict.as_dict(),
    }


def measure_stages(
    run: Run, layout: Layout, nodes: Sequence[Node], shards: Sequence[Shard]
) -> dict[Stage, list[list[Timed]]]:
    """Each stage alone, by as many processes at once as do it in the run, of the same resources."""
    actor: dict[str, float] = {"num_cpus": layout.cpus_per_actor, "num_gpus": layout.gpus_per_actor}
    if layout.form == "fused" and layout.device == "cpu":
        return _measure(run, shards, layout.num_actors, actor, STAGES)
    num_cpus = pools_of(layout, nodes)[0].size
    on_cpus: tuple[Stage, ...] = ("fetch",) if "decode" in layout.stages_on_gpu else ("fetch", "decode")
    of_cpus = _measure(run, shards, num_cpus, {"num_cpus": 1, "num_gpus": 0}, on_cpus)
    every = math.ceil(len(shards) / (layout.num_actors * _SHARDS_TO_AN_ACTOR))
    some = shards[::every]  # from all over the set
    return {**_measure(run, some, layout.num_actors, actor, STAGES), **of_cpus}


def _measure(
    run: Run, shards: Sequence[Shard], num_processes: int, resources: dict[str, float], stages: Sequence[Stage]
) -> dict[Stage, list[list[Timed]]]:
    """A round of `stages`, one after the other: for each, what every process took of those that did it at once."""
    import ray

    from pipeline.inference.stages import Stages

    witness, start = start_here(Witness), ray.remote(Stages).options(**resources).remote
    parts = {f"process {first}": shards[first::num_processes] for first in range(min(num_processes, len(shards)))}
    processes = [
        start(run, part, with_networks="predict" in stages, arrive=partial(arrive, witness, name))
        for name, part in parts.items()
    ]
    asked = dict.fromkeys(parts, f"a process of {in_words(resources['num_cpus'], resources['num_gpus'])}")
    timed: dict[Stage, list[list[Timed]]] = {}
    try:
        with heard(witness, asked):
            results_of([process.__ray_ready__.remote() for process in processes])
            for stage in stages:
                if stage == "predict":
                    results_of([process.warm_up.remote() for process in processes])
                timed[stage] = [results_of([getattr(process, stage).remote() for process in processes])]
    finally:
        for process in processes:
            ray.kill(process)
    return timed


if __name__ == "__main__":
    run_job(BenchmarkConfig, main)
