"""Curation manifests: a Parquet table of pictures that lie where they lay, loose or in tar shards.

Columns: `uid`, `uri`, `sha256`, `height`, `width` (of the upright picture, in pixels), a caption, and any
number of scores and decisions. A `uri` is a path relative to the manifest, an absolute path, a URL for
fsspec, or `shard.tar#member`. A manifest names bytes: its sha256 column is taken as the identity of the
pictures.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from emu_lightning.data.folder import decode
from emu_lightning.data.held_out import HeldOutData
from emu_lightning.data.shards import check_window, index_shards, order_in_windows, read_index
from emu_lightning.data.source import BrokenImage, Sample, Source
from emu_lightning.data.storage import (
    LocalCopies,
    StoredFile,
    filesystem,
    find_files,
    is_url,
    look_up,
    read_file,
    read_part,
)
from emu_lightning.files import write_whole

COLUMNS = {
    "uid": pa.large_string(),
    "uri": pa.large_string(),
    "sha256": pa.large_string(),
    "height": pa.int32(),
    "width": pa.int32(),
}
MEMBER = r"^(?P<shard>.*\.tar)#(?P<member>.*)$"


def read_manifest(file: StoredFile, keep: str | None, caption: str) -> pa.Table:
    """The rows that are kept.

    Args:
        file: a Parquet file.
        keep: name of a boolean column; rows where it is true are kept. None keeps all.
        caption: name of the column of captions.

    Returns:
        `COLUMNS` and `caption`, without nulls; each `uri` absolute, or a URL.

    Raises:
        ValueError: it is no manifest, a column is missing or of another type, or a value is missing.
    """
    store, path = filesystem(file.url)
    wanted = COLUMNS | {"caption": pa.large_string()}
    named = {name: caption if name == "caption" else name for name in wanted}
    try:
        there = pq.read_schema(path, filesystem=store)
        needed = [*named.values(), *([keep] if keep is not None else [])]
        missing = [name for name in needed if name not in there.names]
        if missing:
            raise ValueError(
                f"manifest {file.url} has no column {', '.join(missing)}; it has {', '.join(there.names)}"
            )
        columns = list(dict.fromkeys(needed))
        table = pq.read_table(path, columns=columns, filesystem=store, partitioning=None)
    except pa.ArrowException as error:
        raise _damaged(file, error) from None
    if keep is not None:
        if not pa.types.is_boolean(there.field(keep).type):
            raise ValueError(
                f"keep={keep} of {file.url} is {there.field(keep).type}, not a decision (boolean)"
            )
        table = table.filter(table[keep])  # null: undecided, not kept
    complete = {}
    for name, type_ in wanted.items():
        column = table[named[name]]
        try:
            complete[name] = column.cast(type_)
        except pa.ArrowException:
            raise ValueError(f"{named[name]} of {file.url} is {column.type}, not {type_}") from None
    complete["caption"] = pc.utf8_trim_whitespace(complete["caption"])
    for name, column in complete.items():
        nothing = pa.scalar(0 if name in ("height", "width") else "", column.type)
        is_empty = pc.fill_null(pc.equal(column, nothing), True)
        if pc.any(is_empty).as_py():
            uid = complete["uid"][pc.index(is_empty, True).as_py()]
            raise ValueError(
                f"{pc.sum(is_empty)} of {len(table)} rows of {file.url} have no {named[name]}, "
                f"such as that of {uid}"
            )
    complete["uri"] = _absolute(complete["uri"], file.url.rpartition("/")[0])
    return pa.table(complete)


def read_table(file: StoredFile) -> pa.Table:
    """All rows and columns of a manifest as they are, but each `uri` absolute, or a URL.

    Raises:
        ValueError: it is no Parquet file, or has no column `uri`.
    """
    store, path = filesystem(file.url)
    try:
        table = pq.read_table(path, filesystem=store, partitioning=None)
        uris = table["uri"].cast(COLUMNS["uri"])
    except pa.ArrowException as error:
        raise _damaged(file, error) from None
    except KeyError:
        raise ValueError(f"manifest {file.url} has no column uri") from None
    absolute = _absolute(uris, file.url.rpartition("/")[0])
    return table.set_column(table.column_names.index("uri"), "uri", absolute)


def write_table(table: pa.Table, path: str | Path) -> None:
    """Writes a manifest whole or not at all."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_whole(path, buffer.getvalue().to_pybytes())


