"""Masked generation: losses against their parts, sampling, and what others ask of every generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader

from emu_lightning.models import MaskedTransformer, SmallTextEncoder, Text, VQAutoencoder
from emu_lightning.modules import (
    CascadeModule,
    MaskedModule,
    MaskedSuperResolutionModule,
    QualityTuningModule,
    load_generator,
    load_upsampler,
)
from emu_lightning.processes.masking import random_mask
from emu_lightning.processes.seeding import generators_for, next_seed, uniform
from tests.tiny import TinyData, make_batch, make_trainer

PROMPTS = ["a red ball in the snow", "a star", "a purple box on a beach on the left"]
CODES, SIDE, LOW_SIDE = 16, 4, 2  # pictures of 8 and of 4 pixels


def tiny_vq(seed: int = 0) -> VQAutoencoder:
    """f2."""
    torch.manual_seed(seed)
    vq = VQAutoencoder(CODES, 4, (8, 16), norm_groups=4, use_mid_attention=False)
    with torch.no_grad():  # codes where the latents are, so that pictures have different ids
        vq.codebook.weight.copy_(vq.encode(make_batch(99, side=8).images).movedim(1, -1).flatten(0, 2)[::4])
    return vq.eval()


def tiny_text() -> SmallTextEncoder:
    return SmallTextEncoder(dim=8, num_layers=1, num_heads=2, max_length=16, embedding_dim=2)


def tiny_masked(seed: int = 0, **arguments: Any) -> MaskedModule:
    vq = tiny_vq(seed)
    defaults: dict[str, Any] = {
        "transformer": MaskedTransformer(CODES, SIDE, 8, 1, 2, sequence_dim=8),
        "text_encoder": tiny_text(),
        "vq": vq,
        "num_steps": 3,
        "guidance_scale": 2.0,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return shaken(MaskedModule(**{**defaults, **arguments}))


def tiny_upsampler(seed: int = 0, **arguments: Any) -> MaskedSuperResolutionModule:
    vq, low_vq = tiny_vq(seed), tiny_vq(seed + 1)
    transformer = MaskedTransformer(
        CODES, SIDE, 8, 1, 2, sequence_dim=8, low_codebook_size=CODES, low_side=LOW_SIDE
    )
    defaults: dict[str, Any] = {
        "transformer": transformer,
        "text_encoder": tiny_text(),
        "vq": vq,
        "low_vq": low_vq,
        "num_steps": 3,
        "guidance_scale": 2.0,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return shaken(MaskedSuperResolutionModule(**{**defaults, **arguments}))


def shaken(module: Any) -> Any:
    """No trained weight is zero, and the average differs from the weights."""
    torch.manual_seed(5)
    with torch.no_grad():
        networks = [module.transformer, *([module.average.model] if module.average else [])]
        for weight in (weight for network in networks for weight in network.parameters()):
            weight.add_(0.3 * torch.randn_like(weight))
    return module


def sample(module: Any, prompts: list[str], seeds: list[int], **options: Any) -> Tensor:
    """What either kind makes; an upsampler of pictures that belong to the seeds."""
    if isinstance(module, MaskedModule):
        return module.generate(prompts, seeds, **options)
    small = torch.cat([make_batch(seed, size=1, side=4).images for seed in seeds])
    return module.upsample(small, prompts, seeds, **options)


MAKERS = [tiny_masked, tiny_upsampler]
both = pytest.mark.parametrize("make", MAKERS)


# --- training -----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("is_training", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_hidden_ids(make: Callable[..., Any], is_training: bool) -> None:
    module = make(text_dropout=0.5).train(is_training)
    batch = make_batch(8)
    loss = module.loss(batch, generators_for(1, batch.positions))

    rng = generators_for(1, batch.positions)
    dropped = uniform(4, rng) < 0.5
    assert 0 < dropped.sum() < 4
    mask = random_mask(4, SIDE**2, rng)
    text = module.text_encoder(
        ["" if drop else text for text, drop in zip(batch.texts, dropped, strict=True)]
    )
    ids = module.vq(batch.images)[3].flatten(1)
    low = []
    if isinstance(module, MaskedSuperResolutionModule):
        small = interpolate(batch.images, (4, 4), mode="bicubic", antialias=True).clamp(-1, 1)
        low = [module.low_vq(small)[3].flatten(1)]
    network = module.transformer if is_training else module.average.model
    logits = network(torch.where(mask, CODES, ids), text, *low)
    expected = cross_entropy(logits[mask], ids[mask], reduction="sum") / (4 * SIDE**2 * 2 / math.pi)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@both
def test_the_loss_of_a_batch_is_the_mean_of_its_halves(make: Callable[..., Any]) -> None:
    module, batch = make(text_dropout=0.5), make_batch(8)

    def loss(start: int, stop: int) -> float:
        names = ("images", "texts", "original_size", "crop", "target_size", "uids")
        part = {name: getattr(batch, name)[start:stop] for name in names}
        positions = range(8 + start, 8 + stop)
        return module.loss(replace(batch, position=positions[0], **part), generators_for(5, positions)).item()

    state = torch.get_rng_state()
    assert loss(0, 4) == pytest.approx((loss(0, 2) + loss(2, 4)) / 2, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


class Recording(SmallTextEncoder):
    """Remembers the texts."""

    seen: list[list[str]]

    def forward(self, texts: list[str]) -> Text:
        self.seen.append(texts)
        return super().forward(texts)


def recording() -> Recording:
    encoder = Recording(8, 1, 2, 16, 2)
    encoder.seen = []
    return encoder


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_captions_are_dropped_at_the_stated_rate_not_kept(dropout: float) -> None:
    encoder, num = recording(), 1000
    module = tiny_masked(text_encoder=encoder, text_dropout=dropout)
    batch = make_batch(0, size=num)
    module.loss(batch, generators_for(0, batch.positions))
    (seen,) = encoder.seen
    num_dropped = sum(text == "" for text in seen)
    assert abs(num_dropped - dropout * num) <= 5 * (num * dropout * (1 - dropout)) ** 0.5
    assert all(text in ("", own) for text, own in zip(seen, batch.texts, strict=True))


def test_cached_latents_are_as_good_as_images() -> None:
    module, batch = tiny_masked(), make_batch(8)
    cached = replace(batch, images=None, latents=module.encode(batch.images))
    losses = [module.loss(each, generators_for(0, batch.positions)).item() for each in (batch, cached)]
    assert losses[0] == losses[1]
    with pytest.raises(
        ValueError, match=r"from images, not from cached latents: leave data\.latents_from out"
    ):
        tiny_upsampler().loss(cached, generators_for(0, batch.positions))


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    state = module.state_dict()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], state[name])}


@both
def test_training_moves_transformer_text_and_average_only(make: Callable[..., Any], tmp_path: Path) -> None:
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    make_trainer(tmp_path, max_steps=2).fit(module, TinyData())
    assert changed(before, module) == {"transformer", "text_encoder", "average"}
    after = module.transformer.state_dict(prefix="transformer.")
    assert not any(torch.equal(before[name], after[name]) for name in after)  # every weight of it
    frozen = [module.vq, getattr(module, "low_vq", module.vq)]
    module.train()
    assert not any(each.training or any(w.requires_grad for w in each.parameters()) for each in frozen)
    kept = make(train_text_encoder=False)
    assert {id(w) for w in kept.trainable_parameters()} == {id(w) for w in kept.transformer.parameters()}


def test_it_learns_which_picture_belongs_to_which_text() -> None:
    """Four captions, four pictures: after training each text gives its own."""
    transformer = MaskedTransformer(CODES, SIDE, 32, 1, 2, sequence_dim=8)
    module = tiny_masked(transformer=transformer, ema_decay=None, text_dropout=0.0, temperature=0.0)
    batch = make_batch(0)
    optimizer = torch.optim.AdamW(module.trainable_parameters(), lr=1e-2)
    for step in range(160):
        optimizer.zero_grad()
        module.loss(batch, generators_for(0, range(4 * step, 4 * step + 4))).backward()
        optimizer.step()
    expected = module.vq.reconstruct(batch.images).clamp(-1, 1)
    pictures = module.generate(batch.texts, range(4), guidance_scale=1.0)
    error = torch.cdist(pictures.flatten(1), expected.flatten(1), p=1)
    assert error.argmin(1).tolist() == [0, 1, 2, 3]
    assert error.diagonal().mean() < 0.5 * error.mean()


class From(TinyData):
    """Batches from a position on, as a resumed loader gives them."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def train_dataloader(self) -> DataLoader:
        return DataLoader([make_batch(position) for position in range(self.first, 40, 4)], batch_size=None)


