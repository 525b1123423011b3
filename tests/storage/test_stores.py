import json
import os
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import AccessDeniedError, StorageError


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_access_denied(tmp_path: Path) -> None:
    path = tmp_path / "private.jpg"
    path.write_bytes(b"1")
    path.chmod(0)
    with pytest.raises(AccessDeniedError):
        storage.read(f"file://{path}")


@pytest.mark.s3
def test_a_denied_object_is_access_denied_and_its_neighbours_are_not(s3_uri: str) -> None:
    bucket = s3_uri.removeprefix("s3://")
    for name in ("private/plain.jpg", "private/new\nline.jpg", "public.jpg"):
        storage.write(storage.join(s3_uri, name), b"1")
    deny = {"Effect": "Deny", "Principal": "*", "Action": ["s3:GetObject", "s3:PutObject"]}
    policy = {"Version": "2012-10-17", "Statement": [{**deny, "Resource": f"arn:aws:s3:::{bucket}/private/*"}]}
    storage.filesystem("s3").call_s3("put_bucket_policy", Bucket=bucket, Policy=json.dumps(policy))
    for name in ("private/plain.jpg", "private/new\nline.jpg"):
        uri = storage.join(s3_uri, name)
        for touch in (storage.read, storage.head, lambda uri: storage.write(uri, b"2")):
            with pytest.raises(AccessDeniedError, match="private"):
                touch(uri)
    assert storage.read(storage.join(s3_uri, "public.jpg")) == b"1"
    storage.filesystem("s3").call_s3("delete_bucket_policy", Bucket=bucket)


def test_a_name_no_file_system_can_have_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="null byte"):
        storage.read("file:///tmp/a\0b")
