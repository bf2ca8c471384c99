"""Tiny CLIP and T5 text networks in the files that transformers and open_clip load; no download."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

LETTERS = string.ascii_lowercase + string.digits + ".,!'-"


def make_clip(folder: Path, dim: int = 8) -> Path:
    """Words are spelt: every letter is a token, and has another one at the end of a word."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=len(pieces) - 2,
        eos_token_id=len(pieces) - 1,
    )
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def make_t5(folder: Path, dim: int = 8, seed: int = 1) -> Path:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(n)) for n, piece in enumerate(pieces)], extra_ids=0)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(pieces), d_model=dim, d_kv=4, d_ff=2 * dim, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def make_open_clip(folder: Path, name: str, dim: int = 8) -> Path:
    """Makes the architecture known to open_clip under a name; returns the file of its weights."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir()
    vision = {"image_size": 16, "layers": 1, "width": 8, "head_width": 8, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49_408, "width": dim, "heads": 2, "layers": 2}
    config = {"embed_dim": 4, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(2)
    save_file(open_clip.create_model(name).state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"
