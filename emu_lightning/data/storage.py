"""Files by path or by URL: which there are, what identifies them, and local copies of the remote ones.

A URL is anything fsspec reads (`s3://`, `gs://`, `hf://`, `https://`, ...); credentials and endpoints come
from its own configuration and environment variables.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from filelock import FileLock

BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "mtime",
    "LastModified",
    "last_modified",
    "created",
)  # in an fsspec info
NUM_REQUESTS = 32  # at once, when many remote files are looked up
OPEN_FILES = 256  # local ones kept open by a process


@dataclass(frozen=True)
class StoredFile:
    """A file as it was when it was looked up.

    Attributes:
        url: an absolute path, or a URL.
        size: in bytes.
        version: time of modification in nanoseconds, or what the store has for it (an ETag).
    """

    url: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """Without folder and suffix."""
        return Path(self.url).stem

    @property
    def key(self) -> str:
        """Identity of place and content."""
        return hashlib.sha256(f"{self.url}\n{self.size}\n{self.version}".encode()).hexdigest()[:32]


def is_url(name: str) -> bool:
    """Whether `name` is not a path of this machine."""
    return "://" in name and not name.startswith("file://")


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the path in it.

    Raises:
        ValueError: fsspec does not know this kind of URL, or needs another package for it; it says which.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be read: {error}") from None


def expand_braces(pattern: str) -> list[str]:
    """`{00..10}` and `{a,b}` spelt out, as a shell does: one name for each combination, in order."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last, listed = found.groups()
    if listed is not None:
        choices = listed.split(",")
    else:
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    names = [name for choice in choices for name in expand_braces(before + choice + after)]
    return list(dict.fromkeys(names))


def find_files(patterns: str | Sequence[str]) -> list[StoredFile]:
    """The files that paths or URLs name, with `{00..10}`, `{a,b}`, `*` and `?`; each once, in order.

    Raises:
        FileNotFoundError: a file is missing, or nothing fits a pattern.
        ValueError: a URL cannot be read; see :func:`filesystem`.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    names = [name for pattern in patterns for each in expand_braces(pattern) for name in _matches(each)]
    if not names:
        raise FileNotFoundError(f"no file is named by {', '.join(patterns) or 'an empty list'}")
    return look_up(list(dict.fromkeys(names)))


def _matches(pattern: str) -> list[str]:
    if is_url(pattern):
        if "*" not in pattern:  # a question mark belongs to the URL
            return [pattern]
        store, path = filesystem(pattern)
        found = [store.unstrip_protocol(name) for name in sorted(store.glob(path))]
    else:
        path = os.path.abspath(os.path.expanduser(pattern.removeprefix("file://")))
        found = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
    if not found:
        raise FileNotFoundError(f"no file is named {pattern}")
    return found


def look_up(names: Sequence[str]) -> list[StoredFile]:
    """Size and version of each of `names`, which are absolute paths or URLs.

    Raises:
        FileNotFoundError: some are missing; the first is named.
        OSError: a store does not answer.
    """
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        files = list(pool.map(_look_up, names))
    missing = [name for name, file in zip(names, files, strict=True) if file is None]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} files are missing or out of reach, such as {missing[0]}"
        )
    return [file for file in files if file is not None]


def _look_up(name: str) -> StoredFile | None:
    try:
        if not is_url(name):
            stat = os.stat(name)
            return StoredFile(name, stat.st_size, str(stat.st_mtime_ns))
        store, path = filesystem(name)
        info = store.info(path)
    except FileNotFoundError:
        return None
    except ValueError:
        raise
    except Exception as error:  # stores raise what they like: no credentials, no such bucket, no network
        raise OSError(f"{name} cannot be looked up: {type(error).__name__}: {error}") from None
    version = next((str(info[key]) for key in VERSIONS if info.get(key) is not None), "")
    return StoredFile(name, int(info["size"] or 0), version)


def read_file(name: str) -> bytes:
    """All of a file, by absolute path or URL.

    Raises:
        OSError: it is missing (FileNotFoundError), or cannot be read.
    """
    if not is_url(name):
        return Path(name).read_bytes()
    store, path = filesystem(name)
    content: bytes = store.cat_file(path)
    return content


@dataclass(frozen=True)
class LocalCopies:
    """Whole copies of remote files in a folder that several processes share.

    Attributes:
        folder: made when the first copy is.
        gigabytes: what the copies may take, 10^9 bytes each; the least recently opened goes first. Copies
            that are under way at the same time come on top.
    """

    folder: Path
    gigabytes: float

    def open(self, file: StoredFile) -> BinaryIO:
        """`file` for reading, copied first where it is remote; usable even after its copy has gone.

        Raises:
            OSError: it cannot be copied.
        """
        if not is_url(file.url):
            return Path(file.url).open("rb", buffering=0)
        copy = self.folder / f"{file.key}.copy"
        opened = _open_if_there(copy)
        if opened is None:
            with lock_for(self.folder, file.key):
                opened = _open_if_there(copy) or self._copy(file, copy)  # another process may have copied it
        now = time.time_ns()  # finer than what the system would write by itself
        os.utime(opened.fileno(), ns=(now, now))
        return opened

    def _copy(self, file: StoredFile, copy: Path) -> BinaryIO:
        self._make_room(file.size)
        partial = copy.with_suffix(".partial")
        store, path = filesystem(file.url)
        try:
            store.get_file(path, str(partial))
        except Exception as error:
            raise OSError(f"{file.url} cannot be copied: {type(error).__name__}: {error}") from None
        if partial.stat().st_size != file.size:
            raise OSError(
                f"{file.url} was copied with {partial.stat().st_size} of {file.size} bytes: start again"
            )
        opened = partial.open("rb", buffering=0)
        os.replace(partial, copy)
        return opened

    def _make_room(self, size: int) -> None:
        copies = sorted(self._copies(), key=lambda each: each[1].st_mtime)
        excess = sum(stat.st_size for _, stat in copies) + size - self.gigabytes * 1e9
        for path, stat in copies:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= stat.st_size

    def _copies(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("*.copy"):
            try:
                yield path, path.stat()
            except FileNotFoundError:  # another process has made room
                continue


def lock_for(folder: Path, key: str) -> FileLock:
    """A lock between processes for `key`; keys share 256 lock files, so that they do not pile up."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{key[:2]}.lock")


def _open_if_there(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        return None


@lru_cache(maxsize=OPEN_FILES)
def _opened(file: StoredFile) -> BinaryIO:
    """A local file; on a network file system opening is what takes long."""
    return Path(file.url).open("rb", buffering=0)


def read_part(copies: LocalCopies, file: StoredFile, offset: int, size: int) -> bytes:
    """`size` bytes of `file` from `offset`.

    Raises:
        OSError: it ends before that, or cannot be read.
    """
    if is_url(file.url):
        with copies.open(file) as opened:  # closed at once: a copy that goes must free the disk
            content = os.pread(opened.fileno(), size, offset)
    else:
        content = os.pread(_opened(file).fileno(), size, offset)
    if len(content) != size:
        raise OSError(f"{file.url} has become shorter while it was read: start again")
    return content
