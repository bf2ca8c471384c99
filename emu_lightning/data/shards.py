"""WebDataset shards: tar files with a picture and a caption for each key, read at random by an index.

    000000012.jpg  000000012.txt  000000012.json      as img2dataset writes them

An index of each shard is made once, from the headers of the tar file and of its pictures, and kept as an
Arrow file: processes map it into memory instead of each holding its own. Nothing but pictures, `.txt` and
`.json` is ever looked at; a `.pyd` or `.pickle` is not opened.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL.ContainerIO import ContainerIO
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from emu_lightning.data.datamodule import ImageData
from emu_lightning.data.folder import decode, read_size, warn_of_unread
from emu_lightning.data.sampler import permutation
from emu_lightning.data.source import BrokenImage, Sample, Source
from emu_lightning.data.storage import (
    OPEN_FILES,
    LocalCopies,
    StoredFile,
    find_files,
    is_url,
    lock_for,
    read_part,
)
from emu_lightning.files import SUFFIXES, unread_pictures, write_whole

FORMAT = 1  # of the index
UNREAD = b"unread"
INDEX = pa.schema(
    [
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("caption", pa.string()),  # null: there is none
        ("height", pa.int32()),  # of the upright picture in pixels; null: the header does not tell
        ("width", pa.int32()),
    ]
)


def sample_key(member: str) -> tuple[str, str]:
    """Key and lower-case extension of a member, split as in WebDataset: at the first dot of the file name."""
    folder, slash, name = member.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}" if stem else "", extension.lower()


def read_members(file: BinaryIO, name: str) -> list[tarfile.TarInfo]:
    """The regular files in a tar archive.

    Raises:
        ValueError: it is truncated, damaged, compressed, or not a tar archive.
    """
    members: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            members.extend(archive)
            file.seek(archive.offset)
            is_whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)  # the mark of the end
    except (tarfile.TarError, EOFError, ValueError):  # ValueError: a number in a header is none
        is_whole = False
    if not is_whole:
        where = f"in or after {members[-1].name}" if members else "at its beginning, or no plain .tar"
        raise ValueError(f"shard {name} is truncated or damaged {where}: get it anew")
    return [member for member in members if member.isreg()]


def scan(file: BinaryIO, name: str, caption: str | None) -> pa.RecordBatch:
    """The index of one shard.

    Args:
        file: the shard.
        name: of it, for errors.
        caption: key of the `.json` that holds the caption; None takes the `.txt`.

    Returns:
        Columns of `INDEX`, a row for each picture, in the order of the archive. Names of pictures of
        kinds that are not read are in the metadata.

    Raises:
        ValueError: the shard is damaged, or two pictures have one key.
    """

    def part(member: tarfile.TarInfo) -> BinaryIO:
        return cast(BinaryIO, ContainerIO(file, member.offset_data, member.size))

    pictures: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, tarfile.TarInfo] = {}
    members = read_members(file, name)
    for member in members:
        key, extension = sample_key(member.name)
        if not key:  # a hidden file
            continue
        if f".{extension}" in SUFFIXES:
            if key in pictures:
                raise ValueError(
                    f"shard {name} has two pictures for {key}: {pictures[key].name}, {member.name}"
                )
            pictures[key] = member
        elif extension == ("txt" if caption is None else "json"):
            captions[key] = member

    rows = []
    for key, member in pictures.items():
        text = None
        if key in captions:
            text = _caption(part(captions[key]).read(), caption)
        height = width = None
        with suppress(BrokenImage):
            height, width = read_size(part(member), member.name)
        rows.append((member.name, member.offset_data, member.size, text, height, width))
    columns = zip(*rows, strict=True) if rows else [()] * len(INDEX)
    unread = unread_pictures(member.name for member in members)
    schema = INDEX.with_metadata({UNREAD: json.dumps(unread)})
    arrays = [pa.array(column, type_) for column, type_ in zip(columns, INDEX.types, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def _caption(content: bytes, field: str | None) -> str | None:
    """The caption in a `.txt`, or in `field` of a `.json`; None where there is none that can be read."""
    try:
        decoded = content.decode("utf-8-sig")
        entry = {None: decoded} if field is None else json.loads(decoded)
    except ValueError:  # not UTF-8, or not JSON
        return None
    text = entry.get(field) if isinstance(entry, dict) else None
    return " ".join(text.split()) or None if isinstance(text, str) else None


class _Unindexed(Dataset[str]):
    """Indexing a shard is getting its item: the error in one line, or nothing.

    Args:
        files: the shards.
        paths: of their indices.
    """

    def __init__(
        self, files: Sequence[StoredFile], paths: Sequence[Path], copies: LocalCopies, caption: str | None
    ) -> None:
        self.files, self.paths, self.copies, self.caption = files, paths, copies, caption

    def __getitem__(self, index: int) -> str:
        file, path = self.files[index], self.paths[index]
        with lock_for(path.parent, path.stem):  # another process may be at it
            if not path.is_file():
                try:
                    with self.copies.open(file) as opened:
                        table = scan(opened, file.url, self.caption)
                except (OSError, ValueError) as error:
                    return str(error)
                buffer = pa.BufferOutputStream()
                with pa.ipc.new_file(buffer, table.schema) as writer:
                    writer.write(table)
                write_whole(path, buffer.getvalue().to_pybytes())
        return ""


def index_shards(
    files: Sequence[StoredFile],
    copies: LocalCopies,
    folder: Path,
    caption: str | None = None,
    num_workers: int = 0,
) -> list[Path]:
    """Index what is not indexed yet; processes that ask at once share the work.

    Args:
        files: the shards.
        copies: where remote ones are copied to.
        folder: of the indices.
        caption: see :func:`scan`.
        num_workers: processes to use; 0 uses this one.

    Returns:
        The Arrow file of each shard.

    Raises:
        ValueError: a shard cannot be indexed; the first is named.
    """
    made_by = f"{FORMAT}\n{caption}\n"
    names = [hashlib.sha256((made_by + file.key).encode()).hexdigest()[:32] for file in files]
    paths = [folder / f"{name}.arrow" for name in names]
    todo = [index for index, path in enumerate(paths) if not path.is_file()]
    random.Random(os.getpid()).shuffle(todo)  # processes begin at different shards
    loader = DataLoader(
        _Unindexed(files, paths, copies, caption),
        batch_size=None,
        sampler=todo,
        num_workers=min(num_workers, len(todo)),
        generator=torch.Generator(),  # else starting would draw from the global one
    )
    bar = tqdm(loader, desc="indexing shards", unit="shard", disable=not todo)
    errors = [error for error in bar if error]
    if errors:
        more = f" ({len(errors)} of {len(files)} shards cannot be used)" if len(errors) > 1 else ""
        raise ValueError(min(errors) + more)
    return paths


@lru_cache(maxsize=OPEN_FILES)
def read_index(path: Path) -> pa.RecordBatch:
    """The index at `path`, mapped into memory; those last used stay so.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, it is made again") from None


