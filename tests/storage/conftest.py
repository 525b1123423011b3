"""The stores that every test of storage runs on."""

from pathlib import Path
from uuid import uuid4

import pytest


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_uri"))
    return f"file://{tmp_path}" if request.param == "file" else f"memory://{uuid4().hex}"
