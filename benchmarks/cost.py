"""What training a full-size configuration costs, computed without weights, pictures or a GPU.

    python benchmarks/cost.py configs/emu/diffusion_256.yaml --gpus 64

Networks are built and run on torch's meta device, where tensors have sizes but no content. So parameters are
exact, and so are FLOPs (of the loss of one picture and of its gradient, a multiplication and an addition as
two; nothing is recomputed) and the bytes that a forward pass keeps for the backward pass, under bf16-mixed
with fused attention. What a kernel needs in passing, fragments and buffers of communication are not in: leave
a tenth of the memory free. Time is FLOPs over (peak x MFU): the MFU is an assumption until the Throughput
callback has measured yours. Activation checkpointing takes about a third more time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningModule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from emu_lightning.callbacks.acceleration import trained_networks
from emu_lightning.callbacks.throughput import count_flops
from emu_lightning.data.batch import Batch
from emu_lightning.models import EMA, Autoencoder, ClipText, T5Text, UNet
from emu_lightning.models.encoders import TextNetwork
from emu_lightning.modules.autoencoder import ReconstructionModule
from emu_lightning.modules.generator import Learner
from emu_lightning.resources import shipped

PEAK = 989  # TFLOP/s of an H100 or H200 (SXM) in bfloat16, without sparsity: NVIDIA's data sheet; 312 an A100
STATE_BYTES = 4 + 4 + 8  # float32 weight, gradient and Adam's two moments
FAMILIES = ("emu", "imagen", "muse")  # folders of configs
CAST_BYTES = 2  # autocast's copy of a weight, kept until the backward pass


@dataclass
class Cost:
    """What one training image costs, and what lies on the GPUs.

    Attributes:
        trained, frozen: parameters.
        state: bytes that are sharded over the GPUs: trained weights, gradients, moments and average.
        resident: bytes that every GPU holds whole: frozen networks, and the trained weights cast.
        flops: of an image; those of autoencoder and text are what caches of latents and of text would save.
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
    data = config["data"]["init_args"]
    with torch.device("meta"):
        module = build(config)
        if isinstance(module, ReconstructionModule):
            return _autoencoder_cost(module, config, data["resolution"])
        assert isinstance(module, Learner)
        return _learner_cost(module, data)


def build(config: dict[str, Any]) -> LightningModule:
    """The module of a configuration with fresh weights; stages that it starts from need not have run.

    An autoencoder or a generator that another stage's run leaves behind is built from that stage's own
    configuration, which is found by its `run_dir`.
    """
    if config["model"]["class_path"].endswith("QualityTuningModule"):
        return build(made_by(config["model"]["init_args"]["init_from"]))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    return parser.instantiate(parser.parse_object({"model": _without_files(config["model"])})).model


