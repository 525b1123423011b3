"""Packing a manifest: row-complete, resumable, and the output is a manifest."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import jobs.pack
from jobs.demo_images import CLASSES, draw_set
from jobs.pack import PackConfig, main, pack_and_write
from pipeline import storage
from pipeline.config import ClusterConfig, load
from pipeline.data.manifest import Manifest
from pipeline.data.readers import read_shard
from pipeline.errors import ConfigError, ImageError, ManifestError, ReconcileError, RunError, StorageError
from pipeline.inference.commit import commit
from pipeline.inference.layout import Node
from tests.manifests import images_of
from tests.worlds import list_images, run_job

QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
REENCODE = ["--reencode.shorter_side", "24", "--reencode.quality", "80"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images in 4 shards, 3 of them unreadable."""
    root = tmp_path_factory.mktemp("world")
    draw_set(root / "images", num_images=30, seed=5, num_broken=3)
    list_images(root / "images", root / "manifest", shard_size=8)
    return root


def pack(world: Path, output: Path, *flags: str) -> dict[str, Any]:
    return main(load(PackConfig, ["--manifest", str(world / "manifest"), "--output", str(output), *flags]))


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shards are packed one by one in this process; lists those that were."""
    done: list[int] = []

    def pack_all(config, work, ordered, pending, records) -> float:
        for shard in pending:
            commit(records, pack_and_write(work, ordered, shard))
            done.append(shard.shard_id)
        return 1.0

    monkeypatch.setattr(jobs.pack, "_pack_and_commit", pack_all)
    return done


def packed_images(output: Path) -> dict[str, tuple[int | None, bytes]]:
    """Label and bytes of every packed image, through the output's manifest."""
    manifest = Manifest.open(str(output))
    found = {}
    for shard in manifest.shards():
        table = manifest.images(shard)
        contents = read_shard(shard, table, allowed_roots=["file://"], max_bytes=10**9)
        for image, content in zip(table.to_pylist(), contents, strict=True):
            assert isinstance(content, bytes)
            assert len(content) == image["size"]
            found[image["uri"]] = (image["label"], content)
    return found


def errors(output: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((output / "errors").iterdir()) for row in pq.read_table(path).to_pylist()]


def files(output: Path) -> dict[str, bytes]:
    """What readers see: the temporary file of a writer that was killed is none of it, and is swept an hour later."""
    found = [info.uri for folder in ("data", "errors") for info in storage.list_objects(f"file://{output}/{folder}")]
    return {uri.removeprefix(f"file://{output}/"): storage.read(uri) for uri in found}


# --- what is packed --------------------------------------------------------------------------------------------------


def test_the_output_is_a_manifest_of_the_same_images_labels_and_classes(world, tmp_path, without_ray):
    summary = pack(world, tmp_path / "packed", "--shard_size", "7")
    source = Manifest.open(str(world / "manifest"))
    packed = Manifest.open(str(tmp_path / "packed"))
    assert (summary["status"], summary["num_packed"], summary["num_errors"], summary["num_shards"]) == (
        "done",
        30,
        0,
        5,
    )
    assert packed.classes == source.classes == sorted(CLASSES)
    listed = {image["uri"]: (image["label"], storage.read(image["uri"])) for image in images_of(source)}
    assert packed_images(tmp_path / "packed") == listed
    assert [image["etag"] for image in sorted(images_of(packed), key=lambda image: image["uri"])] == [
        image["etag"] for image in sorted(images_of(source), key=lambda image: image["uri"])
    ]
    assert json.loads((tmp_path / "packed/_pack/summary.json").read_text()) == summary


def test_every_image_is_packed_or_in_the_errors_table_and_never_both(world, tmp_path, without_ray):
    summary = pack(world, tmp_path / "packed", *REENCODE)
    packed, failed = packed_images(tmp_path / "packed"), [row["uri"] for row in errors(tmp_path / "packed")]
    listed = [image["uri"] for image in images_of(Manifest.open(str(world / "manifest")))]
    assert sorted([*packed, *failed]) == sorted(listed)
    assert (summary["num_packed"], summary["num_errors"]) == (27, 3) == (len(packed), len(failed))
    assert sum(summary["errors_by_kind"].values()) == 3
    assert all(content.startswith(b"\xff\xd8") for _, content in packed.values())


