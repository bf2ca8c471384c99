"""What there is to choose from: pools of pictures, loose or in tar shards, as rows in shards of equal length.

Nothing is decoded here and nothing judged: a file that is broken, or missing, is a row like any other. Pool
columns that mean the same everywhere:

    uid uri caption    the caption null where there is none
    source licence     text
    likes              int64, null where unknown, which is not zero
    posted_at          timestamp, UTC
    file_version       of picture and caption: another one has the row scored again
    file_offset file_size    where in its tar the picture lies; null for loose ones
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from emu_lightning.files import SUFFIXES, UNREAD, unread_pictures

FIELDS = {  # of what people and sites say about a picture; others keep the type that they come with
    "source": pa.string(),
    "licence": pa.string(),
    "likes": pa.int64(),
    "posted_at": pa.timestamp("us", "UTC"),
}
PLACE = {"file_version": pa.string(), "file_offset": pa.int64(), "file_size": pa.int64()}
MISSING = "missing"  # a file's version where there is none
FORMAT = 1  # of the tables of tar shards in the cache


@dataclass(frozen=True)
class Shard:
    """Some rows of a pool.

    Attributes:
        id: eight digits, in the order of the pool.
        rows: at least `uid`, `uri`, `caption` and `PLACE`.
        content: changes when a row, a caption or a picture's file does.
    """

    id: str
    rows: pa.Table
    content: str


class Pool(ABC):
    """Pictures to choose from."""

    @abstractmethod
    def table(self) -> pa.Table:
        """All rows; see the module. Order does not matter."""

    def shards(self, rows_per_shard: int = 1000) -> list[Shard]:
        """The rows by rising uri, in shards of `rows_per_shard`: for equal pools equal shards.

        Raises:
            FileNotFoundError: the pool is missing or empty.
            ValueError: a uid is there twice, or what describes the pictures is wrong.
        """
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
        table = self.table()
        for name in ("uid", "uri"):
            if table[name].null_count:
                raise ValueError(f"{table[name].null_count} rows of the pool have no {name}")
        counts = pc.value_counts(table["uid"])
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        if len(repeated):
            raise ValueError(f"the pool has {len(repeated)} uids more than once, such as {repeated[0]}")
        table = table.sort_by([("uri", "ascending"), ("uid", "ascending")]).combine_chunks()
        return [
            _shard(number, table.slice(first, rows_per_shard))
            for number, first in enumerate(range(0, len(table), rows_per_shard))
        ]


def _shard(number: int, rows: pa.Table) -> Shard:
    digest = hashlib.sha256()
    for uid, version in zip(rows["uid"].to_pylist(), rows["file_version"].to_pylist(), strict=True):
        digest.update(f"{len(uid)} {uid} {version}\n".encode())
    return Shard(f"{number:08d}", rows, digest.hexdigest()[:32])


def write_pool(run: Path, shards: Iterable[Shard]) -> None:
    """Writes `pool/<shard>.parquet` of a run; shards that are no more go."""
    folder = run / "pool"
    folder.mkdir(parents=True, exist_ok=True)
    names = set()
    for shard in shards:
        write_parquet(
            shard.rows.replace_schema_metadata({"content": shard.content}), pool_file(run, shard.id)
        )
        names.add(f"{shard.id}.parquet")
    for path in folder.iterdir():  # also what killed processes left
        if path.name not in names:
            path.unlink()


def read_shard(run: Path, shard: str) -> Shard:
    """A shard as :func:`write_pool` wrote it."""
    rows = pq.read_table(pool_file(run, shard), partitioning=None)
    return Shard(shard, rows.replace_schema_metadata(None), rows.schema.metadata[b"content"].decode())


def pool_file(run: Path, shard: str) -> Path:
    """Where a shard's rows lie."""
    return run / "pool" / f"{shard}.parquet"