def order_in_windows(groups: NDArray[np.int64], window: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A shuffle that stays local: shuffles the groups, then all samples within each `window` groups.

    Args:
        groups: (N,) number of the file that holds each sample, 0 ... G - 1.
        window: groups read side by side.
        seed: with `epoch`, fixes the order.
        epoch: number of the pass.

    Returns:
        (N,) a permutation of 0 ... N - 1.
    """
    shuffled = permutation(seed, epoch, int(groups.max()) + 1)
    place = np.empty_like(shuffled)
    place[shuffled] = np.arange(len(shuffled))
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch, 1))).random_raw(len(groups))
    return np.lexsort((bits, place[groups] // window))


def check_window(shuffle_shards: int, files: Sequence[StoredFile], copies: LocalCopies) -> None:
    """Whether `shuffle_shards` can be read side by side.

    Raises:
        ValueError: they cannot; says why.
    """
    if not 1 <= shuffle_shards <= OPEN_FILES // 2:
        raise ValueError(f"shuffle_shards must be from 1 to {OPEN_FILES // 2}, got {shuffle_shards}")
    remote = sorted((file.size for file in files if is_url(file.url)), reverse=True)
    needed = sum(remote[:shuffle_shards]) / 1e9
    if needed > copies.gigabytes:
        raise ValueError(
            f"cache_gb={copies.gigabytes:g} cannot hold the {shuffle_shards} shards of {needed:.3g} GB that "
            "are shuffled together: raise cache_gb, or lower shuffle_shards"
        )


class Shards(Source):
    """Captioned pictures in tar shards, in the order of shards and archives; a uid is `shard/key`.

    Args:
        urls: paths or URLs, with `{00000..00099}`, `{a,b}`, `*`.
        cache_dir: for indices and for copies of remote shards.
        cache_gb: what the copies may take, 10^9 bytes each.
        shuffle_shards: how many shards are shuffled together, and so read side by side.
        caption: key of the `.json` that holds the caption; None takes the `.txt`.
        num_workers: processes that make the index.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a shard is damaged or has no pictures, a picture has no caption, two shards have one name.
        OSError: a store cannot be read.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        cache_dir: str | Path = "runs/cache",
        cache_gb: float = 100.0,
        shuffle_shards: int = 16,
        caption: str | None = None,
        num_workers: int = 0,
    ) -> None:
        self.files, self.shuffle_shards = find_files(urls), shuffle_shards
        _check_names(self.files)
        self._copies = LocalCopies(Path(cache_dir) / "shards", cache_gb)
        check_window(shuffle_shards, self.files, self._copies)
        folder = Path(cache_dir) / "shard_index"
        self._indices = index_shards(self.files, self._copies, folder, caption, num_workers)
        lengths, unread = [], []
        for file, path in zip(self.files, self._indices, strict=True):
            index = read_index(path)
            _check_captions(index, file, caption)
            lengths.append(index.num_rows)
            unread += [f"{file.name}/{name}" for name in json.loads(index.schema.metadata[UNREAD])]
        warn_of_unread(unread, "the shards")
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[int, pa.RecordBatch, int]:
        """Number of the shard, its index, and the row in it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        table = read_index(self._indices[shard])
        return shard, table, index - int(self._ends[shard]) + table.num_rows

    def __getitem__(self, index: int) -> Sample:
        shard, table, row = self._find(index)
        offset, size, text = (table[name][row].as_py() for name in ("offset", "size", "caption"))
        uid = self.uid(index)
        image = decode(io.BytesIO(read_part(self._copies, self.files[shard], offset, size)), uid)
        return Sample(image=image, text=text, uid=uid, original_size=(image.height, image.width))

    def uid(self, index: int) -> str:
        shard, table, row = self._find(index)
        return f"{self.files[shard].name}/{sample_key(table['member'][row].as_py())[0]}"

    def uids(self) -> list[str]:
        return [
            f"{file.name}/{sample_key(member)[0]}"
            for file, path in zip(self.files, self._indices, strict=True)
            for member in read_index(path)["member"].to_pylist()
        ]

    def text(self, index: int) -> str:
        _, table, row = self._find(index)
        text: str = table["caption"][row].as_py()
        return text

    def size(self, index: int) -> tuple[int, int]:
        _, table, row = self._find(index)
        height, width = table["height"][row].as_py(), table["width"][row].as_py()
        return (height, width) if height else super().size(index)

    def sizes(self) -> NDArray[np.int64]:
        sizes = np.ones((len(self), 2), np.int64)
        for path, end in zip(self._indices, self._ends, strict=True):
            table = read_index(path)
            for axis, name in enumerate(("height", "width")):
                sizes[end - table.num_rows : end, axis] = table[name].fill_null(1)
        return sizes

    def order(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Shards are shuffled, then samples within `shuffle_shards` of them."""
        shards = np.searchsorted(self._ends, indices, side="right")
        return order_in_windows(shards, self.shuffle_shards, seed, epoch)

    def fingerprint(self) -> str:
        """Over names, sizes and versions (time of modification, or ETag) of all shards; they are not read."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\n{file.size}\n{file.version}\n".encode())
        return "shards-1:" + digest.hexdigest()


def _check_names(files: Sequence[StoredFile]) -> None:
    """Names of pictures begin with the shard's: it must be the only one of its name."""
    named: dict[str, StoredFile] = {}
    for file in files:
        other = named.setdefault(file.name, file)
        if other is not file:
            raise ValueError(f"two shards have one name, {other.url} and {file.url}: rename one")