def _without_files(value: Any) -> Any:
    """A description in which what would be loaded is described itself, or left out."""
    if isinstance(value, list):
        return [_without_files(each) for each in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("class_path", "").rpartition(".")[2]
    if kind in ("load_generator", "load_upsampler"):
        return _without_files(made_by(value["init_args"]["path"])["model"])
    if kind in ("load_autoencoder", "load_vq_autoencoder"):
        return made_by(value["init_args"]["folder"])["model"]["init_args"]["autoencoder"]
    weights = ("init_from", "perceptual")
    return {name: _without_files(each) for name, each in value.items() if name not in weights}


def made_by(folder: str) -> dict[str, Any]:
    """The shipped configuration whose run leaves this folder.

    Raises:
        ValueError: there is none.
    """
    for name in FAMILIES:
        for path in sorted(shipped(f"configs/{name}").glob("*.yaml")):
            config = yaml.safe_load(path.read_text())
            if folder == f"{config['run_dir']}/pretrained":
                return config
    raise ValueError(f"no configuration of {', '.join(FAMILIES)} in configs leaves {folder}")


# --- the stages ---------------------------------------------------------------------------------------------


def _learner_cost(learner: Learner, data: dict[str, Any]) -> Cost:
    with (
        patch.object(TextNetwork, "embed", _embed),
        patch.object(TextNetwork, "fingerprint", lambda network: repr(network.config)),
        _OnMeta(),
    ):
        texts = {each.frozen: each for each in learner.modules() if isinstance(each, TextNetwork)}.values()
        encoder, images = learner.frozen_text(), torch.empty(1, 3, data["resolution"], data["resolution"])
        assert encoder is not None
        embeddings, sizes = encoder.embed([""]), torch.empty(1, 2, dtype=torch.long)
        picture = Batch(images, None, [""], sizes, sizes, sizes, ["0"], 0, [], embeddings, embeddings)
        if data.get("latents_from"):
            picture.images, picture.latents = None, learner.encode(images)

        def loss() -> Tensor:
            return learner.loss(picture, [torch.Generator()])

        flops = {"autoencoder": 0.0, "text": 0.0}
        if picture.images is not None:
            flops["autoencoder"] = count_flops(lambda: learner.encode(images), use_gradient=False)
        if not data.get("cache_text"):
            flops["text"] = count_flops(lambda: encoder.embed([""]), use_gradient=False)
        _imitate_autocast(learner)
        with _kept(learner) as kept:
            flops = {"training": count_flops(loss) - flops["autoencoder"]} | flops
        checkpointed = _checkpointed_bytes(loss, learner)
    trained = sum(weight.numel() for weight in learner.trainable_parameters())
    averages = [each.model for each in learner.modules() if isinstance(each, EMA)]
    averaged, text = num_parameters(*averages), num_parameters(*(_published(type(each)) for each in texts))
    others = num_parameters(learner) - trained - averaged
    return Cost(
        trained,
        others + text,
        STATE_BYTES * trained + 4 * averaged,
        CAST_BYTES * trained + 4 * others + 2 * text,
        {name: value for name, value in flops.items() if value},
        _bytes(kept),
        checkpointed,
    )


def _autoencoder_cost(module: ReconstructionModule, config: dict[str, Any], size: int) -> Cost:
    import timm

    name = config["model"]["init_args"]["perceptual"]["init_args"]["model_name"]
    features = timm.create_model(name, features_only=True).requires_grad_(False)
    autoencoder, critic, images = module.autoencoder, module.discriminator, torch.empty(1, 3, size, size)
    assert critic is not None
    for network in (autoencoder, critic, features):
        _imitate_autocast(network)

    def step() -> int:
        """One step of the autoencoder, then of the discriminator; gives what the first keeps."""
        with _kept(autoencoder, critic, features) as kept:
            reconstructions = autoencoder(images)[0]
            similarity = _sum(features(reconstructions)) + _sum(features(images)) + reconstructions.sum()
            adversarial = critic(reconstructions).sum()
        for term in (similarity, adversarial):  # the adaptive weight
            torch.autograd.grad(term, autoencoder.last_layer.weight, retain_graph=True)
        (similarity + adversarial).backward()
        (critic(images).sum() + critic(reconstructions.detach()).sum()).backward()
        return _bytes(kept)

    kept = step()
    flops = {"autoencoder and losses": count_flops(step, use_gradient=False)}
    trained = num_parameters(autoencoder, critic)
    whole = (STATE_BYTES + CAST_BYTES) * trained + 4 * num_parameters(features)  # small: no need to shard it
    return Cost(trained, num_parameters(features), 0, whole, flops, kept, kept)


def _embed(network: TextNetwork, texts: list[str]) -> dict[str, Tensor]:
    """In place of `TextNetwork.embed`, which wants files; of texts without padding."""
    published, ids = _published(type(network)), torch.ones(len(texts), network.length, dtype=torch.long)

    def unmasked(input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return published(input_ids)  # whether all of a mask is True is not known on the meta device

    with torch.no_grad():
        return {**network.run(unmasked, ids, ids.bool()), "mask": ids.bool()}


def clip_l() -> nn.Module:
    """CLIP ViT-L/14's text tower."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    return CLIPTextModel(config)


def t5_xxl() -> nn.Module:
    """T5-XXL 1.1's encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=4096, d_ff=10_240, d_kv=64, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


@cache
def _published(kind: type[TextNetwork]) -> nn.Module:
    """What the configurations name."""
    return {ClipText: clip_l, T5Text: t5_xxl}[kind]()


# --- counting -----------------------------------------------------------------------------------------------


def num_parameters(*networks: nn.Module) -> int:
    return sum(weight.numel() for network in networks for weight in network.parameters())


def _sum(maps: list[Tensor]) -> Tensor:
    return torch.stack([features.sum() for features in maps]).sum()


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

    with _OnMeta(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def _checkpointed_bytes(run: Callable[[], Tensor], module: nn.Module) -> int:
    inside: list[int] = []
    inputs: dict[int, Tensor] = {}

    def checkpoint(block: nn.Module, *arguments: Any) -> Any:
        inputs.update({a.untyped_storage()._cdata: a for a in arguments if isinstance(a, Tensor)})
        with _kept(block) as kept:
            output = block(*arguments)
        inside.append(_bytes(kept))
        return output

    networks = [each for each in trained_networks(module) if each._supports_gradient_checkpointing]
    for network in networks:
        network.enable_gradient_checkpointing(checkpoint)
    with _kept(module) as outside:
        run()
    for network in networks:
        network.disable_gradient_checkpointing()
    return _bytes(outside | inputs) + max(inside)


class _OnMeta(TorchFunctionMode):
    """What torch does on a GPU and not on the meta device, or would do otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.rand:  # a generator cannot be there
            return func(*args, device="meta")
        if func is nn.functional.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


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
