from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from emu_lightning.models import PatchDiscriminator, RandomFeatures, VQAutoencoder, load_vq_autoencoder
from emu_lightning.modules import VQAutoencoderModule
from emu_lightning.parallel import Sharded
from tests.tiny import make_batch, make_trainer

K, WINDOW = 24, 4


def make_module(**arguments: Any) -> VQAutoencoderModule:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "autoencoder": VQAutoencoder(K, 4, (8, 16), norm_groups=4, use_mid_attention=False),
        "metric_features": RandomFeatures((4, 8), seed=1),
        "usage_window": WINDOW,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, betas=(0.9, 0.99)),
    }
    return VQAutoencoderModule(**{**defaults, **arguments})


def still(parameters: Any) -> torch.optim.Optimizer:
    """Moves nothing, so that what else moves is seen."""
    return torch.optim.SGD(parameters, lr=0.0)


def make_loader(num_batches: int) -> DataLoader:
    return DataLoader([make_batch(4 * n) for n in range(num_batches)], batch_size=None)


def latents_of(module: VQAutoencoderModule, position: int) -> torch.Tensor:
    """(N, C)"""
    with torch.no_grad():
        return module.autoencoder.encode(make_batch(position).images).movedim(1, -1).flatten(0, -2)


def is_among(codes: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return (torch.cdist(codes, latents, compute_mode="donot_use_mm_for_euclid_dist") < 1e-5).any(dim=1)


def test_the_codebook_starts_from_the_first_batch(tmp_path: Path) -> None:
    module = make_module(optimizer=still)
    make_trainer(tmp_path, max_steps=1).fit(module, make_loader(2))
    codes = module.autoencoder.codebook.weight.detach()
    assert is_among(codes, latents_of(module, 0)).all()
    assert len(codes.unique(dim=0)) == K  # drawn without putting back
    assert not is_among(codes, latents_of(module, 4)).any()


def test_codes_of_a_trained_network_stay(tmp_path: Path) -> None:
    module = make_module(optimizer=still)
    module.autoencoder.usage.fill_(1 / K)
    before = module.autoencoder.codebook.weight.detach().clone()
    make_trainer(tmp_path, max_steps=1).fit(module, make_loader(1))
    assert torch.equal(module.autoencoder.codebook.weight, before)


def test_unused_codes_move_to_the_batch_at_hand_and_no_others(tmp_path: Path) -> None:
    lost, far = torch.tensor([2, 11, 17]), 1e3  # nearest to nothing
    kept = [code for code in range(K) if code not in lost.tolist()]
    found = {}
    for num_steps in (WINDOW, WINDOW + 1):
        module = make_module(optimizer=still)

        @torch.no_grad()
        def lose(outputs: Any, batch: Any, batch_idx: int, module: Any = module) -> None:
            if batch_idx == 0:
                module.autoencoder.codebook.weight[lost] = far
                module.autoencoder.usage.fill_(1 / K)[lost] = 0

        module.on_train_batch_end = lose
        make_trainer(tmp_path, max_steps=num_steps).fit(module, make_loader(WINDOW + 1))
        found[num_steps] = module.autoencoder.codebook.weight.detach()
    assert (found[WINDOW][lost] == far).all()  # it is not looked for them before
    assert is_among(found[WINDOW + 1][lost], latents_of(module, 4 * WINDOW)).all()
    assert torch.equal(found[WINDOW][kept], found[WINDOW + 1][kept])


def test_usage_is_the_average_of_shares_that_forgets(tmp_path: Path) -> None:
    module = make_module(optimizer=still, usage_window=3)
    make_trainer(tmp_path, max_steps=3).fit(module, make_loader(3))  # at step 0 all move, then none
    expected = np.zeros(K)
    for step in range(3):
        latents = latents_of(module, 4 * step).double()
        distances = (latents[:, None] - module.autoencoder.codebook.weight.detach().double()).square().sum(2)
        counts = np.bincount(distances.argmin(1).numpy(), minlength=K)
        expected += (counts / counts.sum() - expected) / 3
    np.testing.assert_allclose(module.autoencoder.usage.numpy(), expected, atol=1e-6)
    shares = expected[expected > 0] / expected.sum()
    logged = module.trainer.callback_metrics
    assert logged["train/codebook_perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert logged["train/codebook_usage"] == pytest.approx((expected >= 0.01 / K).mean())


def test_the_loss_is_the_formula(tmp_path: Path) -> None:
    """|x - x'| + |sg[z] - e|^2 + beta |z - sg[e]|^2, as diffusers' own quantizer measures the last two."""
    module = make_module(optimizer=still, commitment_weight=0.7)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, make_loader(1))
    images, quantizer = make_batch(0).images, module.autoencoder.vq.quantize
    quantizer.legacy, quantizer.beta = False, 0.7
    with torch.no_grad():
        _, bottleneck, _ = quantizer(module.autoencoder.encode(images))
        expected = (module.autoencoder.reconstruct(images) - images).abs().mean() + bottleneck
    assert bottleneck > 0
    assert trainer.callback_metrics["train/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_one_step_follows_the_gradient_of_the_loss(tmp_path: Path) -> None:
    """Encoder, codes and decoder each, although the pictures' part is differentiated apart."""
    module = make_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    module.autoencoder.usage.fill_(1 / K)  # nothing is moved
    reference = make_module().autoencoder
    images = make_batch(0).images
    reconstructions, z, e, _ = reference(images)
    loss = (reconstructions - images).abs().mean()
    loss = loss + ((z.detach() - e) ** 2).mean() + 0.25 * ((z - e.detach()) ** 2).mean()
    loss.backward()
    make_trainer(tmp_path, max_steps=1).fit(module, make_loader(1))
    for name, weight in reference.named_parameters():
        expected = weight.detach() - 0.5 * weight.grad
        torch.testing.assert_close(module.autoencoder.get_parameter(name), expected, msg=name)


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    def module() -> VQAutoencoderModule:
        torch.manual_seed(1)
        return make_module(discriminator=PatchDiscriminator(8, 1, norm_groups=4), adversarial_start=2)

    whole = module()
    make_trainer(tmp_path, max_epochs=3).fit(whole, make_loader(5))
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    make_trainer(tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[checkpoints]).fit(
        module(), make_loader(5)
    )
    resumed = module()
    make_trainer(tmp_path, max_epochs=3).fit(resumed, make_loader(5), ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert {name.split(".")[0] for name in whole.state_dict()} == {"autoencoder", "discriminator"}
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_training_lowers_the_loss_and_keeps_codes_in_use(tmp_path: Path) -> None:
    module = make_module()
    trainer = make_trainer(tmp_path, max_steps=60, precision="bf16-mixed")
    losses = []
    module.on_train_batch_end = lambda *_: losses.append(float(trainer.callback_metrics["train/loss"]))
    trainer.fit(module, make_loader(1))
    assert losses[-1] < 0.7 * losses[0]
    assert trainer.callback_metrics["train/codebook_usage"] > 0.9


def test_validation_counts_the_codes_of_all_its_pictures(tmp_path: Path) -> None:
    module = make_module()
    trainer = make_trainer(tmp_path, limit_val_batches=4)
    (val,) = trainer.validate(module, make_loader(4), verbose=False)
    images = torch.cat([batch.images for batch in make_loader(4)])
    ids = module.autoencoder(images)[3].flatten().numpy()
    _, counts = np.unique(ids, return_counts=True)
    shares = counts / counts.sum()
    assert val["val/codebook_usage"] == pytest.approx(len(counts) / K)
    assert val["val/codebook_perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    errors = (module.autoencoder.reconstruct(images).clamp(-1, 1) - images).detach() / 2
    psnr = -10 * errors.square().mean(dim=(1, 2, 3)).log10().mean()
    assert val["val/psnr"] == pytest.approx(psnr.item(), abs=1e-3)
    (again,) = trainer.validate(module, make_loader(4), verbose=False)
    assert again == val  # counts start anew


def test_what_is_handed_over_makes_the_same_ids(tmp_path: Path) -> None:
    module = make_module()
    make_trainer(tmp_path, max_steps=2).fit(module, make_loader(2))
    module.save_pretrained(tmp_path / "vq")
    loaded, images = load_vq_autoencoder(str(tmp_path / "vq")), make_batch(0).images
    assert torch.equal(loaded.ids(loaded.encode(images)), module.autoencoder.eval()(images)[3])
    assert torch.equal(loaded.usage, module.autoencoder.usage)


def test_sharding_is_refused() -> None:
    module = make_module()
    module._trainer = SimpleNamespace(strategy=Sharded())  # type: ignore[assignment]
    with pytest.raises(ValueError, match="VQ autoencoder is not sharded.*configs/hardware/ddp.yaml"):
        module.configure_model()


def test_configuration_round_trips_and_knows_its_options() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--model", type=VQAutoencoderModule)
    network = {"class_path": "emu_lightning.models.VQAutoencoder", "init_args": {"block_channels": [8, 16]}}
    network["init_args"] |= {"norm_groups": 4, "codebook_size": 9}
    arguments = {"autoencoder": network, "commitment_weight": 0.5, "reconstruction": "l2"}
    model = {"class_path": "emu_lightning.modules.VQAutoencoderModule", "init_args": arguments}
    config = parser.parse_object({"model": model})
    text = parser.dump(config)
    assert parser.dump(parser.parse_string(text)) == text
    options = [f"--config={text}", "--model.autoencoder.codebook_size=12", "--model.optimizer.lr=0.5"]
    module = parser.instantiate(parser.parse_args(options)).model
    assert (module.commitment_weight, module.reconstruction) == (0.5, "l2")
    assert module.autoencoder.codebook.weight.shape == (12, 16)
    assert module.configure_optimizers()[0][0].param_groups[0]["lr"] == 0.5
    model["init_args"] = arguments | {"kl_weight": 1.0}
    with pytest.raises(ArgumentError, match="kl_weight"):
        parser.parse_object({"model": model})
