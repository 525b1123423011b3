"""The benchmark of what bounds a run, on a small world and a Ray of its own."""

from pathlib import Path

import pytest

from pipeline.inference.bound import STAGES
from tests.worlds import make_world, run_job


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("jobs_share_ray")
@pytest.mark.parametrize("form", ["fused", "split"])
def test_every_stage_and_the_whole_are_measured_and_nothing_is_left(tmp_path: Path, form: str) -> None:
    make_world(tmp_path)
    summary = run_job(
        "benchmark",
        manifest=tmp_path / "manifest",
        registry=tmp_path / "registry",
        bundles="tiny",
        output=tmp_path / "scratch",
        num_images=30,
        compute__form=form,
    )
    assert (summary["status"], summary["layout"]["form"], summary["num_images"]) == ("done", form, 30)
    assert summary["computed_in"] == {"tiny/1": "float32, eager"}
    assert all(summary["alone_images_per_s"][stage] > 0 for stage in STAGES)
    verdict = summary["verdict"]
    assert verdict["share"] == pytest.approx(verdict["images_per_s"] / verdict["bound_images_per_s"], abs=0.01)
    assert verdict["sentence"].startswith(f"{verdict['binds']}-bound: ")
    assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []
