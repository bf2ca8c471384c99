"""The shipped run configurations, and options that make each of them tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from emu_lightning.models import load_autoencoder
from tests.tiny import tiny_autoencoder, tiny_generator, tiny_unet

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
RUN_CONFIGS = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
SIDE = 32


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
    return settings


def tiny_data(config: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"data.resolution": SIDE, "data.batch_size": 2, "data.num_workers": 0}
    settings["data.cache_dir"] = "cache"
    if config["data"]["class_path"].endswith("FolderData"):
        settings["data.path"] = "photographs"
    else:
        settings |= {"data.pool_size": 8, "data.val_size": 4}
    if config["data"]["init_args"].get("latents_from"):
        settings["data.latents_from"] = "autoencoder"
    return settings


def tiny_autoencoder_module(arguments: dict[str, Any]) -> dict[str, Any]:
    levels = len(arguments["autoencoder"]["init_args"]["block_channels"])
    settings = {"model.autoencoder.block_channels": [8] * levels, "model.autoencoder.norm_groups": 4}
    if arguments.get("discriminator"):
        settings |= {"model.discriminator.channels": 8, "model.discriminator.norm_groups": 4}
        settings |= {"model.adversarial_start": 1}
    if arguments.get("perceptual"):
        settings |= {"model.perceptual.channels": [4, 8]}
    return settings


def tiny_diffusion_module(arguments: dict[str, Any]) -> dict[str, Any]:
    levels = len(arguments["denoiser"]["init_args"]["block_channels"])
    network = {
        "block_channels": [8] * levels,
        "head_dim": 8,
        "norm_groups": 4,
        "sequence_dim": 8,
        "pooled_dim": 8,
    }
    text = {"dim": 8, "num_layers": 1, "num_heads": 2, "embedding_dim": 2}
    settings = {f"model.denoiser.{name}": value for name, value in network.items()}
    settings |= {f"model.text_encoder.{name}": value for name, value in text.items()}
    settings |= {"model.image_size": SIDE, "model.num_steps": 2}
    if arguments.get("autoencoder"):
        settings["model.autoencoder.init_args.folder"] = "autoencoder"
    return settings


def tiny_quality_tuning_module(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"model.init_from": "base"}


TINY_MODEL: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "AutoencoderModule": tiny_autoencoder_module,
    "DiffusionModule": tiny_diffusion_module,
    "QualityTuningModule": tiny_quality_tuning_module,
}


def tiny_options(name: str) -> list[str]:
    """Command-line options with which a configuration trains in a second, in a `workplace`."""
    config = read(name)
    tiny_model = TINY_MODEL[stage_of(config)](config["model"]["init_args"])
    settings = tiny_trainer(config) | tiny_data(config) | tiny_model
    return [
        f"--{option}={json.dumps(value) if isinstance(value, list) else value}"
        for option, value in settings.items()
    ]


def make_workplace(folder: Path) -> None:
    """What stages start from, by the names that the options give: photographs, an autoencoder, a base."""
    tiny_autoencoder().save(folder / "autoencoder")
    generator = tiny_generator(
        autoencoder=load_autoencoder(str(folder / "autoencoder")),
        denoiser=tiny_unet(4),
        image_size=SIDE,
        num_steps=2,
    )
    generator.save_pretrained(folder / "base")
    (folder / "photographs").mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photographs" / f"{index}.jpg")
        (folder / "photographs" / f"{index}.txt").write_text(f"a photograph, number {index}")
