"""What quality-tuning a published pipeline costs, computed without weights, pictures or a GPU.

    python -m benchmarks.pipeline_cost configs/quality_tuning/sdxl.yaml --gpus 8

As benchmarks/cost.py counts Emu's own networks, here are those of pipelines on the hub, at their published
settings: Stable Diffusion 1.5, SDXL 1.0 and FLUX.1 dev. Latents and text embeddings are cached, as in the
configurations; the frozen networks are counted as held all the same, since drawing samples loads them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from benchmarks.cost import (
    CAST_BYTES,
    PEAK,
    STATE_BYTES,
    Cost,
    _bytes,
    _checkpointed_bytes,
    _imitate_autocast,
    _kept,
    clip_l,
    num_parameters,
    report,
    t5_xxl,
)
from emu_lightning.callbacks.throughput import count_flops
from emu_lightning.models.lora import Lora, add_lora
from emu_lightning.models.pipeline_families import Flux, PipelineFamily, StableDiffusion, StableDiffusionXL
from emu_lightning.models.text import Text
from emu_lightning.resources import shipped


@dataclass
class Published:
    """A pipeline at its published settings.

    Attributes:
        family: feeds the denoiser.
        denoiser: makes it.
        text_encoders: make them.
        latent_channels: C.
        text: sequence length and width, and width of the pooled text.
    """

    family: PipelineFamily
    denoiser: Callable[[], Any]
    text_encoders: list[Callable[[], nn.Module]]
    latent_channels: int
    text: tuple[int, int, int]


def clip_g() -> nn.Module:
    """OpenCLIP ViT-bigG/14's text tower."""
    config = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
    )
    return CLIPTextModelWithProjection(config)


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Published(
        StableDiffusion(), lambda: UNet2DConditionModel(cross_attention_dim=768), [clip_l], 4, (77, 768, 0)
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": Published(
        StableDiffusionXL(), sdxl_unet, [clip_l, clip_g], 4, (77, 2048, 1280)
    ),
    "black-forest-labs/FLUX.1-dev": Published(
        Flux(), lambda: FluxTransformer2DModel(guidance_embeds=True), [clip_l, t5_xxl], 16, (512, 4096, 768)
    ),
}


def cost_of(config: dict[str, Any]) -> Cost:
    """The cost of quality-tuning as a configuration says.

    Raises:
        ValueError: it starts from a pipeline whose settings are not here.
    """
    arguments = config["model"]["init_args"]
    if arguments["init_from"] not in PUBLISHED:
        raise ValueError(
            f"the networks of {arguments['init_from']} are not known here; known are {list(PUBLISHED)}"
        )
    pipeline, overrides = PUBLISHED[arguments["init_from"]], arguments["overrides"]
    frozen_bytes = 2 if overrides.get("frozen_dtype") == "bfloat16" else 4
    with torch.device("meta"):
        denoiser = pipeline.denoiser()
        base = num_parameters(denoiser)
        if overrides.get("lora"):
            add_lora(denoiser, Lora(**overrides["lora"]))
        trained = sum(weight.numel() for weight in denoiser.parameters() if weight.requires_grad)
        text = num_parameters(*(make() for make in pipeline.text_encoders))
        vae = num_parameters(
            AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=pipeline.latent_channels,
            )
        )
        side = config["data"]["init_args"]["resolution"] // 8
        length, width, pooled = pipeline.text

        def predict() -> Tensor:
            mask = torch.ones(1, length, dtype=torch.bool)
            text = Text(torch.empty(1, length, width), mask, torch.empty(1, pooled))
            x_t = torch.empty(1, pipeline.latent_channels, side, side)
            return pipeline.family.predict(denoiser, x_t, torch.empty(1), text, torch.empty(1, 6))

        _imitate_autocast(denoiser)
        with _kept(denoiser) as kept:
            flops = {type(denoiser).__name__: count_flops(lambda: predict().sum())}
        checkpointed = _checkpointed_bytes(predict, denoiser)
    averaged = trained if overrides.get("ema_decay", 0.999) is not None else 0
    frozen = text + vae + (base if overrides.get("lora") else 0)
    on_gpu = frozen - vae - (text if overrides.get("offload_text") else 0)
    return Cost(
        trained,
        frozen,
        STATE_BYTES * trained + 4 * averaged,
        CAST_BYTES * trained + frozen_bytes * on_gpu + 4 * vae,
        flops,
        _bytes(kept),
        checkpointed,
    )


def main(argv: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", help="configuration of configs/quality_tuning that starts from a pipeline")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed share of the peak")
    parser.add_argument("--peak", type=float, default=PEAK, help="TFLOP/s of a GPU in bfloat16")
    options = parser.parse_args(argv)
    config = yaml.safe_load(shipped(options.config).read_text())
    lines = report(config, cost_of(config), options.gpus, options.mfu, options.peak)
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main()
