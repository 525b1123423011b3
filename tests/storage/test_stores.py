import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import AccessDeniedError, StorageError

FILES_OF_AWS = {"CONFIG": "config", "SHARED_CREDENTIALS": "credentials"}


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


@pytest.mark.s3
def test_a_profile_of_aws_config_files_reads_and_writes(s3_uri: str, tmp_path: Path) -> None:
    env = {
        name: value for name, value in os.environ.items() if name not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }
    (tmp_path / ".aws").mkdir()
    keys = "\n".join(f"{name.lower()} = {os.environ[name]}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    (tmp_path / ".aws/credentials").write_text(f"[pipeline]\n{keys}\n")
    uri = storage.join(s3_uri, "a.jpg")
    code = (
        "import sys; from pipeline import storage; storage.write(sys.argv[1], b'1'); "
        "print(storage.read(sys.argv[1]), storage.exists(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, uri]
    told = subprocess.run(
        command,
        env={**env, "HOME": str(tmp_path), "AWS_PROFILE": "pipeline"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert told.stdout == "b'1' True\n", told.stderr


@pytest.mark.parametrize("keys_from", ["environment", "profile", "role"])
def test_region_and_endpoint_of_aws_config_files_are_those_of_every_request(own_store, tmp_path, keys_from) -> None:
    (tmp_path / "config").write_text(f"[default]\nregion = eu-test-7\nendpoint_url = {own_store.url}\n")
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    if keys_from == "profile":
        (tmp_path / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    elif keys_from == "role":  # as an instance's metadata service tells
        role = {"AccessKeyId": "a", "SecretAccessKey": "b", "Token": "t", "Expiration": "2099-01-01T00:00:00Z"}
        credentials = {"Code": "Success", "LastUpdated": "2026-01-01T00:00:00Z", "Type": "AWS-HMAC", **role}
        path = "meta-data/iam/security-credentials/"
        own_store.objects |= {path: b"role", f"{path}role": json.dumps(credentials).encode()}
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    env |= {f"AWS_{name}_FILE": str(tmp_path / file) for name, file in FILES_OF_AWS.items()}
    env |= {"AWS_EC2_METADATA_SERVICE_ENDPOINT": own_store.url, "AWS_METADATA_ENDPOINT": own_store.url}
    code = (
        "import sys; from pipeline import storage; storage.write(sys.argv[1], b'1'); "
        "print(storage.read(sys.argv[1]), storage.exists(sys.argv[1]))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, f"{own_store.uri}/a.jpg"],
        env=env | (keys if keys_from == "environment" else {}),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert told.stdout == "b'1' True\n", told.stderr
    signed = [signature for signature in own_store.signed if signature]
    assert len(signed) == 3
    assert all("/eu-test-7/s3/" in signature for signature in signed)


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(
        StorageError, match=r"a.json' only where it is not there yet: expected a file system with hard links"
    ):
        storage.write(f"file://{tmp_path}/a.json", b"{}", if_absent=True)
    assert list(tmp_path.iterdir()) == []


def test_a_name_no_file_system_can_have_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="null byte"):
        storage.read("file:///tmp/a\0b")
