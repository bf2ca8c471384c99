"""Full-size networks on the meta device: published parameter counts, and the figures in configs/emu."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost
from benchmarks.cost import parameter_counts
from emu_lightning.callbacks.throughput import count_flops
from emu_lightning.models import Text, UNet
from tests.shipped import CONFIGS, RUN_CONFIGS, read

EMU_CONFIGS = [name for name in RUN_CONFIGS if name.startswith("emu/")]
KL_F8, SD2_UNET, SDXL_UNET = 83_653_863, 865_910_724, 2_567_463_684  # as published


def test_networks_of_published_settings_have_the_published_numbers_of_parameters():
    ours = parameter_counts()
    assert (ours["kl_f8_4"], ours["sd2_unet"], ours["sdxl_unet"]) == (KL_F8, SD2_UNET, SDXL_UNET)
    assert abs(ours["emu_unet"] / 2.8e9 - 1) < 0.01
    with torch.device("meta"):
        autoencoder = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        sd2 = UNet2DConditionModel(
            attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
        )
    assert (cost.num_parameters(autoencoder), cost.num_parameters(sd2)) == (KL_F8, SD2_UNET)


def test_emus_unet_is_wider_and_deeper_than_stable_diffusions_and_fits_a_gpu():
    networks = [
        read(f"emu/diffusion_{side}.yaml")["model"]["init_args"]["denoiser"] for side in (256, 512, 1024)
    ]
    for network in networks:
        settings = network["init_args"]
        assert settings["in_channels"] == 16 and settings["block_channels"][0] > 320
        assert settings["layers_per_block"] > 2
        assert all(width % 64 == width % settings["head_dim"] == 0 for width in settings["block_channels"])
    differing = {
        name
        for name in networks[0]["init_args"]
        for n in networks
        if n["init_args"][name] != networks[0]["init_args"][name]
    }
    assert differing == {"sample_size"}  # or the next stage could not start from the one before


def test_every_stage_starts_from_what_another_leaves_and_has_the_papers_settings():
    stages = [
        read(f"emu/{name}.yaml")
        for name in ("diffusion_256", "diffusion_512", "diffusion_1024", "quality_tuning")
    ]
    for before, after in zip(stages, stages[1:], strict=False):
        assert cost.made_by(after["model"]["init_args"]["init_from"]) == before
    for stage in stages[:3]:
        assert cost.made_by(stage["model"]["init_args"]["autoencoder"]["init_args"]["folder"])
    last, tuning = stages[2:]
    assert [
        stage["model"]["init_args"]["process"]["init_args"].get("noise_offset", 0) for stage in stages[:3]
    ] == [0, 0, 0.02]
    assert tuning["model"]["init_args"]["overrides"]["process.noise_offset"] == 0.1
    assert tuning["data"]["init_args"]["batch_size"] == 64 and tuning["trainer"]["max_steps"] <= 15_000
    assert last["data"]["init_args"]["buckets"] == tuning["data"]["init_args"]["buckets"]


@pytest.mark.parametrize("name", EMU_CONFIGS)
def test_it_is_built_at_full_size_and_its_head_says_what_it_costs(name: str):
    text = (CONFIGS / name).read_text()
    command = re.search(r"# On (\d+) H100 of 80 GB, computed by python benchmarks/cost.py configs/(.*)", text)
    assert command is not None
    gpus, options = command[1], shlex.split(command[2])
    assert options == [name, "--gpus", gpus]
    for line in cost.main([str(CONFIGS / name), *options[1:]]):
        assert f"#   {line}\n" in text
    held, activations = map(int, re.findall(r"(\d+) GB", text.partition("memory of a GPU:")[2])[:2])
    assert held + activations <= 72  # a tenth stays free


def test_flops_are_those_of_a_real_forward_and_backward_pass():
    def make() -> tuple[UNet, Callable[[], torch.Tensor]]:
        unet = UNet(
            16, 8, (32, 64), 1, (0, 1), head_dim=8, sequence_dim=32, pooled_dim=8, use_size_condition=True
        )
        text = Text(
            torch.randn(1, 5, 32, requires_grad=True), torch.ones(1, 5, dtype=torch.bool), torch.randn(1, 8)
        )
        x_t, t, size = torch.randn(1, 16, 32, 32), torch.rand(1), torch.zeros(1, 6)
        return unet, lambda: unet(x_t, t, text, size).sum()

    predict = make()[1]
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        predict().backward()
    with torch.device("meta"):
        unet, predict = make()
        cost._imitate_autocast(unet)
        with cost._kept(unet):
            flops = count_flops(predict)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_kept_bytes_are_those_of_the_formula():
    side, wide = 16, 8
    with torch.device("meta"):
        network = nn.Sequential(
            nn.Conv2d(3, wide, 3, padding=1), nn.GroupNorm(2, wide), nn.SiLU(), nn.Conv2d(wide, 3, 1)
        )
        cost._imitate_autocast(network)
        with cost._kept(network) as kept:
            network(torch.empty(1, 3, side, side))
    cast_input, norm_input, activation_input, convolved = 2 * 3, 4 * wide, 4 * wide, 2 * wide
    statistics = 2 * 2 * 4  # mean and deviation of two groups
    assert (
        cost._bytes(kept) == side**2 * (cast_input + norm_input + activation_input + convolved) + statistics
    )
