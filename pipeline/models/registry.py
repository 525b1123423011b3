"""The registry: bundles by name and version, and aliases that point at one of them.

    <registry>/<name>/<version>/               a bundle; never changes
    <registry>/<name>/aliases/<alias>.json     {"version": "…"}; moves

A reference is `name` (the highest version), `name/version`, `name@alias`, or where a bundle lies: a URI, or a local
folder. Versions are ordered naturally: numbers by value, the rest by letters, so 1.9 < 1.10 and v9 < v10.
"""

import json
import re
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline import storage
from pipeline.errors import BundleError, ObjectNotFoundError
from pipeline.models import bundle as bundles
from pipeline.models.bundle import Bundle, Name

_ALIASES = "aliases"
_NAME = TypeAdapter[str](Name)


def publish(registry_uri: str, bundle: Bundle, weights: bytes) -> str:
    """Write the bundle under its name and version and return its URI; of several writers at once exactly one wins.

    Publishing an equal bundle again changes nothing. Raises BundleError where the version is taken by another.
    """
    if bundle.version == _ALIASES:
        raise BundleError(f"version: {_ALIASES!r} is where the aliases lie; choose another")
    uri = storage.join(storage.normalise(registry_uri), bundle.name, bundle.version)
    bundles.save(uri, bundle, weights)
    return uri


def resolve(registry_uri: str | None, reference: str) -> str:
    """The URI of the bundle that `reference` means; without a registry, only where a bundle lies will do.

    Raises BundleError where there is none, naming what there is.
    """
    if is_place(reference):
        return storage.normalise(reference)
    if registry_uri is None:
        raise BundleError(f"expected a registry for {reference!r} to be looked up in, or a bundle's URI or folder")
    name, version, alias = _parse(reference)
    versions = list_versions(registry_uri, name)
    if not versions:
        raise BundleError(f"expected a bundle named {name!r} in {registry_uri}, found no version of it")
    if alias is not None:
        version = _read_alias(registry_uri, name, alias)
    if version is None:
        version = versions[-1]
    if version not in versions:
        raise BundleError(f"expected version {version!r} of {name!r} in {registry_uri}, found {', '.join(versions)}")
    return storage.join(storage.normalise(registry_uri), name, version)


def is_place(reference: str) -> bool:
    """Whether the reference says where a bundle lies, whatever the registry."""
    return "://" in reference or Path(reference, bundles.MODEL_FILE).exists()


def list_versions(registry_uri: str, name: str) -> list[str]:
    """The published versions of `name`, lowest first, in natural order; empty where there are none."""
    root = storage.join(storage.normalise(registry_uri), _checked(name))
    suffix = f"/{bundles.MODEL_FILE}"
    below = (info.uri.removeprefix(f"{root}/") for info in storage.list_objects(root))
    versions = [path.removesuffix(suffix) for path in below if path.endswith(suffix)]
    return sorted((version for version in versions if "/" not in version and version != _ALIASES), key=_natural)


def set_alias(registry_uri: str, name: str, alias: str, version: str) -> None:
    """Point `name@alias` at a published version; readers see the old or the new. Raises BundleError if it is not."""
    resolve(registry_uri, f"{_checked(name)}/{_checked(version)}")
    storage.write(_alias_uri(registry_uri, name, _checked(alias)), json.dumps({"version": version}).encode())


def _parse(reference: str) -> tuple[str, str | None, str | None]:
    """(name, version, alias) of a reference, of which the last two are not both given."""
    parts = re.fullmatch(r"([^/@]+)(?:/([^/@]+)|@([^/@]+))?", reference)
    if parts is None:
        raise BundleError(f"expected name, name/version, name@alias or a bundle's URI, got {reference!r}")
    for part in parts.groups():
        if part is not None:
            _checked(part)
    return parts[1], parts[2], parts[3]


def _checked(name: str) -> str:
    try:
        return _NAME.validate_python(name)
    except ValidationError as error:
        raise BundleError(f"expected a name of letters, digits and `.`, `_`, `-`, got {name!r}") from error


def _read_alias(registry_uri: str, name: str, alias: str) -> str:
    uri = _alias_uri(registry_uri, name, alias)
    try:
        version = json.loads(storage.read(uri))["version"]
        return _checked(version)
    except ObjectNotFoundError as error:
        raise BundleError(f"expected an alias {alias!r} of {name!r} in {registry_uri}, found none") from error
    except (ValueError, KeyError, TypeError, BundleError) as error:
        raise BundleError(f'{uri} is damaged: expected {{"version": "…"}}') from error


def _alias_uri(registry_uri: str, name: str, alias: str) -> str:
    return storage.join(storage.normalise(registry_uri), name, _ALIASES, f"{alias}.json")


def _natural(version: str) -> tuple[list[tuple[int, int, str]], str]:
    pieces = (piece for piece in re.split(r"(\d+)", version) if piece)
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in pieces], version
