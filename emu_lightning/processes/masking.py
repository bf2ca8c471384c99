"""Masked generation: ids are hidden at random in training, and decided a few at a time in sampling.

Source: Chang et al. 2022 (MaskGIT), section 3, for masks and parallel decoding; Chang et al. 2023 (Muse) for
guidance. ``ids`` are (B, N) int64 in 0 ... K - 1, K the codebook's size; ``mask`` (B, N) is True where an id
is hidden, and ``mask_id`` = K stands in its place. ``predict`` is ``(ids, progress) -> logits (B, N, K)``,
where progress is 0 at the first step of sampling and 1 at the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from emu_lightning.processes.guidance import C, guide
from emu_lightning.processes.seeding import Rng, draw, uniform

Predict = Callable[[Tensor, float], Tensor]

MEAN_MASK_RATIO = 2 / math.pi  # of cos(pi u / 2) over u in [0, 1]


def mask_ratio(u: Tensor) -> Tensor:
    """Share of hidden ids, cos(pi u / 2) in [0, 1]: of density (2 / pi) / sqrt(1 - r^2) for uniform u."""
    return torch.cos(math.pi / 2 * u)


def random_mask(num: int, num_ids: int, rng: Rng) -> Tensor:
    """Masks (B, N) of B = `num` samples: a uniformly drawn set of ceil(ratio N) ids each, at least one."""
    count = (mask_ratio(uniform(num, rng)) * num_ids).ceil().clamp(min=1)
    order = _uniforms(num, num_ids, rng).argsort(1)
    is_hidden = torch.arange(num_ids, device=order.device) < count[:, None]
    return torch.zeros_like(is_hidden).scatter(1, order, is_hidden)


def masked_cross_entropy(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the hidden ids, in nats per hidden id.

    The sum is divided by the number of ids that masks hide on average, not by that of this batch: so the loss
    is a mean of the samples' own losses, whichever batch or rank they come in.

    Args:
        logits: (B, N, K).
        ids, mask: (B, N).
    """
    errors = cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")  # (B, N)
    return (errors * mask).sum(1).mean() / (MEAN_MASK_RATIO * ids.shape[1])


def guided_logits(
    transformer: Callable[[Tensor, C], Tensor], cond: C, uncond: C, guidance_scale: float
) -> Predict:
    """Fills a transformer's condition in, guided ever more strongly (Muse, section 2.7).

    With t from 0 to `guidance_scale` - 1 over the steps, the logits are (1 + t) l_cond - t l_uncond: early
    ids, decided with little guidance, keep the pictures different.

    Args:
        transformer: (ids (B, N), condition of B) -> logits (B, N, K).
        cond: the condition of B samples.
        uncond: that of the empty or negative prompts, also of B samples.
        guidance_scale: of the last step; 1.0 is off and costs no second prediction.
    """
    both = uncond.concatenate(cond)

    def predict(ids: Tensor, progress: float) -> Tensor:
        t = (guidance_scale - 1) * progress
        if t == 0:
            return transformer(ids, cond)
        without, with_cond = transformer(torch.cat([ids, ids]), both).chunk(2)
        return guide(without, with_cond, 1 + t)

    return predict


def num_hidden(num_ids: int, num_steps: int) -> list[int]:
    """How many of N ids are hidden before each step, and 0 at last: N cos(pi i / (2 num_steps)), whole.

    Every step decides at least one id.

    Raises:
        ValueError: there are fewer ids than steps, or no step.
    """
    if not 1 <= num_steps <= num_ids:
        raise ValueError(f"num_steps={num_steps}: {num_ids} ids are decided in 1 to {num_ids} steps")
    hidden = [num_ids]
    for step in range(1, num_steps + 1):
        planned = int(num_ids * math.cos(math.pi / 2 * step / num_steps))
        hidden.append(min(max(planned, num_steps - step), hidden[-1] - 1))
    return hidden


def decode(
    predict: Predict,
    num: int,
    num_ids: int,
    mask_id: int,
    num_steps: int,
    temperature: float,
    rng: Rng,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draws ids in parallel: each step draws all hidden ones and keeps those it is most confident of.

    The confidence in an id is its log-probability plus Gumbel noise, of a strength that falls linearly from
    `temperature` to 0 at the last step, so that the first ids are not always the same ones.

    Args:
        predict: called exactly `num_steps` times.
        num: B.
        num_ids: N.
        mask_id: what stands for a hidden id.
        num_steps: in 1 ... N.
        temperature: of the noise on the confidence; 0 decides by confidence alone.
        rng: may be of another device.
        device: of the ids.

    Returns:
        Ids (B, N).

    Raises:
        ValueError: see `num_hidden`.
    """
    ids = torch.full((num, num_ids), mask_id, device=device)
    for step, num_left in enumerate(num_hidden(num_ids, num_steps)[1:]):
        log_p = predict(ids, step / max(1, num_steps - 1)).float().log_softmax(-1)
        drawn = pick(log_p.exp(), _uniforms(num, num_ids, rng).to(device))
        gumbel = _gumbel(_uniforms(num, num_ids, rng).to(device))
        confidence = log_p.gather(-1, drawn[..., None])[..., 0]
        confidence = confidence + temperature * (1 - (step + 1) / num_steps) * gumbel
        mask = ids == mask_id
        unsure = confidence.masked_fill(~mask, torch.inf).topk(num_left, largest=False).indices
        ids = torch.where(mask, drawn, ids).scatter(1, unsure, mask_id)
    return ids


def pick(p: Tensor, u: Tensor) -> Tensor:
    """Draws from distributions p (..., K) by their inverse distribution functions at u (...) in [0, 1).

    One random number an id, where Gumbel's trick takes K.
    """
    cumulated = p.cumsum(-1)
    # in shares of the last entry, which rounding may leave above or below 1
    return torch.searchsorted(cumulated, (u[..., None] * cumulated[..., -1:]), right=True)[..., 0]


def _uniforms(num: int, num_ids: int, rng: Rng) -> Tensor:
    """(B, N) float32, uniform in [0, 1)."""
    return draw(
        lambda n, generator: torch.rand(n, num_ids, generator=generator, device=generator.device), num, rng
    )


def _gumbel(u: Tensor) -> Tensor:
    return -(-u.clamp(min=2**-25).log()).log()  # rand's smallest value above 0 is 2^-24
