import gzip
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipeline.data.manifest import write_manifest
from pipeline.data.uri_table import TableSource
from pipeline.errors import ManifestError
from tests.manifests import fresh, images_of, uris_of


def write_table(path: Path, table: pa.Table) -> str:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        buffer = io.BytesIO()
        pyarrow.csv.write_csv(table, buffer)
        path.write_bytes(gzip.compress(buffer.getvalue()))
    return str(path)


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.csv.gz"])
def test_a_table_gives_uris_labels_sizes_and_etags_in_its_order(tmp_path: Path, name: str) -> None:
    columns = {
        "junk": [1.5, 2.5, 3.5],
        "image": ["s3://b/z,'\" x.jpg", "s3://b/new\nline.jpg", "s3://b/ü%#?.jpg"],
        "kind": ["dog", "cat", None],
        "bytes": [10, None, 30],
        "tag": ["e1", "e2", None],
    }
    table = write_table(tmp_path / name, pa.table(columns))
    source = TableSource(table, uri_column="image", label_column="kind", size_column="bytes", etag_column="tag")
    made = write_manifest(fresh(), source, shard_size=2)
    assert made.classes == ["cat", "dog"]
    assert [tuple(image.values()) for image in images_of(made)] == list(
        zip(columns["image"], columns["bytes"], columns["tag"], [1, 0, None], strict=True)
    )


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_integer_labels_of_a_table_are_class_ids(tmp_path: Path, name: str) -> None:
    table = write_table(tmp_path / name, pa.table({"uri": ["s3://b/1", "s3://b/2"], "label": [7, 2]}))
    made = write_manifest(fresh(), TableSource(table, label_column="label"), shard_size=2)
    assert ([image["label"] for image in images_of(made)], made.classes) == ([7, 2], None)


def test_dictionary_and_large_string_columns_are_read(tmp_path: Path) -> None:
    uris = pa.array(["s3://b/1", "s3://b/2"]).dictionary_encode()
    table = write_table(
        tmp_path / "t.parquet", pa.table({"uri": uris, "label": pa.array(["x", "y"], pa.large_string())})
    )
    made = write_manifest(fresh(), TableSource(table, label_column="label"), shard_size=2)
    assert uris_of(made) == ["s3://b/1", "s3://b/2"]


def test_relative_names_of_a_table_need_a_root_and_lie_below_it(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", pa.table({"uri": ["a/1.jpg", "s3://b/2.jpg", "/data/3.jpg"]}))
    with pytest.raises(ManifestError, match=r"relative name 'a/1\.jpg'; set the root"):
        write_manifest(fresh(), TableSource(table), shard_size=2)
    made = write_manifest(fresh(), TableSource(table, root="s3://bucket/photos/"), shard_size=2)
    assert uris_of(made) == ["s3://bucket/photos/a/1.jpg", "s3://b/2.jpg", "file:///data/3.jpg"]


def test_all_tables_below_a_prefix_are_read_in_order(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write_table(tmp_path / f"part-{number}.parquet", pa.table({"uri": [f"s3://b/{number}"]}))
    (tmp_path / "_SUCCESS").write_bytes(b"")
    made = write_manifest(fresh(), TableSource(str(tmp_path)), shard_size=2)
    assert uris_of(made) == ["s3://b/0", "s3://b/1", "s3://b/2"]


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_etags_in_quotes_are_those_without_and_empty_ones_are_unknown(tmp_path: Path, name: str) -> None:
    etags = ['"abc"', "abc", '""', ""]
    table = write_table(tmp_path / name, pa.table({"uri": [f"s3://b/{n}" for n in range(4)], "etag": etags}))
    made = write_manifest(fresh(), TableSource(table, etag_column="etag"), shard_size=5)
    assert [image["etag"] for image in images_of(made)] == ["abc", "abc", None, None]


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_a_folder_named_like_a_table_is_read_without_what_its_writer_keeps_there(tmp_path: Path, name: str) -> None:
    folder, suffix = tmp_path / name, name[1:]
    for number, path in enumerate(["part-1", "part-0", "_temporary/part-2", ".part-3", "day=1/part-4"]):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_table(folder / f"{path}{suffix}", pa.table({"uri": [f"s3://b/{number}"]}))
    assert uris_of(write_manifest(fresh(), TableSource(str(folder)), shard_size=2)) == [
        "s3://b/1",
        "s3://b/0",
        "s3://b/4",
    ]


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_a_missing_column_is_named_with_those_there(tmp_path: Path, name: str) -> None:
    table = write_table(tmp_path / name, pa.table({"url": ["s3://b/1"], "kind": ["x"]}))
    with pytest.raises(ManifestError, match="expected a column 'uri', found url, kind"):
        write_manifest(fresh(), TableSource(table), shard_size=2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.parquet", b"PAR1 but not really"),
        ("t.parquet", b""),
        ("t.csv", b"uri\n\xff\xfe\n"),
        ("t.csv", b"uri,x\ns3://b/1,1\ns3://b/2\n"),
        ("t.csv", b""),
        ("t.csv.gz", b"uri\ns3://b/1\n"),
        ("t.csv.gz", gzip.compress(b"uri\ns3://b/1\n" * 100, mtime=0)[:-9]),
    ],
)
def test_an_unreadable_table_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=rf"t\.{name.partition('.')[2]}"):
        write_manifest(fresh(), TableSource(str(tmp_path / name)), shard_size=2)


def test_a_table_that_is_not_there_and_a_prefix_without_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"gone\.csv"):
        write_manifest(fresh(), TableSource(str(tmp_path / "gone.csv")), shard_size=2)
    with pytest.raises(ManifestError, match=r"ending in \.parquet or \.csv"):
        write_manifest(fresh(), TableSource(str(tmp_path)), shard_size=2)


def test_rows_without_a_uri_and_labels_of_other_types_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", pa.table({"uri": ["s3://b/1", None], "score": [0.5, 0.5]}))
    with pytest.raises(ManifestError, match="uri in every row, got 1 empty"):
        write_manifest(fresh(), TableSource(table), shard_size=2)
    with pytest.raises(ManifestError, match="strings or integers in label column 'score', got double"):
        write_manifest(fresh(), TableSource(table, label_column="score"), shard_size=2)


def test_labels_of_one_kind_in_many_tables_keep_it_and_of_two_are_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", pa.table({"uri": ["s3://b/1"], "label": ["cat"]}))
    write_table(tmp_path / "b.csv", pa.table({"uri": ["s3://b/2"], "label": ["3"]}))
    write_table(tmp_path / "c.parquet", pa.table({"uri": ["s3://b/3"], "label": pa.nulls(1)}))
    made = write_manifest(fresh(), TableSource(str(tmp_path), label_column="label"), shard_size=2)
    assert made.classes == ["3", "cat"]
    write_table(tmp_path / "d.parquet", pa.table({"uri": ["s3://b/4"], "label": [3]}))
    write_table(tmp_path / "0.parquet", pa.table({"uri": ["s3://b/0"], "label": pa.nulls(1, pa.string())}))
    expected = r"integers in '.*/d\.parquet' and strings in '.*/a\.parquet'"
    with pytest.raises(ManifestError, match=expected):
        write_manifest(fresh(), TableSource(str(tmp_path), label_column="label"), shard_size=2)
