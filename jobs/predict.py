"""Classify and embed every image of a manifest; run the same command again to resume.

python -m jobs.predict --config configs/classify.yaml
python -m jobs.predict --manifest URI --output URI --registry URI --bundles NAME
"""

from typing import Any

from jobs import run_job
from pipeline.cluster import connected_ray
from pipeline.config import ClusterConfig
from pipeline.inference.config import PredictConfig
from pipeline.inference.plan import finished_plan
from pipeline.inference.run import resolve_inputs


def main(config: PredictConfig) -> dict[str, Any]:
    """Run, or resume, the run that `config` describes."""
    manifest, models = resolve_inputs(config)  # what is wrong here is said before a cluster is waited for
    from pipeline.inference.ending import report_finished

    if (plan := finished_plan(config, manifest, models)) is not None:
        return report_finished(plan, config)
    from pipeline.inference.flow import predict  # and with it Ray Data

    awaited = ClusterConfig() if config.dry_run else config.cluster
    with connected_ray(awaited) as nodes:
        return predict(config, manifest, models, nodes)


if __name__ == "__main__":
    run_job(PredictConfig, main)
