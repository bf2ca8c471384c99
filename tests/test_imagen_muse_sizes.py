"""Imagen's and Muse's networks at full size on the meta device, and the figures in their configurations."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from jsonargparse import ArgumentParser
from torch import nn

from benchmarks import cost
from emu_lightning.models import MaskedTransformer, PixelUNet, Text
from emu_lightning.modules import CascadeModule
from tests.shipped import CONFIGS, RUN_CONFIGS, read

COMMAND = re.compile(r"# On (\d+) H100 of 80 GB, computed by python benchmarks/cost.py configs/(.*)")
FULL_SIZE = [name for name in RUN_CONFIGS if name.startswith(("imagen/", "muse/"))]
PUBLISHED = {  # parameters
    "imagen/base_64.yaml": 2e9,
    "imagen/super_resolution_256.yaml": 600e6,
    "imagen/super_resolution_1024.yaml": 400e6,
    "muse/base_256.yaml": 3e9,
}


def network(name: str) -> Any:
    """The trained network of a stage, on the meta device."""
    arguments = read(name)["model"]["init_args"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "network", required=True)
    described = arguments.get("denoiser") or arguments["transformer"]
    with torch.device("meta"):
        return parser.instantiate(parser.parse_object({"network": described})).network


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_papers_number_of_parameters_within_a_tenth_and_its_head_says_how_many(name: str) -> None:
    count = cost.num_parameters(network(name))
    assert abs(count / PUBLISHED[name] - 1) < 0.1
    stated = re.search(r"#   ([\d,]+) parameters trained", (CONFIGS / name).read_text())
    encoder = read(name)["model"]["init_args"]["text_encoder"]["init_args"]
    projection = (encoder["network"]["init_args"]["dim"] + 1) * encoder["dim"]
    assert stated is not None and int(stated[1].replace(",", "")) == count + projection


def side_of_attention(unet: PixelUNet, side: int) -> set[tuple[int, bool]]:
    """(side in pixels, whether the picture is read too) of every attention, by shapes on the way through."""
    found = set()

    def note(attention: Attention, inputs: tuple[torch.Tensor, ...]) -> None:
        found.add((inputs[0].shape[-1], not attention.only_cross_attention))
        assert attention.add_k_proj is not None  # the text is read everywhere

    for module in unet.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(note)
    with torch.device("meta"), cost._OnMeta():
        dim = unet.config.sequence_dim
        text = Text(torch.empty(1, 7, dim), torch.ones(1, 7, dtype=torch.bool), torch.empty(1, dim))
        picture = torch.empty(1, 3, side, side)
        small = (None, picture[..., : side // 4, : side // 4], torch.empty(1))
        unet(picture, torch.empty(1), text, *(small if unet.config.use_low_resolution else ()))
    return found


def test_imagens_unets_have_their_shapes() -> None:
    base, first, last = (network(name) for name in PUBLISHED if name.startswith("imagen/"))
    widths = [512 * multiple for multiple in (1, 2, 3, 4)]
    assert (base.config.block_channels, base.config.layers_per_block) == (widths, [3] * 4)
    assert side_of_attention(base, 64) == {(32, True), (16, True), (8, True)}
    assert first.config.block_channels == [128, 256, 512, 1024]
    assert first.config.layers_per_block == [2, 4, 8, 8]
    assert side_of_attention(first, 256) == {(32, True)}  # the deepest
    assert side_of_attention(last, 256) == {(32, False)}  # no self-attention
    data = read("imagen/super_resolution_1024.yaml")
    stage = data["model"]["init_args"]
    assert (stage["crop_size"], stage["factor"], data["data"]["init_args"]["resolution"]) == (256, 4, 1024)


def test_muses_transformers_have_their_shapes() -> None:
    base, last = network("muse/base_256.yaml"), network("muse/super_resolution_512.yaml")
    for transformer, layers, width, side in ((base, 48, 2048, 16), (last, 32, 1024, 64)):
        assert isinstance(transformer, MaskedTransformer)
        assert len(transformer.layers) == layers and transformer.num_ids == side**2
        shapes = {tuple(weight.shape) for weight in transformer.layers[0].ff.parameters()}
        assert (4 * width, width) in shapes
        assert transformer.logits.weight.shape == (8192, width)
    assert base.low is None and last.low is not None


@pytest.mark.parametrize(("family", "sides"), [("imagen", [64, 256, 1024]), ("muse", [256, 512])])
def test_a_cascade_is_made_of_what_the_stages_leave_and_is_what_tuning_starts_from(
    family: str, sides: list[int]
) -> None:
    description = read(f"{family}/cascade.yaml")
    arguments = description["model"]["init_args"]
    loaded = [each["init_args"]["path"] for each in (arguments["base"], *arguments["upsamplers"])]
    stages = [cost.made_by(path) for path in loaded]
    assert [stage["data"]["init_args"]["resolution"] for stage in stages] == sides
    tuning = read(f"{family}/quality_tuning.yaml")
    assert cost.made_by(tuning["model"]["init_args"]["init_from"]) == description
    settings = tuning["data"]["init_args"]
    assert settings["resolution"] == sides[-1] and settings["batch_size"] == 64
    assert tuning["trainer"]["max_steps"] <= tuning["model"]["init_args"]["max_iterations"] == 15_000


def test_muses_stages_read_ids_of_the_autoencoders_before_them() -> None:
    folders = {f: f"{read(f'muse/vq_{f}.yaml')['run_dir']}/pretrained" for f in ("f8", "f16")}
    base, last = (
        read(name)["model"]["init_args"] for name in ("muse/base_256.yaml", "muse/super_resolution_512.yaml")
    )
    assert base["vq"]["init_args"]["folder"] == last["low_vq"]["init_args"]["folder"] == folders["f16"]
    assert last["vq"]["init_args"]["folder"] == folders["f8"]
    for f, side in (("f16", 256), ("f8", 512)):
        network = read(f"muse/vq_{f}.yaml")
        levels = network["model"]["init_args"]["autoencoder"]["init_args"]["block_channels"]
        assert f"f{2 ** (len(levels) - 1)}" == f and network["data"]["init_args"]["resolution"] == side


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_it_is_built_at_full_size_and_its_head_says_what_it_costs(name: str) -> None:
    text = (CONFIGS / name).read_text()
    command = COMMAND.search(text)
    assert command is not None
    gpus, options = command[1], shlex.split(command[2])
    assert options == [name, "--gpus", gpus]
    for line in cost.main([str(CONFIGS / name), *options[1:]]):
        assert f"#   {line}\n" in text
    held, activations = map(int, re.findall(r"(\d+) GB", text.partition("memory of a GPU:")[2])[:2])
    assert held + activations <= 72  # a tenth stays free


@pytest.mark.parametrize("family", ["imagen", "muse"])
def test_the_whole_cascade_is_built_at_full_size(family: str) -> None:
    with torch.device("meta"):
        cascade = cost.build(read(f"{family}/cascade.yaml"))
    assert isinstance(cascade, CascadeModule)
    assert len({text.frozen for text in cascade.modules() if isinstance(text, cost.TextNetwork)}) == 1