def test_a_check_finds_what_does_not_decode_and_changes_no_bytes(world, tmp_path, without_ray):
    summary = pack(world, tmp_path / "packed", "--check", "true")
    assert summary["num_errors"] == 3
    assert all(content == storage.read(uri) for uri, (_, content) in packed_images(tmp_path / "packed").items())


def test_images_of_all_classes_meet_in_a_shard_unless_their_order_is_kept(world, tmp_path, without_ray):
    pack(world, tmp_path / "shuffled", "--shard_size", "10")
    pack(world, tmp_path / "kept", "--shuffle_seed", "null")
    shuffled, kept, source = (
        Manifest.open(str(place)) for place in (tmp_path / "shuffled", tmp_path / "kept", world / "manifest")
    )
    assert images_of(kept) == images_of(source)
    assert [shard.num_images for shard in kept.shards()] == [shard.num_images for shard in source.shards()]
    met = [len(set(shuffled.images(shard)["label"].to_pylist())) for shard in shuffled.shards()]
    assert max(met) >= 4  # the order is by the files' times too: now and then a shard has three


def test_packed_images_are_packed_again_in_their_own_order_alone(world, tmp_path, without_ray):
    pack(world, tmp_path / "once")
    again = ["--manifest", str(tmp_path / "once"), "--output", str(tmp_path / "twice"), *REENCODE]
    with pytest.raises(ManifestError, match="loose images to shuffle, got packed ones"):
        main(load(PackConfig, again))
    assert not (tmp_path / "twice").exists()
    assert main(load(PackConfig, [*again, "--shuffle_seed", "null"]))["num_packed"] == 27


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_rerun_packs_only_what_is_not_committed_and_gives_the_same_bytes(world, tmp_path, without_ray):
    output = tmp_path / "packed"
    flags = ["--shard_size", "7", *REENCODE]
    pack(world, output, *flags)
    before = files(output)
    (output / "_pack/commits/00000003.json").unlink()
    (output / "manifest.json").unlink()
    (output / "data/00000003.parquet").write_bytes(b"of a killed writer on a store without renames")
    without_ray.clear()
    assert pack(world, output, *flags)["num_packed"] == 27
    assert (without_ray, files(output)) == ([3], before)
    kept = (output / "_pack/summary.json").read_bytes()
    again = pack(world, output, *flags)
    assert (again["status"], again["num_packed"], without_ray) == ("was done", 27, [3])
    assert (output / "_pack/summary.json").read_bytes() == kept


def test_a_file_that_is_there_already_keeps_its_etag(world, tmp_path, without_ray):
    output = tmp_path / "packed"
    pack(world, output)
    for path in output.glob("_pack/commits/*.json"):
        path.unlink()
    etags = [storage.head(f"file://{path}").etag for path in sorted(output.glob("data/*"))]
    pack(world, output)  # as a twin that comes late does: the manifest made before must stay right
    assert [storage.head(f"file://{path}").etag for path in sorted(output.glob("data/*"))] == etags
    assert len(packed_images(output)) == 30


@pytest.mark.parametrize("there", [b"", b"1234", b"1234567", b"123456789", b"1234567x", b"x2345678"])
def test_a_file_that_holds_anything_else_is_written_anew(tmp_path, monkeypatch, there):
    monkeypatch.setattr(jobs.pack, "_COMPARED_BYTES", 4)
    (tmp_path / "0.parquet").write_bytes(there)
    jobs.pack._write(f"file://{tmp_path}", "0.parquet", 1, b"12345678")
    assert (tmp_path / "0.parquet").read_bytes() == b"12345678"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (["--shuffle_seed", "1"], "shuffle_seed: began with 0, now 1"),
        (["--shard_size", "9"], "shard_size: began with 1000, now 9"),
        (["--reencode.quality", "81"], "reencode: began with .*'quality': 80.*now .*'quality': 81"),
        (["--check", "true"], "check: began with False, now True"),
        (["--images.max_pixels", "5"], "images: began with"),
    ],
)
def test_a_changed_config_is_refused_by_the_fields_name(world, tmp_path, without_ray, change, field):
    output = tmp_path / "packed"
    pack(world, output, *REENCODE)
    with pytest.raises(ConfigError, match=f"began otherwise.*\n{field}"):
        pack(world, output, *REENCODE, *change)


