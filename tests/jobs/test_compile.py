"""Compiling ahead of time, as a user runs it."""

from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data.manifest import write_manifest
from tests.manifests import Rows
from tests.worlds import make_bundle, run_job


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("jobs_share_ray")
def test_a_bundle_is_compiled_once_and_its_agreement_told(tmp_path: Path) -> None:
    make_bundle(tmp_path / "registry")
    fields = {"registry": tmp_path / "registry", "bundle": "tiny", "precision": "bfloat16", "agreement__min_top1": 0}
    first = run_job("compile", **fields, agreement__min_cosine=0.9)
    assert first["status"] == "done"
    assert 0.9 < first["agreement"]["cosine"] < 1
    assert storage.exists(first["package"])
    assert run_job("compile", **fields, agreement__min_cosine=0.9) == first
    refused = run_job("compile", expected_code=2, **fields, agreement__min_cosine=1)
    assert refused["error"] == "BundleError"
    assert refused["message"].startswith(f"file://{tmp_path}/registry/tiny/1 is compiled in bfloat16, but predict")


def test_a_bundle_that_is_not_there_is_refused_before_ray_starts(tmp_path: Path) -> None:
    refused = run_job("compile", expected_code=2, registry=tmp_path, bundle="nothing")
    assert "nothing" in refused["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.usefixtures("jobs_share_ray")
def test_a_manifest_of_which_no_image_can_be_had_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "registry")
    write_manifest(str(tmp_path / "gone"), Rows([(f"file://{tmp_path}/gone.jpg", 1, None, None)]), shard_size=5)
    fields = {"registry": tmp_path / "registry", "bundle": "tiny", "manifest": tmp_path / "gone"}
    refused = run_job("compile", expected_code=2, **fields)
    assert refused["error"] == "ManifestError"
    assert "got none that can be had" in refused["message"]


def test_integers_without_images_are_refused_before_ray_starts(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    refused = run_job("compile", expected_code=2, registry=tmp_path, bundle="tiny", precision="int8")
    assert refused["message"].startswith("precision: int8 needs a manifest")
