"""What diffusion and masked generation share: one network under text, and its average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Generic, TypeVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from emu_lightning.data.batch import Batch
from emu_lightning.models import EMA, FrozenTextEncoder, Text, TextEncoder
from emu_lightning.modules.generator import Description, Learner, class_path, describe
from emu_lightning.processes.seeding import Rng, uniform

N = TypeVar("N", bound=nn.Module)
DECODE_PIXELS = 2 * 1024**2  # of the pictures decoded at once: each of 1024 x 1024 takes gigabytes in float32


def encode_text(encoder: TextEncoder, batch: Batch, text_dropout: float, rng: Rng) -> Text:
    """Text of a batch, "" for a share of ``text_dropout``; from cached embeddings where there are any.

    Raises:
        ValueError: embeddings are cached, but the encoder is trained.
    """
    is_dropped = uniform(len(batch), rng) < text_dropout
    if batch.embeddings is None:
        dropped = is_dropped.tolist()
        return encoder(["" if drop else text for text, drop in zip(batch.texts, dropped, strict=True)])
    if not isinstance(encoder, FrozenTextEncoder) or batch.empty_embeddings is None:
        raise ValueError(
            f"cached text embeddings are of no use to {type(encoder).__name__}, which is trained: "
            "leave data.cache_text out"
        )
    mixed = {
        name: torch.where(is_dropped.to(value.device).view(-1, *[1] * (value.ndim - 1)), empty, value)
        for (name, value), empty in zip(
            batch.embeddings.items(), batch.empty_embeddings.values(), strict=True
        )
    }
    return encoder.read(mixed)


class TextLearner(Learner, Generic[N]):
    """A network that is trained under text, with a text encoder and an average that samples.

    Args:
        network: kept under the name that `network_name` gives it.
        text_encoder: trained along with the network where ``train_text_encoder``.
        text_dropout: share of captions replaced by "" so that guidance has an unconditional model (Ho &
            Salimans 2022).
        ema_decay: of the network's average; None keeps none.
        num_steps, guidance_scale: defaults of sampling.
    """

    network_name: ClassVar[str]

    def __init__(
        self,
        network: N,
        text_encoder: TextEncoder,
        text_dropout: float,
        train_text_encoder: bool,
        ema_decay: float | None,
        num_steps: int,
        guidance_scale: float,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        seed: int,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed)
        self.add_module(self.network_name, network)
        self.text_encoder = text_encoder.requires_grad_(train_text_encoder)
        self.average = EMA(network, ema_decay) if ema_decay is not None else None
        self.text_dropout, self.train_text_encoder = text_dropout, train_text_encoder
        self.ema_decay, self.num_steps, self.guidance_scale = ema_decay, num_steps, guidance_scale

    @property
    def network(self) -> N:
        """The one that is trained."""
        network: N = getattr(self, self.network_name)
        return network

    @property
    def sampling_network(self) -> N:
        """The average, where there is one."""
        return self.network if self.average is None else self.average.model

    @property
    def loss_network(self) -> N:
        """What the loss is of: validation judges what samples."""
        return self.network if self.training else self.sampling_network

    def frozen_text(self) -> FrozenTextEncoder | None:
        return self.text_encoder if isinstance(self.text_encoder, FrozenTextEncoder) else None

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.network.parameters()
        if self.train_text_encoder:
            yield from self.text_encoder.parameters()

    def update_average(self) -> None:
        if self.average is not None:
            self.average.update(self.network)

    def describe(self) -> Description:
        return {
            "class_path": class_path(type(self)),
            "init_args": {
                self.network_name: describe(self.network),
                "text_encoder": describe(self.text_encoder),
                "text_dropout": self.text_dropout,
                "train_text_encoder": self.train_text_encoder,
                "ema_decay": self.ema_decay,
                "num_steps": self.num_steps,
                "guidance_scale": self.guidance_scale,
            },
        }

    def sampling_state(self) -> dict[str, Tensor]:
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("average.")}
        averaged = self.sampling_network.state_dict()
        return state | {f"{self.network_name}.{name}": value for name, value in averaged.items()}

    def load_sampling_state(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        own = {name: value for name, value in state.items() if not name.startswith("average.")}
        averaged = {
            name.replace("average.model.", f"{self.network_name}.", 1): value
            for name, value in state.items()
            if name.startswith("average.model.")
        }
        missing, unexpected = self.load_state_dict(own | averaged, strict=False)
        if self.average is not None:
            self.average.restart(self.network)
        return [name for name in missing if not name.startswith("average.")], list(unexpected)
