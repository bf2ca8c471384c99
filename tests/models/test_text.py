"""The small text encoder: tokens of open_clip, texts independent of their batch."""

from __future__ import annotations

import pytest
import torch
from open_clip import tokenizer
from torch.testing import assert_close

from emu_lightning.models.text import SmallTextEncoder, Text

TEXTS = ["a red cube", "", "a blue ball on the grass, at the left!", "!"]
LONG = "word " * 100


@pytest.fixture(scope="module")
def encoder() -> SmallTextEncoder:
    torch.manual_seed(0)
    encoder = SmallTextEncoder(dim=16, num_layers=2, num_heads=2, max_length=12, embedding_dim=4)
    return encoder.requires_grad_(False)


def test_tokens_are_those_of_open_clip(encoder):
    ids, mask = encoder.tokenize([*TEXTS, LONG])
    assert torch.equal(ids, tokenizer.tokenize([*TEXTS, LONG], context_length=12)[:, : ids.shape[1]])
    assert mask.sum(1).tolist() == [5, 2, 12, 3, 12]


def test_long_texts_keep_their_end(encoder):
    ids, _ = encoder.tokenize([LONG])
    assert ids.shape == (1, 12) and ids[0, -1] == ids.max() == 49_407


def test_shapes_and_padding(encoder):
    text = encoder(TEXTS)
    assert text.sequence.shape == (4, 12, encoder.sequence_dim) and text.mask.shape == (4, 12)
    assert text.pooled.shape == (4, encoder.pooled_dim)
    assert text.mask.dtype == torch.bool and not text.sequence[~text.mask].any()
    assert text.sequence[text.mask].any(-1).all()


def test_a_text_does_not_depend_on_its_batch(encoder):
    together = encoder(TEXTS)
    for number, caption in enumerate(TEXTS):
        alone = encoder([caption])
        length = alone.mask.shape[1]
        assert_close(alone.sequence[0], together.sequence[number, :length], atol=1e-5, rtol=0)
        assert_close(alone.pooled[0], together.pooled[number], atol=1e-5, rtol=0)


def test_word_order_matters(encoder):
    one, other = encoder(["red cube on blue ball", "blue cube on red ball"]).pooled
    assert (one - other).abs().max() > 1e-3


def test_concatenation_pads_the_shorter(encoder):
    both = encoder([""]).concatenate(encoder(TEXTS))
    together = encoder(["", *TEXTS])
    assert torch.equal(both.mask, together.mask)
    assert_close(both.sequence, together.sequence, atol=1e-5, rtol=0)
    assert_close(both.pooled, together.pooled, atol=1e-5, rtol=0)
    swapped = encoder(TEXTS).concatenate(encoder([""]))
    assert_close(swapped.sequence[-1], together.sequence[0], atol=1e-5, rtol=0)


def test_layers_start_differently():
    torch.manual_seed(0)
    layers = SmallTextEncoder(dim=16, num_heads=2).layers.layers
    assert not torch.equal(layers[0].linear1.weight, layers[1].linear1.weight)
    assert not torch.equal(layers[0].self_attn.in_proj_weight, layers[1].self_attn.in_proj_weight)


def test_every_weight_is_trained():
    encoder = SmallTextEncoder(dim=16, num_layers=1, num_heads=2, max_length=12)
    text = encoder(TEXTS)
    (text.sequence.square().sum() + text.pooled.square().sum()).backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in encoder.parameters())


def test_saved_encoders_return(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    again = SmallTextEncoder.from_pretrained(tmp_path)
    assert again.config.max_length == 12 and again.sequence_dim == 16
    assert_close(again(TEXTS).sequence, encoder(TEXTS).sequence)


def test_the_default_fits_the_weights_budget():
    # 16 MB in half precision hold autoencoder, U-Net and text encoder
    assert sum(weight.numel() for weight in SmallTextEncoder().parameters()) < 2.1e6


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match="dim=10.*num_heads=4"):
        SmallTextEncoder(dim=10)
    with pytest.raises(ValueError, match="max_length=1"):
        SmallTextEncoder(max_length=1)


def test_text_is_plain_tensors():
    text = Text(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 3))
    assert text.concatenate(text).sequence.shape == (2, 2, 3)
