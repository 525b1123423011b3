import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.data.manifest import write_manifest
from pipeline.data.packed import PackedSource, WebDatasetSource
from pipeline.errors import ManifestError
from tests.manifests import fresh, images_of, uris_of


def packed_table(uris: list[str], **more: list[Any]) -> pa.Table:
    return pa.table({"uri": uris, "bytes": [uri.encode() * 3 for uri in uris], **more})


def test_each_row_group_of_packed_parquet_is_a_shard(tmp_path: Path) -> None:
    uris = [f"s3://origin/{number}.jpg" for number in range(5)]
    table = packed_table(uris, label=["b", "a", "b", None, "a"], size=[54] * 5)
    pq.write_table(table, tmp_path / "p0.parquet", row_group_size=3)
    pq.write_table(packed_table(["plain name"], label=["c"], size=[30]), tmp_path / "p1.parquet")
    made = write_manifest(fresh(), PackedSource(str(tmp_path)), shard_size=2)
    shards = list(made.shards())
    assert [(shard.num_images, shard.source_row_group, shard.num_bytes) for shard in shards] == [
        (3, 0, 162),
        (2, 1, 108),
        (1, 0, 30),
    ]
    assert [str(shard.source)[-10:] for shard in shards] == ["p0.parquet", "p0.parquet", "p1.parquet"]
    assert shards[0].source_etag == storage.head(f"file://{tmp_path}/p0.parquet").etag
    assert uris_of(made) == [*uris, "plain name"]
    assert [image["label"] for image in images_of(made)] == [1, 0, 1, None, 0, 2]


def test_etags_in_quotes_are_those_without(tmp_path: Path) -> None:
    pq.write_table(packed_table(["x", "y"], etag=['"abc"', None]), tmp_path / "p.parquet")
    made = write_manifest(fresh(), PackedSource(str(tmp_path)), shard_size=2)
    assert [image["etag"] for image in images_of(made)] == ["abc", None]


def test_packed_parquet_without_its_columns_or_names_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["x"], "image": [b"x"]}), tmp_path / "p.parquet")
    with pytest.raises(ManifestError, match="expected a column 'bytes', found uri, image"):
        write_manifest(fresh(), PackedSource(str(tmp_path)), shard_size=2)
    pq.write_table(pa.table({"uri": ["x", None], "bytes": [b"x", b"y"]}), tmp_path / "p.parquet")
    with pytest.raises(ManifestError, match="1 empty"):
        write_manifest(fresh(), PackedSource(str(tmp_path)), shard_size=2)


def test_packed_shards_with_labels_of_two_kinds_are_refused(tmp_path: Path) -> None:
    pq.write_table(packed_table(["x"], label=["cat"]), tmp_path / "p0.parquet")
    pq.write_table(packed_table(["y"], label=[3]), tmp_path / "p1.parquet")
    with pytest.raises(ManifestError, match=r"integers in '.*/p1\.parquet' and strings in '.*/p0\.parquet'"):
        write_manifest(fresh(), PackedSource(str(tmp_path)), shard_size=2)


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


LONG = "very/long/" * 15 + "ünï"


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_webdataset_tars_are_cut_on_member_boundaries(tmp_path: Path, tar_format: int) -> None:
    first = {"a.cls": b"3", "a.jpg": b"x" * 600, f"{LONG}.left.jpg": b"y" * 5, f"{LONG}.cls": b"1\n", "c.txt": b"no"}
    write_tar(tmp_path / "0.tar", first | {"d.PNG": b""}, tar_format)
    write_tar(tmp_path / "1.tar", {"e.jpg": b"z", "e.cls": b"0"}, tar_format)
    made = write_manifest(fresh(), WebDatasetSource(str(tmp_path)), shard_size=2)
    tar = f"file://{tmp_path}/0.tar"
    assert uris_of(made) == [f"{tar}/a.jpg", f"{tar}/{LONG}.left.jpg", f"{tar}/d.PNG", f"file://{tmp_path}/1.tar/e.jpg"]
    assert [image["label"] for image in images_of(made)] == [3, 1, None, 0]
    shards = list(made.shards())
    assert [shard.num_images for shard in shards] == [2, 1, 1]
    assert made.made_from["skipped"] == {"not_included": 1}
    for shard in shards:
        assert shard.source is not None
        part = storage.read(shard.source, shard.source_start, shard.source_end)
        with tarfile.open(fileobj=io.BytesIO(part), mode="r:") as archive:
            names = {storage.join(shard.source, name) for name in archive.getnames()}
        assert {image["uri"] for image in made.images(shard).to_pylist()} <= names


