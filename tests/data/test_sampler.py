"""The order of an epoch: complete, independent of the workers, and resumable at any step."""

import itertools
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sampler import EpochOrder, Steps

shard_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(lambda sizes: np.array(sizes, np.int64))
Image = tuple[int, int]


@st.composite
def orders(draw) -> EpochOrder:
    sizes = draw(shard_sizes)
    lanes = draw(st.integers(1, int(sizes.sum())))
    window = draw(st.one_of(st.none(), st.integers(1, 20)))
    return EpochOrder(sizes, draw(st.integers(0, 3)), draw(st.integers(0, 3)), lanes, window)


def lane_images(order: EpochOrder, lane: int, first: int = 0) -> list[Image]:
    return [
        image
        for window in order.windows(lane, first)
        for image in zip(window.shard_ids.tolist(), window.rows.tolist(), strict=True)
    ]


def epoch_images(order: EpochOrder) -> list[Image]:
    lanes = [lane_images(order, lane) for lane in range(order.num_lanes)]
    return [lanes[p % order.num_lanes][p // order.num_lanes] for p in range(order.num_images)]


@given(orders())
def test_an_epoch_has_every_image_exactly_once(order):
    everything = {(shard, row) for shard, size in enumerate(order.shard_sizes) for row in range(size)}
    assert Counter(epoch_images(order)) == Counter(everything)


@given(orders(), st.integers(1, 9), st.integers(1, 5))
def test_ranks_together_have_every_position_of_every_step_once(order, batch_size, world_size):
    steps = Steps(order.num_images, batch_size, order.num_lanes)
    seen = [
        position
        for step in range(steps.per_epoch)
        for position in sorted(p for rank in range(world_size) for p in steps.share(step, rank, world_size))
    ]
    assert seen == list(range(order.num_images))


@given(st.integers(1, 500), st.integers(1, 64))
def test_steps_are_as_even_as_can_be_and_never_larger_than_the_batch(num_images, batch_size):
    steps = Steps(num_images, batch_size, 4)
    sizes = [end - start for start, end in map(steps.bounds, range(steps.per_epoch))]
    assert sum(sizes) == num_images
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 500), st.integers(1, 64), st.integers(0, 3), st.integers(1, 4))
def test_every_epoch_is_cut_into_the_same_steps(num_images, batch_size, epoch, world_size):
    steps = Steps(num_images, batch_size, 4)
    for step in range(steps.per_epoch):
        of_epoch = epoch * steps.per_epoch + step
        assert steps.bounds(of_epoch) == steps.bounds(step)
        np.testing.assert_array_equal(steps.share(of_epoch, 0, world_size), steps.share(step, 0, world_size))


@given(orders(), st.data())
def test_a_lane_can_be_entered_at_any_image(order, data):
    lane = data.draw(st.integers(0, order.num_lanes - 1))
    first = data.draw(st.integers(0, order.lane_size(lane)))
    assert lane_images(order, lane, first) == lane_images(order, lane)[first:]


@given(orders())
def test_a_window_holds_whole_shards_but_for_those_a_lane_cuts(order):
    for lane in range(order.num_lanes):
        windows = list(order.windows(lane))
        for before, after in itertools.pairwise(windows):
            assert not set(before.shard_ids) & set(after.shard_ids)


def test_another_epoch_and_another_seed_have_another_order():
    sizes = np.full(10, 20, np.int64)
    made = {tuple(epoch_images(EpochOrder(sizes, seed, epoch, 4, 30))) for seed in (0, 1) for epoch in (0, 1)}
    assert len(made) == 4


def test_a_batch_mixes_shards():
    images = epoch_images(EpochOrder(np.full(32, 50, np.int64), 0, 0, 16, 100))
    assert all(len({shard for shard, _ in images[start : start + 64]}) >= 16 for start in range(0, 1600, 64))


def test_draws_belong_to_the_step_and_nothing_else():
    order = EpochOrder(np.array([8], np.int64), 5, 2, 2)
    np.testing.assert_array_equal(order.draws(3, 8, 4), order.draws(3, 8, 4))
    assert (order.draws(3, 8, 4) != order.draws(4, 8, 4)).any()
