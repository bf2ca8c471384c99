"""What a frozen text encoder makes of captions, encoded once and kept in a folder of safetensors files.

The folder is named and keyed by the encoder and the precision. Rows are found by the sha256 of their text, so
that data sets which share captions share them here, and new captions only add files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from emu_lightning.data.batch import Batch, Embeddings, collate
from emu_lightning.data.chunks import CacheDtype, make_all, map_chunk, narrowed
from emu_lightning.files import write_whole

if TYPE_CHECKING:
    from emu_lightning.models.text import FrozenTextEncoder  # brings diffusers, which takes seconds to import

EMBED_BATCH = 32  # fixed: with another batch size a matrix product may round differently
CHUNK = 128  # captions of a file, and what a kill can lose; a multiple of EMBED_BATCH
DIGEST = "sha256"  # name of the tensor of keys, (n, 32) uint8, beside the embeddings


class CachedTexts:
    """Embeddings by text. They stay in the files until a batch asks for them.

    Args:
        folder: of files with `sha256` (n, 32) and embeddings (n, ...).
        key: what the files must have been made for.

    Raises:
        ValueError: a file is damaged, or was made by another encoder.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.chunks: list[Embeddings] = []
        for path in sorted(folder.glob("*.safetensors")):
            tensors, metadata = map_chunk(path)
            if metadata.get("key") != key:
                raise ValueError(f"{path} holds embeddings of another text encoder: delete it")
            self.chunks.append(tensors)
        self.places = {
            digest.tobytes(): (number, row)
            for number, chunk in enumerate(self.chunks)
            for row, digest in enumerate(chunk[DIGEST].numpy())
        }

    def __reduce__(self) -> tuple[type[CachedTexts], tuple[Path, str]]:
        """To a data worker goes the name of the folder, not what is in it."""
        return CachedTexts, (self.folder, self.key)

    def __call__(self, texts: Sequence[str]) -> Embeddings:
        """Embeddings (B, ...) of B texts, in the precision of the files.

        Raises:
            ValueError: a text is not there.
        """
        rows = [self._place(text) for text in texts]
        names = [name for name in self.chunks[0] if name != DIGEST]
        return {name: torch.stack([self.chunks[number][name][row] for number, row in rows]) for name in names}

    def collate(self, batches: Sequence[Batch]) -> Batch:
        """Joins batches along B and adds the embeddings of their texts and of ""."""
        batch = collate(batches)
        return replace(batch, embeddings=self(batch.texts), empty_embeddings=self([""]))

    def _place(self, text: str) -> tuple[int, int]:
        try:
            return self.places[_digest(text)]
        except KeyError:
            raise ValueError(
                f"the caption {text[:60]!r} is not in the text cache: captions changed since the run began; "
                "start it again"
            ) from None


class TextCache:
    """The embeddings of texts by `encoder`, in a folder below `folder`.

    Args:
        encoder: its frozen half is cached. It is copied before it loads anything, so that it holds no more
            memory after than before.
        folder: where caches live; made if it is not there.
        dtype: of the embeddings in the files; those that the encoder makes in fewer bytes stay as they are.
    """

    def __init__(self, encoder: FrozenTextEncoder, folder: str | Path, dtype: CacheDtype = "float32") -> None:
        self.encoder, self.dtype = encoder, dtype
        made_by = {"version": 1, "encoder": encoder.fingerprint(), "dtype": dtype}
        self.key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
        self.folder = Path(folder) / f"texts-{self.key[:16]}"

    def missing(self, texts: Iterable[str]) -> set[str]:
        """Those of `texts` and "" that are not cached; raises as `CachedTexts` does."""
        known = self.load().places
        return {text for text in {"", *texts} if _digest(text) not in known}

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def build(
        self, texts: Iterable[str], device: torch.device | str = "cpu", show_progress: bool = True
    ) -> None:
        """Encodes those of `texts` that are missing, and "". Does nothing when everything is there.

        Killed half-way, it goes on from the last whole file. Several processes may call it: they share the
        work, and each returns when all of it is done.

        Raises:
            ValueError: a file is damaged, or an embedding is not finite in this precision.
        """
        texts = {"", *texts}
        missing = self.missing(texts)
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # Cut by what is asked for, not by what is missing: processes that start at different times agree.
        by_digest = sorted(texts, key=_digest)
        parts = {}
        for first in range(0, len(by_digest), CHUNK):
            if part := [text for text in by_digest[first : first + CHUNK] if text in missing]:
                parts[_name(part)] = part
        encoder = deepcopy(self.encoder).to(device)

        def make(name: str) -> None:
            embeddings = self._embed(encoder, parts[name], bar)
            write_whole(self.folder / name, save(embeddings, {"key": self.key}))

        with (
            tqdm(total=len(missing), desc="encoding captions", unit="text", disable=not show_progress) as bar,
            torch.random.fork_rng(devices=[]),  # a run with a cache must not differ from one without
        ):
            make_all(self.folder, parts, make)
            bar.update(len(missing) - bar.n)  # what other processes made

    def load(self) -> CachedTexts:
        """All that is cached; raises as `CachedTexts` does."""
        return CachedTexts(self.folder, self.key)

    @torch.no_grad()
    def _embed(self, encoder: FrozenTextEncoder, texts: list[str], bar: tqdm[None]) -> dict[str, Tensor]:
        batches = []
        for first in range(0, len(texts), EMBED_BATCH):
            batch = texts[first : first + EMBED_BATCH]
            batches.append(
                {
                    name: narrowed(value, self.dtype, f"embeddings of {batch[0][:60]!r}")
                    for name, value in encoder.embed(batch).items()
                }
            )
            bar.update(len(batch))
        digests = torch.frombuffer(bytearray(b"".join(map(_digest, texts))), dtype=torch.uint8)
        embeddings = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        return {DIGEST: digests.view(len(texts), -1), **embeddings}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _name(texts: list[str]) -> str:
    return hashlib.sha256(b"".join(map(_digest, texts))).hexdigest()[:32] + ".safetensors"
