"""What the tests of inference share."""

from pathlib import Path

import pytest

from tests.worlds import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, their manifest and two bundles, of a test file's own."""
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root
