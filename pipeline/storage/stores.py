"""The libraries underneath: how each is reached, and their errors as this package's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import fsspec
import obstore.exceptions
import obstore.store
from obstore.fsspec import FsspecStore

from pipeline.errors import (
    AccessDeniedError,
    ConfigError,
    ObjectExistsError,
    ObjectNotFoundError,
    PipelineError,
    StorageError,
    first_line,
)

OBSTORE_ALONE = ("gs", "az")  # fsspec's own for these tell etags that differ from those that obstore reads under
REQUEST_S = 60
_KNOWN_TO_OBSTORE = ("env", "container-role", "iam-role")  # as botocore names them
_ASKED_AGAIN_AFTER = timedelta(minutes=10)  # obstore asks 5 minutes before


@cache
def filesystem(scheme: str) -> Any:
    """The fsspec file system of `scheme`, for readers that take one; listings are never cached.

    Raises ConfigError where the package that serves the scheme is not installed.
    """
    if scheme in OBSTORE_ALONE:
        of_obstore: Any = FsspecStore  # whose overloads want a literal
        return of_obstore(scheme, **_obstore_options(REQUEST_S, REQUEST_S))
    if scheme == "s3" and "endpoint" in _s3_place():
        # S3-compatible stores refuse the AWS SDK's newer default checksums (411 MissingContentLength).
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    try:
        options = {} if scheme in ("file", "memory") else {"use_listings_cache": False}
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs a package that is not installed: {error}") from error


def is_for_obstore(scheme: str, key: str) -> bool:
    """Whether obstore can be asked for `key`; it still refuses some names, with ValueError."""
    is_unchanged = key == key.strip("/")  # it drops slashes at the ends: another object's name
    return scheme in ("s3", *OBSTORE_ALONE) and is_unchanged


@cache
def obstore_of(scheme: str, bucket: str, *, request_s: float = REQUEST_S, retry_s: float = REQUEST_S) -> Any:
    """The obstore store of a bucket, whose requests end within `request_s`, with their bodies.

    Failed ones are tried again until `retry_s` have passed: after a time-out only where that is longer.
    """
    options = _obstore_options(request_s, retry_s)
    if scheme == "s3":
        place = _s3_place()
        options["client_options"]["allow_http"] = place.get("endpoint", "").startswith("http://")
        options |= {**place, **_of_aws_profile()}
    return obstore.store.from_url(f"{scheme}://{bucket}", **options)


def _obstore_options(request_s: float, retry_s: float) -> dict[str, Any]:
    return {
        "client_options": {"timeout": timedelta(seconds=request_s)},
        "retry_config": {
            "max_retries": 10,
            "retry_timeout": timedelta(seconds=retry_s),
            "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 2},
        },
    }


@cache
def _aws_session() -> Any:
    import botocore.session  # only where it is needed: it takes long

    session = botocore.session.get_session()
    _ = session.full_config  # loaded here: several threads share the session
    return session


@cache
def _s3_place() -> dict[str, str]:
    """`region` and `endpoint`, as far as they are told: by the environment or ~/.aws, which obstore does not read.

    As botocore finds them, and so s3fs; AWS_REGION, which botocore passes over, is obstore's. Source: AWS SDKs and
    Tools Reference Guide, "Service-specific endpoints".
    """
    session = _aws_session()
    place = {"region": os.environ.get("AWS_REGION") or session.get_config_variable("region")}
    if not session.get_config_variable("ignore_configured_endpoint_urls"):
        profile = session.get_scoped_config()
        of_services = session.full_config.get("services", {}).get(profile.get("services"), {})
        told = (
            os.environ.get("AWS_ENDPOINT_URL_S3"),
            os.environ.get("AWS_ENDPOINT_URL"),
            of_services.get("s3", {}).get("endpoint_url"),
            profile.get("endpoint_url"),
        )
        place["endpoint"] = next(filter(None, told), None)
    return {name: value for name, value in place.items() if value}


def _of_aws_profile() -> dict[str, Any]:
    """The credentials of a profile in ~/.aws, also of single sign-on, which s3fs knows and obstore does not."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        return {}
    found = _aws_session().get_credentials()
    if found is None or found.method in _KNOWN_TO_OBSTORE:
        return {}

    def current() -> dict[str, Any]:
        frozen = found.get_frozen_credentials()  # renewed where they are about to expire
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _ASKED_AGAIN_AFTER if frozen.token else None,
        }

    return {"credential_provider": current}


def call_s3(operation: str, path: str, **request: Any) -> Any:
    """One S3 request for `bucket/key`; the key goes as it stands, where s3fs's own paths would tidy it."""
    bucket, _, key = path.partition("/")
    try:
        return filesystem("s3").call_s3(operation, Bucket=bucket, Key=key, **request)
    except OSError as error:
        if getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") == "PreconditionFailed":
            raise FileExistsError(path) from error
        raise


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Errors of the libraries, which share no base, as this package's; their first line says enough."""
    try:
        yield
    except (PipelineError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ObjectNotFoundError(f"expected an object at {uri!r}, found none") from error
    except (FileExistsError, obstore.exceptions.AlreadyExistsError) as error:
        raise ObjectExistsError(f"expected no object at {uri!r}, found one") from error
    except (
        PermissionError,
        obstore.exceptions.PermissionDeniedError,
        obstore.exceptions.UnauthenticatedError,
    ) as error:
        if uri.startswith("file://"):
            raise AccessDeniedError(f"{uri!r}: {getattr(error, 'strerror', error)}") from error
        raise AccessDeniedError(f"the credentials in the environment do not allow {uri!r}") from error
    except obstore.exceptions.InvalidPathError as error:  # of one name, but a page of a listing is lost with it
        reason = str(error).partition("\n\n")[0]
        raise StorageError(
            f"{uri!r}: expected names without empty parts, '.', '..' and control characters, which alone {uri[:2]} can "
            f"be listed with, got another ({reason}); rename that object, or name the others in a table of URIs"
        ) from error
    except Exception as error:
        raise StorageError(f"{uri!r}: {type(error).__name__}: {first_line(error)}") from error
