"""Listing what lies below a prefix, in a fixed order and without holding it all."""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import obstore

from pipeline.storage.concurrency import chain_ahead
from pipeline.storage.names import TEMPORARY_SUFFIX, split
from pipeline.storage.objects import ObjectInfo, clean_etag, file_etag
from pipeline.storage.stores import OBSTORE_ALONE, filesystem, obstore_of, translated

_FILES_PER_PAGE = 1000
_MOST_PARTS = 4096
_JUST_BELOW_A_SLASH = ".~~~~"  # as keys are sorted, what follows begins with a slash, but for names nobody gives


class Page(NamedTuple):
    """Part of one folder: objects in order, and the paths of folders right below it."""

    objects: list[ObjectInfo]
    folders: list[str]


def list_objects(uri: str, *, concurrency: int = 16) -> Iterator[ObjectInfo]:
    """Every object below `uri`, streamed in a fixed order: a folder's own objects, then its folders by name.

    That of `gs` and `az` is by name throughout. The first level's folders are listed in parallel, at most `concurrency`
    at a time and a few pages ahead each, so memory does not grow with the number of objects, nor on `s3` with that of
    folders. Links to folders are followed, but in circles. Folder placeholders (empty names ending in `/`) are left
    out, and so are temporary files. An empty or absent prefix yields nothing; an absent bucket raises
    ObjectNotFoundError. Raises AccessDeniedError, StorageError.
    """
    scheme, path = split(uri)
    if scheme == "file" and not os.path.isdir(path):
        return
    with translated(uri):
        if scheme in OBSTORE_ALONE:
            yield from _stream_of_obstore(scheme, path)
            return
        parts = _Parts(_MOST_PARTS if scheme == "s3" else None)
        for page in _level(scheme, path):
            yield from page.objects
            parts.add(page.folders)
        for objects in chain_ahead(parts.listings(scheme, path), concurrency):
            yield from objects


def list_folders(uri: str) -> list[str]:
    """The names of the folders right below `uri`, in order; none where it is absent. Raises as `list_objects`."""
    scheme, path = split(uri)
    if scheme == "file" and not os.path.isdir(path):
        return []
    with translated(uri):
        folders = [folder for page in _level(scheme, path) for folder in page.folders]
    return sorted(folder.removesuffix("/").rpartition("/")[2] for folder in folders)


class _Parts:
    """Folders to be listed side by side: each by itself or, on S3, where they are more than `most`, in ranges of many,
    since a request for each of millions would take hours.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._starts: list[str] = []
        self._num_folders, self._every = 0, 1

    def add(self, folders: Iterable[str]) -> None:
        """More of them, in order where there is a most."""
        for folder in folders:
            if self._num_folders % self._every == 0:
                self._starts.append(folder)
            self._num_folders += 1
        while self._most is not None and len(self._starts) > self._most:
            self._starts, self._every = self._starts[::2], 2 * self._every

    def listings(self, scheme: str, path: str) -> list[Callable[[], Iterator[list[ObjectInfo]]]]:
        """What lists them, part by part."""
        if self._every == 1:
            return [partial(_list_deeply, scheme, folder) for folder in sorted(self._starts)]
        return [partial(_list_range, path, start, stop) for start, stop in zip_longest(self._starts, self._starts[1:])]


def _list_range(path: str, start: str, stop: str | None) -> Iterator[list[ObjectInfo]]:
    """What lies in the folders of `path` on S3 from `start` to before `stop`, in the order of the keys."""
    first, last = f"s3://{start}", None if stop is None else f"s3://{stop}"
    own = f"s3://{path.rstrip('/')}/"
    for page in _pages_of_s3(path, "", start_after=start.partition("/")[2].removesuffix("/") + _JUST_BELOW_A_SLASH):
        yield [
            info
            for info in page.objects
            if first <= info.uri and (last is None or info.uri < last) and "/" in info.uri.removeprefix(own)
        ]
        if last is not None and page.objects and page.objects[-1].uri >= last:
            return


def _level(scheme: str, path: str) -> Iterator[Page]:
    """The folder at `path`, without what lies deeper."""
    if scheme == "file":
        return _pages_of_files(path)
    if scheme in OBSTORE_ALONE:
        return _pages_of_obstore(scheme, path)
    return _pages_of_s3(path, "/") if scheme == "s3" else _pages_of_fsspec(scheme, path)


def _list_deeply(scheme: str, path: str) -> Iterator[list[ObjectInfo]]:
    if scheme == "s3":
        yield from (page.objects for page in _pages_of_s3(path, ""))
        return
    folders: list[str] = []
    for page in _level(scheme, path):
        yield page.objects
        folders += page.folders
    for folder in sorted(folders):
        yield from _list_deeply(scheme, folder)


def _pages_of_files(path: str) -> Iterator[Page]:
    names = sorted(os.listdir(path))  # and no more than names of all of them: there may be millions
    for start in range(0, len(names), _FILES_PER_PAGE):
        page = Page([], [])
        for name in names[start : start + _FILES_PER_PAGE]:
            _add_file(page, os.path.join(path, name), name)
        yield page


def _add_file(page: Page, path: str, name: str) -> None:
    status = _status(path)
    if status is None:
        return
    if stat.S_ISDIR(status.st_mode):
        if not (os.path.islink(path) and _closes_circle(path)):
            page.folders.append(path)
    elif not (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)):
        page.objects.append(ObjectInfo(f"file://{path}", status.st_size, file_etag(status)))


def _status(path: str) -> os.stat_result | None:
    """None for a file that is gone since, and for a link to nowhere or to itself."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def _closes_circle(link: str) -> bool:
    """Whether a linked folder is one of those that it lies in, by whatever links they were reached."""
    target = os.path.realpath(link)
    return any(os.path.realpath(parent) == target for parent in Path(link).parents)


