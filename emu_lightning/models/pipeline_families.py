"""What differs between the diffusers pipelines that can be tuned: a class per family.

A family knows which components its pipeline has, what its text encoders give, and what its denoiser wants
to be fed. All text is encoded by the pipeline's own `encode_prompt`, so that training sees what sampling will
see.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
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
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    T5Tokenizer,
)

from emu_lightning.models.frozen import Frozen
from emu_lightning.models.pipeline_folder import INDEX_FILE, content_hash, load_network, read_json
from emu_lightning.models.text import FrozenTextEncoder, Text

Components = dict[str, Any]


class PipelineFamily(ABC):
    """A pipeline class and its denoiser's ways.

    Attributes:
        pipeline: diffusers' class.
        denoiser: class of its denoiser.
        denoiser_name: of the denoiser's folder and of the pipeline's attribute.
        text_components: classes of tokenizers and text encoders, by the names of their folders.
        encoded: names, as arguments of the pipeline's call, of what its `encode_prompt` returns.
        call_arguments: of the pipeline's call, so that a picture has the asked size and the given caption.
        default_sample_size: side in latent pixels where the denoiser's configuration gives none.
        is_flow: rectified flow, else diffusion.
    """

    pipeline: ClassVar[Any]
    denoiser: ClassVar[Any]
    denoiser_name: ClassVar[str] = "transformer"
    text_components: ClassVar[dict[str, Any]]
    encoded: ClassVar[tuple[str, ...]]
    call_arguments: ClassVar[dict[str, Any]] = {}
    default_sample_size: ClassVar[int] = 128
    is_flow: ClassVar[bool] = False

    def latent_channels(self, config: dict[str, Any]) -> int:
        """C of the latents that a denoiser of this configuration takes."""
        return int(config["in_channels"])

    def encode(
        self, pipeline: Any, texts: list[str], device: torch.device, negative_prompt: str | None
    ) -> tuple[Any, ...]:
        """What the pipeline's `encode_prompt` returns, in the order of `encoded`; None without guidance."""
        encoded: tuple[Any, ...] = pipeline.encode_prompt(
            texts, device=device, num_images_per_prompt=1, **_guidance(negative_prompt, len(texts))
        )
        return encoded

    def read(self, embeddings: dict[str, Tensor]) -> Text:
        """`Text` of embeddings; what the family does not have is true (mask) or has no width (pooled)."""
        sequence = embeddings["prompt_embeds"]
        mask = embeddings.get("prompt_attention_mask", sequence.new_ones(sequence.shape[:2]))
        pooled = embeddings.get("pooled_prompt_embeds", sequence.new_empty(len(sequence), 0))
        return Text(sequence, mask.bool(), pooled)

    @abstractmethod
    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, text: Text, size: Tensor) -> Tensor:
        """The denoiser's prediction, fed as its pipeline feeds it.

        Args:
            denoiser: the network.
            x_t: (B, C, H, W).
            t: (B,) in [0, 1].
            text: of B texts.
            size: (B, 6) in pixels: original height and width, top and left of the crop, target height and
                width.

        Returns:
            (B, C, H, W).
        """


class StableDiffusion(PipelineFamily):
    """SD 1.x and 2.x (Rombach et al. 2022): a U-Net under CLIP's sequence."""

    pipeline = StableDiffusionPipeline
    denoiser = UNet2DConditionModel
    denoiser_name = "unet"
    text_components = {"tokenizer": CLIPTokenizer, "text_encoder": CLIPTextModel}
    encoded = ("prompt_embeds", "negative_prompt_embeds")
    default_sample_size = 64

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, text: Text, size: Tensor) -> Tensor:
        prediction: Tensor = denoiser(
            x_t, timesteps(t), encoder_hidden_states=text.sequence, return_dict=False
        )[0]
        return prediction


