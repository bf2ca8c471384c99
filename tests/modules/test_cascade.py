"""A cascade is its stages, one after the other, and a generator like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from emu_lightning.data.batch import resized
from emu_lightning.modules import CascadeModule, QualityTuningModule, load_generator, load_upsampler
from emu_lightning.modules.generator import build_learner
from emu_lightning.processes.seeding import generators_for, next_seed
from tests.letters import Letters
from tests.tiny import TinyData, make_batch, make_trainer, tiny_generator, tiny_upsampler

PROMPTS, SEEDS = ["a red ball in the snow", "a star"], [3, 4]


def tiny_cascade(**arguments: Any) -> CascadeModule:
    """8 pixels, 16 by crops, 32."""
    upsamplers = [tiny_upsampler(1, crop_size=8), tiny_upsampler(2, image_size=32)]
    optimizer = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)}
    return CascadeModule(tiny_generator(), upsamplers, **{**optimizer, **arguments})


class From(TinyData):
    """Goes on where the trainer is."""

    def train_dataloader(self) -> DataLoader:
        done = self.trainer.global_step
        return DataLoader([make_batch(4 * step, side=32) for step in range(done, 6)], batch_size=None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> CascadeModule:
    module = tiny_cascade()
    make_trainer(tmp_path_factory.mktemp("trained"), max_steps=2).fit(module, From())
    return module.eval()


# --- its stages, called by hand -----------------------------------------------------------------------------


def test_it_draws_what_its_stages_draw_one_after_the_other(trained: CascadeModule) -> None:
    first, second = trained.upsamplers
    settings = {"num_steps": 4, "guidance_scale": 1.5, "negative_prompt": "blue"}
    images = trained.base.generate(PROMPTS, SEEDS, **settings)  # type: ignore[arg-type]
    seeds = [next_seed(seed) for seed in SEEDS]
    images = first.upsample(images, PROMPTS, seeds, negative_prompt="blue")
    seeds = [next_seed(seed) for seed in seeds]
    images = second.upsample(images, PROMPTS, seeds, negative_prompt="blue")
    drawn = trained.generate(PROMPTS, SEEDS, **settings)  # type: ignore[arg-type]
    assert torch.equal(drawn, images) and images.shape == (2, 3, 32, 32)
    assert trained.image_size == 32


def test_its_loss_is_the_sum_of_its_stages_losses() -> None:
    module, batch = tiny_cascade(), make_batch(0, side=32)
    rng = generators_for(0, range(4))
    expected = sum(
        stage.loss(resized(batch, side), rng)
        for stage, side in [(module.base, 8), (module.upsamplers[0], 16), (module.upsamplers[1], 32)]
    )
    assert_close(module.loss(batch, generators_for(0, range(4))), expected)


def test_its_loss_is_the_mean_over_the_samples() -> None:
    module, batch = tiny_cascade(), make_batch(0, side=32)
    halves = []
    for first in (0, 2):
        part = slice(first, first + 2)
        tensors = {name: getattr(batch, name)[part] for name in ("original_size", "crop", "target_size")}
        half = replace(batch, images=batch.images[part], texts=batch.texts[part], **tensors)
        halves.append(module.loss(half, generators_for(0, range(first, first + 2))))
    assert_close(module.loss(batch, generators_for(0, range(4))), torch.stack(halves).mean())


def test_a_picture_is_a_function_of_prompt_and_seed_not_of_the_batch(trained: CascadeModule) -> None:
    together = trained.generate(PROMPTS, SEEDS)
    for index in range(2):
        alone = trained.generate(PROMPTS[index : index + 1], SEEDS[index : index + 1])
        assert_close(alone[0], together[index], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(trained.generate(PROMPTS, [9, 4])[0], together[0], atol=1e-3)


def test_every_stage_is_trained_and_averaged(tmp_path: Path) -> None:
    module, before = tiny_cascade(), tiny_cascade().state_dict()
    make_trainer(tmp_path, max_steps=3).fit(module, From())
    for name in ("base", "upsamplers.0", "upsamplers.1"):
        weight = f"{name}.denoiser.net.conv_in.weight"
        average = weight.replace("denoiser", "average.model")
        now = module.state_dict()
        assert not torch.equal(now[weight], before[weight])
        assert not torch.equal(now[average], before[weight]) and not torch.equal(now[average], now[weight])
        assert now[f"{name}.average.num_updates"] == 3
    parts = [type(part).__name__ for part in module.networks()]
    assert parts == ["UNet", "SmallTextEncoder", "EMA"] + 2 * ["PixelUNet", "SmallTextEncoder", "EMA"]


# --- a generator like any other -----------------------------------------------------------------------------


def test_a_folder_gives_the_same_cascade(trained: CascadeModule, tmp_path: Path) -> None:
    loaded = load_generator(trained.save_pretrained(tmp_path / "cascade"))
    assert torch.equal(loaded.generate(PROMPTS, SEEDS), trained.generate(PROMPTS, SEEDS))
    assert loaded.describe() == trained.describe()


def test_a_checkpoint_gives_the_averaged_weights(tmp_path: Path) -> None:
    module, trainer = tiny_cascade(), make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, From())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    expected = module.eval().generate(PROMPTS, SEEDS)
    assert torch.equal(load_generator(tmp_path / "last.ckpt").generate(PROMPTS, SEEDS), expected)


def test_it_is_made_of_its_stages_folders(trained: CascadeModule, tmp_path: Path) -> None:
    """As a configuration does it; saved, it needs the folders no more."""
    trained.base.save_pretrained(tmp_path / "base")
    for index, upsampler in enumerate(trained.upsamplers):
        upsampler.save_pretrained(tmp_path / f"up{index}")
    description = {
        "class_path": "emu_lightning.modules.CascadeModule",
        "init_args": {
            "base": {
                "class_path": "emu_lightning.modules.load_generator",
                "init_args": {"path": str(tmp_path / "base")},
            },
            "upsamplers": [
                {
                    "class_path": "emu_lightning.modules.load_upsampler",
                    "init_args": {"path": str(tmp_path / f"up{index}")},
                }
                for index in range(2)
            ],
        },
    }
    built = build_learner(description)
    assert isinstance(built, CascadeModule)
    assert torch.equal(built.generate(PROMPTS, SEEDS), trained.generate(PROMPTS, SEEDS))
    assert "load_generator" not in str(built.describe())


def test_an_override_reaches_into_the_stages(trained: CascadeModule, tmp_path: Path) -> None:
    folder = trained.save_pretrained(tmp_path / "cascade")
    overrides = {"upsamplers.0.process.noise_offset": 0.1, "upsamplers.1.augmentation_level": 0.5,
                 "base.text_dropout": 0.3}  # fmt: skip
    loaded = load_generator(folder, overrides)
    assert isinstance(loaded, CascadeModule)
    first, second = loaded.upsamplers
    assert (loaded.base.text_dropout, first.process.noise_offset, second.augmentation_level) == (
        0.3,
        0.1,
        0.5,
    )
    assert second.process.noise_offset == 0.0


def test_quality_tuning_tunes_all_of_it(trained: CascadeModule, tmp_path: Path) -> None:
    folder = trained.save_pretrained(tmp_path / "cascade")
    tuning = QualityTuningModule(str(folder), optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-2))
    make_trainer(tmp_path, max_steps=2).fit(tuning, From())
    assert torch.equal(tuning.load_start().generate(PROMPTS, SEEDS), trained.generate(PROMPTS, SEEDS))
    tuned = tuning.generator.sampling_state()
    for name, weight in trained.sampling_state().items():
        if name.endswith("conv_in.weight"):
            assert not torch.equal(tuned[name], weight), name
    loaded = load_generator(tuning.save_pretrained(tmp_path / "tuned"))
    assert torch.equal(loaded.generate(PROMPTS, SEEDS), tuning.generate(PROMPTS, SEEDS))


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, first, second = (tiny_cascade() for _ in range(3))
    make_trainer(tmp_path, max_steps=3).fit(whole, From())
    stopped = make_trainer(tmp_path, max_steps=2)
    stopped.fit(first, From())
    stopped.save_checkpoint(tmp_path / "at_2.ckpt")
    make_trainer(tmp_path, max_steps=3).fit(second, From(), ckpt_path=tmp_path / "at_2.ckpt")
    resumed = second.state_dict()
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed[name], weight), name


def test_a_cache_of_text_serves_stages_that_read_the_same() -> None:
    def cascade(seed: int) -> CascadeModule:
        base, upsampler = tiny_generator(), tiny_upsampler()
        base.text_encoder, upsampler.text_encoder = Letters(0), Letters(seed)
        return CascadeModule(base, [upsampler])

    same = cascade(0)
    assert same.frozen_text() is same.base.text_encoder
    assert cascade(1).frozen_text() is None
    assert tiny_cascade().frozen_text() is None  # they are trained


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(), (8,), (32, 16)])
def test_stages_that_do_not_grow_are_named(sides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"make pictures of \[8.*\] pixels: give growing sides"):
        CascadeModule(tiny_generator(), [tiny_upsampler(image_size=side) for side in sides])


def test_data_without_images_large_enough_is_named() -> None:
    batch, rng = make_batch(0, side=16), generators_for(0, range(4))
    with pytest.raises(ValueError, match="images of 16x16 are too small for a stage of 32 pixels"):
        tiny_cascade().loss(batch, rng)
    with pytest.raises(ValueError, match="stages learn from images, but the data gives latents"):
        tiny_cascade().loss(replace(batch, images=None, latents=batch.images), rng)


def test_weights_that_do_not_fit_are_named_by_their_stage(trained: CascadeModule) -> None:
    state = trained.sampling_state()
    state["upsamplers.2.weight"] = state.pop("upsamplers.1.denoiser.text_norm.weight")
    missing, unexpected = tiny_cascade().load_sampling_state(state)
    assert missing == ["upsamplers.1.denoiser.text_norm.weight"] and unexpected == ["upsamplers.2.weight"]


def test_a_stage_alone_is_no_generator(trained: CascadeModule, tmp_path: Path) -> None:
    folder = trained.upsamplers[0].save_pretrained(tmp_path / "stage")
    with pytest.raises(ValueError, match="super-resolution stage"):
        load_generator(folder)
    assert load_upsampler(folder).image_size == 16
