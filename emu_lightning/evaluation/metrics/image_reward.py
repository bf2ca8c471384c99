"""ImageReward (Xu et al. 2023): a BLIP that reads picture and prompt together, tuned on people's rankings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emu_lightning.evaluation.metrics.embedders import Network, Pictures, batches, default_device
from emu_lightning.evaluation.metrics.picture_scorers import PictureScorer, Scores, affine_map
from emu_lightning.weights import (
    VOCABULARY_FILES,
    find_in,
    find_weights,
    first_line,
    read_state,
    sha256,
)

CONFIG = "med_config.json"
CHECKPOINTS = ("ImageReward.pt", "ImageReward.safetensors")
LENGTH = 35  # tokens of a prompt that the reward was learnt with, start and end included
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of rewards, as published
HEAD_DIM = 64  # of the picture's attention, base and large alike
TEXT_SETTINGS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "vocab_size", "layer_norm_eps", "hidden_act", "pad_token_id",
)  # fmt: skip


class ImageReward(PictureScorer):
    """ImageReward: about -2 to 2, unbounded; 0 is the mean of the pictures it was learnt from.

    It needs its own state dict and no package: timm has the picture's half of BLIP and transformers the
    text's. Of a prompt only the first 35 tokens are read, start and end included; `cut` counts those that
    are longer, and most long prompts are.

    Args:
        weights: folder or hub id with `ImageReward.pt` and `med_config.json`: "THUDM/ImageReward".
        tokenizer: folder or hub id of BERT's tokenizer.
        batch_size: pictures that pass at once.
        device: where it runs; None is the GPU where there is one.
    """

    name = "ImageReward"
    range = (-np.inf, np.inf)

    def __init__(
        self,
        weights: str = "THUDM/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        self.weights, self.tokenizer = weights, tokenizer
        self.batch_size, self.device = batch_size, device

    @property
    def networks(self) -> tuple[Network, ...]:
        size = self._network.vision.patch_embed.img_size[0]
        preprocess = f"torchvision bicubic, shortest side {size}, centre; {LENGTH} tokens"
        return (Network(self.name, self.weights_sha256, preprocess),)

    @property
    def weights_sha256(self) -> str:
        return sha256(self._checkpoint())

    def cut(self, prompts: Sequence[str]) -> NDArray[np.bool_]:
        _ = self._network
        _, mask = self._tokenize(list(prompts), LENGTH + 1)
        return mask[:, -1].bool().numpy()

    def _score(self, images: Pictures, prompts: list[str]) -> Scores:
        device, rewards = next(self._network.parameters()).device, []
        ids, mask = (tensor.split(self.batch_size) for tensor in self._tokenize(prompts, LENGTH))
        for pictures, *text in zip(batches(images, self.batch_size), ids, mask, strict=True):
            pixels = torch.stack([self._transform(picture) for picture in pictures])
            inputs = [tensor.to(device) for tensor in (pixels, *text)]
            with torch.inference_mode():
                rewards.append(self._network(*inputs).cpu())
        return (torch.cat(rewards).double().numpy() - MEAN) / DEVIATION

    def _checkpoint(self) -> Path:
        return find_in(find_weights(self.weights), CHECKPOINTS)

    def _tokenize(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, length)."""
        tokens = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return tokens.input_ids, tokens.attention_mask

    @cached_property
    def _network(self) -> Any:
        from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
        from torchvision import transforms
        from transformers import AutoTokenizer

        checkpoint = self._checkpoint()
        config = find_in(checkpoint.parent, [CONFIG])
        vocabulary = find_weights(self.tokenizer)
        find_in(vocabulary, VOCABULARY_FILES, "tokenizer")
        self._tokenizer = AutoTokenizer.from_pretrained(vocabulary, local_files_only=True)
        try:
            network = _Reward(read_state(checkpoint), json.loads(config.read_text()))
        except Exception as error:  # torch, transformers and json each raise their own kinds
            raise ValueError(f"{checkpoint} does not hold an ImageReward: {first_line(error)}") from None
        size = network.vision.patch_embed.img_size[0]
        self._transform = transforms.Compose(
            [
                transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
            ]
        )
        return network.eval().to(default_device(self.device))


class _Reward(nn.Module):
    """BLIP and what reads it, of a published state dict; the picture's sizes follow from the weights.

    Args:
        state: by the published names.
        config: of the text's half, as `med_config.json` has it.
    """

    def __init__(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        from timm.models.vision_transformer import VisionTransformer  # imported late: seconds
        from transformers import BlipTextConfig
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        vision, text, head = (
            {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
            for part in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
        )
        width, _, patch, _ = vision["patch_embed.proj.weight"].shape
        side = math.isqrt(vision["pos_embed"].shape[1] - 1)  # patches; one place more is the class token's
        self.vision = VisionTransformer(
            img_size=side * patch,
            patch_size=patch,
            embed_dim=width,
            depth=len({name.split(".")[1] for name in vision if name.startswith("blocks.")}),
            num_heads=width // HEAD_DIM,
            num_classes=0,
        )
        self.vision.load_state_dict(vision)
        known = {name: config[name] for name in TEXT_SETTINGS}
        self.text = BlipTextModel(BlipTextConfig(encoder_hidden_size=width, **known), add_pooling_layer=False)
        text.pop("embeddings.position_ids", None)  # counts up
        self.text.load_state_dict(text)
        weight, bias = affine_map(head)
        self.head = nn.Linear(weight.shape[1], 1)
        self.head.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards (B,) of pixels (B, 3, H, W), ids (B, L) and their mask (B, L)."""
        patches = self.vision.forward_features(pixels)
        text = self.text(ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return self.head(text[:, 0]).squeeze(1)
