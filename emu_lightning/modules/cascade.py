"""A generator and the super-resolution stages behind it, as one generator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from emu_lightning.data.batch import Batch, resized
from emu_lightning.models import FrozenTextEncoder
from emu_lightning.models.encoders import share_networks
from emu_lightning.modules.generator import Description, Generator, Learner, Upsampler, class_path
from emu_lightning.optimizers import AdamW
from emu_lightning.processes.seeding import Rng, next_seed


class CascadeModule(Generator):
    """Chains a generator and its upsamplers (Ho et al. 2022); each stage is trained on its own resolution.

    Args:
        base: makes the small pictures.
        upsamplers: in the order in which pictures grow.
        optimizer, lr_scheduler, seed: of training all stages together; they are as independent as apart.

    Raises:
        ValueError: there is no upsampler, or a stage does not make larger pictures than the one before.
    """

    def __init__(
        self,
        base: Generator,
        upsamplers: list[Upsampler],
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed)
        self.base = base
        self.upsamplers: Sequence[Upsampler] = nn.ModuleList(upsamplers)  # type: ignore[assignment]
        sides = [stage.image_size for stage in self._stages().values()]
        if len(sides) < 2 or sides != sorted(set(sides)):
            raise ValueError(f"the stages of a cascade make pictures of {sides} pixels: give growing sides")
        self.image_size = sides[-1]
        share_networks(self)  # each stage has its text encoder, but T5 need lie in memory only once

    def _stages(self) -> dict[str, Learner]:
        return {"base": self.base, **{f"upsamplers.{i}": each for i, each in enumerate(self.upsamplers)}}

    def loss(self, batch: Batch, rng: Rng) -> Tensor:
        """The sum of the stages' losses, each at its own resolution."""
        losses = [stage.loss(resized(batch, stage.image_size), rng) for stage in self._stages().values()]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Iterable[int],
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
    ) -> Tensor:
        """As :meth:`Generator.generate`; steps and scale are the base's, the upsamplers have their own."""
        seeds = list(seeds)
        images = self.base.generate(
            prompts,
            seeds,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
        )
        for upsampler in self.upsamplers:
            seeds = [next_seed(seed) for seed in seeds]
            images = upsampler.upsample(images, prompts, seeds, negative_prompt=negative_prompt)
        return images

    def networks(self) -> Iterable[nn.Module]:
        return [network for stage in self._stages().values() for network in stage.networks()]

    def frozen_text(self) -> FrozenTextEncoder | None:
        """The stages' text encoder where it is the same in all, so that one cache serves them."""
        encoders = [stage.frozen_text() for stage in self._stages().values()]
        found = [encoder for encoder in encoders if encoder is not None]
        if len(found) < len(encoders) or len({encoder.fingerprint() for encoder in found}) > 1:
            return None
        return found[0]

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        for stage in self._stages().values():
            yield from stage.trainable_parameters()

    def update_average(self) -> None:
        for stage in self._stages().values():
            stage.update_average()

    def describe(self) -> Description:
        upsamplers = [upsampler.describe() for upsampler in self.upsamplers]
        return {
            "class_path": class_path(type(self)),
            "init_args": {"base": self.base.describe(), "upsamplers": upsamplers},
        }

    def sampling_state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, stage in self._stages().items()
            for key, value in stage.sampling_state().items()
        }

    def load_sampling_state(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        stages = self._stages()
        missing: list[str] = []
        unexpected = [key for key in state if not key.startswith(tuple(f"{name}." for name in stages))]
        for name, stage in stages.items():
            own = {key.removeprefix(f"{name}."): state[key] for key in state if key.startswith(f"{name}.")}
            for found, all_found in zip(stage.load_sampling_state(own), (missing, unexpected), strict=True):
                all_found += [f"{name}.{key}" for key in found]
        return missing, unexpected
