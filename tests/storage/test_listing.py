import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pipeline import storage
from pipeline.errors import ObjectNotFoundError, StorageError

ODD_NAMES = [
    "plain.jpg",
    "with space.jpg",
    " .jpg",
    "quote'\".jpg",
    "50% off.jpg",
    "%41.jpg",
    "tag#1.jpg",
    "what?.jpg",
    "a+b&c=d;.jpg",
    "new\nline.jpg",
    "tab\t.jpg",
    "ünï—日本.jpg",
    "star*[x]{y}~^`|<>.jpg",
    "back\\slash.jpg",
    "deep/er/still.jpg",
]
ODD_KEYS = ["/leading.jpg", "a//b.jpg", "a/./c.jpg", "a/../d.jpg", "?versionId=3", "control\x01.jpg"]  # S3 alone

BLOB = (
    "<Blob><Name>{name}</Name><Properties><Last-Modified>Mon, 01 Jan 2024 00:00:00 GMT</Last-Modified><Etag>0x1</Etag>"
    "<Content-Length>1</Content-Length><Content-Type>image/jpeg</Content-Type><BlobType>BlockBlob</BlobType></Properties></Blob>"
)


def uris_below(uri: str) -> list[str]:
    return [found.uri for found in storage.list_objects(uri)]


def test_odd_names_survive_writing_reading_heading_and_listing(root: str) -> None:
    names = ODD_NAMES + (ODD_KEYS if root.startswith("s3") else [])
    for name in names:
        storage.write(storage.join(root, name), name.encode())
    for name in names:
        uri = storage.join(root, name)
        assert storage.read(uri) == name.encode()
        assert storage.head(uri).size == len(name.encode())
        with storage.open_file(uri) as file:
            assert file.read() == name.encode()
    listed = uris_below(root)
    assert sorted(listed) == sorted(storage.join(root, name) for name in names)
    assert uris_below(root) == listed
    for name in names:
        storage.delete(storage.join(root, name))
    assert uris_below(root) == []


@pytest.mark.s3
def test_listing_many_folders_and_pages_gives_every_object_once_in_a_fixed_order(s3_uri: str) -> None:
    names = [f"class-{number % 7}/{number:05d}.jpg" for number in range(1000)]
    names += [f"many/deep/{number:05d}.jpg" for number in range(1500)] + [
        f"top-{number:02d}.jpg" for number in range(20)
    ]
    list(storage.map_concurrently(lambda name: storage.write(storage.join(s3_uri, name), b"1"), names))
    storage.filesystem("s3").call_s3("put_object", Bucket=s3_uri.removeprefix("s3://"), Key="class-1/", Body=b"")
    listed = uris_below(s3_uri)
    own = sorted(storage.join(s3_uri, name) for name in names if "/" not in name)
    assert listed == own + sorted(storage.join(s3_uri, name) for name in names if "/" in name)
    assert [found.uri for found in storage.list_objects(s3_uri, concurrency=1)] == listed


@pytest.mark.s3
def test_very_many_folders_are_listed_in_ranges_in_the_same_order(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = ["a", "a-b", "a.b", "a.~~~~~", "a0", "b/c", "", "é", *(f"{number:03d}" for number in range(40))]
    names = [f"{folder}/{number}.jpg" for folder in folders for number in range(3)] + ["a.jpg", "own.jpg"]
    list(storage.map_concurrently(lambda name: storage.write(storage.join(s3_uri, name), b"1"), names))
    storage.filesystem("s3").call_s3("put_object", Bucket=s3_uri.removeprefix("s3://"), Key="a/", Body=b"not empty")
    listed = uris_below(s3_uri)
    assert len(listed) == len(names) + 1
    for most_parts in (1, 3, 7, 30):
        monkeypatch.setattr("pipeline.storage.listing._MOST_PARTS", most_parts)
        assert uris_below(s3_uri) == listed
    assert uris_below(storage.join(s3_uri, "b")) == [storage.join(s3_uri, f"b/c/{number}.jpg") for number in range(3)]


def test_a_name_that_az_cannot_be_listed_with_is_told_with_what_to_do(azure_names: list[str]) -> None:
    uri = f"az://{uuid4().hex}"
    azure_names += ["a.jpg", "b/c.jpg"]
    assert uris_below(uri) == [f"{uri}/a.jpg", f"{uri}/b/c.jpg"]
    azure_names += ["d//e.jpg"]
    for listing in (uris_below, storage.list_folders):
        with pytest.raises(StorageError, match=r'az://.*got another \(.*"d//e.jpg".*\); rename that object, or name'):
            listing(uri)


@pytest.fixture
def azure_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What every container of an emulator of one's own lists."""
    names: list[str] = []

    class Listing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            blobs = "".join(BLOB.format(name=name) for name in names)
            page = f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker /></EnumerationResults>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Listing) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", f"http://127.0.0.1:{server.server_port}")
        yield names
        server.shutdown()


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_named(s3_uri: str) -> None:
    with pytest.raises(ObjectNotFoundError, match="-absent"):
        uris_below(f"{s3_uri}-absent")


