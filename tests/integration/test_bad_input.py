"""Every kind of bad input, end to end: one row of `errors` each with stage and reason, the rest of its shard unharmed.

The same set lies in a local folder and in a real object store; so do the images that are unusual but right.
"""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.tables import open_table
from pipeline.training import checkpoint
from tests.training_worlds import make_sets, train_config
from tests.worlds import list_images, make_bundle, run_job

pytestmark = [pytest.mark.ray, pytest.mark.slow]

UNREADABLE_EVEN_FOR_ROOT = "/proc/sys/vm/compact_memory"


def pixels(height: int = 40, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(kind: str = "JPEG", **options) -> bytes:
    return encoded(Image.fromarray(pixels()), kind, **options)


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return rgb(exif=exif.tobytes())


def sixteen_bit_png() -> bytes:
    return encoded(Image.fromarray(pixels()[:, :, 0].astype(np.uint16) * 257), "PNG")


def palette_with_transparency() -> bytes:
    return encoded(Image.fromarray(pixels()).quantize(16), "PNG", transparency=3)


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(np.roll(pixels(), shift, 1)) for shift in (0, 8, 16)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def heic() -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    return rgb("HEIF")


def zip_bomb() -> bytes:
    from jobs.demo_images import _bomb

    return _bomb(b"")


GOOD: dict[str, Callable[[], bytes]] = {
    "plain.jpg": rgb,
    "grayscale.jpg": lambda: encoded(Image.fromarray(pixels()).convert("L"), "JPEG"),
    "cmyk.jpg": lambda: encoded(Image.fromarray(pixels()).convert("CMYK"), "JPEG"),
    "palette.png": palette_with_transparency,
    "sixteen bit.png": sixteen_bit_png,
    "rotated.jpg": rotated_by_exif,
    "animated.gif": lambda: animated("GIF"),
    "animated.webp": lambda: animated("WEBP"),
    "bitmap.bmp": lambda: rgb("BMP"),
    "scan.tiff": lambda: rgb("TIFF"),
    "modern.avif": lambda: rgb("AVIF"),
    "phone.heic": heic,
    "one pixel.png": lambda: encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
    "quote ' and \".jpg": rgb,
    "50% off.jpg": rgb,
    "a%20b.jpg": rgb,
    "number #1.jpg": rgb,
    "what?.jpg": rgb,
    "new\nline.jpg": rgb,
    "größe 日本.jpg": rgb,
}
BAD: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty.jpg": (lambda: b"", "decode", "empty"),
    "truncated.jpg": (lambda: rgb()[:-400], "decode", "truncated"),
    "truncated.png": (lambda: rgb("PNG")[:-60], "decode", "truncated"),
    "text.jpg": (lambda: b"I am no image.\n" * 20, "decode", "not_an_image"),
    "page.jpg": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "decode", "not_an_image"),
    "bomb.png": (zip_bomb, "decode", "too_many_pixels"),
    "changed.jpg": (rgb, "fetch", "changed"),
    "gone.jpg": (rgb, "fetch", "not_found"),
    "denied.jpg": (rgb, "fetch", "access_denied"),
}


def fill(prefix: str) -> None:
    for name, make in GOOD.items():
        storage.write(storage.join(prefix, name), make())
    for name, (make, _, _) in BAD.items():
        storage.write(storage.join(prefix, name), make())


def disturb(prefix: str) -> None:
    """What happens between the listing and the run."""
    storage.delete(storage.join(prefix, "gone.jpg"))
    storage.write(storage.join(prefix, "changed.jpg"), rgb(quality=30))
    if prefix.startswith("s3://"):
        bucket, _, folder = prefix.removeprefix("s3://").partition("/")
        statement = {
            "Effect": "Deny",
            "Principal": "*",
            "Action": "s3:GetObject",
            "Resource": f"arn:aws:s3:::{bucket}/{folder}/denied.jpg",
        }
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        storage.filesystem("s3").call_s3("put_bucket_policy", Bucket=bucket, Policy=policy)
    else:
        denied = Path(prefix.removeprefix("file://"), "denied.jpg")
        denied.unlink()
        denied.symlink_to(UNREADABLE_EVEN_FOR_ROOT)


