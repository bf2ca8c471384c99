"""The shipped run configurations, and options that make each of them tiny."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image

from emu_lightning.models import VQAutoencoder, load_autoencoder
from emu_lightning.modules import CascadeModule, Generator
from emu_lightning.modules.generator import Learner, build_learner
from tests.data.tars import sample, write_tar
from tests.pipelines import make_pipeline
from tests.text_networks import make_clip, make_t5
from tests.tiny import tiny_autoencoder, tiny_generator, tiny_unet

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
RUN_CONFIGS = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob("*.yaml")
    # Not overlays (tests/test_parallel.py), recipes (tests/verbs/test_miniature.py) and what only assembles.
    if {"model", "data"} <= yaml.safe_load(path.read_text()).keys()
)
SIDE = 32
VQ_DOWNSAMPLING = 4
LATENT = "emu_lightning/miniature/latent"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / name).read_text())


def stage_of(config: dict[str, Any]) -> str:
    return config["model"]["class_path"].rpartition(".")[2]


# --- tiny overrides, by what the configuration holds --------------------------------------------------------


def tiny_trainer(config: dict[str, Any]) -> dict[str, Any]:
    settings = {
        "trainer.max_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.log_every_n_steps": 1,
        "trainer.val_check_interval": 2,
        "checkpoint.every_n_train_steps": 1,
    }
    if config["trainer"].get("callbacks"):
        settings["trainer.callbacks.every_n_train_steps"] = 2
    if config["trainer"].get("accumulate_grad_batches"):
        settings["trainer.accumulate_grad_batches"] = 2
    return settings


def tiny_data(config: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"data.resolution": SIDE, "data.batch_size": 2, "data.num_workers": 0}
    settings["data.cache_dir"] = "cache"
    settings |= TINY_SOURCE[config["data"]["class_path"].rpartition(".")[2]]
    if config["data"]["init_args"].get("buckets"):
        settings |= {"data.buckets.resolution": 2 * SIDE, "data.buckets.step": SIDE // 2}
    if config["data"]["init_args"].get("latents_from"):
        settings["data.latents_from"] = "vq" if stage_of(config).startswith("Masked") else "autoencoder"
    return settings


TINY_SOURCE: dict[str, dict[str, Any]] = {
    "FolderData": {"data.path": "photographs"},
    "ManifestData": {"data.manifest": "manifest.parquet"},
    "ShardData": {"data.urls": "shards/*.tar", "data.val_urls": "shards/*.tar"},
    "WorldData": {"data.pool_size": 8, "data.val_size": 4},
}


def tiny_autoencoder_module(arguments: dict[str, Any]) -> dict[str, Any]:
    levels = len(arguments["autoencoder"]["init_args"]["block_channels"])
    settings: dict[str, Any] = {
        "model.autoencoder.block_channels": [8] * levels,
        "model.autoencoder.norm_groups": 4,
    }
    if arguments.get("discriminator"):
        settings |= {"model.discriminator.channels": 8, "model.discriminator.norm_groups": 4}
        settings |= {"model.adversarial_start": 1}
    if arguments.get("perceptual"):
        settings["model.perceptual"] = "emu_lightning.models.RandomFeatures"  # others want a file of weights
        settings["model.perceptual.channels"] = [4, 8]
    return settings


def tiny_vq_autoencoder_module(arguments: dict[str, Any]) -> dict[str, Any]:
    tiny = {"model.autoencoder.codebook_size": 8, "model.autoencoder.code_dim": 4}
    return tiny_autoencoder_module(arguments) | tiny


def tiny_denoiser(arguments: dict[str, Any]) -> dict[str, Any]:
    shipped = arguments["denoiser"]["init_args"]
    levels = len(shipped["block_channels"])
    network: dict[str, Any] = {
        "block_channels": [8] * levels,
        "head_dim": 8,
        "norm_groups": 4,
        "sequence_dim": 8,
        "pooled_dim": 8,
    }
    if isinstance(shipped["layers_per_block"], list):
        network |= {"layers_per_block": [1] * levels, "level_dim": 8}
    elif levels > 2:
        network |= {"layers_per_block": 1, "transformer_layers": [0] + [1] * (levels - 1), "size_dim": 8}
    return {f"model.denoiser.{name}": value for name, value in network.items()}


def tiny_text(arguments: dict[str, Any]) -> dict[str, Any]:
    encoder = arguments["text_encoder"]["class_path"].rpartition(".")[2]
    return {f"model.text_encoder.{name}": value for name, value in TINY_TEXT[encoder].items()}


def tiny_diffusion_module(arguments: dict[str, Any]) -> dict[str, Any]:
    settings = tiny_denoiser(arguments) | tiny_text(arguments)
    settings |= {"model.image_size": SIDE, "model.num_steps": 2}
    if arguments.get("autoencoder"):
        settings["model.autoencoder.init_args.folder"] = "autoencoder"
        settings["model.denoiser.in_channels"] = 4
    if arguments.get("init_from"):
        settings["model.init_from"] = "base"
    return settings


def tiny_super_resolution_module(arguments: dict[str, Any]) -> dict[str, Any]:
    settings = tiny_denoiser(arguments) | tiny_text(arguments)
    settings |= {"model.image_size": SIDE, "model.num_steps": 2}
    if arguments.get("crop_size"):
        settings["model.crop_size"] = SIDE // 2
    return settings


def tiny_masked_module(arguments: dict[str, Any]) -> dict[str, Any]:
    network = {"dim": 8, "num_layers": 1, "num_heads": 2, "sequence_dim": 8, "codebook_size": 8}
    network["side"] = SIDE // VQ_DOWNSAMPLING
    settings: dict[str, Any] = {"model.vq.init_args.folder": "vq"}
    if arguments.get("low_vq"):
        network |= {"low_codebook_size": 8, "low_side": SIDE // 2 // VQ_DOWNSAMPLING}
        settings["model.low_vq.init_args.folder"] = "vq"
    if arguments["transformer"]["init_args"].get("pooled_dim"):
        network["pooled_dim"] = 8
    settings |= {f"model.transformer.{name}": value for name, value in network.items()}
    if arguments.get("init_from"):
        settings["model.init_from"] = "base"
    return settings | tiny_text(arguments) | {"model.num_steps": 2}


def tiny_contrastive_module(arguments: dict[str, Any]) -> dict[str, Any]:
    vision = {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    return {"model.config": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}}


TINY_TEXT: dict[str, dict[str, Any]] = {
    "SmallTextEncoder": {"dim": 8, "num_layers": 1, "num_heads": 2, "embedding_dim": 2},
    "JointTextEncoder": {
        "clip.path": "clip",
        "clip.dim": 8,
        "t5.path": "t5",
        "t5.dim": 8,
        "t5.length": 16,
        "dim": 8,
    },
    "SingleTextEncoder": {"network.path": "t5", "network.dim": 8, "network.length": 16, "dim": 8},
}


def tiny_quality_tuning_module(arguments: dict[str, Any]) -> dict[str, Any]:
    if pipeline := TINY_PIPELINES.get(arguments["init_from"]):
        tiny = {"image_size": SIDE, "num_steps": 2, "frozen_dtype": "float32"}
        return {
            "model.init_from": pipeline,
            "model.overrides": arguments["overrides"] | tiny,
            "data.latents_from": pipeline,
        }
    return {"model.init_from": "base"}


TINY_PIPELINES = {  # hub id -> name in tests/pipelines.py
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable_diffusion",
    "stabilityai/stable-diffusion-xl-base-1.0": "stable_diffusion_xl",
    "black-forest-labs/FLUX.1-dev": "flux",
}

TINY_MODEL: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "AutoencoderModule": tiny_autoencoder_module,
    "ContrastiveModule": tiny_contrastive_module,
    "DiffusionModule": tiny_diffusion_module,
    "MaskedModule": tiny_masked_module,
    "MaskedSuperResolutionModule": tiny_masked_module,
    "QualityTuningModule": tiny_quality_tuning_module,
    "SuperResolutionModule": tiny_super_resolution_module,
    "VQAutoencoderModule": tiny_vq_autoencoder_module,
}


def tiny_settings(name: str) -> dict[str, Any]:
    """By dotted names, as on the command line."""
    config = read(name)
    tiny_model = TINY_MODEL[stage_of(config)](config["model"]["init_args"])
    return tiny_trainer(config) | tiny_data(config) | tiny_model


def tiny_options(name: str) -> list[str]:
    """Command-line options with which a configuration trains in a second, in a `workplace`."""
    return [
        f"--{option}={json.dumps(value) if isinstance(value, (list, dict)) else value}"
        for option, value in tiny_settings(name).items()
    ]


# --- what stages start from ---------------------------------------------------------------------------------


def tiny_stage(name: str, side: int = SIDE) -> Learner:
    """The generator or upsampler of a configuration, made tiny, of pictures of ``side`` pixels, untrained.

    Its networks are found in the working directory.
    """
    config = read(name)["model"]
    arguments = {
        key: each for key, each in config["init_args"].items() if key not in ("optimizer", "lr_scheduler")
    }
    for option, value in tiny_settings(name).items():
        *parents, last = option.split(".")
        if parents[:1] != ["model"]:
            continue
        place = arguments
        for parent in parents[1:]:
            place = place if parent == "init_args" else place[parent]
            place = place.get("init_args", place)
        place[last] = value
    if "image_size" in arguments:
        arguments["image_size"] = side
    else:
        arguments["transformer"]["init_args"]["side"] = side // VQ_DOWNSAMPLING
    return build_learner({"class_path": config["class_path"], "init_args": arguments})


def latent_base(folder: Path) -> Generator:
    return tiny_generator(
        autoencoder=load_autoencoder(str(folder / "autoencoder")),
        denoiser=tiny_unet(4),
        image_size=SIDE,
        num_steps=2,
    )


def cascade(base: str, upsampler: str, factor: int) -> Generator:
    return CascadeModule(tiny_stage(base, SIDE // factor), [tiny_stage(upsampler)])


BASES: dict[str, Callable[[Path], Generator]] = {  # what a configuration starts from -> its tiny kind
    LATENT: latent_base,
    "emu_lightning/miniature/pixel": lambda _: cascade(
        "pixel/miniature_base.yaml", "pixel/miniature_super_resolution.yaml", 2
    ),
    "emu_lightning/miniature/masked": lambda _: cascade(
        "masked/miniature_base.yaml", "masked/miniature_super_resolution.yaml", 2
    ),
    "runs/miniature/masked/base/": lambda _: tiny_stage("masked/miniature_base.yaml"),
    "runs/emu/": lambda _: tiny_stage("emu/diffusion_256.yaml"),
    "runs/imagen/": lambda _: cascade("imagen/base_64.yaml", "imagen/super_resolution_256.yaml", 4),
    "runs/muse/": lambda _: cascade("muse/base_256.yaml", "muse/super_resolution_512.yaml", 2),
}


def make_workplace(folder: Path, name: str | None = None) -> None:
    """What stages start from, by the names that the options give: photographs, autoencoders, a base.

    The base is of the kind that this configuration starts from.
    """
    init_from = (read(name)["model"]["init_args"].get("init_from") if name else None) or LATENT
    if pipeline := TINY_PIPELINES.get(init_from):
        make_pipeline(pipeline, folder / pipeline)
    tiny_autoencoder().save(folder / "autoencoder")
    torch.manual_seed(0)
    levels = VQ_DOWNSAMPLING.bit_length()
    VQAutoencoder(8, 4, (8,) * levels, norm_groups=4, use_mid_attention=False).save(folder / "vq")
    make_clip(folder / "clip")
    make_t5(folder / "t5")
    for start, make in BASES.items():
        if init_from.startswith(start):
            with chdir(folder):
                make(folder).save_pretrained(folder / "base")
    (folder / "photographs").mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photographs" / f"{index}.jpg")
        (folder / "photographs" / f"{index}.txt").write_text(f"a photograph, number {index}")
    shard = {}
    for index in range(4):
        shard |= sample(f"{index:09d}", index, width=50 - 10 * (index % 2), height=40)
    write_tar(folder / "shards" / "00000.tar", shard)
    members = [name for name in shard if name.endswith(".jpg")]
    columns: dict[str, list[Any]] = {
        "uid": members,
        "uri": [f"shards/00000.tar#{name}" for name in members],
        "sha256": [hashlib.sha256(shard[name]).hexdigest() for name in members],
        "width": [50, 40, 50, 40],
        "height": [40] * 4,
        "caption": [f"picture {name}" for name in members],
        "source": ["test"] * 4,
        "licence": ["none"] * 4,
        "selected": [True] * 4,
    }
    pq.write_table(pa.table(columns), folder / "manifest.parquet")
