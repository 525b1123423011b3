import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.manifest import ManifestConfig, main
from pipeline import storage
from pipeline.config import load
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError, ManifestError

CONFIG = Path(__file__).parents[2] / "configs" / "manifest.yaml"


@pytest.fixture
def photos(tmp_path: Path) -> str:
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/3.jpg", "dog/thumbnails/4.jpg", "dog/notes.txt"):
        storage.write(f"file://{tmp_path}/photos/{name}", b"12345")
    return f"{tmp_path}/photos"


def run(arguments: list[str]) -> dict[str, Any]:
    return main(load(ManifestConfig, arguments))


def test_the_config_file_of_the_repository_makes_a_manifest(photos: str, tmp_path: Path) -> None:
    output = str(tmp_path / "m")
    paths = ["--source.uri", photos, "--output", output, "--allowed_roots", f'["{tmp_path}"]']
    summary = run(["--config", str(CONFIG), *paths])
    assert summary["status"] == "made"
    assert summary["num_images"] == summary["num_labelled"] == 3
    assert summary["skipped"] == {"excluded": 1, "not_included": 1}
    manifest = Manifest.open(output)
    assert (manifest.classes, manifest.digest) == (["cat", "dog"], summary["digest"])
    assert run(["--config", str(CONFIG), *paths])["status"] == "unchanged"


def test_every_kind_of_source_has_its_place_in_the_config(photos: str, tmp_path: Path) -> None:
    uris = [f"file://{photos}/cat/{number}.jpg" for number in (1, 2)]
    pq.write_table(pa.table({"uri": uris, "label": ["x", "y"], "bytes": [b"1", b"2"]}), tmp_path / "t.parquet")
    labels = ["--labels.kind", "table", "--labels.table", str(tmp_path / "t.parquet")]
    of_prefix = run(["--source.uri", photos, "--output", str(tmp_path / "m0"), *labels])
    assert (of_prefix["num_images"], of_prefix["num_labelled"], of_prefix["num_classes"]) == (4, 2, 2)
    table = ["--source.uri", str(tmp_path / "t.parquet")]
    as_table = [*table, "--source.kind", "table", "--source.label_column", "label", "--classes", '["y", "x", "z"]']
    assert run([*as_table, "--output", str(tmp_path / "m1")])["num_classes"] == 3
    packed = run([*table, "--source.kind", "packed", "--output", str(tmp_path / "m2")])
    assert (packed["num_images"], packed["num_shards"]) == (2, 1)
    for kind in ("inventory", "webdataset"):
        with pytest.raises(ManifestError, match=r"nventory|\.tar"):
            run(["--source.uri", photos, "--source.kind", kind, "--output", str(tmp_path / "m3")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels.kind", "table"], "only one of them"),
        (["--labels.table", "labels.csv"], "only one of them"),
        (["--source.root", "s3://bucket"], "kind table alone"),
        (["--source.label_column", "label"], "kind table alone"),
        (["--source.kind", "table", "--labels.kind", "folders"], "kind prefix alone"),
        (["--source.kind", "packed", "--filters.min_bytes", "5"], "filters"),
        (["--source.kind", "packed", "--shard_size", "5"], "shard_size: .*jobs.pack"),
        (
            ["--labels.kind", "folders", "--labels.label_column", "kind"],
            "column names with kind table alone",
        ),
        (["--seed", "1"], "seed: expected with sample alone"),
        (["--shard_size", "0"], "shard_size"),
        (["--sample", "1.5"], "sample"),
        (["--limits", "5"], "limits"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(["--source.uri", str(tmp_path), "--output", str(tmp_path / "m"), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_the_job_prints_progress_on_stderr_and_its_summary_last_on_stdout(photos: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.manifest", "--source.uri", photos, "--progress_interval_s", "0.000001"]
    done = subprocess.run([*command, "--output", str(tmp_path / "m")], capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1])["num_images"] == 4
    assert "manifest: 4 images read" in done.stderr
