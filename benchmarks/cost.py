"""What training a configuration of configs/emu costs, computed without weights, pictures or a GPU.

    python benchmarks/cost.py configs/emu/diffusion_256.yaml --gpus 64

Networks are built and run on torch's meta device, where tensors have sizes but no content. So parameters are
exact, and so are FLOPs (2 a multiplication and addition; a denoiser's backward pass counts twice its forward
pass, nothing is recomputed) and the bytes that a forward pass keeps for the backward pass, under bf16-mixed
with fused attention. What a kernel needs in passing, fragments and buffers of communication are not in: leave
a tenth of the memory free. Time is FLOPs over (peak x MFU): the MFU is an assumption until the Throughput
callback has measured yours. Activation checkpointing takes about a third more time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningModule
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from emu_lightning.models import Autoencoder, ClipText, JointTextEncoder, T5Text, Text, UNet
from emu_lightning.models.encoders import TextNetwork
from emu_lightning.modules import AutoencoderModule, DiffusionModule
from emu_lightning.resources import shipped

PEAK = 989  # TFLOP/s of an H100 or H200 (SXM) in bfloat16, without sparsity: NVIDIA's data sheet; 312 an A100
STATE_BYTES = 4 + 4 + 8  # float32 weight, gradient and Adam's two moments
CAST_BYTES = 2  # autocast's copy of a weight, kept until the backward pass


@dataclass
class Cost:
    """What one training image costs, and what lies on the GPUs.

    Attributes:
        trained, frozen: parameters.
        state: bytes that are sharded over the GPUs: trained weights, gradients, moments and average.
        resident: bytes that every GPU holds whole: frozen networks, and the trained weights cast.
        flops: of an image, by what does them.
        activations: bytes kept of an image for the backward pass.
        checkpointed: the same with activation checkpointing: the blocks' inputs, and all of one block.
    """

    trained: int
    frozen: int
    state: int
    resident: int
    flops: dict[str, float]
    activations: int
    checkpointed: int


def cost_of(config: dict[str, Any]) -> Cost:
    """The cost of training as a configuration says."""
    with torch.device("meta"):
        module = build(config)
        size = config["data"]["init_args"]["resolution"]
        if isinstance(module, AutoencoderModule):
            return _autoencoder_cost(module, config, size)
        assert isinstance(module, DiffusionModule)
        return _diffusion_cost(module, config["data"]["init_args"], size)


def build(config: dict[str, Any]) -> LightningModule:
    """The module of a configuration with fresh weights; stages that it starts from need not have run.

    An autoencoder or a generator that another stage's run leaves behind is built from that stage's own
    configuration, which is found by its `run_dir`.
    """
    model = deepcopy(config["model"])
    arguments = model["init_args"]
    if model["class_path"].endswith("QualityTuningModule"):
        return build(made_by(arguments["init_from"]))
    arguments.pop("init_from", None)
    arguments.pop("perceptual", None)  # wants a file of weights
    if "folder" in arguments["autoencoder"]["init_args"]:
        origin = made_by(arguments["autoencoder"]["init_args"]["folder"])
        arguments["autoencoder"] = origin["model"]["init_args"]["autoencoder"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    return parser.instantiate(parser.parse_object({"model": model})).model


def made_by(folder: str) -> dict[str, Any]:
    """The shipped configuration whose run leaves this folder.

    Raises:
        ValueError: there is none.
    """
    for path in sorted(shipped("configs/emu").glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        if folder == f"{config['run_dir']}/pretrained":
            return config
    raise ValueError(f"no configuration in configs/emu leaves {folder}")


# --- the stages ---------------------------------------------------------------------------------------------


def _diffusion_cost(module: DiffusionModule, data: dict[str, Any], size: int) -> Cost:
    autoencoder, encoder = module.autoencoder, module.text_encoder
    assert isinstance(autoencoder, Autoencoder) and isinstance(encoder, JointTextEncoder)
    networks = [(_published(network), network.length) for network in (encoder.clip, encoder.t5)]
    frozen = [autoencoder, *(network for network, _ in networks)]
    flops = {"U-Net": 0.0}
    if data.get("latents_from") is None:
        flops["autoencoder"] = _flops(lambda: autoencoder.posterior(torch.empty(1, 3, size, size)))
    if not data.get("cache_text"):
        flops["text"] = sum(
            _flops(lambda network=network, length=length: network(torch.ones(1, length, dtype=torch.long)))
            for network, length in networks
        )
    denoiser, side = module.denoiser, size // autoencoder.downsampling
    trained = num_parameters(denoiser, encoder)
    averaged = num_parameters(denoiser) if module.average is not None else 0

    def predict() -> Tensor:
        length = sum(network.length for network in (encoder.clip, encoder.t5))
        mask, pooled = torch.ones(1, length, dtype=torch.bool), torch.empty(1, encoder.pooled_dim)
        text = Text(torch.empty(1, length, encoder.sequence_dim, requires_grad=True), mask, pooled)
        x_t = torch.empty(1, denoiser.config.in_channels, side, side)
        return denoiser(x_t, torch.empty(1), text, torch.empty(1, 6))

    _imitate_autocast(denoiser)
    with _kept(denoiser) as kept:
        flops["U-Net"] = 3 * _flops(predict)
    return Cost(
        trained,
        num_parameters(*frozen),
        STATE_BYTES * trained + 4 * averaged,
        CAST_BYTES * trained + 4 * num_parameters(autoencoder) + 2 * num_parameters(*frozen[1:]),
        flops,
        _bytes(kept),
        _checkpointed_bytes(predict, denoiser),
    )


def _autoencoder_cost(module: AutoencoderModule, config: dict[str, Any], size: int) -> Cost:
    import timm

    name = config["model"]["init_args"]["perceptual"]["init_args"]["model_name"]
    features = timm.create_model(name, features_only=True).requires_grad_(False)
    autoencoder, critic, images = module.autoencoder, module.discriminator, torch.empty(1, 3, size, size)
    assert critic is not None
    last = autoencoder.kl.decoder.conv_out.weight

    for network in (autoencoder, critic, features):
        _imitate_autocast(network)

    def step() -> int:
        """One step of the autoencoder, then of the discriminator; gives what the first keeps."""
        with _kept(autoencoder, critic, features) as kept:
            reconstructions, posterior = autoencoder(images)
            similarity = _sum(features(reconstructions)) + _sum(features(images)) + reconstructions.sum()
            adversarial = critic(reconstructions).sum()
        for term in (similarity, adversarial):  # the adaptive weight
            torch.autograd.grad(term, last, retain_graph=True)
        (similarity + adversarial + posterior.mean.sum() + posterior.logvar.sum()).backward()
        (critic(images).sum() + critic(reconstructions.detach()).sum()).backward()
        return _bytes(kept)

    with FlopCounterMode(display=False) as counter:
        kept = step()
    trained = num_parameters(autoencoder, critic)
    whole = (STATE_BYTES + CAST_BYTES) * trained + 4 * num_parameters(features)  # small: no need to shard it
    flops = {"autoencoder and losses": counter.get_total_flops()}
    return Cost(trained, num_parameters(features), 0, whole, flops, kept, kept)


def _published(network: TextNetwork) -> nn.Module:
    """What the configurations of configs/emu name: CLIP ViT-L/14's text tower, T5-XXL's encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    if isinstance(network, ClipText):
        return CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
    assert isinstance(network, T5Text)
    return T5EncoderModel(
        T5Config(
            d_model=4096, d_ff=10_240, d_kv=64, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
        )
    )


