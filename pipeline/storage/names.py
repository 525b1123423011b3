"""How locations are spelled."""

import os

from pipeline.errors import ConfigError

SCHEMES = ("file", "s3", "gs", "az", "memory")
TEMPORARY_SUFFIX = ".part"  # with a leading dot: readers of Parquet folders pass such files over


def normalise(uri: str) -> str:
    """The one spelling of a location: plain paths become absolute `file://` URIs, trailing slashes go.

    Raises ConfigError for a scheme outside `SCHEMES`.
    """
    scheme, separator, path = uri.partition("://")
    if not separator:
        scheme, path = "file", os.path.abspath(os.path.expanduser(uri))
    if scheme not in SCHEMES:
        raise ConfigError(f"expected a URI of scheme {', '.join(SCHEMES)} or a local path, got {uri!r}")
    if scheme == "file":
        path = os.path.abspath(path)
    return f"{scheme}://{path.rstrip('/') or '/'}"


def split(uri: str) -> tuple[str, str]:
    """(scheme, path) of a URI; the path is `bucket/key` for object stores and absolute for `file`."""
    scheme, separator, path = uri.partition("://")
    if not separator or scheme not in SCHEMES:
        raise ConfigError(f"expected a URI of scheme {', '.join(SCHEMES)}, got {uri!r}")
    return scheme, path


def join(uri: str, *names: str) -> str:
    """`uri` with `names` below it."""
    return "/".join([uri.rstrip("/"), *names])


def is_under(uri: str, root: str) -> bool:
    """Whether `uri` lies at or below `root`; `root` may be a bare scheme such as `s3://`.

    `..` segments in a `file` URI are resolved first, as the system would, so that they cannot climb out of the root:
    after a link to a folder they lead to where that lies.
    """
    if root.endswith("://"):
        return uri.startswith(root)
    if uri.startswith("file://") and root.startswith("file://"):
        resolve = _real if "/../" in uri else os.path.normpath
        uri, root = (f"file://{resolve(each.removeprefix('file://'))}" for each in (uri, root))
    return uri == root or uri.startswith(root if root.endswith("/") else root + "/")


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # a name that no file has
        return os.path.normpath(path)