@both
def test_a_resumed_run_ends_in_the_same_weights(make: Callable[..., Any], tmp_path: Path) -> None:
    def fit(max_steps: int, first: int = 0, **resume: Any) -> dict[str, Tensor]:
        module, trainer = make(), make_trainer(tmp_path, max_steps=max_steps)
        trainer.fit(module, From(first), **resume)
        trainer.save_checkpoint(tmp_path / f"{max_steps}.ckpt")
        return module.state_dict()

    whole = fit(4)
    fit(2)
    resumed = fit(4, first=8, ckpt_path=tmp_path / "2.ckpt", weights_only=False)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


# --- sampling -----------------------------------------------------------------------------------------------


@both
def test_a_picture_is_a_function_of_prompt_and_seed_not_of_the_batch(make: Callable[..., Any]) -> None:
    module = make().train()
    state, before = torch.get_rng_state(), {name: v.clone() for name, v in module.state_dict().items()}
    together = sample(module, PROMPTS, [7, 8, 9])
    assert together.shape == (3, 3, 8, 8) and together.dtype == torch.float32 and not together.requires_grad
    assert together.abs().max() <= 1 and together.std() > 0.1
    for index, prompt in enumerate(PROMPTS):
        assert torch.allclose(sample(module, [prompt], [7 + index])[0], together[index], atol=1e-4)
    assert not torch.allclose(sample(module, PROMPTS, [8, 8, 9])[0], together[0], atol=1e-2)
    assert module.training and module.transformer.training and not module.vq.training
    assert torch.equal(torch.get_rng_state(), state) and changed(before, module) == set()


