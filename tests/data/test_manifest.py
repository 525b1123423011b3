import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data.manifest import Manifest, write_manifest
from pipeline.errors import ManifestError
from tests.manifests import Row, Rows, fresh, images_of, some_rows

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
images = st.lists(
    st.tuples(
        texts.map(lambda name: f"s3://bucket/{name}"),
        st.none() | st.integers(0, 2**40),
        st.none() | texts,
        st.none() | st.sampled_from(["cat", "dog", "ünï\n"]),
    ),
    min_size=1,
    max_size=40,
    unique_by=lambda row: row[0],
)


@settings(max_examples=30, deadline=None)
@given(rows=images, shard_size=st.integers(1, 12), rows_per_batch=st.integers(1, 12))
def test_any_list_survives_the_round_trip_in_order(rows: list[Row], shard_size: int, rows_per_batch: int) -> None:
    made = write_manifest(fresh(), Rows(rows, rows_per_batch), shard_size=shard_size)
    assert Manifest.open(made.uri) == made
    shards = list(made.shards())
    names = sorted({label for *_, label in rows if label is not None})
    assert made.classes == (names or None)
    expected = [(uri, size, etag, None if label is None else names.index(label)) for uri, size, etag, label in rows]
    assert [tuple(image.values()) for image in images_of(made)] == expected
    assert [shard.shard_id for shard in shards] == list(range(made.num_shards))
    assert all(shard.num_images == shard_size for shard in shards[:-1])
    assert 0 < shards[-1].num_images <= shard_size
    assert sum(shard.num_images for shard in shards) == made.num_images == len(rows)
    assert sum(shard.num_bytes for shard in shards) == made.num_bytes == sum(size or 0 for _, size, *_ in rows)
    again = write_manifest(fresh(), Rows(rows, rows_per_batch + 1), shard_size=shard_size)
    assert again.digest == made.digest


@settings(max_examples=30, deadline=None)
@given(rows=images, data=st.data())
def test_the_digest_tells_any_change_of_content(rows: list[Row], data: st.DataObject) -> None:
    made = write_manifest(fresh(), Rows(rows), shard_size=5, classes=["cat", "dog", "ünï\n"])
    index = data.draw(st.integers(0, len(rows) - 1))
    uri, size, etag, label = rows[index]
    other = data.draw(
        st.sampled_from(
            [
                (uri + "/other", size, etag, label),
                (uri, 1 if size is None else size + 1, etag, label),
                (uri, size, "" if etag is None else None, label),
                (uri, size, etag, "cat" if label != "cat" else "dog"),
                (uri, size, etag, "cat" if label is None else None),
            ]
        )
    )
    changed = [*rows[:index], other, *rows[index + 1 :]]
    assert write_manifest(fresh(), Rows(changed), shard_size=5, classes=["cat", "dog", "ünï\n"]).digest != made.digest


def test_the_digest_tells_order_cut_and_class_names() -> None:
    rows = some_rows(10, "cat")
    digests = {
        write_manifest(fresh(), Rows(rows), shard_size=5).digest,
        write_manifest(fresh(), Rows(rows[::-1]), shard_size=5).digest,
        write_manifest(fresh(), Rows(rows), shard_size=4).digest,
        write_manifest(fresh(), Rows(some_rows(10, "dog")), shard_size=5).digest,
    }
    assert len(digests) == 4


def test_the_files_are_those_of_the_format(tmp_path: Path) -> None:
    tag = write_manifest(str(tmp_path / "m"), Rows(some_rows(250, "cat")), shard_size=1).digest[:8]
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names == [*(f"images-{tag}-0000{n}.parquet" for n in range(3)), "manifest.json", f"shards-{tag}.parquet"]
    first = pq.ParquetFile(tmp_path / "m" / f"images-{tag}-00000.parquet")
    assert first.num_row_groups == 100
    assert first.schema_arrow.names == ["uri", "size", "etag", "label"]
    assert [str(t) for t in first.schema_arrow.types] == ["string", "int64", "string", "int32"]
    shards = pq.read_table(tmp_path / "m" / f"shards-{tag}.parquet")
    assert shards.column_names[:5] == ["shard_id", "file", "row_group", "num_images", "num_bytes"]
    assert [str(t) for t in shards.schema.types[:5]] == ["int32", "string", "int32", "int32", "int64"]
    assert shards["source"].null_count == 250
    content = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert content["classes"] == ["cat"]
    assert content["created_by"]["pyarrow"] == pa.__version__