def _check_captions(index: pa.RecordBatch, file: StoredFile, caption: str | None) -> None:
    if not index.num_rows:
        raise ValueError(f"shard {file.url} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    captions = index["caption"]
    if captions.null_count:
        member = index["member"].filter(captions.is_null())[0]
        wanted = "a .txt" if caption is None else f"a .json with {caption!r}"
        raise ValueError(
            f"{captions.null_count} of {index.num_rows} pictures in shard {file.url} have no caption in "
            f"UTF-8, such as {member}: put {wanted} beside it, or leave it out by a manifest"
        )


class ShardData(ImageData):
    """WebDataset shards, as img2dataset writes them, local or in an object store.

    Args:
        urls: shards to train on: paths or URLs, with `{00000..00099}`, `{a,b}`, `*`.
        val_urls: shards for validation.
        caption: key of the `.json` that holds the caption; None takes the `.txt`.
        shuffle_shards: how many shards are shuffled together, and so read side by side.
        cache_gb: what local copies of remote shards may take in `cache_dir`, 10^9 bytes each.
        kwargs: of :class:`~emu_lightning.data.datamodule.ImageData`.
    """

    def __init__(
        self,
        urls: str | list[str],
        val_urls: str | list[str] | None = None,
        caption: str | None = None,
        shuffle_shards: int = 16,
        cache_gb: float = 100.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.urls, self.val_urls, self.caption = urls, val_urls, caption
        self.shuffle_shards, self.cache_gb = shuffle_shards, cache_gb

    def train_source(self) -> Source:
        return self._shards(self.urls)

    def val_source(self) -> Source | None:
        return None if self.val_urls is None else self._shards(self.val_urls)

    def _shards(self, urls: str | list[str]) -> Shards:
        return Shards(
            urls, self.cache_dir, self.cache_gb, self.shuffle_shards, self.caption, self.num_workers
        )
