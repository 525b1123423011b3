import os

import pytest

from pipeline import storage
from pipeline.errors import ConfigError


def test_locations_have_one_spelling() -> None:
    assert storage.normalise("s3://bucket/photos/") == "s3://bucket/photos"
    assert storage.normalise("/data/a/../b/") == "file:///data/b"
    assert storage.normalise("file:///data//b") == "file:///data/b"
    assert storage.normalise("relative") == f"file://{os.getcwd()}/relative"
    with pytest.raises(ConfigError, match="ftp"):
        storage.normalise("ftp://host/photos")


def test_only_what_lies_below_a_root_is_under_it() -> None:
    assert storage.is_under("s3://bucket/a/b.jpg", "s3://bucket/a")
    assert storage.is_under("s3://bucket/a/b.jpg", "s3://")
    assert not storage.is_under("s3://bucket/ab.jpg", "s3://bucket/a")
    assert not storage.is_under("s3://bucket-2/a", "s3://bucket")
    assert not storage.is_under("file:///data/../etc/passwd", "file:///data")
