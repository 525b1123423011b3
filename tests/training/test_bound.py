"""What binds a training, from what the loop and its device waited for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.bound import Pace, idle_share, verdict


@pytest.mark.parametrize(
    ("data_idle_share", "device_lag", "on_gpu", "found"),
    [
        (0.001, 0.0, False, "compute-bound: 0.1% of the time devices stood idle for data"),
        (0.25, 0.0, False, "data-bound: 25.0% of the time devices stood idle for data"),
        (0.001, 0.9, True, "compute-bound: 0.1% of the time devices stood idle for data"),
        (0.5, 0.3, True, "data-bound: 50.0% of the time devices stood idle for data"),
        (0.8, 0.0, True, "data-bound: 80.0% of the time devices stood idle for data"),
        (0.001, 0.02, True, "launch-bound: the GPU has done a step as soon as it is launched"),
    ],
)
def test_what_binds_is_what_the_device_waits_for(data_idle_share, device_lag, on_gpu, found):
    assert verdict(82, data_idle_share, device_lag, on_gpu=on_gpu).startswith(found)


def test_what_data_costs_is_told_as_the_rate_without():
    assert verdict(300, 0.25, 0.0, on_gpu=False).endswith("raise 300 to 400 images/s")


@given(st.integers(1, 12), *[st.integers(0, 50)] * 3)
def test_the_idle_share_is_that_of_a_device_that_works_behind_a_loop(num_steps, data, launch, work):
    """A loop that looks after every `num_steps`: a batch is there `data` after the last was taken, then is launched."""
    now = free = wait = idle = 0
    for _ in range(num_steps):
        idle += max(now + data - max(free, now), 0)
        now, wait = now + data, wait + data
        free = max(free, now) + launch + work  # the device is done so long after the launch began, or the step before
        now += launch
    lag, elapsed = free - now, free
    if elapsed and data >= work:  # the device sets no pace, so its lag is the same after every step
        assert idle_share(wait, lag, elapsed, num_steps) == pytest.approx(idle / elapsed)
    elif elapsed:
        assert idle_share(wait, lag, elapsed, num_steps) <= idle / elapsed + 1e-9


@given(st.floats(0, 1e6), st.floats(0, 1), st.floats(0, 100), st.booleans())
def test_any_figures_make_a_sentence(images_per_s, share, device_lag, on_gpu):
    assert verdict(images_per_s, share, device_lag, on_gpu=on_gpu)


def test_the_pace_of_no_steps_binds_nothing():
    assert Pace.of({}) == Pace(0, 0, 0, 0, 0)  # a state of an earlier version
    assert Pace.of({}).verdict(on_gpu=False) is None
    known = Pace.of({"pace": {"train_s": 10.0, "images": 820.0, "wait_s": 4.0, "idle_s": 2.5, "lag_s": 0.0}})
    assert known == Pace(10, 82, 0.4, 0.25, 0)
    assert known.verdict(on_gpu=False) == verdict(82, 0.25, 0, on_gpu=False)
