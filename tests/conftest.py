"""Shared by all tests: one local Ray for those that want one, a bucket of a real object store for those marked `s3`."""

import gc
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

os.environ.update(RAY_DEDUP_LOGS="0", RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads would only wait for each other


@pytest.fixture
def s3_uri() -> Iterator[str]:
    """An empty prefix of a fresh bucket on the store that AWS_ENDPOINT_URL names; removed afterwards."""
    if not os.environ.get("AWS_ENDPOINT_URL"):
        pytest.skip("needs a real S3 store: set AWS_ENDPOINT_URL and credentials")
    from pipeline import storage

    bucket = f"test-{uuid.uuid4().hex[:12]}"
    storage.filesystem("s3").mkdir(bucket)
    yield f"s3://{bucket}"
    with suppress(OSError):  # a bucket left behind fails no test
        _remove_bucket(bucket)


def _remove_bucket(bucket: str) -> None:
    from pipeline import storage

    call = storage.filesystem("s3").call_s3
    page = {"NextContinuationToken": ""}
    while (token := page.get("NextContinuationToken")) is not None:
        page = call("list_objects_v2", Bucket=bucket, **({"ContinuationToken": token} if token else {}))
        keys = [entry["Key"] for entry in page.get("Contents", [])]
        plain = [{"Key": key} for key in keys if key.isprintable()]
        if plain:
            call("delete_objects", Bucket=bucket, Delete={"Objects": plain, "Quiet": True})
        for key in keys:
            if not key.isprintable():  # the XML of many deletions cannot spell it
                call("delete_object", Bucket=bucket, Key=key)
    call("delete_bucket", Bucket=bucket)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A two-CPU local Ray, started once for the whole session."""
    import ray

    from pipeline.cluster import start_ray

    start_ray(num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def last_test_let_go(request: pytest.FixtureRequest) -> None:
    """Of what pytest kept of the test before, its log for one: errors of Ray Data hold actors, and these CPUs."""
    if "local_ray" in request.fixturenames:
        gc.collect()


@pytest.fixture(scope="module")
def jobs_share_ray(local_ray: None) -> Iterator[None]:
    """Jobs run by `run_job` join the tests' own Ray, which saves each of them the start of one."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield


@pytest.fixture
def full_cluster(local_ray: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """All CPUs of the tests' Ray are taken, until the log says that something waits for them."""
    import ray

    class Holder:
        pass

    monkeypatch.setattr("pipeline.cluster.BEGIN_WITHIN_S", 2.0)
    holder = ray.remote(Holder).options(num_cpus=2).remote()
    ray.get(holder.__ray_ready__.remote())

    def release() -> None:
        deadline = time.monotonic() + 60
        while "not begun within" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.1)
        ray.kill(holder)

    thread = threading.Thread(target=release)
    thread.start()
    yield
    thread.join()


@pytest.fixture
def nvjpeg_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CPU in the place of nvJPEG: `tests.jpegs.NvjpegOnCpu`."""
    import torch

    from tests.jpegs import NvjpegOnCpu

    operator = NvjpegOnCpu()
    monkeypatch.setattr(torch.ops.image, "decode_jpegs_cuda", operator)
    return operator