def check(root: str) -> None:
    images, output = storage.join(root, "images"), storage.join(root, "tables")
    fill(images)
    listed = run_job("manifest", source__uri=images, output=f"{root}/manifest", shard_size=8)
    assert listed["num_images"] == len(GOOD) + len(BAD)
    disturb(images)
    make_bundle(f"{root}/registry")
    fields = {"manifest": f"{root}/manifest", "registry": f"{root}/registry", "bundles": "tiny", "output": output}
    summary = run_job("predict", **fields, images__max_storage_errors=0)
    assert (summary["num_predicted"], summary["num_errors"]) == (len(GOOD), len(BAD))
    errors = open_table(f"{output}/errors").to_table().to_pylist()
    found = {row["uri"].removeprefix(f"{images}/"): (row["stage"], row["error"]) for row in errors}
    assert found == {name: (stage, error) for name, (_, stage, error) in BAD.items()}
    assert all(row["message"] for row in errors)
    predicted = open_table(f"{output}/predictions").to_table()["uri"].to_pylist()
    assert {uri.removeprefix(f"{images}/") for uri in predicted} == set(GOOD)
    assert run_job("verify", output=output)["status"] == "verified"


@pytest.mark.usefixtures("jobs_share_ray")
@pytest.mark.skipif(not os.path.exists(UNREADABLE_EVEN_FOR_ROOT), reason="needs a file that root cannot read")
def test_each_bad_image_of_a_local_folder_ends_as_one_error_row(tmp_path):
    check(storage.normalise(str(tmp_path)))


@pytest.mark.s3
@pytest.mark.usefixtures("jobs_share_ray")
def test_each_bad_image_of_an_object_store_ends_as_one_error_row(s3_uri):
    check(storage.join(s3_uri, "a set"))


CRASHING_DECODER = """
import os, signal
from PIL import Image, ImageFile, PpmImagePlugin

class Crashing(ImageFile.ImageFile):
    format = "PPM"  # one of the formats that are tried

    def _open(self):
        signal.raise_signal(signal.SIGSEGV)  # a fault strikes the thread that made it

Image.register_open("PPM", Crashing, lambda prefix: prefix.startswith(b"CRASHES"))
"""


@pytest.fixture
def where_decoders_crash(tmp_path) -> dict[str, str]:
    """The environment of a job whose workers die of an image that begins with CRASHES; its Ray is its own."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(CRASHING_DECODER)
    others = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**others, "PYTHONPATH": f"{site}:{os.getcwd()}"}


def test_a_decoder_crash_is_survived_and_its_image_named(tmp_path, where_decoders_crash):
    images, root = tmp_path / "images", str(tmp_path)
    for index in range(12):
        storage.write(f"file://{images}/{index:02d}.jpg", rgb())
    storage.write(f"file://{images}/05 kills.jpg", b"CRASHES the decoder")
    run_job("manifest", source__uri=images, output=f"{root}/manifest", shard_size=4)
    make_bundle(f"{root}/registry")
    fields = {"manifest": f"{root}/manifest", "registry": f"{root}/registry", "bundles": "tiny"}
    summary = run_job("predict", **fields, output=f"{root}/tables", env=where_decoders_crash)
    assert (summary["num_predicted"], summary["errors_by_kind"]) == (12, {"decode/crashed": 1})
    [row] = open_table(f"{root}/tables/errors").to_table().to_pylist()
    assert row["uri"].endswith("05 kills.jpg")
    assert "SIGSEGV" in row["message"]
    shutil.rmtree(tmp_path / "tables")


def test_a_training_survives_decoder_crashes_and_names_their_images(tmp_path, where_decoders_crash):
    make_sets(tmp_path, num_train=24, num_evaluation=12)
    for name in ("train", "evaluation"):
        class_folder = min(path for path in (tmp_path / f"{name}-images").iterdir() if path.is_dir())
        (class_folder / "kills.jpg").write_bytes(f"CRASHES the decoder in {name}".encode())
        shutil.rmtree(tmp_path / name)
        list_images(tmp_path / f"{name}-images", tmp_path / name, shard_size=7)
    config = train_config(tmp_path, data={"max_error_rate": 0.5}, compute={"max_failures": 1})
    (tmp_path / "train.yaml").write_text(config.to_yaml())
    summary = run_job("train", config=tmp_path / "train.yaml", env=where_decoders_crash)
    assert (summary["status"], summary["num_errors"]) == ("done", 1)
    assert checkpoint.list_steps(summary["run"])[-1] == summary["num_steps"]
    [row] = pq.read_table(tmp_path / "runs/first/errors.parquet").to_pylist()
    assert (row["uri"].endswith("/kills.jpg"), row["error"]) == (True, "crashed")