def write_parquet(table: pa.Table, path: Path) -> None:
    """Writes a table whole or not at all, also where two processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    pq.write_table(table, partial)
    os.replace(partial, path)


# --- folders ------------------------------------------------------------------------------------------------


class Folder(Pool):
    """Pictures below a folder; a uid is the path relative to it. Names that begin with a dot are left out.

    Captions are in a `.txt` beside each picture, or in `metadata.jsonl` (Hugging Face imagefolder) as `text`,
    which goes first; that file may say more about a picture.

    Args:
        path: of the folder.
        fields: column and key in `metadata.jsonl`; the names in `FIELDS` are looked for without being named.
        source: what `source` is where nothing else says so.
    """

    def __init__(self, path: str, fields: Mapping[str, str] | None = None, source: str | None = None) -> None:
        self.path, self.source = Path(os.path.abspath(path)), source
        self.fields = {name: name for name in FIELDS} | dict(fields or {})

    def table(self) -> pa.Table:
        if not self.path.is_dir():
            raise FileNotFoundError(f"folder {self.path} does not exist")
        files = dict(_files(self.path))
        suffixes = SUFFIXES | UNREAD
        aside = {name for name in files if PurePosixPath(name).suffix.lower() in UNREAD}
        aside -= set(unread_pictures(files))  # a raw file beside the picture made of it
        texts = {_stem(name): name for name in files if name.lower().endswith(".txt")}
        about = self._metadata(files)
        names = {name for name in files if PurePosixPath(name).suffix.lower() in suffixes} - aside
        rows = []
        for name in sorted(names | set(about)):
            entry = about.get(name, {})
            caption = _clean(entry.get("text"))
            if caption is None and _stem(name) in texts:
                caption = _clean(_text((self.path / texts[_stem(name)]).read_bytes()))
            stat = files.get(name)
            version = f"{stat.st_size} {stat.st_mtime_ns}" if stat else MISSING
            row: dict[str, Any] = {"uid": name, "uri": f"{self.path}/{name}", "caption": caption}
            row |= {column: entry.get(key) for column, key in self.fields.items()}
            rows.append(row | {"file_version": row_version(version, caption)})
        if not rows:
            raise FileNotFoundError(f"{self.path} holds no images ({', '.join(sorted(SUFFIXES))})")
        return as_rows(rows, self.fields, self.source)

    def _metadata(self, files: Mapping[str, os.stat_result]) -> dict[str, dict[str, Any]]:
        """What each `metadata.jsonl` says, by uid."""
        about = {}
        for name in (name for name in files if PurePosixPath(name).name == "metadata.jsonl"):
            lines = (self.path / name).read_bytes().decode("utf-8-sig", errors="replace").split("\n")
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    uid = os.path.normpath(PurePosixPath(name).parent / entry["file_name"])
                except (ValueError, KeyError, TypeError):
                    raise ValueError(
                        f'{self.path / name}, line {number}: expected {{"file_name": "...", ...}}'
                    ) from None
                if uid.startswith(("../", "/")):
                    raise ValueError(f"{self.path / name}, line {number}: {uid} is not below {self.path}")
                about[uid] = entry
        return about


def _files(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Relative names of all visible files, with what the system says of them."""
    unnamed = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root)
            if name.startswith(".") or not os.path.isfile(path):
                continue
            try:
                relative.encode()
            except UnicodeEncodeError:
                unnamed.append(relative)
                continue
            yield relative, os.stat(path)
    if unnamed:
        warnings.warn(
            f"{len(unnamed)} files in {root} are left out because their names are not UTF-8, such as "
            f"{unnamed[0]!r}: rename them",
            stacklevel=2,
        )


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


# --- WebDataset shards --------------------------------------------------------------------------------------


