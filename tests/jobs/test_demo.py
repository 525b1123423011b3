"""The demo's network learns, and its run is whole."""

import pytest
from pydantic import ValidationError

from jobs.demo import DemoConfig
from tests.worlds import run_job


@pytest.mark.parametrize(
    "fields", [{"num_train": 7}, {"num_train": 63}, {"num_images": 0}, {"num_images": -5}, {"epochs": 0}]
)
def test_a_demo_of_too_few_images_or_epochs_is_refused(fields):
    with pytest.raises(ValidationError, match="greater than or equal to"):
        DemoConfig(**fields)


@pytest.mark.slow
@pytest.mark.ray
def test_the_demo_trains_a_network_that_tells_the_shapes_apart(tmp_path):
    summary = run_job("demo", root=tmp_path / "demo", num_images=300)
    assert (summary["status"], summary["num_images"], summary["num_errors"]) == ("done", 300, 3)
    assert summary["accuracy"] > 0.6  # one in six by chance
    again = run_job("demo", root=tmp_path / "demo", num_images=300)
    assert (again["status"], again["accuracy"]) == ("was done", summary["accuracy"])
