import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipeline.data.inventory import InventorySource
from pipeline.data.manifest import write_manifest
from pipeline.errors import ManifestError
from tests.manifests import fresh, images_of


def write_inventory(folder: Path, file_format: str, rows: dict[str, list[Any]], file_schema: str) -> str:
    suffix = "csv.gz" if file_format == "CSV" else "parquet"
    (folder / "data").mkdir(parents=True)
    data = folder / "data" / f"0123.{suffix}"
    if file_format == "CSV":
        buffer = io.BytesIO()
        options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="all_valid")
        pyarrow.csv.write_csv(
            pa.table({name: [str(v) for v in values] for name, values in rows.items()}), buffer, options
        )
        data.write_bytes(gzip.compress(buffer.getvalue()))
    else:
        pq.write_table(pa.table(rows), data)
    report = {"sourceBucket": "photos", "fileFormat": file_format, "fileSchema": file_schema}
    report |= {"files": [{"key": f"reports/photos/daily/data/0123.{suffix}", "size": 1}]}
    (folder / "2026-11-01T00-00Z").mkdir()
    (folder / "2026-11-01T00-00Z" / "manifest.json").write_text(json.dumps(report))
    return str(folder / "2026-11-01T00-00Z" / "manifest.json")


INVENTORY = {
    "Bucket": ["photos"] * 5,
    "Key": ["a+b/50%25+%231.jpg", "old.jpg", "gone.jpg", "notes.txt", "a%2Bb/%C3%BC.PNG"],
    "IsLatest": ["true", "false", "true", "true", "true"],
    "IsDeleteMarker": ["false", "false", "true", "false", "false"],
    "Size": ["10", "20", "", "40", "50"],
    "ETag": ['"e0"', "e1", "", "e3", "e4"],
}


def check_inventory(uri: str) -> None:
    made = write_manifest(fresh(), InventorySource(uri), shard_size=2)
    assert [tuple(image.values()) for image in images_of(made)] == [
        ("s3://photos/a b/50% #1.jpg", 10, "e0", None),
        ("s3://photos/a+b/ü.PNG", 50, "e4", None),
    ]
    assert made.made_from["skipped"] == {"not_included": 1, "not_latest": 2}


def test_a_csv_inventory_gives_the_latest_images_with_decoded_keys(tmp_path: Path) -> None:
    check_inventory(write_inventory(tmp_path, "CSV", INVENTORY, ", ".join(INVENTORY)))


def test_a_parquet_inventory_gives_the_latest_images_with_keys_as_they_are(tmp_path: Path) -> None:
    rows = {
        "bucket": INVENTORY["Bucket"],
        "key": ["a b/50% #1.jpg", "old.jpg", "gone.jpg", "notes.txt", "a+b/ü.PNG"],
        "is_latest": [True, False, True, True, True],
        "is_delete_marker": [False, False, True, False, False],
        "size": [10, 20, None, 40, 50],
        "e_tag": ["e0", "e1", None, "e3", "e4"],
        "storage_class": ["STANDARD"] * 5,
    }
    check_inventory(write_inventory(tmp_path, "Parquet", rows, "message s3.inventory {}"))


def test_an_inventory_of_bucket_and_key_alone_is_enough(tmp_path: Path) -> None:
    rows = {"Bucket": ["photos"], "Key": ["a.jpg"]}
    made = write_manifest(fresh(), InventorySource(write_inventory(tmp_path, "CSV", rows, "Bucket, Key")), shard_size=2)
    assert [tuple(image.values()) for image in images_of(made)] == [("s3://photos/a.jpg", None, None, None)]


@pytest.mark.parametrize("content", ["", "{}", '{"fileFormat": "ORC", "fileSchema": "x", "files": []}', "[1]"])
def test_what_is_no_inventory_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ManifestError, match="S3 Inventory in CSV or Parquet"):
        write_manifest(fresh(), InventorySource(str(tmp_path / "manifest.json")), shard_size=2)