# --- counting -----------------------------------------------------------------------------------------------


def num_parameters(*networks: nn.Module) -> int:
    return sum(weight.numel() for network in networks for weight in network.parameters())


def _sum(maps: list[Tensor]) -> Tensor:
    return torch.stack([features.sum() for features in maps]).sum()


def _flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _imitate_autocast(network: nn.Module) -> None:
    """There is no autocast on the meta device: norms in float32, convolutions and products in bfloat16."""
    for module in network.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            module.bfloat16().register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16(),))


@contextmanager
def _kept(*networks: nn.Module) -> Iterator[dict[int, Tensor]]:
    """The tensors that autograd keeps meanwhile, by their storage, without the weights."""
    weights = {weight.untyped_storage()._cdata for net in networks for weight in net.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor  # held, so that its storage is not given to another
        return tensor

    with (
        patch.object(nn.functional, "scaled_dot_product_attention", _fused_attention),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        yield kept


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def _kept_bytes(run: Callable[[], Tensor], *networks: nn.Module) -> int:
    with _kept(*networks) as kept:
        run()
    return _bytes(kept)


def _checkpointed_bytes(run: Callable[[], Tensor], denoiser: UNet) -> int:
    inside: list[int] = []
    inputs: dict[int, Tensor] = {}

    def checkpoint(block: Callable[..., Any], *arguments: Any) -> Any:
        inputs.update({a.untyped_storage()._cdata: a for a in arguments if isinstance(a, Tensor)})
        with _kept(denoiser) as kept:
            output = block(*arguments)
        inside.append(_bytes(kept))
        return output

    denoiser.net.enable_gradient_checkpointing(checkpoint)
    with _kept(denoiser) as outside:
        run()
    denoiser.net.disable_gradient_checkpointing()
    return _bytes(outside | inputs) + max(inside)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """On the meta device torch would take the plain formula, which keeps the whole matrix of weights."""
    query, key, value = (tensor.bfloat16() for tensor in (query, key, value))
    mask = attn_mask.bfloat16() if attn_mask is not None else None
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, True)[0]


# --- what is printed ----------------------------------------------------------------------------------------


def report(config: dict[str, Any], cost: Cost, gpus: int, mfu: float, peak: float) -> list[str]:
    """The lines that stand in a configuration's head."""
    batch, trainer = config["data"]["init_args"]["batch_size"], config["trainer"]
    steps, accumulated = trainer["max_steps"], trainer.get("accumulate_grad_batches", 1)
    flops = sum(cost.flops.values())
    seconds = batch * flops / (gpus * peak * 1e12 * mfu)
    micro, rest = divmod(batch, gpus * accumulated)
    if rest:
        raise ValueError(
            f"batch_size={batch} is not divisible by {gpus} GPUs x {accumulated} accumulated batches"
        )
    kinds = ", ".join(f"{name} {value / 1e12:.2f}" for name, value in cost.flops.items())
    held = (cost.state / gpus + cost.resident) / 1e9
    kept, checkpointed = (micro * size / 1e9 for size in (cost.activations, cost.checkpointed))
    sharded = f", state sharded over {gpus}" if cost.state else ""
    memory = f"{held:.0f} GB held{sharded}; {kept:.0f} GB of activations of {micro} images"
    if checkpointed < kept:
        memory += f" ({checkpointed:.0f} with checkpointing)"
    return [
        f"{cost.trained:,} parameters trained, {cost.frozen:,} frozen",
        f"{flops / 1e12:.2f} TFLOP an image ({kinds})",
        f"{seconds:.2f} s a step of {batch} images, {_duration(steps * seconds)} for {steps:,} steps:"
        f" {gpus} GPUs of {peak:.0f} TFLOP/s at an assumed {mfu:.0%}",
        f"memory of a GPU: {memory}",
    ]


def _duration(seconds: float) -> str:
    return f"{seconds / 86_400:.1f} days" if seconds > 86_400 else f"{seconds / 3_600:.1f} hours"


def parameter_counts() -> dict[str, int]:
    """Parameters of the networks whose published counts are known, and of Emu's."""
    with torch.device("meta"):
        sd2 = UNet(4, 96, (320, 640, 1280, 1280), 2, (1, 1, 1, 0), 64, 1024, 1024)
        return {
            "kl_f8_4": num_parameters(Autoencoder(4, (128, 256, 512, 512), 2)),
            "kl_f8_16": num_parameters(Autoencoder(16, (128, 256, 512, 512), 2)),
            "sd2_unet": num_parameters(sd2)
            - num_parameters(sd2.net.class_embedding),  # SD has no pooled text
            "sdxl_unet": num_parameters(
                UNet(4, 128, (320, 640, 1280), 2, (0, 2, 10), 64, 2048, 1280, True, 256)
            ),
            "emu_unet": num_parameters(build(made_by("runs/emu/diffusion_1024/pretrained")).denoiser),
        }


def main(argv: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is used, in (0, 1]")
    parser.add_argument("--peak", type=float, default=PEAK, help="TFLOP/s of a GPU")
    options = parser.parse_args(argv)
    config = yaml.safe_load(options.config.read_text())
    lines = report(config, cost_of(config), options.gpus, options.mfu, options.peak)
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main()
