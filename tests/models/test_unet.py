"""The U-Net: conditions reach the output, and the network inside is a stock diffusers model."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.testing import assert_close

from emu_lightning.models.text import Text
from emu_lightning.models.unet import UNet

SIZE = torch.tensor([[32, 48, 0, 4, 32, 32]])


def unet(**options: object) -> UNet:
    torch.manual_seed(0)
    return UNet(
        block_channels=(16, 32),
        transformer_layers=(0, 2),
        head_dim=8,
        sequence_dim=12,
        pooled_dim=10,
        size_dim=8,
        norm_groups=8,
        **options,
    )


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Text]:
    rng = torch.Generator().manual_seed(seed)
    sequence, pooled = torch.randn(3, 5, 12, generator=rng), torch.randn(3, 10, generator=rng)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    x_t, t = torch.randn(3, 4, 8, 8, generator=rng), torch.rand(3, generator=rng)
    return x_t, t, Text(sequence * mask[..., None], mask, pooled)


@pytest.mark.parametrize("use_size_condition", [False, True])
def test_predictions_have_the_data_s_shape_and_train_every_weight(use_size_condition):
    net = unet(use_size_condition=use_size_condition)
    prediction = net(*inputs(), SIZE)
    assert prediction.shape == (3, 4, 8, 8)
    prediction.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in net.parameters())


@pytest.mark.parametrize("condition", ["sequence", "pooled", "t", "size"])
@torch.no_grad()
def test_every_condition_changes_the_prediction(condition):
    net, size = unet(use_size_condition=True), SIZE
    x_t, t, text = inputs()
    before = net(x_t, t, text, size)
    if condition == "sequence":
        text = Text(-text.sequence, text.mask, text.pooled)
    elif condition == "pooled":
        text = Text(text.sequence, text.mask, -text.pooled)
    elif condition == "t":
        t = 1 - t
    else:
        size = size + 16
    assert (net(x_t, t, text, size) - before).abs().max() > 1e-4


@torch.no_grad()
def test_padding_is_not_read():
    net = unet()
    x_t, t, text = inputs()
    filled = Text(torch.where(text.mask[..., None], text.sequence, 7.0), text.mask, text.pooled)
    assert_close(net(x_t, t, filled), net(x_t, t, text), atol=1e-6, rtol=0)


@torch.no_grad()
def test_one_size_serves_the_batch():
    net = unet(use_size_condition=True)
    assert_close(net(*inputs(), SIZE), net(*inputs(), SIZE.repeat(3, 1)))


@torch.no_grad()
def test_the_inside_is_a_stock_network_that_sees_timesteps(tmp_path):
    net = unet(use_size_condition=True)
    net.net.save_pretrained(tmp_path)
    stock = UNet2DConditionModel.from_pretrained(tmp_path)
    x_t, t, text = inputs()
    expected = stock(
        x_t,
        t * 1000,
        text.sequence,
        encoder_attention_mask=text.mask,
        added_cond_kwargs={"text_embeds": text.pooled, "time_ids": SIZE.repeat(3, 1)},
    ).sample
    assert_close(net(x_t, t, text, SIZE), expected)


@torch.no_grad()
def test_saved_networks_return(tmp_path):
    net = unet()
    net.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path)
    assert list(again.config.transformer_layers) == [0, 2] and again.config.pooled_dim == 10
    assert_close(again(*inputs()), net(*inputs()))


def test_head_dim_is_the_width_of_a_head():
    attention = unet().net.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    assert attention.heads == 32 // 8 and len(unet().net.down_blocks[1].attentions[0].transformer_blocks) == 2


def test_the_default_fits_the_weights_budget():
    # 16 MB in half precision hold autoencoder, U-Net and text encoder
    assert sum(weight.numel() for weight in UNet().parameters()) < 4.5e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transformer_layers": (1,)}, "differ in length"),
        ({"block_channels": (48, 64)}, r"\[48\] are not divisible by norm_groups=32"),
        ({"head_dim": 48}, "head_dim=48"),
    ],
)
def test_impossible_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**options)


def test_a_missing_size_is_named():
    with pytest.raises(ValueError, match="give size"):
        unet(use_size_condition=True)(*inputs())
