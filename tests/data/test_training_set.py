"""What may be trained on, and what is refused before anything is."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.manifest import write_manifest
from pipeline.data.training_set import TrainingSet, refuse_one_class, refuse_other_classes, refuse_overlap
from pipeline.errors import ManifestError
from tests.manifests import Row, Rows, fresh


def opened(rows: list[Row], *, shard_size: int = 2, kind: str = "names", **fields) -> TrainingSet:
    return TrainingSet.open(write_manifest(fresh(), Rows(rows, label_kind=kind), shard_size=shard_size, **fields).uri)


def rows_of(labels: list[str | None], start: int = 0) -> list[Row]:
    return [(f"s3://bucket/{start + number}.jpg", 1, None, label) for number, label in enumerate(labels)]


def md5(content: str) -> str:
    return hashlib.md5(content.encode()).hexdigest()


def test_every_label_is_at_hand_shard_by_shard():
    images = opened(rows_of(["dog", "cat", "cat", "ant", "dog"]))
    assert images.classes == ["ant", "cat", "dog"]
    assert [labels.tolist() for labels in images.labels] == [[2, 1], [1, 0], [2]]
    assert images.shard_sizes.tolist() == [2, 2, 1]
    assert not images.is_packed


def test_bare_class_ids_are_their_own_names():
    images = opened(rows_of(["3", "0", "1"]), kind="ids")
    assert images.classes == ["0", "1", "2", "3"]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 7))
def test_class_counts_are_those_of_all_shards(labels, shard_size):
    images = opened(rows_of([str(label) for label in labels]), kind="ids", shard_size=shard_size)
    assert images.class_counts(6).tolist() == [labels.count(label) for label in range(6)]
    assert images.class_counts(6).dtype == np.int64


def test_an_image_without_a_label_is_refused():
    with pytest.raises(ManifestError, match=r"a label for every image of .*, found 1 of 2 in one shard without"):
        opened(rows_of(["a", "b", "a", None]))


def test_a_manifest_without_labels_is_refused():
    with pytest.raises(ManifestError, match=r"found 2 of 2 in one shard without; list them with --labels\.kind"):
        opened(rows_of([None, None]))


def test_a_manifest_without_images_is_refused():
    with pytest.raises(ManifestError, match="found none"):
        opened([])


def test_a_manifest_that_is_not_there_is_refused():
    with pytest.raises(ManifestError, match=r"found none; make one with jobs\.manifest"):
        TrainingSet.open(fresh())


def test_one_class_is_nothing_to_tell_apart():
    with pytest.raises(ManifestError, match=r"at least two classes in .*, found 1"):
        refuse_one_class(opened(rows_of(["a"] * 5), classes=["a", "b"]))


@pytest.mark.parametrize("labels", [["a", "b"], ["a", "a", "b"], ["a", "a", "a", "b", "b"]])
def test_two_classes_are_enough_wherever_they_are(labels):
    refuse_one_class(opened(rows_of(labels)))


def test_an_image_that_is_evaluated_too_is_refused_by_its_name():
    train, evaluation = opened(rows_of(["a", "b", "a"])), opened(rows_of(["a", "b"], start=2))
    with pytest.raises(ManifestError, match=r"found 1, e\.g\. 's3://bucket/2\.jpg', .* says nothing; make one of"):
        refuse_overlap(train, evaluation)


@pytest.mark.parametrize("spelling", ["{}", '"{}"'])
def test_the_same_content_under_another_name_is_refused(spelling):
    train = opened([("s3://a/1.jpg", 1, md5("one"), "a"), ("s3://a/2.jpg", 1, md5("two"), "b")])
    evaluation = opened([("s3://b/9.jpg", 1, spelling.format(md5("two")), "b")])
    with pytest.raises(ManifestError, match=r"found 1, e\.g\. 's3://a/2\.jpg', which is 's3://b/9\.jpg' there"):
        refuse_overlap(train, evaluation)


def test_an_image_of_the_same_name_and_content_is_one_image():
    rows = [("s3://a/1.jpg", 1, md5("one"), "a"), ("s3://a/2.jpg", 1, md5("two"), "b")]
    with pytest.raises(ManifestError, match=r"found 2, e\.g\. 's3://a/1\.jpg'"):
        refuse_overlap(opened(rows), opened(rows))


@pytest.mark.parametrize("etag", [f"{md5('part')}-2", "18c2a7d0e4f-400", None])
def test_an_etag_that_is_no_digest_of_the_content_says_nothing(etag):
    refuse_overlap(opened([("s3://a/1.jpg", 1, etag, "a")]), opened([("s3://b/1.jpg", 1, etag, "a")]))


def test_empty_objects_are_no_content_that_sets_could_share():
    train = opened([("s3://a/1.jpg", 0, md5(""), "a"), ("s3://a/2.jpg", 1, md5("two"), "b")])
    refuse_overlap(train, opened([("s3://b/1.jpg", 0, md5(""), "a")]))
    with pytest.raises(ManifestError, match="found 1, e"):
        refuse_overlap(train, opened([("s3://a/1.jpg", 0, md5(""), "a")]))


@settings(max_examples=15, deadline=None)
@given(st.sets(st.integers(0, 12), min_size=1), st.sets(st.integers(0, 12), min_size=1))
def test_sets_overlap_exactly_where_they_share_content(train, evaluation):
    def rows(place: str, contents: set[int]) -> list[Row]:
        return [(f"s3://{place}/{content}.jpg", 1, md5(str(content)), "a") for content in sorted(contents)]

    sets = opened(rows("train", train)), opened(rows("evaluation", evaluation))
    if train & evaluation:
        with pytest.raises(ManifestError, match=f"found {len(train & evaluation)}, e"):
            refuse_overlap(*sets)
    else:
        refuse_overlap(*sets)


@pytest.mark.parametrize("classes", [["cat", "dog", "owl"], ["cat", "dog"], None])
def test_classes_that_mean_the_networks_pass(classes: list[str] | None):
    images = (
        opened(rows_of(["0", "7"]), kind="ids") if classes is None else opened(rows_of(["cat", "dog"]), classes=classes)
    )
    refuse_other_classes(images.manifest, ["cat", "dog", "owl"])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["dog", "cat", "owl"], "3 in their order, got 3, and label 0 is 'dog' where the network's is 'cat'"),
        (["cat", "owl"], "3 in their order, got 2, and label 1 is 'owl' where the network's is 'dog'"),
        (["cat", "dog", "owl", "ant"], "got 4, and label 3 is 'ant' where the network's is None; make the manifest"),
    ],
)
def test_classes_that_mean_others_are_refused(classes: list[str], message: str):
    with pytest.raises(ManifestError, match=message):
        refuse_other_classes(opened(rows_of(classes), classes=classes).manifest, ["cat", "dog", "owl"])
