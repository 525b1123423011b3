from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.bound import verdict


def test_a_loop_that_never_waits_is_bound_by_its_steps():
    assert verdict(82, 0.001).startswith("compute-bound: 0.1% of the time")


def test_a_loop_that_waits_is_told_what_it_would_reach_without():
    assert verdict(300, 0.25).startswith("data-bound: 25.0% of the time")
    assert verdict(300, 0.25).endswith("raise 300 to 400 images/s")


@given(st.floats(0, 1e6), st.floats(0, 1))
def test_any_rate_and_share_make_a_sentence(images_per_s, share):
    assert verdict(images_per_s, share)
