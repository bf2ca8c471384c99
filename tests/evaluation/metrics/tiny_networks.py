"""Random networks in the files that open_clip, transformers and timm load; no download."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertTokenizer,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tests.text_networks import make_clip

DIM, SIDE = 16, 32
OPEN_CLIP = {
    "embed_dim": DIM,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49_408, "width": 32, "heads": 2, "layers": 2},
}
WORDS = ["red", "ball", "snow", "is", "there", "a", "Yes", "No", "yes", "no", "or", "Does", "figure"]


def make_pictures(num: int = 5, seed: int = 0) -> list[Image.Image]:
    """Patches of noise, in several sizes."""
    rng = np.random.default_rng(seed)
    noise = [Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)) for _ in range(num)]
    return [image.resize((50, 40 + n)) for n, image in enumerate(noise)]


def make_images(num: int = 5, side: int = SIDE, seed: int = 0) -> torch.Tensor:
    """(N, 3, side, side) of the levels that 8 bits have."""
    levels = torch.randint(0, 256, (num, 3, side, side), generator=torch.Generator().manual_seed(seed))
    return levels / 127.5 - 1


def make_open_clip(folder: Path) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**OPEN_CLIP).state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def make_transformers_clip(folder: Path) -> Path:
    make_clip(folder)  # the tokenizer; its weights and configuration are replaced
    text = json.loads((folder / "config.json").read_text())
    vision = {
        "image_size": SIDE, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    torch.manual_seed(3)
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM))
    _spread(network, 1.0)
    network.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(folder)
    return folder


def make_dinov2(folder: Path) -> Path:
    torch.manual_seed(4)
    config = Dinov2Config(
        image_size=SIDE, patch_size=8, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=2
    )
    Dinov2Model(config).save_pretrained(folder)
    processor = BitImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(folder)
    return folder


def make_timm(folder: Path) -> Path:
    folder.mkdir()
    torch.manual_seed(5)
    network = timm.create_model("test_resnet", num_classes=10)
    save_file(network.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, SIDE, SIDE], "num_classes": 10, "crop_pct": 1.0}
    config = {"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_llava(folder: Path) -> Path:
    """Knows the words of `WORDS`; sees 4 patches of a picture."""
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*specials, *WORDS])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|<\w+>"), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        image_processor, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}{% for part in message['content'] %}"
            "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %} there"
        ),
    ).save_pretrained(folder)  # fmt: skip
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    num_words = len(specials) + len(WORDS)
    torch.manual_seed(6)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **small),
        text_config=LlamaConfig(
            vocab_size=num_words, bos_token_id=1, eos_token_id=2, pad_token_id=3, **small
        ),
        image_token_index=4, image_token_id=4,
    )  # fmt: skip
    network = LlavaForConditionalGeneration(config)
    _spread(network, 0.3)
    network.save_pretrained(folder)
    return folder


def make_bert_tokenizer(folder: Path) -> Path:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word.lower() for word in WORDS)]
    BertTokenizer(vocab={piece: n for n, piece in enumerate(dict.fromkeys(pieces))}).save_pretrained(folder)
    return folder


def _spread(network: nn.Module, deviation: float) -> None:
    """Larger weights: as networks are initialised, they answer nearly the same to everything."""
    for parameter in network.parameters():
        if parameter.ndim > 0:
            parameter.data.normal_(0, deviation)
