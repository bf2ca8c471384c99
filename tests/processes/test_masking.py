"""Masks against their density, decoding against a plain loop over samples, guidance against its formula."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chisquare
from torch import Tensor
from torch.testing import assert_close

from emu_lightning.processes.masking import (
    decode,
    guided_logits,
    masked_cross_entropy,
    num_hidden,
    pick,
    random_mask,
)
from emu_lightning.processes.seeding import picture_generators

NUM_IDS, CODES = 12, 7


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- masks --------------------------------------------------------------------------------------------------


def test_the_share_of_hidden_ids_has_its_density() -> None:
    """(2 / pi) / sqrt(1 - r^2), integrated over bins; its mean is 2 / pi = 0.637."""
    shares = random_mask(4000, 2000, seeded()).float().mean(1).double()
    edges = np.array([0, 0.2, 0.4, 0.6, 0.75, 0.85, 0.95, 1.0])
    counted = np.histogram(shares - 0.25 / 2000, edges)[0]  # ceil moves the share up by half an id on average
    bins = zip(edges[:-1], edges[1:], strict=True)
    expected = [quad(lambda r: 2 / math.pi / math.sqrt(1 - r * r), *each)[0] for each in bins]
    assert chisquare(counted, np.array(expected) * 4000).pvalue > 0.01
    assert shares.mean().item() == pytest.approx(0.637, abs=0.015)


def test_a_mask_hides_the_places_of_the_smallest_uniforms() -> None:
    """Every sample from its own generator: first the share's uniform, then one a place."""
    masks = random_mask(50, NUM_IDS, picture_generators(range(50)))
    for seed, mask in enumerate(masks):
        u = seeded(seed)
        ratio = math.cos(math.pi / 2 * torch.rand(1, generator=u).item())
        smallest = np.argsort(torch.rand(1, NUM_IDS, generator=u)[0].numpy())[: math.ceil(ratio * NUM_IDS)]
        assert sorted(mask.nonzero()[:, 0].tolist()) == sorted(smallest.tolist())


def test_at_least_one_id_is_hidden_and_no_place_is_preferred() -> None:
    assert random_mask(1000, 3, seeded()).any(1).all()
    hidden = random_mask(20_000, NUM_IDS, seeded(1)).sum(0)
    assert (hidden / hidden.float().mean() - 1).abs().max() < 0.03


def test_the_loss_is_the_error_of_the_hidden_ids_alone() -> None:
    logits = torch.randn(3, NUM_IDS, CODES, generator=seeded(), requires_grad=True)
    ids = torch.randint(CODES, (3, NUM_IDS), generator=seeded())
    mask = random_mask(3, NUM_IDS, seeded())
    loss = masked_cross_entropy(logits, ids, mask)
    total = 0.0
    for row, codes, hidden in zip(
        logits.detach().numpy().astype(float), ids.tolist(), mask.tolist(), strict=True
    ):
        for scores, code, is_hidden in zip(row, codes, hidden, strict=True):
            total += is_hidden * (math.log(np.exp(scores).sum()) - scores[code])
    assert loss.item() == pytest.approx(total / 3 / (NUM_IDS * 2 / math.pi), rel=1e-5)
    loss.backward()
    assert torch.equal((logits.grad != 0).any(2), mask)


# --- decoding -----------------------------------------------------------------------------------------------


class Predictor:
    """Logits that depend on the place and on all ids seen; remembers its calls."""

    def __init__(self) -> None:
        self.own = 2 * torch.randn(NUM_IDS, CODES, generator=seeded(1))
        self.seen = torch.randn(NUM_IDS, CODES + 1, CODES, generator=seeded(2))
        self.calls: list[tuple[Tensor, float]] = []

    def __call__(self, ids: Tensor, progress: float) -> Tensor:
        self.calls.append((ids, progress))
        places = torch.arange(NUM_IDS)
        shared = torch.stack([self.seen[places, row].mean(0) for row in ids])
        return self.own + shared[:, None]


def reference(predictor: Predictor, num_steps: int, temperature: float, seed: int) -> list[int]:
    """MaskGIT's algorithm for one sample, in double precision and in plain words."""
    generator = seeded(seed)
    decided: dict[int, int] = {}
    for step in range(1, num_steps + 1):
        ids = torch.tensor([[decided.get(place, CODES) for place in range(NUM_IDS)]])
        scores = predictor(ids, 0.0)[0].double().numpy()
        p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        picks, uniforms = (torch.rand(1, NUM_IDS, generator=generator)[0].double().numpy() for _ in range(2))
        candidates = []
        for place in set(range(NUM_IDS)) - decided.keys():
            code = next(k for k in range(CODES) if p[place, : k + 1].sum() > picks[place])
            gumbel = -math.log(-math.log(uniforms[place]))
            strength = temperature * (1 - step / num_steps)
            candidates.append((math.log(p[place, code]) + strength * gumbel, place, code))
        num_left = math.floor(NUM_IDS * math.cos(math.pi / 2 * step / num_steps) + 1e-9)
        num_left = min(max(num_left, num_steps - step), len(candidates) - 1)
        for _, place, code in sorted(candidates, reverse=True)[: len(candidates) - num_left]:
            decided[place] = code
    return [decided[place] for place in range(NUM_IDS)]