class Shards(Pool):
    """Pictures in tar shards, each with a `.txt` and a `.json` of its key; a uid is `shard/key`.

    Args:
        urls: paths or URLs, with `{00000..00099}`, `{a,b}`, `*`.
        caption: key of the `.json` that holds the caption; None takes the `.txt`.
        fields: column and key in the `.json`; the names in `FIELDS` are looked for without being named.
        source: what `source` is where nothing else says so.
        cache_dir: for what was read of the headers of each shard, and for copies of remote shards.
        cache_gb: what the copies may take, 10^9 bytes each.
    """

    def __init__(
        self,
        urls: str | list[str],
        caption: str | None = None,
        fields: Mapping[str, str] | None = None,
        source: str | None = None,
        cache_dir: str = "runs/cache",
        cache_gb: float = 100.0,
    ) -> None:
        self.urls, self.caption, self.source = urls, caption, source
        self.fields = {name: name for name in FIELDS} | dict(fields or {})
        self.cache_dir, self.cache_gb = Path(cache_dir), cache_gb

    def table(self) -> pa.Table:
        from emu_lightning.data.storage import LocalCopies, find_files

        copies = LocalCopies(self.cache_dir / "shards", self.cache_gb)
        parts = []
        for file in find_files(self.urls):
            made_by = json.dumps([FORMAT, file.key, self.caption, self.fields, self.source])
            cached = self.cache_dir / "pool" / f"{hashlib.sha256(made_by.encode()).hexdigest()[:32]}.parquet"
            if not cached.is_file():
                with copies.open(file) as opened:
                    rows = self._scan(opened, file.url, file.name, file.key)
                write_parquet(as_rows(rows, self.fields, self.source), cached)
            parts.append(pq.read_table(cached))
        try:
            table = pa.concat_tables(parts, promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"{self.urls}: shards do not agree about a column: {error}") from None
        if not len(table):
            raise FileNotFoundError(f"no picture is in {self.urls}")
        return table

    def _scan(self, file: BinaryIO, url: str, name: str, key: str) -> list[dict[str, Any]]:
        """A row for each picture in a tar.

        Raises:
            ValueError: the tar is damaged.
        """
        from emu_lightning.data.shards import read_members, sample_key

        def content(member: Any) -> bytes:
            return os.pread(file.fileno(), member.size, member.offset_data)

        parts: dict[str, dict[str, Any]] = {}
        pictures = []
        for member in read_members(file, url):
            sample, extension = sample_key(member.name)
            if sample and f".{extension}" in SUFFIXES:
                pictures.append((sample, member))
            elif sample and extension in ("txt", "json"):
                parts.setdefault(sample, {})[extension] = member
        rows = []
        for sample, member in pictures:
            beside = parts.get(sample, {})
            about = _json(content(beside["json"])) if "json" in beside else {}
            text = _text(content(beside["txt"])) if "txt" in beside else None
            caption = _clean(text if self.caption is None else about.get(self.caption))
            row: dict[str, Any] = {
                "uid": f"{name}/{sample}",
                "uri": f"{url}#{member.name}",
                "caption": caption,
            }
            row |= {column: about.get(field) for column, field in self.fields.items()}
            version = row_version(f"{key} {member.offset_data} {member.size}", caption)
            row |= {"file_version": version, "file_offset": member.offset_data, "file_size": member.size}
            rows.append(row)
        return rows


