import os
import sys
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.data.manifest import write_manifest
from pipeline.data.sources import Filters, LabelTable, PrefixSource
from pipeline.data.uri_table import TableSource, read_labels
from pipeline.errors import ManifestError
from tests.manifests import fresh, images_of, uris_of


def save(uri: str, *, size: tuple[int, int] = (1, 1)) -> None:
    storage.write(uri, b"x" * (size[0] * size[1]))


def test_a_prefix_is_listed_with_folder_names_as_labels(tmp_path: Path) -> None:
    for name in ("dog/1.jpg", "cat/deep/2.JPEG", "cat/3.png", "top.jpg", "cat/notes.txt"):
        save(f"file://{tmp_path}/{name}")
    made = write_manifest(fresh(), PrefixSource(str(tmp_path), labels="folders"), shard_size=10)
    assert made.classes == ["cat", "dog"]
    found = {image["uri"].removeprefix(f"file://{tmp_path}/"): image["label"] for image in images_of(made)}
    assert found == {"top.jpg": None, "cat/3.png": 0, "cat/deep/2.JPEG": 0, "dog/1.jpg": 1}
    assert made.made_from["skipped"] == {"not_included": 1}
    assert made.made_from["num_labelled"] == 3
    assert all(image["size"] == 1 and image["etag"] for image in images_of(made))


def test_globs_match_below_the_prefix_without_minding_case_and_sizes_are_limits() -> None:
    root = f"memory://{uuid4().hex}"
    for name, edge in {"A/1.jpg": 3, "a/2.JPG": 30, "b/thumbs/3.jpg": 3, "b/4.dat": 3, "b/5.jpg": 1}.items():
        save(f"{root}/{name}", size=(edge, 1))
    filters = Filters(include=["*.JPG", "b/*.dat"], exclude=["*/thumbs/*"], min_bytes=2, max_bytes=10)
    made = write_manifest(fresh(), PrefixSource(root, filters), shard_size=5)
    assert uris_of(made) == [f"{root}/A/1.jpg", f"{root}/b/4.dat"]
    assert made.made_from["skipped"] == {"excluded": 1, "too_large": 1, "too_small": 1}


def test_contradictory_sizes_are_refused() -> None:
    with pytest.raises(ManifestError, match="min_bytes <= max_bytes, got 10 > 2"):
        Filters(min_bytes=10, max_bytes=2)


def test_a_prefix_takes_its_labels_from_a_table_of_relative_names_or_uris(tmp_path: Path) -> None:
    for name in ("1.jpg", "2 ü.jpg", "3.jpg"):
        save(f"file://{tmp_path}/images/{name}")
    (tmp_path / "labels.csv").write_text(f"label,uri\ndog,1.jpg\ncat,file://{tmp_path}/images/2 ü.jpg\n")
    labels = read_labels(str(tmp_path / "labels.csv"), root=str(tmp_path / "images"))
    made = write_manifest(fresh(), PrefixSource(str(tmp_path / "images"), labels=labels), shard_size=5)
    assert ([image["label"] for image in images_of(made)], made.classes) == ([1, 0, None], ["cat", "dog"])
    strangers = LabelTable({"s3://b/x": "dog"}, "text")
    with pytest.raises(ManifestError, match=r"expected labels for images below .* got some for others"):
        write_manifest(fresh(), PrefixSource(str(tmp_path / "images"), labels=strangers), shard_size=5)
    (tmp_path / "labels.csv").write_text("label,uri\ndog,1.jpg\ncat,1.jpg\n")
    with pytest.raises(ManifestError, match="one label for"):
        read_labels(str(tmp_path / "labels.csv"), root=str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "classes", "ids"), [(["1", "2", "10"], ["1", "10", "2"], [0, 2, 1]), ([1, 2, 10], None, [1, 2, 10])]
)
def test_labels_from_a_table_keep_the_kind_that_their_type_tells(
    tmp_path: Path, labels: list[str | int], classes: list[str] | None, ids: list[int]
) -> None:
    uris = [f"file://{tmp_path}/images/{number}.jpg" for number in range(3)]
    for uri in uris:
        save(uri)
    pq.write_table(pa.table({"uri": uris, "label": labels}), tmp_path / "labels.parquet")
    table = str(tmp_path / "labels.parquet")
    by_prefix = PrefixSource(str(tmp_path / "images"), labels=read_labels(table, root=str(tmp_path)))
    for source in (by_prefix, TableSource(table, label_column="label")):
        made = write_manifest(fresh(), source, shard_size=5)
        assert (made.classes, [image["label"] for image in images_of(made)]) == (classes, ids)


def test_what_is_hidden_is_no_image_and_its_folder_no_class_unless_asked_for(tmp_path: Path) -> None:
    hidden = [".cache/1.jpg", "cat/.thumbs/2.jpg", "cat/._3.jpg", "__MACOSX/cat/4.jpg", "dog/@eaDir/5.jpg"]
    for name in (*hidden, "cat/..6.jpg", "cat/7.jpg", "dog/8.jpg"):
        save(f"file://{tmp_path}/{name}")
    made = write_manifest(fresh(), PrefixSource(str(tmp_path), labels="folders"), shard_size=10)
    assert (made.classes, made.made_from["skipped"]) == (["cat", "dog"], {"hidden": 6})
    everything = PrefixSource(str(tmp_path), Filters(hidden=True), labels="folders")
    assert write_manifest(fresh(), everything, shard_size=10).classes == [".cache", "__MACOSX", "cat", "dog"]


def test_a_dot_that_stands_for_the_folder_itself_hides_nothing() -> None:
    filters = Filters()
    assert filters.accepts("./a.jpg", 1)  # as `tar -c .` names them
    assert not filters.accepts("./.a.jpg", 1)


def test_formats_that_are_never_decoded_are_no_images(tmp_path: Path) -> None:
    for name in ("a.jpg", "favicon.ico", "b.tga"):
        save(f"file://{tmp_path}/{name}")
    made = write_manifest(fresh(), PrefixSource(str(tmp_path)), shard_size=5)
    assert (made.num_images, made.made_from["skipped"]) == (1, {"not_included": 2})


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have UTF-8 names alone")
def test_a_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"1")
    with pytest.raises(ManifestError, match=r"UTF-8, got .*caf"):
        write_manifest(fresh(), PrefixSource(str(tmp_path)), shard_size=5)


@pytest.mark.s3
def test_a_bucket_with_odd_names_is_listed(s3_uri: str) -> None:
    names = sorted(["a/50% #1?.jpg", "a/new\nline.jpg", "b/ü 'quote'.jpg", "b/plain.jpg"])
    for name in names:
        storage.write(f"{s3_uri}/{name}", b"1")
    made = write_manifest(f"{s3_uri}/made", PrefixSource(s3_uri, labels="folders"), shard_size=3)
    assert uris_of(made) == [f"{s3_uri}/{name}" for name in names]
    assert made.classes == ["a", "b"]
    assert images_of(made)[0]["etag"] == storage.head(f"{s3_uri}/{names[0]}").etag


def test_nothing_left_is_said_with_what_was_skipped() -> None:
    root = f"memory://{uuid4().hex}"
    for name in ("a.txt", "b.jpg", "c.PNG"):
        save(storage.join(root, name))
    with pytest.raises(ManifestError, match="1 not_included, 2 too_small"):
        write_manifest(fresh(), PrefixSource(root, Filters(min_bytes=10)), shard_size=5)
    with pytest.raises(ManifestError, match="skipped: nothing"):
        write_manifest(fresh(), PrefixSource(f"{root}-empty"), shard_size=5)
