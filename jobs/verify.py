"""Prove a run from its files alone: every image with its results or in errors, and not both; every byte as committed.

python -m jobs.verify --output URI --run_id ID
"""

from typing import Any

from pydantic import Field

from jobs import run_job
from pipeline import storage
from pipeline.config import JobConfig
from pipeline.errors import ConfigError, ReconcileError
from pipeline.inference.reconcile import find_faults
from pipeline.inference.run import list_run_ids, read_run

_MOST_FAULTS_TOLD = 20


class VerifyConfig(JobConfig):
    """Prove a run from its files alone: every image with its results or in errors, every byte as committed."""

    output: str
    """URI that the run was written to."""
    run_id: str | None = Field(None)
    """Name of the run; may be left out where there is only one."""
    manifest: str | None = None
    """URI of the run's manifest, where that is elsewhere now."""


def main(config: VerifyConfig) -> dict[str, Any]:
    """Look at everything, name what is wrong. Raises ReconcileError where anything is."""
    output = storage.normalise(config.output)
    run = read_run(output, config.run_id or _only_run_id(output))
    if config.manifest is not None:
        run = run.model_copy(update={"manifest_uri": storage.normalise(config.manifest)})
    faults = list(find_faults(run))
    if faults:
        told = faults[:_MOST_FAULTS_TOLD]
        raise ReconcileError(
            f"run {run.run_id}: {len(faults)} faults, e.g. {faults[0]}",
            run_id=run.run_id,
            num_faults=len(faults),
            faults=told,
        )
    return {"status": "verified", "run_id": run.run_id, "num_images": run.num_images, "num_shards": run.num_shards}


def _only_run_id(output: str) -> str:
    run_ids = list_run_ids(output)
    if len(run_ids) != 1:
        raise ConfigError(
            f"run_id: expected the name of a run under {output}, which has {', '.join(run_ids) or 'none'}"
        )
    return run_ids[0]


if __name__ == "__main__":
    run_job(VerifyConfig, main)