@both
def test_guidance_steps_and_negative_prompts_are_those_asked_for(make: Callable[..., Any]) -> None:
    encoder = recording()
    module = make(text_encoder=encoder, ema_decay=None)
    sizes: list[int] = []
    module.transformer.register_forward_hook(lambda network, inputs, logits: sizes.append(len(logits)))
    for options, expected in [
        ({}, [2, 4, 4]),  # two prompts; the first step is not guided yet
        ({"guidance_scale": 1.0}, [2, 2, 2]),
        ({"num_steps": 5}, [2, 4, 4, 4, 4]),
        ({"num_steps": 1, "guidance_scale": 3.0}, [2]),
    ]:
        sizes.clear()
        sample(module, PROMPTS[:2], [0, 1], **options)
        assert sizes == expected
    encoder.seen.clear()
    plain = sample(module, PROMPTS[:1], [0], guidance_scale=8.0)
    negative = sample(module, PROMPTS[:1], [0], guidance_scale=8.0, negative_prompt="a box")
    assert encoder.seen == [PROMPTS[:1], [""], PROMPTS[:1], ["a box"]]
    assert not torch.equal(plain, negative)


@both
def test_sampling_uses_the_averaged_weights(make: Callable[..., Any]) -> None:
    module = make()
    expected = sample(module, PROMPTS[:1], [0])
    with torch.no_grad():
        for weight in module.transformer.parameters():
            weight.zero_()
    assert torch.equal(sample(module, PROMPTS[:1], [0]), expected)


def test_the_small_picture_decides_what_is_drawn() -> None:
    module = tiny_upsampler()
    small = make_batch(0, size=2, side=4).images
    made = module.upsample(small, [PROMPTS[0]] * 2, [0, 0])
    assert not torch.allclose(made[0], made[1], atol=1e-2)
    again = module.upsample(small, [PROMPTS[0]] * 2, [0, 0], size=(8, 8))
    assert torch.equal(made, again) and (module.low_size, module.image_size) == (4, 8)


def test_other_sizes_are_refused() -> None:
    module, batch = tiny_upsampler(), make_batch(0)
    for images, size in ((batch.images, None), (batch.images[..., ::2, ::2], (16, 16))):
        with pytest.raises(ValueError, match=r"makes \(8, 8\) pixels of \(4, 4\), not"):
            module.upsample(images, batch.texts, range(4), size=size)
    with pytest.raises(ValueError, match=r"64 ids, but the transformer has 16: set data\.resolution to 8"):
        tiny_masked().loss(make_batch(0, side=16), generators_for(0, range(4)))


def test_codebooks_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="codebook_size is 9, but the VQ autoencoder has 16 codes"):
        tiny_masked(transformer=MaskedTransformer(9, SIDE, 8, 1, 2, sequence_dim=8))
    low = {"low_codebook_size": 9, "low_side": LOW_SIDE}
    with pytest.raises(ValueError, match="low_codebook_size is 9, but the VQ autoencoder has 16 codes"):
        tiny_upsampler(transformer=MaskedTransformer(CODES, SIDE, 8, 1, 2, sequence_dim=8, **low))


# --- what others ask of every generator ---------------------------------------------------------------------


@both
def test_a_folder_makes_the_same_pictures(make: Callable[..., Any], tmp_path: Path) -> None:
    module = make()
    module.save_pretrained(tmp_path)
    load = load_generator if make is tiny_masked else load_upsampler
    loaded = load(tmp_path, {"temperature": 4.5})
    assert torch.equal(sample(loaded, PROMPTS, [1, 2, 3]), sample(module, PROMPTS, [1, 2, 3]))
    assert loaded.describe() == module.describe()
    assert load(tmp_path, {"num_steps": 7}).num_steps == 7


def test_a_cascade_of_both_is_its_stages_by_hand_and_is_tuned_as_one(tmp_path: Path) -> None:
    base = tiny_masked(transformer=MaskedTransformer(CODES, LOW_SIDE, 8, 1, 2, sequence_dim=8))
    upsampler = tiny_upsampler()
    cascade = CascadeModule(base, [upsampler])
    made = cascade.generate(PROMPTS, [1, 2, 3])
    small = base.generate(PROMPTS, [1, 2, 3])
    assert torch.equal(made, upsampler.upsample(small, PROMPTS, [next_seed(seed) for seed in (1, 2, 3)]))

    cascade.save_pretrained(tmp_path / "cascade")
    tuning = QualityTuningModule(str(tmp_path / "cascade"), {"upsamplers.0.text_dropout": 0.0})
    before = tuning.generator.sampling_state()
    before = {name: value.clone() for name, value in before.items()}
    make_trainer(tmp_path, max_steps=2).fit(tuning, TinyData())
    after = tuning.generator.sampling_state()
    moved = {".".join(name.split(".")[:-1]) for name in before if not torch.equal(before[name], after[name])}
    assert {name.rsplit("transformer")[0] for name in moved if "transformer" in name} >= {
        "base.",
        "upsamplers.0.",
    }
    assert not any("vq." in name for name in moved)
