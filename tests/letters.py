"""A frozen text encoder that needs no files: an embedding of letters."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from emu_lightning.models import Frozen, FrozenTextEncoder, Text
from emu_lightning.models.pretrained import Pretrained

LENGTH = 8


class Table(nn.Module):
    """A frozen network of one block."""

    _no_split_modules = ["Embedding"]

    def __init__(self, seed: int) -> None:
        super().__init__()
        weights = torch.randn(256, 4, generator=torch.Generator().manual_seed(seed))
        self.embedding = nn.Embedding.from_pretrained(weights)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)


class Letters(FrozenTextEncoder, Pretrained):
    """Reads the first eight letters; half of it is frozen, a projection is trained.

    Args:
        seed: of the frozen half.
        dim: width of sequence and pooled text.
    """

    embedded: list[str] = []  # every text that any of them embedded, since a test cleared it

    @register_to_config
    def __init__(self, seed: int = 0, dim: int = 8) -> None:
        super().__init__()
        self.seed, self.sequence_dim, self.pooled_dim = seed, dim, dim
        self.frozen = Frozen(lambda: Table(seed))
        self.projection = nn.Linear(4, dim)

    def embed(self, texts: list[str]) -> dict[str, Tensor]:
        Letters.embedded += texts
        letters = [list(text.encode()[:LENGTH]) for text in texts]
        ids = torch.tensor([row + [0] * (LENGTH - len(row)) for row in letters])
        mask = torch.tensor([[place < max(1, len(row)) for place in range(LENGTH)] for row in letters])
        with torch.no_grad():
            return {"letters": self.frozen.network(ids), "mask": mask}

    def read(self, embeddings: dict[str, Tensor]) -> Text:
        mask = embeddings["mask"]
        sequence = self.projection(embeddings["letters"].float()) * mask[..., None]
        return Text(sequence, mask, sequence.mean(1))

    def fingerprint(self) -> str:
        return f"letters:{self.seed}"