def _text(content: bytes) -> str | None:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _json(content: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(content)
    except ValueError:  # not JSON, or not UTF-8
        return {}
    return entry if isinstance(entry, dict) else {}


# --- tables -------------------------------------------------------------------------------------------------


class Table(Pool):
    """Pictures that a Parquet file names and that are already here: img2dataset's table, or a manifest.

    Its columns become the pool's, except those that are measured anew from the pictures.

    Args:
        path: of the Parquet file, or its URL; several with `{00..10}`, `{a,b}`, `*`.
        uri: name of the column of paths (relative to the file, or absolute), URLs, or `shard.tar#member`.
        uid: name of the column of names; the uri itself when None.
        caption: name of the column of captions; rows have none when None.
        fields: column of the pool and column of the file, where `FIELDS` go by another name.
        cache_dir: for indices of tar shards and copies of remote ones.
        cache_gb: what the copies may take, 10^9 bytes each.
    """

    def __init__(
        self,
        path: str | list[str],
        uri: str = "uri",
        uid: str | None = None,
        caption: str | None = "caption",
        fields: Mapping[str, str] | None = None,
        cache_dir: str = "runs/cache",
        cache_gb: float = 100.0,
    ) -> None:
        self.path, self.uri, self.uid, self.caption = path, uri, uid, caption
        self.fields, self.cache_dir, self.cache_gb = dict(fields or {}), Path(cache_dir), cache_gb

    def table(self) -> pa.Table:
        from emu_lightning.curation.decode import FACTS
        from emu_lightning.data.storage import find_files

        try:
            table = pa.concat_tables(map(self._read, find_files(self.path)), promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"{self.path}: files do not agree about a column: {error}") from None
        if not len(table):
            raise FileNotFoundError(f"{self.path} names no picture")
        uris = table["uri"].to_pylist()
        versions, offsets, sizes = self._find(uris)
        captions = [_clean(text) for text in table["caption"].to_pylist()]
        columns = {name: table[name] for name in table.column_names if name not in FACTS}
        columns |= {
            "caption": pa.array(captions, pa.string()),
            "file_version": pa.array(map(row_version, versions, captions), pa.string()),
            "file_offset": pa.array(offsets, pa.int64()),
            "file_size": pa.array(sizes, pa.int64()),
        }
        return pa.table(columns)

    def _read(self, file: Any) -> pa.Table:
        """One file's columns under the pool's names; each uri absolute, or a URL."""
        from emu_lightning.data.storage import filesystem

        store, path = filesystem(file.url)
        try:
            table = pq.read_table(path, filesystem=store, partitioning=None)
        except pa.ArrowException as error:
            raise ValueError(f"{file.url} is no Parquet file, or damaged: {error}") from None
        there = table.column_names
        named = {"uri": self.uri, "uid": self.uid or self.uri, "caption": self.caption, **self.fields}
        absent = dict.fromkeys(name for name in named.values() if name is not None and name not in there)
        if absent:
            raise ValueError(f"{file.url} has no column {', '.join(absent)}; it has {', '.join(there)}")
        columns = {name: table[name] for name in there}
        for name, theirs in named.items():
            columns[name] = pa.nulls(len(table), pa.string()) if theirs is None else table[theirs]
        for name, type_ in {"uid": pa.string(), "uri": pa.string(), "caption": pa.string(), **FIELDS}.items():
            if name in columns:
                columns[name] = _cast(columns[name], type_, f"{named.get(name, name)} of {file.url}")
        folder = file.url.rpartition("/")[0]
        if columns["uri"].null_count:
            raise ValueError(f"{columns['uri'].null_count} rows of {file.url} have no {self.uri}")
        columns["uri"] = pa.array([_absolute(uri, folder) for uri in columns["uri"].to_pylist()], pa.string())
        return pa.table(columns)

    def _find(self, uris: Sequence[str]) -> tuple[list[str], list[int | None], list[int | None]]:
        """Version of each file, and offset and size of those in tars."""
        from emu_lightning.data.manifest import MEMBER
        from emu_lightning.data.shards import index_shards, read_index
        from emu_lightning.data.storage import LocalCopies, is_url, look_up

        parts = pc.extract_regex(pa.array(uris, pa.string()), MEMBER)
        tars = pc.struct_field(parts, "shard").to_pylist()
        members = pc.struct_field(parts, "member").to_pylist()

        def find(name: str) -> Any:
            try:
                return look_up([name])[0] if is_url(name) else os.stat(name)
            except FileNotFoundError:
                return None

        names = sorted({tar or uri for tar, uri in zip(tars, uris, strict=True)})
        with ThreadPoolExecutor(32) as threads:
            found = dict(zip(names, threads.map(find, names), strict=True))
        there = look_up(sorted({tar for tar in tars if tar is not None and found[tar] is not None}))
        copies = LocalCopies(self.cache_dir / "shards", self.cache_gb)
        indices = {}
        for file, path in zip(
            there, index_shards(there, copies, self.cache_dir / "shard_index"), strict=True
        ):
            index = read_index(path)
            place = zip(index["offset"].to_pylist(), index["size"].to_pylist(), strict=True)
            indices[file.url] = (file.key, dict(zip(index["member"].to_pylist(), place, strict=True)))
        rows = []
        for uri, tar, member in zip(uris, tars, members, strict=True):
            stat = found[tar or uri]
            if tar is None or stat is None:
                key = MISSING if stat is None else getattr(stat, "key", None)
                rows.append((key or f"{stat.st_size} {stat.st_mtime_ns}", None, None))
                continue
            key, places = indices[tar]
            offset, size = places.get(member, (None, None))
            rows.append((MISSING if offset is None else f"{key} {offset} {size}", offset, size))
        versions, offsets, sizes = zip(*rows, strict=True)
        return list(versions), list(offsets), list(sizes)


def _absolute(uri: str, folder: str) -> str:
    uri = uri.removeprefix("file://")
    return uri if uri.startswith("/") or "://" in uri else f"{folder}/{uri}"


# --- rows ---------------------------------------------------------------------------------------------------


def row_version(file: str, caption: str | None) -> str:
    """Of what scores depend on: the picture's file and its caption, not how many like it or where it lies."""
    return hashlib.sha256(json.dumps([file, caption]).encode()).hexdigest()[:16]


def as_rows(rows: Sequence[Mapping[str, Any]], fields: Mapping[str, str], source: str | None) -> pa.Table:
    """Rows with the columns of a pool, in the types that those have.

    Raises:
        ValueError: the values of a field are of several types.
    """
    types = {"uid": pa.string(), "uri": pa.string(), "caption": pa.string(), **FIELDS, **PLACE}
    columns = {}
    for name in dict.fromkeys(["uid", "uri", "caption", *fields, *PLACE]):
        values = [_utf8(row.get(name)) for row in rows]
        try:
            column = pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(f"values of {fields.get(name, name)} are of several types: {error}") from None
        columns[name] = _cast(column, types.get(name, column.type), fields.get(name, name))
    columns["source"] = pc.fill_null(columns["source"], source) if source is not None else columns["source"]
    return pa.table(columns)


def _cast(column: pa.Array, type_: pa.DataType, name: str) -> pa.Array:
    """Seconds since 1970 and ISO 8601 are times; whole numbers are counts."""
    if pa.types.is_timestamp(type_) and pa.types.is_floating(column.type):
        column = pc.multiply(column, 1e6).cast(pa.int64(), safe=False)
    elif pa.types.is_timestamp(type_) and pa.types.is_integer(column.type):
        column = pc.multiply(column.cast(pa.int64()), 1_000_000)
    elif pa.types.is_timestamp(type_) and pa.types.is_string(column.type):
        return pa.array([_time(text, name) for text in column.to_pylist()], type_)
    try:
        return column.cast(type_)
    except pa.ArrowException:
        raise ValueError(f"{name} is {column.type}, which cannot be taken as {type_}") from None


def _time(text: str | None, name: str) -> Any:
    from datetime import UTC, datetime

    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, which is no time as in 2023-09-27T12:00:00+00:00") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _clean(text: Any) -> str | None:
    """A caption on one line; None where there is none."""
    if not isinstance(text, str):
        return None
    return " ".join(text.split()) or None


def _utf8(value: Any) -> Any:
    """JSON and names in tars may hold lone surrogates, which Parquet cannot."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value