def test_another_manifest_is_refused_and_how_hard_to_fetch_is_not(world, tmp_path, without_ray):
    output = tmp_path / "packed"
    pack(world, output)
    assert pack(world, output, "--images.fetch_concurrency", "3", "--shard_size", "1000")["status"] == "was done"
    list_images(world / "images" / CLASSES[0], tmp_path / "other", shard_size=8)
    with pytest.raises(ConfigError, match="manifest: began with '"):
        main(load(PackConfig, ["--manifest", str(tmp_path / "other"), "--output", str(output)]))


def test_what_cannot_come_to_an_end_is_refused_before_it_begins(world, tmp_path):
    with pytest.raises(ConfigError, match=r"output: expected no manifest.*found one that was not packed there"):
        pack(world, world / "manifest")
    with pytest.raises(ConfigError, match="shard_size: expected with a shuffle_seed alone"):
        pack(world, tmp_path / "packed", "--shuffle_seed", "null", "--shard_size", "5")
    with pytest.raises(ConfigError, match=r"images\.reduced_decode: is for predictions"):
        pack(world, tmp_path / "packed", "--images.reduced_decode", "2")
    assert not (tmp_path / "packed").exists()


def test_a_shard_that_no_store_takes_is_refused_by_its_size(world, tmp_path, without_ray, monkeypatch):
    monkeypatch.setattr(storage, "LARGEST_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"shard_size: expected shards of at most .* GB of 7 images in shard 0;"):
        pack(world, tmp_path / "packed", "--shard_size", "7")
    assert not (tmp_path / "packed/data").exists()
    assert pack(world, tmp_path / "smaller", "--shard_size", "7", *REENCODE)["num_packed"] == 27  # whose bytes are few


# --- the proof -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda output: (output / "data/00000000.parquet").unlink(), "expected [0-9]+ bytes at .*found none"),
        (lambda output: (output / "errors/00000000.parquet").write_bytes(b"short"), "found 5 bytes"),
        (lambda output: (output / "data/stray.parquet").write_bytes(b"stray"), "expected no such file at .*stray"),
    ],
)
def test_files_that_are_not_as_committed_are_not_published(world, tmp_path, without_ray, damage, message):
    output = tmp_path / "packed"
    pack(world, output)
    (output / "manifest.json").unlink()
    damage(output)
    with pytest.raises(ReconcileError, match=message):
        pack(world, output)
    assert not (output / "manifest.json").exists()


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"num_predicted": 29}, "shard 0: expected 30 images accounted for"),
        ({"num_predicted": 29, "num_errors": 1}, "expected 29 images in .*/data', found 30"),
    ],
)
def test_images_that_are_not_as_many_as_the_receipts_tell_are_not_published(world, tmp_path, without_ray, lie, message):
    output = tmp_path / "packed"
    pack(world, output)
    (output / "manifest.json").unlink()
    record = output / "_pack/commits/00000000.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **lie}))
    with pytest.raises(ReconcileError, match=message):
        pack(world, output)
    assert not (output / "manifest.json").exists()


def test_a_store_that_is_down_stops_the_packing_and_commits_nothing(world, tmp_path, without_ray, monkeypatch):
    outage = ImageError("fetch", "storage_error", "503 Slow Down")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.inference.config.read_shard", lambda *args, **options: iter([outage] * 30))
        with pytest.raises(StorageError, match=r"at most 10 images lost to a failing store.*503 Slow Down"):
            pack(world, tmp_path / "packed")
    assert not (tmp_path / "packed/data").exists()
    assert pack(world, tmp_path / "packed")["num_packed"] == 30


