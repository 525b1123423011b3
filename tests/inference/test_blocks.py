"""What is handed from tasks to actors."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.gpu_loader import GpuDecoder, prepare
from pipeline.data.loader import LoadLog
from pipeline.data.manifest import Shard
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError
from pipeline.inference import blocks
from pipeline.inference.blocks import DecodedShard, PreparedShard
from pipeline.inference.predictor import Predictor
from pipeline.inference.shard import load_shard
from tests.jpegs import ALL, MAX_PIXELS, PLAIN
from tests.worlds import plan_of

CPU = torch.device("cpu")
PREPROCESSINGS = [Preprocessing(resize_size=16, crop_size=16), Preprocessing(resize_size=20, crop_size=8)]
OPTIONS = {"max_pixels": MAX_PIXELS, "shrink_to": None}
LOST = ImageError("fetch", "not_found", "it is gone")


def shard_of(num_images, num_bytes=0):
    return Shard(3, "images-00000.parquet", 0, num_images, num_bytes)


def test_the_split_form_hands_over_the_batches_of_the_fused_one(world):
    plan = plan_of(world, compute={"batch_size": 3})
    predictor = Predictor(plan.run, plan.manifest)
    shard = next(plan.pending_shards())
    log = LoadLog()
    options = {"num_threads": 2, "isolated": False, "log": log}
    load = partial(load_shard, plan.run, plan.manifest, shard, predictor.preprocessings, **options)
    streamed, as_one = list(load()), load(batch_size=shard.num_images)
    decoded = DecodedShard.gather(shard, 1, as_one, predictor.preprocessings, log)
    handed_over = DecodedShard.from_row(decoded.to_row())
    assert (handed_over.shard, handed_over.attempt) == (shard, 1)
    assert [str(error) for error in handed_over.log.errors.values()] == [str(error) for error in log.errors.values()]
    for before, after in zip(streamed, handed_over.batches(3), strict=True):
        assert before.rows == after.rows
        assert all(torch.equal(a, b) for a, b in zip(before.pixels, after.pixels, strict=True))


def test_a_decoded_shard_without_a_good_image_is_empty_and_not_missing():
    shard = Shard(0, "images-00000.parquet", 0, 2, 0, None, None, None, None, None)
    log = LoadLog({0: ImageError("decode", "empty", "e"), 1: ImageError("decode", "empty", "e")})
    empty = DecodedShard.gather(shard, 1, [], [Preprocessing(resize_size=4, crop_size=4)], log)
    handed_over = DecodedShard.from_row(empty.to_row())
    assert list(handed_over.batches(8)) == []
    assert sorted(handed_over.log.errors) == [0, 1]


def test_pixels_of_more_than_tasks_may_hold_are_not_even_fetched(monkeypatch):
    monkeypatch.setattr(blocks, "_MOST_PIXELS", 2 * 3 * 4 * 4)
    never_read = (pytest.fail("it was read") for _ in range(1))
    preprocessings = [Preprocessing(resize_size=4, crop_size=4)]
    handed_over = DecodedShard.from_row(
        DecodedShard.gather(shard_of(3), 2, never_read, preprocessings, LoadLog()).to_row()
    )
    assert (handed_over.is_whole, handed_over.attempt, len(handed_over.rows)) == (False, 2, 0)
    assert DecodedShard.gather(shard_of(2), 2, [], preprocessings, LoadLog()).is_whole


def gather(items):
    """A row as Ray hands it on, read-only, and the images it was made of."""
    prepared = list(prepare(items, PREPROCESSINGS, OPTIONS, num_threads=1, log=LoadLog()))
    row = PreparedShard.row_of(shard_of(len(items)), 2, prepared, LoadLog(fetch_s=1.5, began_at=3.0))
    row["block"].setflags(write=False)
    return row, prepared


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([*ALL, "lost"]), max_size=80))
def test_a_gpu_is_handed_what_it_would_have_prepared_itself(nvjpeg_on_cpu, names):
    row, prepared = gather([LOST if name == "lost" else ALL[name] for name in names])
    found = PreparedShard.from_row(row)
    assert (found.shard, found.attempt, found.log) == (shard_of(len(names)), 2, LoadLog(fetch_s=1.5, began_at=3.0))
    decoder = GpuDecoder(CPU, PREPROCESSINGS, OPTIONS)
    (one, log), (other, other_log) = (
        (list(decoder.batches(images, batch_size=7, log=log)), log)
        for images, log in ((prepared, LoadLog()), (found.images, LoadLog()))
    )
    assert [batch.rows for batch in one] == [batch.rows for batch in other]
    for batch, its_other in zip(one, other, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch.pixels, its_other.pixels, strict=True))
    assert repr(sorted(log.errors.items())) == repr(sorted(other_log.errors.items()))


def test_the_bytes_of_jpegs_are_not_copied_once_more():
    row, _ = gather([PLAIN["jpeg"]] * 3)
    images = PreparedShard.from_row(row).images
    assert all(np.shares_memory(np.frombuffer(image.data, np.uint8), row["block"]) for image in images)


def test_rays_blocks_take_a_shard_none_of_whose_images_is_there():
    from ray.data.block import BlockAccessor

    row, _ = gather([LOST, LOST])
    block = BlockAccessor.batch_to_block(row)
    again = BlockAccessor.for_block(block).to_batch_format("numpy")
    assert [image.error for image in PreparedShard.from_row(again).images] == ["not_found", "not_found"]


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_shard_of_too_much_to_hand_on_is_left_to_the_actor(monkeypatch, kind):
    items = [ALL[kind]] * 4
    size = len(PLAIN["jpeg"]) if kind == "jpeg" else 3 * (16 * 16 + 8 * 8)
    monkeypatch.setattr(blocks, "_MOST_BYTES", 2 * size)
    taken = []

    def prepared(num_images):
        for item in prepare(items[:num_images], PREPROCESSINGS, OPTIONS, num_threads=1, log=LoadLog()):
            taken.append(item)
            yield item

    def images(num_images, num_bytes):
        shard = shard_of(num_images, num_bytes)
        return PreparedShard.from_row(PreparedShard.row_of(shard, 1, prepared(num_images), LoadLog())).images

    assert len(images(2, 2 * size)) == len(taken) == 2
    assert (images(4, 0), len(taken)) == (None, 2 + 3)
    assert (images(4, 10**6), len(taken)) == (None, 5)