def test_an_empty_cls_is_no_label(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"x", "a.cls": b"\n", "b.jpg": b"x", "b.cls": b"cat"})
    made = write_manifest(fresh(), WebDatasetSource(str(tmp_path / "0.tar")), shard_size=2)
    assert (made.classes, [image["label"] for image in images_of(made)]) == (["cat"], [None, 0])


def test_class_names_in_a_webdataset_stay_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"x", "a.cls": b"dog", "b.jpg": b"x", "b.cls": b"cat"})
    assert write_manifest(fresh(), WebDatasetSource(str(tmp_path / "0.tar")), shard_size=2).classes == ["cat", "dog"]


@pytest.mark.parametrize("content", [b"no tar at all" * 100, gzip.compress(b"0" * 2000, mtime=0)])
def test_what_is_no_tar_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ManifestError, match=r"WebDataset tar at .*0\.tar"):
        write_manifest(fresh(), WebDatasetSource(str(tmp_path)), shard_size=2)


TWO = {"a.jpg": b"x" * 6000, "b.jpg": b"x" * 6000}  # the second header is at 6656, the archive's end at 13312


@pytest.mark.parametrize("num_bytes", [9000, 6656 + 100, 6656, 13312, 13312 + 100])
def test_a_truncated_tar_is_named(tmp_path: Path, num_bytes: int) -> None:
    write_tar(tmp_path / "0.tar", TWO)
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[:num_bytes])
    with pytest.raises(ManifestError, match=r"WebDataset tar at .*0\.tar"):
        write_manifest(fresh(), WebDatasetSource(str(tmp_path)), shard_size=2)


@pytest.mark.parametrize("damage", [b"\xff", bytes(512)])
def test_a_tar_with_a_damaged_header_is_named_rather_than_read_in_part(tmp_path: Path, damage: bytes) -> None:
    write_tar(tmp_path / "0.tar", TWO)
    content = bytearray((tmp_path / "0.tar").read_bytes())
    content[6656 : 6656 + len(damage)] = damage
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ManifestError, match=r"WebDataset tar at .*0\.tar.* at byte 6656"):
        write_manifest(fresh(), WebDatasetSource(str(tmp_path)), shard_size=2)


def test_tars_joined_by_cat_are_refused_rather_than_read_in_part(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", TWO)
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes() * 2)
    with pytest.raises(ManifestError, match="nothing behind the archive's end at byte 13312, got more"):
        write_manifest(fresh(), WebDatasetSource(str(tmp_path)), shard_size=2)


def test_a_tar_may_end_with_a_single_block_of_zeros(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", TWO)
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[: 13312 + 512])
    assert write_manifest(fresh(), WebDatasetSource(str(tmp_path)), shard_size=2).num_images == 2


def test_links_in_a_tar_are_counted_as_skipped_and_folders_are_not(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"x")
    (tmp_path / "images/soft.jpg").symlink_to("a.jpg")
    (tmp_path / "images/hard.jpg").hardlink_to(tmp_path / "images/a.jpg")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(tmp_path / "images", "images")
    made = write_manifest(fresh(), WebDatasetSource(str(tmp_path / "0.tar")), shard_size=2)
    assert (made.num_images, made.made_from["skipped"]) == (1, {"not_a_file": 2})
