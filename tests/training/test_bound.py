"""What binds a training, from what the loop and its device waited for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.bound import verdict


@pytest.mark.parametrize(
    ("data_wait_share", "device_lag", "on_gpu", "found"),
    [
        (0.001, 0.0, False, "compute-bound: 0.1% of the time"),
        (0.25, 0.0, False, "data-bound: 25.0% of the time"),
        (0.001, 0.9, True, "compute-bound: 0.0% of the time"),
        (0.3, 0.5, True, "compute-bound: 0.0% of the time"),  # the GPU was at work while the loop waited
        (0.8, 0.3, True, "data-bound: 50.0% of the time"),
        (0.8, 0.0, True, "data-bound: 80.0% of the time"),
        (0.001, 0.02, True, "launch-bound: the GPU has done a step as soon as it is launched"),
    ],
)
def test_what_binds_is_what_the_device_waits_for(data_wait_share, device_lag, on_gpu, found):
    assert verdict(82, data_wait_share, device_lag, on_gpu=on_gpu).startswith(found)


def test_what_data_costs_is_told_as_the_rate_without():
    assert verdict(300, 0.25, 0.0, on_gpu=False).endswith("raise 300 to 400 images/s")
    assert verdict(300, 0.5, 0.25, on_gpu=True).endswith("raise 300 to 400 images/s")


@given(st.floats(0, 1e6), st.floats(0, 1), st.floats(0, 100), st.booleans())
def test_any_figures_make_a_sentence(images_per_s, share, device_lag, on_gpu):
    assert verdict(images_per_s, share, device_lag, on_gpu=on_gpu)
