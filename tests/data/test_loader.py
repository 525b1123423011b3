"""From encoded images to batches, and samples of a manifest."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data.images import decode
from pipeline.data.loader import LoadLog, load_batches, sample_pixels
from pipeline.data.readers import ReadLimits
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError
from tests.manifests import uris_of
from tests.worlds import make_world, plan_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


def test_samples_are_good_images_from_all_over_the_manifest(world):
    manifest, preprocessing = plan_of(world).manifest, Preprocessing(resize_size=32, crop_size=32)
    samples = sample_pixels(manifest, ReadLimits(), preprocessing, 8)
    assert (samples.dtype, samples.shape[1:]) == (torch.uint8, (3, 32, 32))
    assert 4 <= len(samples) <= 8
    first = preprocessing.apply(decode(storage.read(uris_of(plan_of(world).manifest)[0]), max_pixels=10**6))
    assert torch.equal(samples[0], first)


def test_samples_that_cannot_be_had_are_told_of_with_the_first_reason(world, caplog):
    limits, preprocessing = ReadLimits(allowed_roots=["s3://elsewhere/"]), Preprocessing(resize_size=32, crop_size=32)
    assert len(sample_pixels(plan_of(world).manifest, limits, preprocessing, 8)) == 0
    assert re.search(r"(\d+) of \1 images to try a network on .* the first: '.*' is not under a root", caplog.text)


def test_whatever_preprocessing_raises_is_the_images_error():
    def decode_to_nonsense(data: bytes) -> torch.Tensor:
        return torch.zeros(3)

    log = LoadLog()
    resize = [Preprocessing(resize_size=4, crop_size=4).apply]
    assert list(load_batches([b"x"], decode_to_nonsense, resize, batch_size=2, num_threads=1, log=log)) == []
    assert (log.errors[0].stage, log.errors[0].error) == ("preprocess", "failed")


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=40), st.integers(1, 7), st.integers(1, 4))
def test_batches_hold_every_good_image_once_in_order_and_are_full_but_for_the_last(is_good, batch_size, num_threads):
    def decode_or_fail(data: bytes) -> torch.Tensor:
        if data == b"bad":
            raise ImageError("decode", "corrupt", "bad")
        return torch.full((3, 2, 2), data[0], dtype=torch.uint8)

    encoded = [bytes([index]) if good else b"bad" for index, good in enumerate(is_good)]
    log = LoadLog()
    batches = list(
        load_batches(
            encoded,
            decode_or_fail,
            [Preprocessing(resize_size=2, crop_size=2).apply],
            batch_size=batch_size,
            num_threads=num_threads,
            log=log,
        )
    )
    rows = [row for batch in batches for row in batch.rows]
    assert rows == [index for index, good in enumerate(is_good) if good]
    assert sorted(log.errors) == [index for index, good in enumerate(is_good) if not good]
    assert all(len(batch.rows) == batch_size for batch in batches[:-1])
    assert [int(image[0, 0, 0]) for batch in batches for image in batch.pixels[0]] == rows