def test_making_the_same_manifest_again_does_nothing(tmp_path: Path) -> None:
    made = write_manifest(str(tmp_path / "m"), Rows(some_rows(10)), shard_size=4)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "m").iterdir()}
    assert write_manifest(str(tmp_path / "m"), Rows(some_rows(10)), shard_size=4) == made
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "m").iterdir()} == before


def test_another_manifest_at_the_same_uri_is_refused_and_harms_nothing() -> None:
    made = write_manifest(fresh(), Rows(some_rows(10)), shard_size=4)
    with pytest.raises(ManifestError, match="never changes"):
        write_manifest(made.uri, Rows(some_rows(11)), shard_size=4)
    assert len(images_of(Manifest.open(made.uri))) == 10


def test_a_source_that_fails_halfway_leaves_nothing() -> None:
    class Failing(Rows):
        def batches(self) -> Iterator[pa.RecordBatch]:
            yield from super().batches()
            raise ManifestError("the table ends in garbage")

    uri = fresh()
    with pytest.raises(ManifestError, match="garbage"):
        write_manifest(uri, Failing(some_rows(10)), shard_size=4)
    assert list(storage.list_objects(uri)) == []


def test_a_stop_while_writing_leaves_no_manifest_and_the_next_one_completes_it() -> None:
    class StoppedError(BaseException):
        pass

    def stop_at_the_second_file(stage: str, num_images: int) -> None:
        if stage == "written" and num_images > 100:
            raise StoppedError

    uri = fresh()
    with pytest.raises(StoppedError):
        write_manifest(uri, Rows(some_rows(250)), shard_size=1, on_progress=stop_at_the_second_file)
    assert not storage.exists(storage.join(uri, "manifest.json"))
    assert len(list(images_of(write_manifest(uri, Rows(some_rows(250)), shard_size=1)))) == 250


def test_a_manifest_that_is_not_there_is_named() -> None:
    with pytest.raises(ManifestError, match=r"memory://nowhere.*jobs\.manifest"):
        Manifest.open("memory://nowhere")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"version": 1}', b'{"version": 2}', b"\xff"])
def test_a_damaged_or_newer_manifest_json_is_refused(content: bytes) -> None:
    made = write_manifest(fresh(), Rows(some_rows(3)), shard_size=2)
    storage.write(storage.join(made.uri, "manifest.json"), content)
    with pytest.raises(ManifestError, match=r"damaged|version 2"):
        Manifest.open(made.uri)


def test_missing_and_damaged_parts_are_named() -> None:
    made = write_manifest(fresh(), Rows(some_rows(300)), shard_size=2)
    other = write_manifest(fresh(), Rows(some_rows(4)), shard_size=2)
    shards = list(made.shards())
    storage.write(
        storage.join(made.uri, f"shards-{made.digest[:8]}.parquet"),
        storage.read(storage.join(other.uri, f"shards-{other.digest[:8]}.parquet")),
    )
    with pytest.raises(ManifestError, match="expected 150 shards"):
        list(made.shards())
    storage.write(
        storage.join(made.uri, f"shards-{made.digest[:8]}.parquet"),
        storage.read(storage.join(other.uri, f"images-{other.digest[:8]}-00000.parquet")),
    )
    with pytest.raises(ManifestError, match="expected columns"):
        list(made.shards())
    storage.write(storage.join(made.uri, f"shards-{made.digest[:8]}.parquet"), b"PAR1")
    with pytest.raises(ManifestError, match=r"shards-\w+\.parquet"):
        list(made.shards())
    storage.delete(storage.join(made.uri, f"images-{made.digest[:8]}-00001.parquet"))
    with pytest.raises(ManifestError, match="-00001"):
        made.images(shards[-1])
    assert made.images(shards[0]).num_rows == 2


def test_a_damaged_page_is_named() -> None:
    made = write_manifest(fresh(), Rows(some_rows(300)), shard_size=2)
    uri = storage.join(made.uri, f"shards-{made.digest[:8]}.parquet")
    data = storage.read(uri)
    storage.write(uri, data[:4] + b"\xff" * 40 + data[44:])
    with pytest.raises(ManifestError, match=r"expected a readable shards-\w+\.parquet"):
        list(made.shards())


def test_the_driver_reads_manifests_without_importing_torch_or_ray() -> None:
    program = "import sys, jobs.manifest, pipeline.data.readers; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