class StableDiffusionXL(PipelineFamily):
    """SDXL (Podell et al. 2023): two CLIPs, the second one pooled, and the sizes of section 2.2."""

    pipeline = StableDiffusionXLPipeline
    denoiser = UNet2DConditionModel
    denoiser_name = "unet"
    text_components = {
        "tokenizer": CLIPTokenizer,
        "text_encoder": CLIPTextModel,
        "tokenizer_2": CLIPTokenizer,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    encoded = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, text: Text, size: Tensor) -> Tensor:
        prediction: Tensor = denoiser(
            x_t,
            timesteps(t),
            encoder_hidden_states=text.sequence,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": size},
            return_dict=False,
        )[0]
        return prediction


class PixArtAlpha(PipelineFamily):
    """PixArt-alpha (Chen et al. 2023): a transformer under T5; the variance it also predicts is not used."""

    pipeline = PixArtAlphaPipeline
    denoiser = PixArtTransformer2DModel
    text_components = {"tokenizer": T5Tokenizer, "text_encoder": T5EncoderModel}
    encoded = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    # Cleaning needs two more packages and is left out silently without them: off, it is the same everywhere.
    call_arguments = {"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, text: Text, size: Tensor) -> Tensor:
        height_width, has_sizes = size[:, 4:], denoiser.use_additional_conditions
        prediction: Tensor = denoiser(
            x_t,
            encoder_hidden_states=text.sequence,
            encoder_attention_mask=text.mask.long(),
            timestep=timesteps(t),
            added_cond_kwargs={
                "resolution": height_width if has_sizes else None,
                "aspect_ratio": height_width[:, :1] / height_width[:, 1:] if has_sizes else None,
            },
            return_dict=False,
        )[0]
        return prediction[:, : x_t.shape[1]]


class PixArtSigma(PixArtAlpha):
    """PixArt-Sigma (Chen et al. 2024): longer texts, no conditioning on sizes."""

    pipeline = PixArtSigmaPipeline


class StableDiffusion3(PipelineFamily):
    """SD3 and 3.5 (Esser et al. 2024): rectified flow under two CLIPs and T5; T5 may be left out."""

    pipeline = StableDiffusion3Pipeline
    denoiser = SD3Transformer2DModel
    text_components = {
        "tokenizer": CLIPTokenizer,
        "text_encoder": CLIPTextModelWithProjection,
        "tokenizer_2": CLIPTokenizer,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer_3": T5Tokenizer,
        "text_encoder_3": T5EncoderModel,
    }
    encoded = StableDiffusionXL.encoded
    is_flow = True

    def encode(
        self, pipeline: Any, texts: list[str], device: torch.device, negative_prompt: str | None
    ) -> tuple[Any, ...]:
        encoded: tuple[Any, ...] = pipeline.encode_prompt(
            texts, None, None, device=device, **_guidance(negative_prompt, len(texts))
        )
        return encoded

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, text: Text, size: Tensor) -> Tensor:
        prediction: Tensor = denoiser(
            hidden_states=x_t,
            timestep=1000 * t,
            encoder_hidden_states=text.sequence,
            pooled_projections=text.pooled,
            return_dict=False,
        )[0]
        return prediction


