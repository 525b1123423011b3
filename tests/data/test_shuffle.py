from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import shuffle
from pipeline.data.manifest import Manifest, write_manifest
from pipeline.data.packed import PackedSource
from pipeline.data.shuffle import ShuffledSource
from pipeline.errors import ManifestError
from tests.manifests import Rows, fresh, images_of, some_rows, uris_of

CLASSES = ["a", "b", "c"]


def listed(num_images: int = 300, shard_size: int = 7) -> Manifest:
    """Images sorted by class, as folders list them; the last one without a label."""
    rows = [(*row[:3], CLASSES[index * 3 // num_images]) for index, row in enumerate(some_rows(num_images))]
    return write_manifest(fresh(), Rows([*rows[:-1], (*rows[-1][:3], None)], 50), shard_size=shard_size)


def shuffled(manifest: Manifest, seed: int = 0, shard_size: int = 60) -> Manifest:
    return write_manifest(fresh(), ShuffledSource(manifest, seed), shard_size=shard_size, classes=manifest.classes)


def by_uri(manifest: Manifest) -> list[dict]:
    return sorted(images_of(manifest), key=lambda image: image["uri"])


def test_every_image_is_kept_once_with_all_that_is_known_of_it():
    manifest = listed()
    result = shuffled(manifest)
    assert by_uri(result) == by_uri(manifest)
    assert uris_of(result) != uris_of(manifest)
    assert (result.classes, result.num_shards) == (CLASSES, 5)


def test_blocks_smaller_than_the_manifest_give_the_same_order(monkeypatch):
    manifest = listed()
    whole = uris_of(shuffled(manifest))
    monkeypatch.setattr(shuffle, "TABLE_ROWS", 10)
    assert uris_of(shuffled(manifest)) == whole


def test_the_order_depends_on_the_seed_and_the_images_and_not_on_their_shards():
    order = uris_of(shuffled(listed(), seed=5))
    assert uris_of(shuffled(listed(shard_size=299), seed=5)) == order
    assert uris_of(shuffled(listed(), seed=6)) != order


def test_a_shard_of_sorted_classes_gets_images_of_all_of_them():
    result = shuffled(listed(3000), shard_size=300)
    for shard in result.shards():
        labels = result.images(shard)["label"].to_pylist()
        assert min(Counter(labels)[label] for label in range(3)) > 60  # 100 expected, 5 standard deviations


def test_places_before_and_after_are_uncorrelated():
    manifest = listed(3000)
    before = {uri: place for place, uri in enumerate(uris_of(manifest))}
    after = [before[uri] for uri in uris_of(shuffled(manifest))]
    assert abs(np.corrcoef(range(3000), after)[0, 1]) < 0.1


def test_equal_hashes_are_ordered_by_uri(monkeypatch):
    monkeypatch.setattr(shuffle, "hash_uris", lambda uris, seed: np.zeros(len(uris), np.uint64))
    manifest = listed(20)
    assert uris_of(shuffled(manifest)) == sorted(uris_of(manifest))


def test_images_without_any_label_stay_without():
    result = shuffled(write_manifest(fresh(), Rows(some_rows(5)), shard_size=2))
    assert [image["label"] for image in images_of(result)] == [None] * 5
    assert result.classes is None


def test_packed_images_are_refused(tmp_path):
    pq.write_table(pa.table({"uri": ["x"], "bytes": [b"x"]}), tmp_path / "p.parquet")
    packed = write_manifest(fresh(), PackedSource(str(tmp_path)), shard_size=2)
    with pytest.raises(ManifestError, match=r"loose images to shuffle, got packed ones in .*p\.parquet"):
        ShuffledSource(packed, 0)
