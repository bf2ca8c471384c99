from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from emu_lightning.data.batch import Batch
from emu_lightning.models import Autoencoder, PatchDiscriminator, RandomFeatures
from emu_lightning.modules import AutoencoderModule


class CountingDiscriminator(PatchDiscriminator):
    calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(images)


def make_module(**arguments: Any) -> AutoencoderModule:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "autoencoder": Autoencoder(block_channels=(8, 16), norm_groups=4),
        "discriminator": CountingDiscriminator(channels=8, num_layers=1, norm_groups=4),
        "perceptual": RandomFeatures((4, 8)),
        "metric_features": RandomFeatures((4, 8), seed=1),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        "gradient_clip": 1.0,
    }
    return AutoencoderModule(**{**defaults, **arguments})


def make_batch(position: int, size: int = 4) -> Batch:
    images = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(position)) * 2 - 1
    sizes = torch.full((size, 2), 16)
    return Batch(images, None, [""] * size, sizes, sizes * 0, sizes, [str(position)] * size, position)


def make_loader(num_batches: int = 5) -> DataLoader:
    return DataLoader([make_batch(4 * n) for n in range(num_batches)], batch_size=None)


def make_trainer(folder: Path, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **arguments})


def test_max_steps_counts_batches_while_the_discriminator_trains(tmp_path: Path) -> None:
    module = make_module()
    before = [p.clone() for p in module.discriminator.parameters()]
    trainer = make_trainer(tmp_path, max_steps=10)
    trainer.fit(module, make_loader(), make_loader(1))
    assert trainer.global_step == 10
    assert trainer.fit_loop.epoch_loop.total_batch_idx + 1 == 10
    assert module.discriminator.calls == 3 * 10  # once for the autoencoder, twice for itself
    assert all((a != b).any() for a, b in zip(before, module.discriminator.parameters(), strict=True))
    assert module.lr_schedulers().last_epoch == 10


def test_discriminator_sleeps_until_its_start(tmp_path: Path) -> None:
    module = make_module(adversarial_start=3)
    before = [p.clone() for p in module.discriminator.parameters()]
    make_trainer(tmp_path, max_steps=3).fit(module, make_loader(), make_loader(1))
    assert module.discriminator.calls == 0
    assert all((a == b).all() for a, b in zip(before, module.discriminator.parameters(), strict=True))
    make_trainer(tmp_path, max_steps=4).fit(module := make_module(adversarial_start=3), make_loader())
    assert module.discriminator.calls == 3


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = make_module(adversarial_start=2)
    make_trainer(tmp_path, max_epochs=3).fit(whole, make_loader(), make_loader(1))

    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    first = make_module(adversarial_start=2)
    make_trainer(tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[checkpoints]).fit(
        first, make_loader(), make_loader(1)
    )
    resumed = make_module(adversarial_start=2)
    trainer = make_trainer(tmp_path, max_epochs=3)
    trainer.fit(resumed, make_loader(), make_loader(1), ckpt_path=str(tmp_path / "step=5.ckpt"))

    assert trainer.global_step == 15
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for ours, theirs in zip(
        whole.optimizers(use_pl_optimizer=False), resumed.optimizers(use_pl_optimizer=False), strict=True
    ):
        for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
            assert torch.equal(a["exp_avg"], b["exp_avg"]) and torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])


def test_checkpoint_holds_the_trained_networks_only(tmp_path: Path) -> None:
    names = {name.split(".")[0] for name in make_module().state_dict()}
    assert names == {"autoencoder", "discriminator"}


def test_training_lowers_the_loss_in_every_precision(tmp_path: Path) -> None:
    for precision in ("32-true", "bf16-mixed"):
        module = make_module(discriminator=None, lr_scheduler=None)
        trainer = make_trainer(tmp_path, max_steps=1, precision=precision)
        trainer.fit(module, make_loader(1))
        start = trainer.callback_metrics["train/loss"]
        trainer = make_trainer(tmp_path, max_steps=30, precision=precision)
        trainer.fit(module, make_loader(1))
        assert trainer.callback_metrics["train/loss"] < 0.9 * start


def test_latents_are_normalised_when_training_ends(tmp_path: Path) -> None:
    module = make_module(num_latent_batches=2)
    val_loader = make_loader(3)
    make_trainer(tmp_path, max_steps=2).fit(module, make_loader(), val_loader)
    images = torch.cat([batch.images for batch in val_loader][:2])
    latents = module.autoencoder.encode(images, torch.Generator().manual_seed(0))
    assert torch.allclose(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=0.15)
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=0.15)