class Flux(PipelineFamily):
    """FLUX.1 (Black Forest Labs 2024): rectified flow over 2 x 2 patches of latents under T5, pooled CLIP.

    Where guidance is distilled into the network (FLUX.1 dev), training asks for scale 1, at which it predicts
    the data's own velocity. This is a choice: scripts differ.
    """

    pipeline = FluxPipeline
    denoiser = FluxTransformer2DModel
    text_components = {
        "tokenizer": CLIPTokenizer,
        "text_encoder": CLIPTextModel,
        "tokenizer_2": T5Tokenizer,
        "text_encoder_2": T5EncoderModel,
    }
    encoded = ("prompt_embeds", "pooled_prompt_embeds")  # no unconditional text: guidance is an input
    is_flow = True

    def latent_channels(self, config: dict[str, Any]) -> int:
        return int(config["in_channels"]) // 4

    def encode(
        self, pipeline: Any, texts: list[str], device: torch.device, negative_prompt: str | None
    ) -> tuple[Any, ...]:
        if negative_prompt:
            raise ValueError(
                f"{self.pipeline.__name__} predicts once, under the prompt, and moves away from nothing: "
                "leave negative_prompt out"
            )
        sequence, pooled, _ = pipeline.encode_prompt(texts, device=device)  # the last are places, all zero
        return sequence, pooled

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, text: Text, size: Tensor) -> Tensor:
        height, width = x_t.shape[2] // 2, x_t.shape[3] // 2
        rows, columns = torch.meshgrid(
            torch.arange(height, device=x_t.device), torch.arange(width, device=x_t.device), indexing="ij"
        )
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(x_t)
        packed: Tensor = denoiser(
            hidden_states=pixel_unshuffle(x_t, 2).flatten(2).mT,  # (B, H W / 4, 4 C)
            timestep=t,
            guidance=torch.ones_like(t) if denoiser.config.guidance_embeds else None,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.sequence,
            txt_ids=places.new_zeros(text.sequence.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return pixel_shuffle(packed.mT.unflatten(2, (height, width)), 2)


FAMILIES: dict[str, type[PipelineFamily]] = {
    family.pipeline.__name__: family
    for family in (StableDiffusion, StableDiffusionXL, PixArtAlpha, PixArtSigma, StableDiffusion3, Flux)
}


def _guidance(negative_prompt: str | None, num: int) -> dict[str, Any]:
    """Arguments of `encode_prompt` for `num` texts: None is no guidance, "" the pipeline's own no prompt."""
    given = {"negative_prompt": [negative_prompt] * num} if negative_prompt else {}
    return {"do_classifier_free_guidance": negative_prompt is not None, **given}


def timesteps(t: Tensor) -> Tensor:
    """Times (B,) in [0, 1] as the whole numbers 0 ... 999 that these denoisers were trained on."""
    return (1000 * t).round()


def pipeline_family(folder: Path) -> PipelineFamily:
    """The family of a pipeline folder, whose components have been looked at but not loaded.

    Raises:
        FileNotFoundError: a component is missing.
        ValueError: the pipeline's class is not known, or autoencoder and denoiser do not fit together.
    """
    index = read_json(folder / INDEX_FILE)
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise ValueError(f"{folder} is a {name}, which cannot be tuned; known are {', '.join(FAMILIES)}")
    family = FAMILIES[name]()
    for component in ("vae", "scheduler", family.denoiser_name, *present_text_components(folder, family)):
        if not (folder / component).is_dir():
            raise FileNotFoundError(
                f"{folder} has no {component}/, which a {name} needs: fetch it again whole"
            )
    config = read_json(folder / family.denoiser_name / "config.json")
    takes = family.latent_channels(config)
    makes = read_json(folder / "vae" / "config.json").get("latent_channels")
    if takes != makes:
        raise ValueError(
            f"{folder}: the denoiser takes {takes} channels, but the autoencoder's latents have {makes}; "
            "they do not belong together, or this is not a plain text-to-image pipeline"
        )
    return family


def present_text_components(folder: Path, family: PipelineFamily) -> list[str]:
    """Names of the tokenizers and text encoders; an index may leave out any of SD3's by null."""
    index = read_json(folder / INDEX_FILE)
    return [name for name in family.text_components if index.get(name, [None])[0] is not None]


def load_denoiser(folder: Path, family: PipelineFamily, dtype: torch.dtype = torch.float32) -> Any:
    """The denoiser of a pipeline folder; see `load_network` for errors."""
    return load_network(family.denoiser, folder / family.denoiser_name, dtype)


def assemble(family: PipelineFamily, folder: Path, **components: Any) -> Any:
    """The family's pipeline of some of its components, the others None, with the folder's own settings."""
    index = read_json(folder / INDEX_FILE)
    parameters = inspect.signature(family.pipeline.__init__).parameters
    absent = {
        name: None for name, each in parameters.items() if each.default is each.empty and name != "self"
    }
    settings = {
        name: index[name] for name in parameters if name in index and not isinstance(index[name], list)
    }
    if "requires_safety_checker" in parameters:
        settings["requires_safety_checker"] = False
    pipeline = family.pipeline(**{**absent, **settings, **components})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class TextSide(nn.Module):
    """Tokenizers and text encoders of a pipeline, as its `encode_prompt` uses them.

    Args:
        family: of the pipeline.
        folder: of the pipeline.
        dtype: of the weights in memory.
    """

    def __init__(self, family: PipelineFamily, folder: Path, dtype: torch.dtype) -> None:
        super().__init__()
        self.family = family
        self.encoders = nn.ModuleDict()
        components: Components = {}
        for name in present_text_components(folder, family):
            kind = family.text_components[name]
            if issubclass(kind, PreTrainedTokenizerBase):
                components[name] = load_tokenizer(kind, folder / name)
            else:
                components[name] = self.encoders[name] = load_network(kind, folder / name, dtype)
        with torch.device(
            "meta"
        ):  # some read the denoiser's configuration, for the width of what is left out
            shape = family.denoiser.from_config(family.denoiser.load_config(folder / family.denoiser_name))
        self._pipeline = [assemble(family, folder, **components, **{family.denoiser_name: shape})]

    @property
    def has_zeros_for_empty(self) -> bool:
        """Whether the pipeline takes zeros, not the embedding of "", where no prompt is given."""
        return bool(self._pipeline[0].config.get("force_zeros_for_empty_prompt", False))

    @torch.no_grad()
    def forward(self, texts: list[str], negative_prompt: str | None = None) -> dict[str, Tensor]:
        """Embeddings (B, ...) of texts and, named negative_..., of what guidance moves away from.

        Args:
            texts: B.
            negative_prompt: "" is what the pipeline takes for no prompt; None is no guidance.

        Raises:
            ValueError: the pipeline has no use for a negative prompt.
        """
        device = next(self.encoders.parameters()).device
        # without autocast, else a cache would hold other embeddings, and T5 overflows in float16
        with _without_warnings(), torch.autocast(device.type, enabled=False):
            encoded = self.family.encode(self._pipeline[0], texts, device, negative_prompt)
        return {
            name: value for name, value in zip(self.family.encoded, encoded, strict=True) if value is not None
        }


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences diffusers, which else says of every long caption what of it is cut."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


def load_tokenizer(kind: Any, folder: Path) -> Any:
    """A tokenizer from its folder.

    Raises:
        ValueError: its files cannot be read.
    """
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises a dozen kinds over broken files
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder} holds no {kind.__name__} that can be read ({cause})") from None


class PipelineTextEncoder(FrozenTextEncoder):
    """The text encoders of a pipeline, frozen and loaded at first use.

    The text "" stands for a dropped caption: it becomes what the pipeline takes for no prompt at all, which
    for SDXL is zeros, not the embedding of an empty string.

    Args:
        family: of the pipeline.
        folder: of the pipeline.
        dtype: of the weights in memory.
        offload: keep and run them in host memory.
    """

    def __init__(
        self, family: PipelineFamily, folder: Path, dtype: torch.dtype = torch.float32, offload: bool = False
    ) -> None:
        super().__init__()
        self.family, self.folder, self.dtype = family, folder, dtype
        self.side = Frozen(lambda: TextSide(family, folder, dtype), offload)

    def embed_for_call(self, prompts: list[str], negative_prompt: str | None) -> dict[str, Tensor]:
        """Arguments of the pipeline's call that stand for its `prompt` (B texts); see :class:`TextSide`."""
        return self.side.network(prompts, negative_prompt)

    def embed(self, texts: list[str]) -> dict[str, Tensor]:
        side = self.side.network
        embeddings: dict[str, Tensor] = side(texts)
        if side.has_zeros_for_empty:
            for row, text in enumerate(texts):
                if text == "":
                    for value in embeddings.values():
                        value[row] = 0
        return embeddings

    def read(self, embeddings: dict[str, Tensor]) -> Text:
        return self.family.read(embeddings)

    def fingerprint(self) -> str:
        index = read_json(self.folder / INDEX_FILE)
        made_by = [
            type(self.family).__name__,
            str(self.dtype),
            str(index.get("force_zeros_for_empty_prompt")),
            content_hash(self.folder, present_text_components(self.folder, self.family)),
        ]
        return hashlib.sha256("/".join(made_by).encode()).hexdigest()
