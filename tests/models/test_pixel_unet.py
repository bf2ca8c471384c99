"""The U-Net of pixel diffusion: what reaches it, what it is built of, and its attention's mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnAddedKVProcessor2_0
from torch import Tensor
from torch.nn.functional import interpolate
from torch.testing import assert_close

from emu_lightning.models import PixelUNet, Text


def unet(**arguments: Any) -> PixelUNet:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "block_channels": (8, 16),
        "head_dim": 8,
        "sequence_dim": 12,
        "pooled_dim": 10,
        "level_dim": 8,
        "norm_groups": 4,
    }
    return PixelUNet(**{**defaults, **arguments}).eval()


def text(length: int = 5, seed: int = 0) -> Text:
    """Of three texts of 5, 3 and 2 tokens, padded to `length`."""
    rng = torch.Generator().manual_seed(seed)
    sequence, pooled = torch.randn(3, 5, 12, generator=rng), torch.randn(3, 10, generator=rng)
    mask = torch.arange(5) < torch.tensor([[5], [3], [2]])
    none = torch.zeros(3, length - 5, 12)
    return Text(
        torch.cat([sequence * mask[..., None], none], 1), torch.cat([mask, none[..., 0].bool()], 1), pooled
    )


def inputs(side: int = 8, low_side: int = 4) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    x_t, t = torch.randn(3, 3, side, side, generator=rng), torch.rand(3, generator=rng)
    low = {
        "low_resolution": torch.randn(3, 3, low_side, low_side, generator=rng),
        "level": torch.rand(3, generator=rng),
    }
    return x_t, t, low


@pytest.mark.parametrize(
    "attention", [("none", "full"), ("text", "text"), ("full", "none"), ("none", "none")]
)
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("is_super_resolution", [False, True])
def test_predictions_have_the_data_s_shape_and_train_every_weight(attention, patch_size, is_super_resolution):
    net = unet(
        attention=attention,
        patch_size=patch_size,
        use_low_resolution=is_super_resolution,
        use_positions=not is_super_resolution,
    )
    x_t, t, low = inputs()
    prediction = net(x_t, t, text(), **(low if is_super_resolution else {}))
    assert prediction.shape == x_t.shape
    prediction.square().mean().backward()
    reads_text = attention != ("none", "none")
    for name, weight in net.named_parameters():
        if reads_text or not name.startswith("text_norm"):
            assert weight.grad is not None and weight.grad.any(), name


@pytest.mark.parametrize("condition", ["sequence", "pooled", "t", "low_resolution", "level"])
@torch.no_grad()
def test_every_condition_changes_the_prediction(condition):
    net, words = unet(use_low_resolution=True), text()
    x_t, t, low = inputs()
    before = net(x_t, t, words, **low)
    if condition == "sequence":
        words = Text(-words.sequence, words.mask, words.pooled)
    elif condition == "pooled":
        words = Text(words.sequence, words.mask, -words.pooled)
    elif condition == "t":
        t = 1 - t
    else:
        low[condition] = 1 - low[condition]
    assert (net(x_t, t, words, **low) - before).abs().amax((1, 2, 3)).min() > 1e-4


# --- attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["full", "text"])
@torch.no_grad()
def test_padding_changes_nothing_however_long_it_is(attention):
    """The middle has 16 pixels: a text of 16 tokens is the one that diffusers takes for padded already."""
    net = unet(attention=("none", attention))
    x_t, t, _ = inputs()
    expected = net(x_t, t, text())
    for length in (6, 15, 16, 17, 40):
        assert_close(net(x_t, t, text(length)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention, length", [("full", 9), ("text", 16)])
@torch.no_grad()
def test_it_is_diffusers_attention_where_that_one_works(attention, length):
    net = unet(attention=("none", attention))
    x_t, t, _ = inputs()
    ours = net(x_t, t, text(length))
    net.net.set_attn_processor(AttnAddedKVProcessor2_0())
    assert_close(net(x_t, t, text(length)), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention, is_local", [("text", True), ("full", False)])
@torch.no_grad()
def test_without_self_attention_pixels_do_not_see_one_another(attention, is_local):
    """One level and no convolution in between: the attention block alone."""
    block = unet(attention=("none", attention)).net.mid_block.attentions[0]
    block.group_norm = torch.nn.Identity()  # it mixes all pixels
    hidden = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    words, mask = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 1, 5)
    before = block(hidden, encoder_hidden_states=words, attention_mask=mask)
    hidden[:, :, 0, 0] += 1
    changed = (block(hidden, encoder_hidden_states=words, attention_mask=mask) - before).abs().sum(1)[
        0
    ] > 1e-5
    assert changed[0, 0]
    assert changed.sum().item() == (1 if is_local else 16)


# --- what the network inside is given -----------------------------------------------------------------------


def seen_by(net: PixelUNet, *args: Any, **arguments: Any) -> Tensor:
    seen: list[Tensor] = []
    with net.net.conv_in.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        net(*args, **arguments)
    return seen[0]


@torch.no_grad()
def test_pixels_are_folded_into_channels_and_the_small_picture_stands_beside():
    x_t, t, low = inputs()
    seen = seen_by(unet(patch_size=2, use_low_resolution=True), x_t, t, text(), **low)
    enlarged = interpolate(low["low_resolution"], scale_factor=2, mode="bilinear")
    joined = torch.cat([x_t, enlarged], 1)  # (B, 6, 8, 8)
    expected = torch.stack(
        [joined[:, c, i::2, j::2] for c in range(6) for i in range(2) for j in range(2)], 1
    )  # (B, 24, 4, 4)
    assert torch.equal(seen, expected)


@torch.no_grad()
def test_what_is_folded_is_unfolded():
    net = unet(patch_size=2)
    x_t, t, _ = inputs()
    net.net.forward = lambda hidden, *args, **arguments: (hidden,)  # type: ignore[method-assign]
    assert torch.equal(net(x_t, t, text()), x_t)


@torch.no_grad()
def test_positions_are_rows_and_columns():
    x_t, t, _ = inputs()
    x_t = torch.cat([x_t, x_t], 3)  # 8 x 16
    rows, columns = seen_by(unet(use_positions=True), x_t, t, text())[2, 3:]
    assert_close(rows[:, 5], torch.linspace(-1, 1, 8))
    assert_close(columns[3], torch.linspace(-1, 1, 16))
    assert torch.equal(rows, rows[:, :1].expand(8, 16)) and torch.equal(columns, columns[:1].expand(8, 16))


def test_blocks_are_given_per_level():
    """Efficient U-Net: few at high sides, many at low ones."""
    net = unet(layers_per_block=(1, 3)).net
    assert [len(block.resnets) for block in net.down_blocks] == [1, 3]
    assert [len(block.resnets) for block in net.up_blocks] == [4, 2]


def test_checkpointing_gives_the_same_gradients():
    x_t, t, _ = inputs()
    gradients = []
    for is_on in (False, True):
        net = unet().train()
        if is_on:
            net.enable_gradient_checkpointing()
        net(x_t, t, text()).square().mean().backward()
        gradients.append([weight.grad for weight in net.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers_per_block": (1,)}, "layers_per_block .* differ in length"),
        ({"attention": ("full",)}, "attention .* differ in length"),
        ({"norm_groups": 5}, "norm_groups=5"),
        ({"head_dim": 16}, "head_dim=16"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        unet(**arguments)


@torch.no_grad()
def test_a_picture_of_a_wrong_side_is_named():
    net = unet(patch_size=2)
    assert net.side_multiple == 4
    with pytest.raises(ValueError, match="pictures of 10x10: the sides must be multiples of 4"):
        net(torch.zeros(1, 3, 10, 10), torch.zeros(1), text())


@pytest.mark.parametrize("is_super_resolution", [False, True])
@torch.no_grad()
def test_a_stage_s_network_is_not_taken_for_a_base_s(is_super_resolution: bool):
    x_t, t, low = inputs()
    given = {} if is_super_resolution else low
    with pytest.raises(ValueError, match="belongs into a SuperResolutionModule"):
        unet(use_low_resolution=is_super_resolution)(x_t, t, text(), **given)