def test_latents_are_measured_on_training_data_without_a_validation_set(tmp_path: Path) -> None:
    module = make_module()
    make_trainer(tmp_path, max_steps=1).fit(module, make_loader())
    assert (module.autoencoder.latent_std != 1).all()


def test_latents_are_measured_when_a_finished_run_is_started_again(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(make_module(), make_loader(), make_loader(1))
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    again = make_module()
    make_trainer(tmp_path, max_steps=1).fit(
        again, make_loader(), make_loader(1), ckpt_path=tmp_path / "done.ckpt"
    )
    assert (again.autoencoder.latent_std != 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_autoencoder_reconstructs_alike(tmp_path: Path, dtype: torch.dtype) -> None:
    module = make_module(autoencoder=Autoencoder(8, (8, 16), fourier_frequencies=(0, 2), norm_groups=4))
    make_trainer(tmp_path, max_steps=2).fit(module, make_loader())
    module.save_pretrained(tmp_path / "autoencoder", dtype)
    loaded = Autoencoder.from_pretrained(tmp_path / "autoencoder")
    images = make_batch(0).images
    assert loaded.dtype == torch.float32 and module.autoencoder.dtype == torch.float32
    assert torch.equal(loaded.latent_std, module.autoencoder.latent_std)
    tolerance = {torch.float32: 0, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]
    expected, found = module.autoencoder.eval().reconstruct(images), loaded.decode(loaded.encode(images))
    assert torch.allclose(found, expected, atol=tolerance + 1e-5, rtol=0)
    size = (tmp_path / "autoencoder" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 1.2 * sum(p.numel() for p in loaded.parameters()) * dtype.itemsize + 30_000


def test_validation_and_test_report_the_metrics(tmp_path: Path) -> None:
    module = make_module()
    trainer = make_trainer(tmp_path)
    (val,) = trainer.validate(module, make_loader(4), verbose=False)
    assert val.keys() == {"val/psnr", "val/ssim", "val/perceptual_random", "val/rfd_random"}
    images = torch.cat([batch.images for batch in make_loader(4)])
    errors = (module.autoencoder.reconstruct(images).clamp(-1, 1) - images).detach() / 2
    psnr = -10 * errors.square().mean(dim=(1, 2, 3)).log10().mean()
    assert val["val/psnr"] == pytest.approx(psnr.item(), abs=1e-3)
    (test,) = trainer.test(module, make_loader(4), verbose=False)
    assert {f"val/{name.split('/')[1]}": value for name, value in test.items()} == pytest.approx(val)


def test_frechet_distance_of_too_few_images_is_absent_with_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            (val,) = make_trainer(tmp_path).validate(module, make_loader(3), verbose=False)
            assert "val/rfd_random" not in val
    reasons = [record.getMessage() for record in caplog.records if "rfd_random" in record.getMessage()]
    assert reasons == [
        "rfd_random is left out: a Frechet distance of 12 features needs more than 12 images, there are 12"
    ]


def test_configuration_round_trips_and_overrides() -> None:
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--model", type=AutoencoderModule)
    arguments = {
        "autoencoder": {
            "class_path": "emu_lightning.models.Autoencoder",
            "init_args": {"block_channels": [8, 16], "norm_groups": 4},
        },
        "discriminator": {
            "class_path": "emu_lightning.models.PatchDiscriminator",
            "init_args": {"channels": 16},
        },
        "perceptual": {"class_path": "emu_lightning.models.RandomFeatures"},
    }
    model = {"class_path": "emu_lightning.modules.AutoencoderModule", "init_args": arguments}
    config = parser.parse_object({"model": model})
    text = parser.dump(config)
    assert "serialize" not in text and parser.dump(parser.parse_string(text)) == text
    module = parser.instantiate(config).model
    assert module.autoencoder.config.block_channels == [8, 16]
    assert [o.param_groups[0]["lr"] for o in module.configure_optimizers()[0]] == [1e-3, 1e-4]
    options = ["--model.autoencoder.latent_channels=16", "--model.optimizer.lr=0.5"]
    module = parser.instantiate(parser.parse_args([f"--config={text}", *options])).model
    assert module.autoencoder.config.latent_channels == 16
    assert module.configure_optimizers()[0][0].param_groups[0]["lr"] == 0.5


def test_latents_instead_of_images_are_refused(tmp_path: Path) -> None:
    batch = make_batch(0)
    batch.images = None
    with pytest.raises(ValueError, match="data gives latents"):
        make_trainer(tmp_path, max_steps=1).fit(make_module(), DataLoader([batch], batch_size=None))