def test_images_that_are_gone_are_rows_of_the_errors_table(world, tmp_path, without_ray):
    shutil.copytree(world / "images", tmp_path / "images")
    list_images(tmp_path / "images", tmp_path / "manifest", shard_size=8)
    gone = next((tmp_path / "images" / "star").iterdir())
    gone.unlink()
    summary = pack(tmp_path, tmp_path / "packed")
    assert (summary["num_packed"], summary["errors_by_kind"]) == (29, {"fetch/not_found": 1})
    assert [row["uri"] for row in errors(tmp_path / "packed")] == [f"file://{gone}"]


# --- on Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_local_ray(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def connected(awaited: ClusterConfig) -> Iterator[list[Node]]:
        yield [Node(cpus=2)]

    monkeypatch.setattr(jobs.pack, "connected_ray", connected)


@pytest.mark.ray
def test_tasks_write_the_bytes_of_a_packing_without_ray(world, tmp_path, in_local_ray, request):
    flags = ["--shard_size", "7", *REENCODE]
    summary = pack(world, tmp_path / "on-ray", *flags)
    assert (summary["status"], summary["num_packed"], summary["num_errors"]) == ("done", 27, 3)
    assert set(summary["seconds_by_stage"]) == {"fetch", "convert", "write", "total"}
    request.getfixturevalue("without_ray")
    pack(world, tmp_path / "alone", *flags)
    assert files(tmp_path / "on-ray") == files(tmp_path / "alone")


@pytest.mark.ray
def test_what_stops_a_task_stops_the_packing_with_its_reason(world, tmp_path, in_local_ray):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/data").write_text("a file where a folder should be")
    with pytest.raises(RunError, match="packed/data"):
        pack(world, tmp_path / "packed")


def test_a_cluster_without_a_cpu_is_refused_instead_of_waited_for(world, tmp_path, monkeypatch):
    @contextmanager
    def connected(awaited: ClusterConfig) -> Iterator[list[Node]]:
        yield [Node(cpus=0, gpus=1)]

    monkeypatch.setattr(jobs.pack, "connected_ray", connected)
    with pytest.raises(ConfigError, match="at least one CPU"):
        pack(world, tmp_path / "packed")


def test_the_driver_does_without_torch():
    imports = "import sys, jobs.pack, pipeline.inference.flow; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imports], check=False).returncode == 0


@pytest.fixture
def one_cpu() -> Iterator[dict[str, str]]:
    """The environment of a cluster of one CPU."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield {**os.environ, "RAY_ADDRESS": cluster.address}
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.ray
def test_a_packing_killed_on_one_cpu_goes_on_to_the_bytes_of_an_undisturbed_one(world, tmp_path, one_cpu, without_ray):
    fields = {"manifest": world / "manifest", "shard_size": 1, "reencode__shorter_side": 24}
    killed = tmp_path / "killed"
    flags = [f"--{name.replace('__', '.')}={value}" for name, value in fields.items()]
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        num_before = len(list(killed.glob("_pack/commits/*.json")))
        command = [sys.executable, "-m", "jobs.pack", *flags, f"--output={killed}"]
        driver = subprocess.Popen(command, env=one_cpu, **QUIET)
        while driver.poll() is None and len(list(killed.glob("_pack/commits/*.json"))) < num_before + 3:
            time.sleep(0.05)
        driver.send_signal(signal_number)
        driver.wait(60)
        assert not (killed / "manifest.json").exists()
    assert run_job("pack", output=killed, env=one_cpu, **fields)["num_packed"] == 27
    undisturbed = tmp_path / "undisturbed"
    assert main(load(PackConfig, [*flags, f"--output={undisturbed}"]))["num_packed"] == 27
    assert files(killed) == files(undisturbed)
    assert len(packed_images(killed)) == 27


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("jobs_share_ray")
def test_the_same_packing_twice_at_once_ends_whole(world, tmp_path):
    fields = {"manifest": world / "manifest", "output": tmp_path / "twins", "shard_size": 8}
    with ThreadPoolExecutor(2) as pool:
        twins = [pool.submit(run_job, "pack", **fields) for _ in range(2)]
        assert [twin.result()["num_packed"] for twin in twins] == [30, 30]
    assert len(packed_images(tmp_path / "twins")) == 30
