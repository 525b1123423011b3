"""Fixtures of the tests of data."""

from pathlib import Path

import pytest


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}" if request.param == "file" else str(request.getfixturevalue("s3_uri"))
