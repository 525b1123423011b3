"""One shard, packed: its bytes, its labels, its errors."""

import io
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.data.images import decode
from pipeline.data.manifest import write_manifest
from pipeline.data.pack import FILE_SCHEMA, PackedImages, Reencode, converting, encode, pack_images
from pipeline.data.packed import PackedSource
from pipeline.data.readers import read_shard
from pipeline.data.shards import LABELLED_SCHEMA
from pipeline.data.transforms import Preprocessing
from pipeline.errors import ImageError
from tests.manifests import fresh, images_of

LIMITS = {"max_pixels": 10**6, "isolated": False}


def listed(count: int) -> pa.Table:
    rows = [
        {"uri": f"s3://origin/{row}.jpg", "size": None, "etag": f"e{row}", "label": row % 3 or None}
        for row in range(count)
    ]
    return pa.Table.from_pylist(rows, LABELLED_SCHEMA)


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = [Image.linear_gradient("L").rotate(90 * turn).resize((width, height)) for turn in range(3)]
    return Image.merge("RGB", channels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pack(contents: list[bytes | ImageError], reencode: Reencode | None = None, **options) -> PackedImages:
    with converting(reencode, **{"check": False, **LIMITS, **options}) as convert:
        return pack_images(listed(len(contents)), iter(contents), convert, {"origin": "test"})


def repacked(data: bytes, **fields) -> Image.Image:
    """One image as it is after re-encoding."""
    return Image.open(io.BytesIO(pack([data], Reencode(**fields)).table["bytes"][0].as_py()))


GONE = ImageError("fetch", "not_found", "found none")


def test_bytes_are_untouched_whatever_they_are_and_the_rest_is_the_manifests():
    packed = pack([b"no image", GONE, b"", b"\xff" * 300])
    assert packed.errors == {1: GONE}
    assert packed.table.to_pylist() == [
        {"uri": "s3://origin/0.jpg", "size": 8, "etag": "e0", "label": None, "bytes": b"no image"},
        {"uri": "s3://origin/2.jpg", "size": 0, "etag": "e2", "label": 2, "bytes": b""},
        {"uri": "s3://origin/3.jpg", "size": 300, "etag": "e3", "label": None, "bytes": b"\xff" * 300},
    ]
    assert packed.table.schema.equals(FILE_SCHEMA.with_metadata({"origin": "test"}), check_metadata=True)


def test_a_check_refuses_what_does_not_decode_and_leaves_the_rest_untouched():
    good = encoded(gradient(20, 30))
    packed = pack([good, good[:-30], b"no image"], check=True)
    assert packed.table["bytes"].to_pylist() == [good]
    assert {row: error.stage for row, error in packed.errors.items()} == {1: "decode", 2: "decode"}


def test_a_checked_image_may_have_no_more_pixels_than_allowed():
    packed = pack([encoded(gradient(20, 30))], check=True, max_pixels=599)
    assert packed.errors[0].error == "too_many_pixels"


@pytest.mark.parametrize(
    ("size", "expected"), [((90, 60), (48, 32)), ((60, 91), (32, 48)), ((32, 40), (32, 40)), ((20, 8), (20, 8))]
)
def test_the_shorter_side_is_shrunk_and_never_enlarged(size: tuple[int, int], expected: tuple[int, int]):
    image = repacked(encoded(gradient(*size)), shorter_side=32)
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", expected)


def test_a_reencoded_image_looks_like_the_preprocessed_one():
    data = encoded(gradient(120, 90))
    expected = Preprocessing(resize_size=40, crop_size=40).resize(decode(data, max_pixels=10**6))
    found = pack([data], Reencode(shorter_side=40, quality=95, subsampling="4:4:4")).table["bytes"][0].as_py()
    difference = decode(found, max_pixels=10**6).int() - expected.int()
    assert difference.shape == (3, 40, 53)
    assert difference.abs().float().mean() < 1.0
    assert difference.abs().max() < 12


def test_a_reencoded_image_stands_upright_in_rgb():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image = repacked(encoded(gradient(90, 60, "L"), "JPEG", exif=exif), shorter_side=30)
    assert (image.mode, image.size, dict(image.getexif())) == ("RGB", (30, 45), {})


def test_quality_and_subsampling_are_those_asked_for():
    noise = encoded(Image.effect_noise((64, 64), 80).convert("RGB"))
    sizes = [pack([noise], Reencode(shorter_side=64, quality=q)).table["size"][0].as_py() for q in (95, 20)]
    assert sizes[0] > 2 * sizes[1]
    sampling = {"4:4:4": 0x11, "4:2:2": 0x21, "4:2:0": 0x22}
    for name, factors in sampling.items():
        image = repacked(noise, shorter_side=64, subsampling=name)
        assert image.layer[0][1] * 16 + image.layer[0][2] == factors


def test_an_image_that_jpeg_cannot_hold_is_an_error_and_its_neighbour_is_not():
    packed = pack([encoded(gradient(70_000, 1)), encoded(gradient(9, 9))], Reencode(shorter_side=8))
    assert (packed.errors[0].stage, packed.errors[0].error) == ("encode", "failed")
    assert "(70000, 1)" in packed.errors[0].message
    assert packed.table.num_rows == 1


def test_decoding_in_a_child_process_gives_the_same_bytes():
    contents = [encoded(gradient(50, 40)), b"no image", encoded(gradient(30, 44))]
    alone, isolated = (pack(contents, Reencode(shorter_side=16), isolated=isolated) for isolated in (False, True))
    assert isolated.table.equals(alone.table)
    assert [str(error) for error in isolated.errors.values()] == [str(error) for error in alone.errors.values()]


def test_a_file_is_one_row_group_whose_images_are_neither_compressed_nor_in_a_dictionary():
    table = pack([b"x" * 1000] * 2000).table
    data = encode(table)
    assert data == encode(table)
    metadata = pq.read_metadata(io.BytesIO(data))
    assert (metadata.num_row_groups, metadata.num_rows) == (1, 2000)
    column = metadata.row_group(0).column(FILE_SCHEMA.get_field_index("bytes"))
    assert (column.compression, column.has_dictionary_page, column.is_stats_set) == ("UNCOMPRESSED", False, False)
    assert pq.read_table(io.BytesIO(data)).equals(table)


class Counted(io.BytesIO):
    """Bytes that tell how many of them were read."""

    num_read = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.num_read += len(data)
        return data


def test_pages_that_would_be_too_large_for_parquet_hold_an_image_each(monkeypatch):
    table = pack([b"x" * 300_000] * 20).table
    by_eight = encode(table)
    monkeypatch.setattr("pipeline.data.pack._MOST_PAGE_BYTES", 8 * 300_000)
    alone = encode(table)
    assert len(alone) > len(by_eight)  # by the headers of more pages
    assert pq.read_table(io.BytesIO(alone)).equals(table)


def test_the_first_images_of_a_large_shard_are_there_when_a_tenth_of_it_is_read():
    num_images, num_bytes = 300, 100_000
    contents = [bytes([index % 256]) * num_bytes for index in range(num_images)]
    packed = pack(contents)
    file = Counted(encode(packed.table))
    batches = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False).iter_batches(8, columns=["bytes"])
    assert next(batches)["bytes"].to_pylist() == contents[:8]
    assert file.num_read < num_images * num_bytes / 10


def test_a_shard_none_of_whose_images_could_be_packed_is_an_empty_table():
    packed = pack([GONE, GONE])
    assert pq.read_table(io.BytesIO(encode(packed.table))).num_rows == 0
    assert sorted(packed.errors) == [0, 1]


def test_packed_files_are_a_source_of_manifests_and_read_as_such():
    folder = fresh()
    contents = [encoded(gradient(10 + row, 12)) for row in range(4)]
    table = pack([*contents, GONE]).table
    storage.write(f"{folder}/00000000.parquet", encode(table))
    storage.write(f"{folder}/00000001.parquet", encode(table.slice(0, 0)))
    manifest = write_manifest(fresh(), PackedSource(folder), shard_size=1, classes=["a", "b", "c"])
    [shard] = manifest.shards()
    assert images_of(manifest) == table.drop_columns("bytes").to_pylist()
    read = read_shard(shard, manifest.images(shard), allowed_roots=["memory://"], max_bytes=10**6)
    assert list(read) == contents


def test_nothing_is_decoded_and_no_torch_imported_for_untouched_bytes():
    code = (
        "import sys; from pipeline.data.pack import converting\n"
        "with converting(None, check=False, max_pixels=1, isolated=False) as convert: assert convert(b'x') == b'x'\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