def _damaged(file: StoredFile, error: pa.ArrowException) -> ValueError:
    return ValueError(f"{file.url} is no Parquet file, or damaged: {error}")


def _absolute(uris: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    """`uris` as absolute paths or URLs; relative ones are below `folder`."""
    uris = pc.replace_substring_regex(uris, "^file://", "")
    is_absolute = pc.match_substring_regex(uris, r"^/|^[A-Za-z0-9+.-]+://")
    below = pc.binary_join_element_wise(pa.scalar(folder, uris.type), uris, pa.scalar("/", uris.type))
    return pc.if_else(is_absolute, uris, below)


class Manifest(Source):
    """The pictures of a manifest, in its order.

    Args:
        manifest: paths or URLs of Parquet files, with `{00..10}`, `{a,b}`, `*`.
        keep: name of a boolean column; rows where it is true are kept. None keeps all.
        caption: name of the column of captions.
        verify: compare the sha256 of each picture when it is read; another one makes it a broken picture.
        cache_dir: for indices of shards and for copies of remote shards.
        cache_gb: what the copies may take, 10^9 bytes each.
        shuffle_shards: how many shards are shuffled together, and so read side by side.
        num_workers: processes that index shards.

    Raises:
        FileNotFoundError: a manifest, a shard or a local picture is missing.
        ValueError: a manifest is wrong, or a shard is damaged or lacks a member; the message says which.
    """

    def __init__(
        self,
        manifest: str | Sequence[str],
        keep: str | None = None,
        caption: str = "caption",
        verify: bool = False,
        cache_dir: str | Path = "runs/cache",
        cache_gb: float = 100.0,
        shuffle_shards: int = 16,
        num_workers: int = 0,
    ) -> None:
        self.verify, self.shuffle_shards = verify, shuffle_shards
        parts = [read_manifest(file, keep, caption) for file in find_files(manifest)]
        self._table = pa.concat_tables(parts).combine_chunks()
        if not len(self._table):
            kept = "" if keep is None else f" with {keep}"
            raise ValueError(f"manifest {manifest} has no row{kept}")
        counts = pc.value_counts(self._table["uid"])
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        if len(repeated):
            raise ValueError(
                f"manifest {manifest} has {len(repeated)} uids more than once, such as {repeated[0]}"
            )
        self._copies = LocalCopies(Path(cache_dir) / "shards", cache_gb)
        self._find_members(Path(cache_dir) / "shard_index", num_workers)
        check_window(shuffle_shards, self._shards, self._copies)
        self._check_loose()

    def _find_members(self, indices: Path, num_workers: int) -> None:
        """Where in which shard each picture lies; shard -1 for loose ones."""
        parts = pc.extract_regex(self._table["uri"].combine_chunks(), MEMBER)
        shards = pc.struct_field(parts, "shard").dictionary_encode()
        members = pc.struct_field(parts, "member")
        self._shard = shards.indices.fill_null(-1).to_numpy()
        self._offset = np.zeros(len(self._shard), np.int64)
        self._size = np.zeros(len(self._shard), np.int64)
        is_loose = self._shard < 0  # each is a file of its own
        self._group = np.where(is_loose, len(shards.dictionary) - 1 + np.cumsum(is_loose), self._shard)
        names = shards.dictionary.to_pylist()
        self._shards = look_up([name if is_url(name) else os.path.abspath(name) for name in names])
        paths = index_shards(self._shards, self._copies, indices, num_workers=num_workers)
        by_shard = np.argsort(self._shard, kind="stable")
        ends = np.searchsorted(self._shard[by_shard], np.arange(len(self._shards) + 1))
        for file, path, first, last in zip(self._shards, paths, ends, ends[1:], strict=False):
            rows, index = by_shard[first:last], read_index(path)
            wanted = members.take(pa.array(rows))
            found = pc.index_in(wanted, value_set=index["member"].cast(wanted.type))
            if found.null_count:
                example = wanted.filter(found.is_null())[0]
                raise ValueError(
                    f"shard {file.url} lacks {found.null_count} pictures of the manifest, such as {example}"
                )
            self._offset[rows] = index["offset"].take(found).to_numpy()
            self._size[rows] = index["size"].take(found).to_numpy()

    def _check_loose(self) -> None:
        rows = np.flatnonzero(self._shard < 0).tolist()
        uris = (self._value("uri", row) for row in rows)
        missing = [uri for uri in uris if not is_url(uri) and not os.path.isfile(uri)]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} pictures of the manifest are missing, such as {missing[0]}"
            )

    def _value(self, column: str, index: int) -> Any:
        return self._table[column][index].as_py()

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Sample:
        uid = self.uid(index)
        content = self._content(index, uid)
        if self.verify and hashlib.sha256(content).hexdigest() != self._value("sha256", index):
            raise BrokenImage(uid, "its sha256 is not that of the manifest")
        image = decode(io.BytesIO(content), uid)
        return Sample(image=image, text=self.text(index), uid=uid, original_size=(image.height, image.width))

    def _content(self, index: int, uid: str) -> bytes:
        if self._shard[index] >= 0:
            file = self._shards[self._shard[index]]
            return read_part(self._copies, file, int(self._offset[index]), int(self._size[index]))
        try:
            return read_file(self._value("uri", index))
        except FileNotFoundError as error:
            raise BrokenImage(uid, f"there is no {error.filename or error}") from None

    def uid(self, index: int) -> str:
        uid: str = self._value("uid", index)
        return uid

    def sha256(self, index: int) -> str:
        """Of the bytes of the picture at `index`, as the manifest has it."""
        sha256: str = self._value("sha256", index)
        return sha256

    def uids(self) -> list[str]:
        uids: list[str] = self._table["uid"].to_pylist()
        return uids

    def text(self, index: int) -> str:
        return " ".join(self._value("caption", index).split())

    def sizes(self) -> NDArray[np.int64]:
        columns = [self._table[name].to_numpy() for name in ("height", "width")]
        return np.stack(columns, axis=1).astype(np.int64)

    def size(self, index: int) -> tuple[int, int]:
        return self._value("height", index), self._value("width", index)

    def order(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Shards and loose pictures are shuffled, then samples within `shuffle_shards` of them."""
        return order_in_windows(self._group[indices], self.shuffle_shards, seed, epoch)

    def fingerprint(self) -> str:
        """Over all uids and sha256 of the manifest; no picture is read."""
        digest = hashlib.sha256()
        for uid, sha256 in zip(self._table["uid"], self._table["sha256"], strict=True):
            digest.update(f"{uid}:{sha256}\n".encode())
        return "manifest-1:" + digest.hexdigest()


class ManifestData(HeldOutData):
    """The pictures of a curation manifest, a share of them held out for validation.

    Args:
        manifest: paths or URLs of Parquet files, with `{00..10}`, `{a,b}`, `*`.
        keep: name of a boolean column, a decision; only rows where it is true are used.
        caption: name of the column of captions.
        verify: compare the sha256 of each picture when it is read; another one makes it a broken picture.
        shuffle_shards: how many shards are shuffled together, and so read side by side.
        cache_gb: what local copies of remote shards may take in `cache_dir`, 10^9 bytes each.
        kwargs: of :class:`~emu_lightning.data.held_out.HeldOutData`, and of `ImageData`.
    """

    def __init__(
        self,
        manifest: str | list[str],
        keep: str | None = None,
        caption: str = "caption",
        verify: bool = False,
        shuffle_shards: int = 16,
        cache_gb: float = 100.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.manifest, self.keep, self.caption, self.verify = manifest, keep, caption, verify
        self.shuffle_shards, self.cache_gb = shuffle_shards, cache_gb

    def whole_source(self) -> Source:
        return Manifest(
            self.manifest,
            keep=self.keep,
            caption=self.caption,
            verify=self.verify,
            cache_dir=self.cache_dir,
            cache_gb=self.cache_gb,
            shuffle_shards=self.shuffle_shards,
            num_workers=self.num_workers,
        )