def test_listing_goes_folder_by_folder_in_order_and_knows_only_below(root: str) -> None:
    for name in ("b/2.jpg", "b/1.jpg", "a/x/3.jpg", "z.jpg", "ab/4.jpg"):
        storage.write(storage.join(root, name), b"1")
    assert uris_below(root) == [storage.join(root, n) for n in ("z.jpg", "a/x/3.jpg", "ab/4.jpg", "b/1.jpg", "b/2.jpg")]
    assert uris_below(storage.join(root, "a")) == [storage.join(root, "a/x/3.jpg")]
    assert uris_below(storage.join(root, "absent")) == []


def test_the_folders_right_below_are_named_in_order(root: str) -> None:
    for name in ("runs/b/deep/er.json", "runs/a+ü/1.json", "runs/own.json", "other/c/2.json"):
        storage.write(storage.join(root, name), b"1")
    assert storage.list_folders(storage.join(root, "runs")) == ["a+ü", "b"]
    assert storage.list_folders(root) == ["other", "runs"]
    assert storage.list_folders(storage.join(root, "absent")) == []


def test_a_listing_left_early_stops_its_threads(tmp_path: Path) -> None:
    for folder in range(40):
        storage.write(f"file://{tmp_path}/{folder}/image.jpg", b"1")
    before = threading.active_count()
    listing = storage.list_objects(f"file://{tmp_path}")
    next(listing)
    listing.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_links_are_followed_except_in_circles_and_dangling_ones_are_passed_over(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    storage.write(f"file://{root}/folder/image.jpg", b"1")
    storage.write(f"file://{elsewhere}/far.jpg", b"1")
    (root / "folder" / "circle").symlink_to(root)
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root / "folder")
    (root / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (root / "itself.jpg").symlink_to(root / "itself.jpg")
    (root / "through.jpg").symlink_to(root / "folder" / "image.jpg" / "no-folder.jpg")
    (root / "link.jpg").symlink_to(root / "folder" / "image.jpg")
    below = ["link.jpg", "folder/image.jpg", "linked/far.jpg", "linked/back/image.jpg"]
    assert uris_below(f"file://{root}") == [f"file://{root}/{name}" for name in below]


def test_of_a_large_folder_only_a_page_is_looked_at_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.listing._FILES_PER_PAGE", 3)
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(b"1")
    listing = storage.list_objects(f"file://{tmp_path}")
    first = [next(listing) for _ in range(3)]
    (tmp_path / "6.jpg").unlink()  # not looked at yet
    names = [found.uri.rpartition("/")[2] for found in (*first, *listing)]
    assert names == [f"{number}.jpg" for number in (0, 1, 2, 3, 4, 5, 7)]


def test_two_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        storage.write(f"file://{tmp_path}/{name}/{name}.jpg", b"1")
        (tmp_path / name / "other").symlink_to(tmp_path / other)
    below = ["a/a.jpg", "a/other/b.jpg", "b/b.jpg", "b/other/a.jpg"]
    assert uris_below(f"file://{tmp_path}") == [f"file://{tmp_path}/{name}" for name in below]
