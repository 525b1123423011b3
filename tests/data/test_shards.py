import pytest

from pipeline.data.manifest import write_manifest
from pipeline.errors import ManifestError
from tests.manifests import Row, Rows, fresh, images_of, some_rows


def test_given_classes_decide_the_ids() -> None:
    rows: list[Row] = [("s3://b/1", None, None, "dog"), ("s3://b/2", None, None, "cat"), ("s3://b/3", None, None, None)]
    made = write_manifest(fresh(), Rows(rows), shard_size=5, classes=["dog", "emu", "cat"])
    assert [image["label"] for image in images_of(made)] == [0, 2, None]
    assert made.classes == ["dog", "emu", "cat"]


def test_a_label_outside_the_given_classes_is_named() -> None:
    with pytest.raises(ManifestError, match="among the 2 classes given, got 'cat'"):
        write_manifest(fresh(), Rows(some_rows(3, "cat")), shard_size=5, classes=["dog", "emu"])


def test_a_class_given_twice_is_named() -> None:
    with pytest.raises(ManifestError, match="'dog' twice"):
        write_manifest(fresh(), Rows(some_rows(3, "dog")), shard_size=5, classes=["cat", "dog", "dog"])


@pytest.mark.parametrize(("kind", "label"), [("ids", "-1"), ("ids", "3"), ("text", "3"), ("ids", str(2**31))])
def test_class_ids_outside_the_classes_are_named(kind: str, label: str) -> None:
    with pytest.raises(ManifestError, match=f"class ids from 0 to 2, got {label}"):
        write_manifest(fresh(), Rows(some_rows(3, label), label_kind=kind), shard_size=5, classes=["a", "b", "c"])


def test_numbers_in_text_are_class_ids_unless_they_are_given_as_names() -> None:
    rows: list[Row] = [(f"s3://b/{label}", None, None, label) for label in ("2", "10", "0")]
    by_id = write_manifest(fresh(), Rows(rows, label_kind="text"), shard_size=5)
    assert ([image["label"] for image in images_of(by_id)], by_id.classes) == ([2, 10, 0], None)
    by_name = write_manifest(fresh(), Rows(rows, label_kind="text"), shard_size=5, classes=["0", "10", "2"])
    assert [image["label"] for image in images_of(by_name)] == [2, 1, 0]
    padded: list[Row] = [("s3://b/1", None, None, "007"), ("s3://b/2", None, None, "1")]
    assert write_manifest(fresh(), Rows(padded, label_kind="text"), shard_size=5).classes == ["007", "1"]
