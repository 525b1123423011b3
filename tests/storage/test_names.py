import os
from pathlib import Path

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


def test_links_do_not_lead_out_of_a_root_by_way_of_their_parents(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "set").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "set").symlink_to(tmp_path / "elsewhere" / "set")
    (tmp_path / "linked").symlink_to(tmp_path / "photos")
    root = f"file://{tmp_path}/photos"
    assert not storage.is_under(f"{root}/set/../private.jpg", root)  # which the system looks for in elsewhere
    assert storage.is_under(f"{root}/set/a.jpg", root)  # as it is listed
    assert storage.is_under(f"{root}/other/../a.jpg", root)
    assert storage.is_under(f"file://{tmp_path}/linked/other/../a.jpg", f"file://{tmp_path}/linked")
    assert storage.is_under(f"{root}/other/../\0.jpg", root)  # which no file is named, as whoever reads it will tell
    assert not storage.is_under("file:///other/../data/a.jpg", "s3://data")