@pytest.mark.parametrize(("num_steps", "temperature"), [(1, 1.0), (4, 0.0), (4, 4.5), (8, 1.0), (12, 2.0)])
def test_decoding_follows_the_algorithm(num_steps: int, temperature: float) -> None:
    predictor = Predictor()
    made = decode(predictor, 6, NUM_IDS, CODES, num_steps, temperature, picture_generators(range(6)))
    assert len(predictor.calls) == num_steps
    expected = [reference(Predictor(), num_steps, temperature, seed) for seed in range(6)]
    assert made.tolist() == expected and len(set(map(tuple, expected))) > 3


def test_what_is_decided_stays_and_all_is_decided_at_last() -> None:
    predictor = Predictor()
    made = decode(predictor, 5, NUM_IDS, CODES, 6, 1.0, seeded())
    states = [ids for ids, _ in predictor.calls] + [made]
    for before, after, num in zip(states, states[1:], num_hidden(NUM_IDS, 6)[1:], strict=False):
        assert torch.equal(after[before != CODES], before[before != CODES])
        assert ((after == CODES).sum(1) == num).all()
    assert [progress for _, progress in predictor.calls] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_without_noise_the_surest_id_comes_first() -> None:
    logits = torch.zeros(4, 3)
    logits[2, 1] = 30.0
    seen = []
    decode(lambda ids, _: seen.append(ids) or logits.expand(2, -1, -1), 2, 4, 3, 4, 0.0, seeded())
    assert seen[1].tolist() == [[3, 3, 1, 3]] * 2


@pytest.mark.parametrize(("num_ids", "num_steps"), [(256, 24), (4096, 8), (64, 64), (5, 4)])
def test_the_number_of_hidden_ids_falls_on_the_cosine(num_ids: int, num_steps: int) -> None:
    hidden = num_hidden(num_ids, num_steps)
    assert hidden[0] == num_ids and hidden[-1] == 0 and len(hidden) == num_steps + 1
    assert all(after < before for before, after in zip(hidden, hidden[1:], strict=False))
    if num_ids > 8 * num_steps:  # elsewhere a step must decide one id even where the cosine would not
        cosine = [num_ids * math.cos(math.pi / 2 * step / num_steps) for step in range(num_steps + 1)]
        assert_close(torch.tensor(hidden), torch.tensor(cosine).floor().long(), atol=1, rtol=0)


@pytest.mark.parametrize("num_steps", [0, -1, 13])
def test_a_number_of_steps_that_cannot_be_is_named(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps={num_steps}: 12 ids are decided in 1 to 12 steps"):
        num_hidden(NUM_IDS, num_steps)


def test_ids_are_picked_as_often_as_they_are_probable() -> None:
    p = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    picked = pick(p.expand(20_000, -1), torch.rand(20_000, generator=seeded()))
    counted = torch.bincount(picked, minlength=6)
    assert counted[[0, 2, 5]].sum() == 0
    assert chisquare(counted[[1, 3, 4]].numpy(), np.array([0.1, 0.6, 0.3]) * 20_000).pvalue > 0.01
    extremes = torch.tensor([0.0, 1 - 2**-24])  # all that rand can give lies between
    assert pick(p.expand(2, -1), extremes).tolist() == [1, 4]


# --- guidance -----------------------------------------------------------------------------------------------


@dataclass
class Texts:
    """A condition of numbers."""

    values: Tensor

    def concatenate(self, other: Texts) -> Texts:
        return Texts(torch.cat([self.values, other.values]))


@dataclass
class Adding:
    """logits = ids + the condition's number, in every code its share."""

    sizes: list[int] = field(default_factory=list)

    def __call__(self, ids: Tensor, text: Texts) -> Tensor:
        self.sizes.append(len(ids))
        return (ids + text.values[:, None])[..., None] * torch.arange(1.0, 4.0)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_guidance_rises_linearly(guidance_scale: float) -> None:
    transformer = Adding()
    cond, negative = torch.tensor([1.0, 2.0]), torch.tensor([-5.0, 4.0])
    predict = guided_logits(transformer, Texts(cond), Texts(negative), guidance_scale)
    ids = torch.tensor([[0, 3], [1, 1]])
    for step in range(5):
        t = (guidance_scale - 1) * step / 4
        with_text, without = (
            (ids + text[:, None])[..., None] * torch.arange(1.0, 4.0) for text in (cond, negative)
        )
        assert_close(predict(ids, step / 4), (1 + t) * with_text - t * without)
    assert transformer.sizes == ([2, 4, 4, 4, 4] if guidance_scale > 1 else [2] * 5)
