"""The masked transformer: what its logits depend on, and that its switches change nothing but the cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention
from torch.testing import assert_close

from emu_lightning.models import MaskedTransformer, Text

CODES, SIDE, LOW_CODES, LOW_SIDE = 11, 4, 7, 2


def make(is_super_resolution: bool = False, **arguments: Any) -> MaskedTransformer:
    """One of which no weight is zero."""
    torch.manual_seed(0)
    low = {"low_codebook_size": LOW_CODES, "low_side": LOW_SIDE} if is_super_resolution else {}
    network = MaskedTransformer(CODES, SIDE, 8, 2, 2, sequence_dim=6, **low, **arguments)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return network.eval()


def make_text(length: int = 3, num: int = 2) -> Text:
    sequence = torch.randn(num, length, 6, generator=torch.Generator().manual_seed(1))
    return Text(sequence, torch.ones(num, length, dtype=torch.bool), sequence.mean(1))


def make_ids(codes: int = CODES + 1, side: int = SIDE, seed: int = 0) -> Tensor:
    return torch.randint(codes, (2, side**2), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("own", [{}, {"pooled_dim": 6, "add_low_ids": True}])
def test_it_is_the_network_of_the_paper(own: dict[str, Any]) -> None:
    """Against the blocks written out: self-attention, cross-attention to text and small picture, MLP.

    With our two additions: the pooled text, and the small picture's id of the same place.
    """
    network = make(is_super_resolution=True, **own)
    state = network.state_dict()

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def attention(name: str, x: Tensor, memory: Tensor) -> Tensor:
        heads = [
            linear(value, state[f"{name}.to_{part}.weight"]).unflatten(-1, (2, 4)).transpose(1, 2)
            for part, value in (("q", x), ("k", memory), ("v", memory))
        ]
        mixed = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return linear(mixed, state[f"{name}.to_out.0.weight"], state[f"{name}.to_out.0.bias"])

    def block(name: str, x: Tensor, memory: Tensor | None) -> Tensor:
        normed = norm(f"{name}.norm1", x)
        x = x + attention(f"{name}.attn1", normed, normed)
        if memory is not None:
            x = x + attention(f"{name}.attn2", norm(f"{name}.norm2", x), memory)
        first, last = f"{name}.ff.net.0.proj", f"{name}.ff.net.2"
        hidden = gelu(linear(norm(f"{name}.norm3", x), state[f"{first}.weight"], state[f"{first}.bias"]))
        assert hidden.shape[-1] == 4 * 8
        return x + linear(hidden, state[f"{last}.weight"], state[f"{last}.bias"])

    def embedded(name: str, ids: Tensor, side: int) -> Tensor:
        rows, columns = state[f"{name}.rows"], state[f"{name}.columns"]
        places = [torch.cat([rows[place // side], columns[place % side]]) for place in range(side**2)]
        return state[f"{name}.embedding.weight"][ids] + torch.stack(places)

    ids, low_ids, text = make_ids(), make_ids(LOW_CODES, LOW_SIDE), make_text()
    low = block("low.layers.0", embedded("low.ids", low_ids, LOW_SIDE), None)
    normed = norm("low.norm", low)
    memory = torch.cat([linear(text.sequence, state["text.weight"], state["text.bias"]), normed], 1)
    x = embedded("ids", ids, SIDE)
    if own:
        x = x + linear(text.pooled, state["pooled.weight"], state["pooled.bias"])[:, None]
        covering = [row // 2 * LOW_SIDE + column // 2 for row in range(SIDE) for column in range(SIDE)]
        x = x + low[:, covering]
    for index in range(2):
        x = block(f"layers.{index}", x, memory)
    expected = linear(norm("norm", x), state["logits.weight"], state["logits.bias"])
    assert_close(network(ids, text, low_ids), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_super_resolution", [False, True])
def test_padding_of_the_text_is_not_seen(is_super_resolution: bool) -> None:
    network, ids, short = make(is_super_resolution), make_ids(), make_text(3)
    low = make_ids(LOW_CODES, LOW_SIDE) if is_super_resolution else None
    padded = short.concatenate(make_text(5))
    both = network(ids.repeat(2, 1), padded, None if low is None else low.repeat(2, 1))
    assert_close(both[:2], network(ids, short, low), atol=1e-5, rtol=1e-4)


def test_every_logit_depends_on_every_id_and_on_the_text() -> None:
    network = make(is_super_resolution=True)
    ids, low, text = make_ids(CODES), make_ids(LOW_CODES, LOW_SIDE), make_text()
    logits = network(ids, text, low)
    for place in range(SIDE**2):
        other = ids.clone()
        other[:, place] = network.mask_id
        assert ((network(other, text, low) - logits).abs().amax(2) > 1e-6).all()
    for place in range(LOW_SIDE**2):
        other = low.clone()
        other[:, place] = (other[:, place] + 1) % LOW_CODES
        assert ((network(ids, text, other) - logits).abs().amax(2) > 1e-6).all()
    spoken = Text(text.sequence.flip(0), text.mask, text.pooled.flip(0))
    assert ((network(ids, spoken, low) - logits).abs().amax(2) > 1e-6).all()


def test_training_starts_from_even_odds() -> None:
    torch.manual_seed(0)
    logits = MaskedTransformer(CODES, SIDE, 8, 1, 2, sequence_dim=6)(make_ids(), make_text())
    assert_close(logits.softmax(-1), torch.full_like(logits, 1 / CODES))


def test_ids_of_similar_codes_start_as_similar_vectors() -> None:
    """Their products are those of the Gaussian kernel."""
    torch.manual_seed(0)
    network = MaskedTransformer(40, SIDE, 4096, 1, 4, 6, low_codebook_size=40, low_side=2)
    codes = torch.randn(40, 3)
    network.start_from_codes(codes)
    network.start_low_from_codes(codes)
    expected = torch.exp(-torch.cdist(codes, codes).square() / 2)
    tables = (
        (network.ids.embedding.weight[:-1], 0.5),
        (network.logits.weight, 0.02),
        (network.low["ids"].embedding.weight, 0.5),
    )
    for table, size in tables:
        assert_close(table @ table.T / (4096 * size**2), expected, atol=0.08, rtol=0)


def test_positions_start_as_sines_of_the_place() -> None:
    """Large and small picture have the same sines, each at the centres of its own ids."""
    torch.manual_seed(0)
    network = MaskedTransformer(CODES, 8, 8, 1, 2, 6, low_codebook_size=LOW_CODES, low_side=4)
    for embedding, side in ((network.ids, 8), (network.low["ids"], 4)):
        for place in range(side):
            x = (place + 0.5) / side
            expected = [math.sin(math.pi * x), math.sin(64 * math.pi * x)]
            expected += [math.cos(math.pi * x), math.cos(64 * math.pi * x)]
            for table in (embedding.rows, embedding.columns):
                assert_close(table[place].detach(), torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("is_super_resolution", [False, True])
def test_plain_attention_and_checkpointing_compute_the_same(is_super_resolution: bool) -> None:
    fused, plain = make(is_super_resolution), make(is_super_resolution, use_fused_attention=False)
    saving = make(is_super_resolution)
    saving.enable_gradient_checkpointing()
    low = make_ids(LOW_CODES, LOW_SIDE) if is_super_resolution else None
    text = make_text(2).concatenate(make_text(4))
    ids, low = make_ids().repeat(2, 1), None if low is None else low.repeat(2, 1)
    gradients = []
    for network in (fused, plain, saving):
        network.train()(ids, text, low).square().sum().backward()
        gradients.append({name: weight.grad for name, weight in network.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert gradient is not None and gradient.abs().max() > 0
            assert_close(other[name], gradient, atol=1e-4, rtol=1e-3)


def test_it_is_saved_with_its_arguments(tmp_path: Path) -> None:
    network = make(is_super_resolution=True, use_fused_attention=False)
    network.save(tmp_path)
    inputs = make_ids(), make_text(), make_ids(LOW_CODES, LOW_SIDE)
    assert torch.equal(MaskedTransformer.from_pretrained(tmp_path)(*inputs), network(*inputs))


def test_bad_arguments_are_named() -> None:
    for dim, num_heads in ((10, 2), (12, 5)):
        with pytest.raises(ValueError, match=f"dim={dim} is not divisible by 4 and by num_heads={num_heads}"):
            MaskedTransformer(CODES, SIDE, dim, 1, num_heads)
    with pytest.raises(ValueError, match="low_codebook_size and low_side both"):
        MaskedTransformer(CODES, SIDE, 8, 1, 2, low_side=2)
    with pytest.raises(ValueError, match="side=4 is no multiple of low_side=3"):
        MaskedTransformer(CODES, SIDE, 8, 1, 2, low_codebook_size=5, low_side=3, add_low_ids=True)
    with pytest.raises(ValueError, match="no super-resolution stage: it takes no low_ids"):
        make()(make_ids(), make_text(), make_ids(LOW_CODES, LOW_SIDE))
    with pytest.raises(ValueError, match="is a super-resolution stage: give low_ids"):
        make(is_super_resolution=True)(make_ids(), make_text())
