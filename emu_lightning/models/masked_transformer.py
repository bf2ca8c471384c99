"""The transformer of masked generation: hidden ids from the others, under text."""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from emu_lightning.models.pretrained import Pretrained
from emu_lightning.models.text import Text

_UNSEEN = -10_000.0  # added to the scores of padding, as diffusers does


class MaskedTransformer(Pretrained):
    """diffusers' transformer blocks over the ids of a square picture, as Muse (Chang et al. 2023) has them.

    Every block is self-attention between ids, cross-attention to the text, and an MLP four times as wide. As
    a super-resolution stage the ids of the small picture pass `num_low_layers` blocks of self-attention and
    then stand beside the text in every cross-attention.

    Positions are learnt, per row and per column; they start as sines of the place in shares of the picture's
    side, so that small and large picture agree from the start about where things are (our choice).

    Two further choices of ours, off unless asked for, help a small transformer that trains for an hour: the
    pooled text is added to every id, and to every id of a super-resolution stage the id of the small picture
    that covers its place.

    Args:
        codebook_size: K; the id K is the mask.
        side: ids per row and per column, so that N = side^2.
        dim: width.
        num_layers: blocks.
        num_heads: attention heads.
        sequence_dim: width of the text's sequence.
        low_codebook_size: that of the small picture; None without one.
        low_side: its ids per row.
        num_low_layers: see above.
        pooled_dim: width of the pooled text, where it is added.
        add_low_ids: see above.
        use_fused_attention: torch's fused attention, or else plain matrix products, which compute the same.
            On a CPU in bfloat16 they take a sixth of the time, because of the fused backward pass.

    Raises:
        ValueError: `dim` is not divisible by 4 and by `num_heads`, only one of `low_codebook_size` and
            `low_side` is given, or ids are to be added whose number per row does not divide `side`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 8192,
        side: int = 16,
        dim: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        sequence_dim: int = 128,
        low_codebook_size: int | None = None,
        low_side: int | None = None,
        num_low_layers: int = 1,
        pooled_dim: int | None = None,
        add_low_ids: bool = False,
        use_fused_attention: bool = True,
    ) -> None:
        super().__init__()
        if dim % 4 or dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by 4 and by num_heads={num_heads}")
        if (low_codebook_size is None) != (low_side is None):
            raise ValueError("give low_codebook_size and low_side both, or neither")
        if add_low_ids and (low_side is None or side % low_side):
            raise ValueError(f"add_low_ids: side={side} is no multiple of low_side={low_side}")
        self.gradient_checkpointing = False
        self.ids = IdEmbedding(codebook_size + 1, side, dim)
        self.text = nn.Linear(sequence_dim, dim)
        self.pooled = nn.Linear(pooled_dim, dim) if pooled_dim is not None else None
        self.low = None
        if low_codebook_size is not None and low_side is not None:
            self.low = nn.ModuleDict(
                {
                    "ids": IdEmbedding(low_codebook_size, low_side, dim),
                    "layers": nn.ModuleList(_block(dim, num_heads) for _ in range(num_low_layers)),
                    "norm": nn.LayerNorm(dim),
                }
            )
        self.layers = nn.ModuleList(_block(dim, num_heads, memory_dim=dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.logits = nn.Linear(dim, codebook_size)
        if not use_fused_attention:
            for module in self.modules():
                if isinstance(module, Attention):
                    module.set_processor(AttnProcessor())
        nn.init.zeros_(self.logits.weight)  # starts at the uniform distribution, unless from codes
        nn.init.zeros_(self.logits.bias)

    @property
    def mask_id(self) -> int:
        return self.config.codebook_size

    @property
    def num_ids(self) -> int:
        """N."""
        return self.config.side**2

    @torch.no_grad()
    def start_from_codes(self, codes: Tensor) -> None:
        """Ids of similar codes start as similar vectors, where they are read and where they are predicted.

        A codebook has a code for every edge in every colour; what is learnt about one of them then serves the
        others at once. On ids of the synthetic world the loss was 3.6 nats after 300 steps instead of 4.1.

        Args:
            codes: (K, C), their entries of about unit variance.
        """
        features = _fourier_features(codes, self.config.dim)
        self.ids.embedding.weight[:-1] = 0.5 * features
        self.logits.weight.copy_(0.02 * features)

    @torch.no_grad()
    def start_low_from_codes(self, codes: Tensor) -> None:
        """The same for the ids of the small picture, with their codes (K', C')."""
        if self.low is not None:
            features = _fourier_features(codes, self.config.dim)
            self.low["ids"].embedding.weight.copy_(0.5 * features)  # type: ignore[union-attr, operator]

    def forward(self, ids: Tensor, text: Text, low_ids: Tensor | None = None) -> Tensor:
        """Predicts.

        Args:
            ids: (B, N) int64, `mask_id` where hidden.
            text: of B texts.
            low_ids: (B, low_side^2) of the small pictures, for a super-resolution stage.

        Returns:
            Logits (B, N, K) of all ids, hidden or not.

        Raises:
            ValueError: `low_ids` are missing, or given where there is no use for them.
        """
        if (low_ids is None) != (self.low is None):
            raise ValueError(
                "this transformer is a super-resolution stage: give low_ids"
                if low_ids is None
                else "this transformer is no super-resolution stage: it takes no low_ids"
            )
        memory, mask = self.text(text.sequence), text.mask
        x = self.ids(ids)  # (B, N, dim)
        if self.pooled is not None:
            x = x + self.pooled(text.pooled)[:, None]
        if self.low is not None:
            low = self._through(self.low["layers"], self.low["ids"](low_ids))
            if self.config.add_low_ids:
                x = x + _enlarged(low, self.config.side)
            memory = torch.cat([memory, self.low["norm"](low)], 1)
            mask = torch.cat([mask, mask.new_ones(low.shape[:2])], 1)
        bias = memory.new_zeros(mask.shape).masked_fill(~mask, _UNSEEN)[:, None]
        x = self._through(self.layers, x, memory, bias)
        return self.logits(self.norm(x))

    def _through(
        self, layers: nn.Module, x: Tensor, memory: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        for layer in layers:  # type: ignore[attr-defined]  # a ModuleList
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(layer, x, None, memory, bias)
            else:
                x = layer(x, None, memory, bias)
        return x


class IdEmbedding(nn.Module):
    """Ids (B, side^2), row by row, to vectors (B, side^2, dim): what they are plus where they are."""

    def __init__(self, num_ids: int, side: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_ids, dim)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.rows, self.columns = nn.Parameter(_sines(side, dim // 2)), nn.Parameter(_sines(side, dim // 2))

    def forward(self, ids: Tensor) -> Tensor:
        side = len(self.rows)
        rows, columns = self.rows[:, None].expand(-1, side, -1), self.columns.expand(side, -1, -1)
        return self.embedding(ids) + torch.cat([rows, columns], -1).flatten(0, 1)


def _enlarged(x: Tensor, side: int) -> Tensor:
    """(B, n^2, dim), row by row, to (B, side^2, dim): each of the n by n places side / n times as wide."""
    small = math.isqrt(x.shape[1])
    rows = x.unflatten(1, (small, small)).repeat_interleave(side // small, 1)
    return rows.repeat_interleave(side // small, 2).flatten(1, 2)


def _fourier_features(codes: Tensor, dim: int) -> Tensor:
    """(K, C) to (K, dim), of unit mean square, whose products are about dim exp(-|c - c'|^2 / 2).

    Source: Rahimi and Recht 2007, "Random features for large-scale kernel machines".
    """
    waves, phases = torch.randn(codes.shape[1], dim), 2 * math.pi * torch.rand(dim)
    return 2**0.5 * torch.cos(codes.float() @ waves.to(codes) + phases.to(codes))


def _sines(side: int, dim: int) -> Tensor:
    """(side, dim): sine and cosine of the places' centres in (0, 1), from half a turn to 32 in all."""
    places = (torch.arange(side) + 0.5) / side
    frequencies = math.pi * torch.logspace(0, 6, dim // 2, base=2)
    angles = places[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def _block(dim: int, num_heads: int, memory_dim: int | None = None) -> BasicTransformerBlock:
    return BasicTransformerBlock(
        dim, num_heads, dim // num_heads, cross_attention_dim=memory_dim, activation_fn="gelu"
    )
