"""The shipped run configurations, and options that make each of them tiny."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from emu_lightning.models import ClipText, JointTextEncoder, T5Text, UNet, load_autoencoder
from emu_lightning.modules import DiffusionModule
from emu_lightning.processes import Diffusion
from tests.data.tars import sample, write_tar
from tests.pipelines import make_pipeline
from tests.text_networks import make_clip, make_t5
from tests.tiny import tiny_autoencoder, tiny_generator, tiny_unet

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
RUN_CONFIGS = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name != "hardware"  # overlays: tests/test_parallel.py
)
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
        settings["data.latents_from"] = "autoencoder"
    return settings


TINY_SOURCE: dict[str, dict[str, Any]] = {
    "FolderData": {"data.path": "photographs"},
    "ManifestData": {"data.manifest": "manifest.parquet"},
    "ShardData": {"data.urls": "shards/*.tar", "data.val_urls": "shards/*.tar"},
    "WorldData": {"data.pool_size": 8, "data.val_size": 4},
}


def tiny_autoencoder_module(arguments: dict[str, Any]) -> dict[str, Any]:
    levels = len(arguments["autoencoder"]["init_args"]["block_channels"])
    settings = {"model.autoencoder.block_channels": [8] * levels, "model.autoencoder.norm_groups": 4}
    if arguments.get("discriminator"):
        settings |= {"model.discriminator.channels": 8, "model.discriminator.norm_groups": 4}
        settings |= {"model.adversarial_start": 1}
    if arguments.get("perceptual"):
        settings["model.perceptual"] = "emu_lightning.models.RandomFeatures"  # others want a file of weights
        settings["model.perceptual.channels"] = [4, 8]
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
    if levels > 2:
        network |= {"layers_per_block": 1, "transformer_layers": [0] + [1] * (levels - 1), "size_dim": 8}
    settings = {f"model.denoiser.{name}": value for name, value in network.items()}
    encoder = arguments["text_encoder"]["class_path"].rpartition(".")[2]
    settings |= {f"model.text_encoder.{name}": value for name, value in TINY_TEXT[encoder].items()}
    settings |= {"model.image_size": SIDE, "model.num_steps": 2}
    if arguments.get("autoencoder"):
        settings["model.autoencoder.init_args.folder"] = "autoencoder"
        settings["model.denoiser.in_channels"] = 4
    if arguments.get("init_from"):
        settings["model.init_from"] = "emu_base"
    return settings


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
}


def tiny_quality_tuning_module(arguments: dict[str, Any]) -> dict[str, Any]:
    if pipeline := TINY_PIPELINES.get(arguments["init_from"]):
        tiny = {"image_size": SIDE, "num_steps": 2, "frozen_dtype": "float32"}
        return {
            "model.init_from": pipeline,
            "model.overrides": arguments["overrides"] | tiny,
            "data.latents_from": pipeline,
        }
    return {"model.init_from": "emu_base" if arguments["init_from"].startswith("runs/emu/") else "base"}


TINY_PIPELINES = {  # hub id -> name in tests/pipelines.py
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable_diffusion",
    "stabilityai/stable-diffusion-xl-base-1.0": "stable_diffusion_xl",
    "black-forest-labs/FLUX.1-dev": "flux",
}

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
        f"--{option}={json.dumps(value) if isinstance(value, (list, dict)) else value}"
        for option, value in settings.items()
    ]


def make_workplace(folder: Path, name: str | None = None) -> None:
    """What stages start from, by the names that the options give: photographs, an autoencoder, a base.

    The pipeline that a configuration starts from is made for this one only.
    """
    init_from = read(name)["model"]["init_args"].get("init_from") if name else None
    if pipeline := TINY_PIPELINES.get(init_from or ""):
        make_pipeline(pipeline, folder / pipeline)
    tiny_autoencoder().save(folder / "autoencoder")
    generator = tiny_generator(
        autoencoder=load_autoencoder(str(folder / "autoencoder")),
        denoiser=tiny_unet(4),
        image_size=SIDE,
        num_steps=2,
    )
    generator.save_pretrained(folder / "base")
    make_emu_base(folder).save_pretrained(folder / "emu_base")
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


def make_emu_base(folder: Path) -> DiffusionModule:
    """Emu's networks, as tiny as the options make them: what stages of configs/emu start from."""
    make_clip(folder / "clip")
    make_t5(folder / "t5")
    shipped = read("emu/diffusion_256.yaml")["model"]["init_args"]
    tiny = tiny_diffusion_module(shipped)
    network = {
        name.removeprefix("model.denoiser."): value
        for name, value in tiny.items()
        if name.startswith("model.denoiser.")
    }
    return DiffusionModule(
        UNet(**shipped["denoiser"]["init_args"] | network),
        JointTextEncoder(ClipText("clip", dim=8), T5Text("t5", dim=8, length=16), dim=8),
        Diffusion(),
        load_autoencoder(str(folder / "autoencoder")),
        image_size=SIDE,
        num_steps=2,
    )
