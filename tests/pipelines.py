"""Tiny diffusers pipelines of all families: diffusers' own classes and files, random weights, no download."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.text_networks import LETTERS

SIDE = 16  # pixels of their pictures: 8 x 8 latents
PROMPT, SEED = "a red ball, in the snow", 3


def clip_tokenizer() -> CLIPTokenizer:
    """Words are spelt: every letter is a token, and has another one at the end of a word."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(vocab=[(piece, -float(n)) for n, piece in enumerate(pieces)], extra_ids=0)


def clip_text(network: Any = CLIPTextModel, dim: int = 8) -> Any:
    size = len(clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=2, projection_dim=dim,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=size - 2, eos_token_id=size - 1,
    )  # fmt: skip
    return network(config).eval()


def t5_text(dim: int = 8) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=dim, d_kv=4, d_ff=2 * dim, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def vae(latent_channels: int = 4, **settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=SIDE, latent_channels=latent_channels,
        **settings,
    ).eval()  # fmt: skip


def unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **settings,
    ).eval()  # fmt: skip


def stable_diffusion() -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae(scaling_factor=0.18215), unet=unet(cross_attention_dim=8), scheduler=scheduler,
        text_encoder=clip_text(), tokenizer=clip_tokenizer(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
    denoiser = unet(
        cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4, use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025), unet=denoiser, scheduler=scheduler,
        text_encoder=clip_text(), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
    )  # fmt: skip


def pixart(pipeline: Any, sample_size: int = 8) -> Any:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, num_layers=2, cross_attention_dim=24, caption_channels=8,
        sample_size=sample_size, in_channels=4, out_channels=8,
    ).eval()  # fmt: skip
    return pipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_text(), vae=vae(), transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


def pixart_alpha() -> PixArtAlphaPipeline:
    """Of its large pictures' side, on which it depends whether the network knows their size."""
    return pixart(PixArtAlphaPipeline, sample_size=128)


def pixart_sigma() -> PixArtSigmaPipeline:
    return pixart(PixArtSigmaPipeline)


def stable_diffusion_3(has_t5: bool = True) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip_text(CLIPTextModelWithProjection), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(16) if has_t5 else None, tokenizer_3=t5_tokenizer() if has_t5 else None,
    )  # fmt: skip


def stable_diffusion_3_without_t5() -> StableDiffusion3Pipeline:
    return stable_diffusion_3(has_t5=False)


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    return FluxPipeline(
        transformer=transformer, vae=vae(4, scaling_factor=0.36, shift_factor=0.12),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=clip_text(), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (
        stable_diffusion,
        stable_diffusion_xl,
        pixart_alpha,
        pixart_sigma,
        stable_diffusion_3,
        stable_diffusion_3_without_t5,
        flux,
    )
}


def make_pipeline(name: str, folder: Path) -> Path:
    """Writes the tiny pipeline of this name; nothing in it is zero where diffusers starts at zero."""
    torch.manual_seed(0)
    pipeline = PIPELINES[name]()
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    pipeline.save_pretrained(folder)
    return folder


def stock(folder: Path) -> Any:
    """The pipeline as any user of diffusers has it."""
    index = json.loads((folder / "model_index.json").read_text())
    absent: dict[str, Any] = {name: None for name, value in index.items() if value == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, **arguments: Any) -> Tensor:
    """A picture (1, 3, H, W) in [-1, 1] by the pipeline's own call."""
    accepted = inspect.signature(pipeline.__call__).parameters
    plain = {"use_resolution_binning": False, "clean_caption": False}
    images = pipeline(
        PROMPT,
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(SEED),
        output_type="pt",
        **{name: value for name, value in plain.items() if name in accepted},
        **arguments,
    ).images
    return 2 * images - 1
