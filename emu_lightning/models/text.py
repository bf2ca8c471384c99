"""Text encoders: strings in, embeddings out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import pad

from emu_lightning.models.pretrained import Pretrained

VOCABULARY = 49_408  # CLIP's byte-pair encoding, its two special tokens included


@dataclass(frozen=True)
class Text:
    """What a denoiser reads of B texts.

    Attributes:
        sequence: (B, L, D) embeddings of the tokens, zero at the padding.
        mask: (B, L) bool, False at the padding.
        pooled: (B, P) one embedding per text.
    """

    sequence: Tensor
    mask: Tensor
    pooled: Tensor

    def concatenate(self, other: Text) -> Text:
        """The texts of both, one after the other; the shorter sequences are padded."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        return Text(
            torch.cat([pad(text.sequence, (0, 0, 0, length - text.mask.shape[1])) for text in (self, other)]),
            torch.cat([pad(text.mask, (0, length - text.mask.shape[1])) for text in (self, other)]),
            torch.cat([self.pooled, other.pooled]),
        )


class TextEncoder(nn.Module, ABC):
    """A network from strings to `Text`. The empty string is the unconditional text.

    Attributes:
        sequence_dim: D, the width of `Text.sequence`.
        pooled_dim: P, the width of `Text.pooled`.
    """

    sequence_dim: int
    pooled_dim: int

    @abstractmethod
    def forward(self, texts: list[str]) -> Text:
        """Embeds B texts, each independently of the others in the batch."""


class FrozenTextEncoder(TextEncoder):
    """A text encoder in two halves: frozen networks, whose work can be cached, and what reads it.

    The first half lies in `models.Frozen`: it is not trained, saved or sharded with the rest, and not even
    loaded where embeddings come from a cache.
    """

    @abstractmethod
    def embed(self, texts: list[str]) -> dict[str, Tensor]:
        """What the frozen networks make of B texts, without gradient: named tensors (B, ...) whose sizes do
        not depend on the texts."""

    @abstractmethod
    def read(self, embeddings: dict[str, Tensor]) -> Text:
        """`Text` of what :meth:`embed` gave, in whatever precision; may hold trained weights."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of everything that :meth:`embed` depends on: weights, tokenizers, lengths."""

    def forward(self, texts: list[str]) -> Text:
        return self.read(self.embed(texts))


class SmallTextEncoder(TextEncoder, Pretrained):
    """A small transformer over CLIP's tokens, to be trained together with the denoiser; needs no download.

    The token embedding is factorised (ALBERT, Lan et al. 2020, section 3.1): with the vocabulary of 49,408, a
    direct embedding would outweigh the denoisers it is meant for.

    Args:
        dim: width D of sequence and pooled text.
        num_layers: transformer layers (pre-norm, GELU, no dropout).
        num_heads: attention heads.
        max_length: longest text in tokens, start and end included; longer ones are cut but keep their end.
        embedding_dim: width of the factorised token embedding.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`, or `max_length` is below 2.
    """

    @register_to_config
    def __init__(
        self,
        dim: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        max_length: int = 32,
        embedding_dim: int = 32,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}")
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: start and end of the text alone take 2 tokens")
        self.sequence_dim = self.pooled_dim = dim
        self.max_length = max_length
        self.embedding = nn.Sequential(nn.Embedding(VOCABULARY, embedding_dim), nn.Linear(embedding_dim, dim))
        self.position = nn.Parameter(0.1 * torch.randn(max_length, dim))
        layer = nn.TransformerEncoderLayer(
            dim, num_heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        for module in self.layers.layers:  # nn.TransformerEncoder starts all layers as copies of one
            module.apply(_reset)

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts to ids (B, L) int64, 0 at the padding, and mask (B, L) bool, on the CPU; L is the longest."""
        ids = [torch.tensor(token_ids(text, self.max_length)) for text in texts]
        mask = [torch.ones(len(row), dtype=torch.bool) for row in ids]
        return (
            nn.utils.rnn.pad_sequence(ids, batch_first=True),
            nn.utils.rnn.pad_sequence(mask, batch_first=True, padding_value=False),
        )

    def forward(self, texts: list[str]) -> Text:
        """Embeds B texts.

        Args:
            texts: B strings; "" is the unconditional text.

        Returns:
            Sequence (B, L, D) with L tokens in the longest text, mask (B, L), mean over the tokens (B, D).
        """
        ids, mask = (tensor.to(self.position.device) for tensor in self.tokenize(texts))
        sequence = self.embedding(ids) + self.position[: ids.shape[1]]  # (B, L, D)
        sequence = self.layers(sequence, src_key_padding_mask=~mask)
        sequence = sequence * mask[..., None]
        return Text(sequence, mask, sequence.sum(1) / mask.sum(1, keepdim=True))


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.MultiheadAttention):
        module._reset_parameters()
    elif isinstance(module, nn.Linear):
        module.reset_parameters()


@lru_cache(maxsize=65_536)  # captions recur every epoch, and byte-pair encoding is slow Python
def token_ids(text: str, max_length: int) -> tuple[int, ...]:
    """CLIP's token ids of a text, start and end included, cut to `max_length` with the end kept."""
    tokenizer = _tokenizer()
    ids = tokenizer.encode(text)[: max_length - 2]
    return (tokenizer.sot_token_id, *ids, tokenizer.eot_token_id)


@cache
def _tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer  # imported late: it brings timm and torchvision, seconds

    return SimpleTokenizer()