def _pages_of_s3(path: str, delimiter: str, start_after: str = "") -> Iterator[Page]:
    bucket, _, prefix = path.partition("/")
    prefix += "/" if prefix and not prefix.endswith("/") else ""  # "a//" is a folder of its own, below "a/"
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
    request |= {"StartAfter": start_after} if start_after else {}
    while True:
        answer = filesystem("s3").call_s3("list_objects_v2", **request)
        yield Page(
            [
                ObjectInfo(f"s3://{bucket}/{entry['Key']}", entry["Size"], clean_etag(entry["ETag"]))
                for entry in answer.get("Contents", [])
                if entry["Size"] or not entry["Key"].endswith("/")
            ],
            [f"{bucket}/{common['Prefix']}" for common in answer.get("CommonPrefixes", [])],
        )
        if not answer.get("IsTruncated"):
            return
        request["ContinuationToken"] = answer["NextContinuationToken"]


def _stream_of_obstore(scheme: str, path: str) -> Iterator[ObjectInfo]:
    bucket, _, prefix = path.partition("/")
    entries = (entry for chunk in obstore.list(obstore_of(scheme, bucket), prefix or None) for entry in chunk)
    empty: ObjectInfo | None = None  # perhaps a placeholder, which obstore names without its slash
    for info in _infos_of_obstore(scheme, bucket, entries):
        if empty is not None and not info.uri.startswith(empty.uri + "/"):
            yield empty
        empty = None if info.size else info
        if info.size:
            yield info
    if empty is not None:
        yield empty


def _pages_of_obstore(scheme: str, path: str) -> Iterator[Page]:
    bucket, _, prefix = path.partition("/")
    found = obstore.list_with_delimiter(obstore_of(scheme, bucket), prefix or None)
    folders = [f"{bucket}/{folder}" for folder in found["common_prefixes"]]
    yield Page(list(_infos_of_obstore(scheme, bucket, found["objects"])), folders)


def _infos_of_obstore(scheme: str, bucket: str, entries: Iterable[Any]) -> Iterator[ObjectInfo]:
    for entry in entries:
        yield ObjectInfo(f"{scheme}://{bucket}/{entry['path']}", entry["size"], clean_etag(entry["e_tag"]))


def _pages_of_fsspec(scheme: str, path: str) -> Iterator[Page]:
    page = Page([], [])
    with suppress(FileNotFoundError):
        for entry in sorted(filesystem(scheme).ls(path, detail=True), key=lambda entry: str(entry["name"])):
            name = entry["name"] if scheme != "memory" else entry["name"].lstrip("/")
            if entry["type"] == "directory":
                page.folders.append(name)
            else:
                page.objects.append(ObjectInfo(f"{scheme}://{name}", entry["size"], clean_etag(entry.get("etag"))))
    yield page
