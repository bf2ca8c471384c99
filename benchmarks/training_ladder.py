"""What each step towards fast training brings, one at a time, beside the loop of diffusers' own script.

    python benchmarks/training_ladder.py --size tiny                                   (a CPU, minutes)
    python benchmarks/training_ladder.py --size sdxl --resolution 256 512 1024         (a GPU)

Every rung keeps what those before it have:

    float32   plain attention; convolutions may use TF32, as torch has it
    bfloat16  mixed precision
    sdpa      fused attention
    layout    channels_last, and cuDNN chooses its algorithms by trying (`trainer.benchmark`)
    compile   every block compiled
    cache     latents and text embeddings come from a cache, not from their frozen networks

`diffusers` is the loop of its example `train_text_to_image.py` with its options --use_ema, --mixed_precision
bf16 and no other, written anew from what it does: encode, draw noise and times, predict, squared error,
backward, clip, step, average, and read the loss for the progress bar. It trains the same U-Net on the same
batches, with the arithmetic of `sdpa`.

Networks have the named sizes and random weights; pictures are noise, in memory. MFU is the same arithmetic in
every line, the U-Net's loss and gradient and no encoder, over the rate of matrix products that this device
has in its faster precision; so that two lines differ in MFU as they do in speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import EMAModel
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from emu_lightning.callbacks import Acceleration, Throughput
from emu_lightning.callbacks.throughput import Clock, count_flops, first_sample, measure_matmul_rate
from emu_lightning.data.batch import Batch
from emu_lightning.evaluation.comparison_page import environment
from emu_lightning.models import Autoencoder, FrozenTextEncoder, JointTextEncoder, Text, TextEncoder, UNet
from emu_lightning.models.encoders import TextNetwork
from emu_lightning.models.frozen import Frozen
from emu_lightning.models.text import VOCABULARY
from emu_lightning.modules import DiffusionModule
from emu_lightning.processes import Diffusion
from emu_lightning.processes.seeding import generators_for
from emu_lightning.resources import config_path

NUM_BATCHES = 4  # different ones, in memory
CAPTION = "a photograph of a red ball in the snow, number {}, in the morning light of a long winter"


# --- networks of the named sizes ----------------------------------------------------------------------------


class RandomNetwork(TextNetwork):
    """A text network of given size that needs no files; made on the device, where that takes seconds."""

    def make(self) -> nn.Module:
        raise NotImplementedError

    def load(self) -> nn.Module:
        with torch.device(self.frozen._place.device):
            return self.make()

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(texts), self.length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            letters = torch.tensor(list(text.encode())[: self.length])
            row[: len(letters)] = letters
        return ids, torch.ones_like(ids, dtype=torch.bool)  # as Stable Diffusion's pipelines: padding is read

    def files(self) -> list[Path]:
        return []


class RandomClip(RandomNetwork):
    """CLIP's text tower; ViT-L's, unless another width and depth are given."""

    def __init__(self, dim: int = 768, num_layers: int = 12) -> None:
        super().__init__(dim, 77, "bfloat16", offload=False)
        self.num_layers = num_layers

    def make(self) -> nn.Module:
        config = CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.dim,
            intermediate_size=4 * self.dim,
            num_hidden_layers=self.num_layers,
            num_attention_heads=max(1, self.dim // 64),
            eos_token_id=VOCABULARY - 1,
        )
        return CLIPTextModel(config)

    def run(self, network: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        output = network(input_ids=ids)
        return {"sequence": output.last_hidden_state, "pooled": output.pooler_output}


class RandomT5(RandomNetwork):
    """T5-XXL's encoder."""

    def __init__(self) -> None:
        super().__init__(4096, 128, "bfloat16", offload=False)

    def make(self) -> nn.Module:
        config = T5Config(
            vocab_size=32_128,
            d_model=4096,
            d_kv=64,
            d_ff=10_240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
        return T5EncoderModel(config)

    def run(self, network: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"sequence": network(input_ids=ids, attention_mask=mask).last_hidden_state}


class Towers(FrozenTextEncoder):
    """CLIP towers side by side along the width, as in Stable Diffusion 2 (one) and SDXL (two)."""

    def __init__(self, *towers: TextNetwork) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)

    def embed(self, texts: list[str]) -> dict[str, Tensor]:
        made: list[dict[str, Tensor]] = [tower.embed(texts) for tower in self.towers]  # type: ignore[operator]
        sequence = torch.cat([each["sequence"] for each in made], -1)
        return {"sequence": sequence, "mask": made[0]["mask"], "pooled": made[-1]["pooled"]}

    def read(self, embeddings: dict[str, Tensor]) -> Text:
        sequence, pooled = (embeddings[name].float() for name in ("sequence", "pooled"))
        return Text(sequence, embeddings["mask"], pooled)

    def fingerprint(self) -> str:
        return ""


SD_AUTOENCODER = {"block_channels": (128, 256, 512, 512), "layers_per_block": 2}


def tiny() -> tuple[UNet, TextEncoder, Autoencoder]:
    """Nothing but small: four kinds of blocks to compile."""
    widths = {"block_channels": (32, 32), "transformer_layers": (0, 1), "head_dim": 16, "norm_groups": 8}
    unet = UNet(4, sample_size=8, **widths, sequence_dim=32, pooled_dim=32)
    autoencoder = Autoencoder(4, (16, 16, 32, 32), norm_groups=8)
    return unet, Towers(RandomClip(32, 2)), autoencoder


def sd2() -> tuple[UNet, TextEncoder, Autoencoder]:
    """Stable Diffusion 2: 866 M."""
    unet = UNet(
        4,
        block_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        transformer_layers=(1, 1, 1, 0),
        head_dim=64,
        sequence_dim=1024,
        pooled_dim=1024,
    )
    return unet, Towers(RandomClip(1024, 23)), Autoencoder(4, **SD_AUTOENCODER)


def sdxl() -> tuple[UNet, TextEncoder, Autoencoder]:
    """SDXL: 2.57 B."""
    unet = UNet(
        4,
        block_channels=(320, 640, 1280),
        layers_per_block=2,
        transformer_layers=(0, 2, 10),
        head_dim=64,
        sequence_dim=2048,
        pooled_dim=1280,
        use_size_condition=True,
        size_dim=256,
    )
    return unet, Towers(RandomClip(768, 12), RandomClip(1280, 32)), Autoencoder(4, **SD_AUTOENCODER)


def emu() -> tuple[UNet, TextEncoder, Autoencoder]:
    """The shipped configuration's: 2.8 B, 16 latent channels, CLIP ViT-L and T5-XXL."""
    settings = yaml.safe_load(config_path("emu/diffusion_512.yaml").read_text())["model"]["init_args"]
    unet = UNet(**settings["denoiser"]["init_args"])
    text = JointTextEncoder(RandomClip(), RandomT5(), settings["text_encoder"]["init_args"]["dim"])
    return unet, text, Autoencoder(16, **SD_AUTOENCODER)


SIZES = {"tiny": tiny, "sd2": sd2, "sdxl": sdxl, "emu": emu}
BATCH_SIZES = {64: 8, 256: 64, 512: 32, 1024: 8}  # by resolution


# --- data ---------------------------------------------------------------------------------------------------


class Batches(LightningDataModule):
    """The same few batches for ever."""

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(Endless(self.batches), batch_size=None)


class Endless(IterableDataset[Batch]):
    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        position = 0
        while True:
            batch = self.batches[position // len(self.batches[0]) % len(self.batches)]
            yield replace(batch, position=position)  # another noise each time
            position += len(batch)


def picture_batches(resolution: int, size: int) -> list[Batch]:
    rng = torch.Generator().manual_seed(0)
    sizes = torch.full((size, 2), resolution)
    return [
        Batch(
            torch.rand(size, 3, resolution, resolution, generator=rng) * 2 - 1,
            None,
            [CAPTION.format(first * size + index) for index in range(size)],
            sizes,
            torch.zeros_like(sizes),
            sizes,
            [f"{first}-{index}" for index in range(size)],
        )
        for first in range(NUM_BATCHES)
    ]


def cached(module: DiffusionModule, batches: list[Batch], resolution: int) -> list[Batch]:
    """The batches as caches would give them: latents in float32, embeddings in bfloat16."""
    encoder, autoencoder = module.text_encoder, module.autoencoder
    assert isinstance(encoder, FrozenTextEncoder) and autoencoder is not None
    side = resolution // autoencoder.downsampling
    rng = torch.Generator().manual_seed(1)

    def embedded(texts: list[str]) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in encoder.embed(texts).items()}

    empty = embedded([""])
    made = []
    for batch in batches:
        shape = (len(batch), module.denoiser.config.in_channels, side, side)
        latents = torch.randn(shape, generator=rng)
        embeddings = embedded(batch.texts)
        made.append(
            replace(batch, images=None, latents=latents, embeddings=embeddings, empty_embeddings=empty)
        )
    return made


def forget_text_networks(module: nn.Module) -> None:
    """Frees them; they load again where they are used."""
    for each in module.modules():
        if isinstance(each, Frozen):
            each._loaded.clear()


def on_device(batch: Batch, device: torch.device) -> Batch:
    moved = {}
    for each in fields(batch):
        value = getattr(batch, each.name)
        if isinstance(value, Tensor):
            moved[each.name] = value.to(device, non_blocking=True)
        elif isinstance(value, dict):
            moved[each.name] = {name: tensor.to(device, non_blocking=True) for name, tensor in value.items()}
    return replace(batch, **moved)


# --- the rungs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """What a line of the ladder switches on."""

    precision: str = "bf16-mixed"
    fused_attention: bool = True
    channels_last: bool = True
    compile_blocks: bool = True
    is_cached: bool = False


RUNGS = {
    "float32": Rung("32-true", fused_attention=False, channels_last=False, compile_blocks=False),
    "bfloat16": Rung(fused_attention=False, channels_last=False, compile_blocks=False),
    "sdpa": Rung(channels_last=False, compile_blocks=False),
    "layout": Rung(compile_blocks=False),
    "compile": Rung(),
    "cache": Rung(is_cached=True),
}
DIFFUSERS = "diffusers"
EVERY = [DIFFUSERS, *RUNGS]  # in this order always, because a compiled block stays one


def climb(
    rung: Rung, module: DiffusionModule, data: Batches, arguments: argparse.Namespace, folder: Path
) -> dict[str, float]:
    """Trains under Lightning, as `emu fit` does; images a second, and peak memory on a GPU."""
    processor = AttnProcessor2_0() if rung.fused_attention else AttnProcessor()
    module.denoiser.net.set_attn_processor(processor)
    throughput = Throughput()
    acceleration = Acceleration(rung.compile_blocks, arguments.activation_checkpointing, rung.channels_last)
    window = max(1, arguments.steps // 4)
    trainer = Trainer(
        accelerator="gpu" if arguments.device == "cuda" else "cpu",
        devices=1,
        precision=rung.precision,
        benchmark=rung.channels_last,
        max_steps=window + arguments.steps,  # the first window warms up
        log_every_n_steps=window,
        gradient_clip_val=1.0,
        callbacks=[throughput, acceleration],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    rows = throughput.rows[1:]
    measured = {
        "images_per_second": statistics.median(row["speed/images_per_second_per_device"] for row in rows),
        "data_wait": statistics.median(row["speed/data_wait"] for row in rows),
    }
    if arguments.device == "cuda":
        measured["peak_memory_gb"] = rows[-1]["speed/peak_memory_gb"]
    return measured


def loop_of_diffusers(
    module: DiffusionModule, data: Batches, arguments: argparse.Namespace
) -> dict[str, float]:
    """The steps of diffusers' script on the module's networks; the same figures."""
    device, dtype = torch.device(arguments.device), torch.bfloat16
    module.to(device)
    unet, autoencoder, encoder = module.denoiser.train(), module.autoencoder, module.text_encoder
    assert autoencoder is not None and isinstance(encoder, FrozenTextEncoder)
    kl = nn.Module.to(deepcopy(autoencoder.kl), dtype)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)
    lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    ema = EMAModel(unet.parameters(), decay=0.9999)
    ema.to(device)
    clock = Clock(device)
    clock.forget_peak_memory()
    window = max(1, arguments.steps // 4)
    marks = []
    for step, batch in enumerate(data.train_dataloader()):
        batch = on_device(batch, device)
        with torch.no_grad():
            assert batch.images is not None
            images = autoencoder.fourier(batch.images).to(dtype)
            latents = (kl.encode(images).latent_dist.sample() * 0.18215).float()
            text = encoder.read(encoder.embed(batch.texts))
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        size = torch.cat([batch.original_size, batch.crop, batch.target_size], 1).to(latents)
        with torch.autocast(device.type, dtype):
            prediction = unet(noisy, timesteps / 1000, text, size)
        loss = nn.functional.mse_loss(prediction.float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.item()  # for its progress bar, every step
        if step % window == 0:
            marks.append(clock.mark())
        if step == window + arguments.steps:
            break
    seconds = [clock.seconds(start, end) for start, end in zip(marks[1:], marks[2:], strict=False)]
    measured = {"images_per_second": len(latents) * window / statistics.median(seconds)}
    peak = clock.peak_memory()
    if arguments.device == "cuda" and peak is not None:
        measured["peak_memory_gb"] = peak / 1e9
    return measured


def flops_of_the_denoiser(module: DiffusionModule, batch: Batch, device: torch.device) -> float:
    """Floating-point operations an image, of the loss on cached latents and text and of its gradient."""
    module.to(device).train()
    sample = on_device(first_sample(batch), device)
    rng = generators_for(0, sample.positions, device)
    with torch.autocast(device.type, torch.bfloat16):
        flops = count_flops(lambda: module.loss(sample, rng))
    module.zero_grad()
    return flops


def fastest_matmul_rate(device: torch.device) -> float:
    """FLOP/s of matrix products, in bfloat16 or float32, whichever is faster here."""
    clock = Clock(device)
    with torch.autocast(device.type, torch.bfloat16):
        rate = measure_matmul_rate(clock)
    return max(rate, measure_matmul_rate(clock))


def ladder(resolution: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All chosen rungs at one resolution."""
    device = torch.device(arguments.device)
    process = Diffusion(schedule="scaled_linear")  # its tables stay on the CPU
    torch.manual_seed(0)
    with device:
        unet, encoder, autoencoder = SIZES[arguments.size]()
        module = DiffusionModule(unet, encoder, process, autoencoder, image_size=resolution)
    size = arguments.batch_size or BATCH_SIZES.get(resolution, 8)
    pictures = picture_batches(resolution, size)
    from_cache = cached(module.to(device), pictures, resolution)
    forget_text_networks(module)
    if device.type == "cuda":
        for batch in (*pictures, *from_cache):
            batch.pin_memory()  # in place; once, because nothing of this is about loading
    flops, rate = flops_of_the_denoiser(module, from_cache[0], device), fastest_matmul_rate(device)
    parameters = sum(each.numel() for each in unet.parameters())
    print(
        f"\n{arguments.size} at {resolution} pixels: {parameters / 1e6:.0f} M parameters, batch {size}, "
        f"{flops / 1e12:.3g} TFLOP an image, matrix products at {rate / 1e12:.3g} TFLOP/s"
    )
    print(f"{'':<12}{'images/s':>10}{'gain':>8}{'MFU':>8}{'peak GB':>9}")
    rungs: dict[str, dict[str, Any]] = {}
    before: float | None = None
    for name in (each for each in EVERY if each in arguments.rungs):
        data = Batches(from_cache if name in RUNGS and RUNGS[name].is_cached else pictures)
        started = time.monotonic()
        try:
            if name == DIFFUSERS:
                measured: dict[str, Any] = loop_of_diffusers(module, data, arguments)
            else:
                measured = climb(RUNGS[name], module, data, arguments, folder)
            speed = measured["images_per_second"]
            measured["mfu"] = flops * speed / rate
            if name != DIFFUSERS:
                if before is not None:
                    measured["gain"] = speed / before
                before = speed
        except torch.cuda.OutOfMemoryError:
            measured = {"error": f"out of memory at batch {size}"}
        module.trainer = None  # else its optimizer would live on
        module.zero_grad()
        forget_text_networks(module)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rungs[name] = measured | {"seconds": round(time.monotonic() - started, 1)}
        print(line_of(name, measured), flush=True)
    result: dict[str, Any] = {
        "batch_size": size,
        "parameters": parameters,
        "flops_per_image": flops,
        "matmul_flops_per_second": rate,
        "rungs": rungs,
    }
    theirs = rungs.get(DIFFUSERS, {}).get("images_per_second")
    for name in ("sdpa", "compile", "cache"):
        ours = rungs.get(name, {}).get("images_per_second")
        if ours and theirs:
            result[f"{name}_over_diffusers"] = ours / theirs
    return result


def line_of(name: str, measured: dict[str, Any]) -> str:
    if "error" in measured:
        return f"{name:<12}{measured['error']}"
    gain, peak = measured.get("gain"), measured.get("peak_memory_gb")
    return (
        f"{name:<12}{measured['images_per_second']:>10.2f}{f'x{gain:.2f}' if gain else '':>8}"
        f"{measured['mfu']:>8.1%}{f'{peak:.1f}' if peak else '':>9}"
    )


def main(argv: list[str]) -> dict[str, Any]:
    """Climbs the ladder, prints a table a resolution, writes ``<out>/results.json``; returns its content."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written, allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--resolution", type=int, nargs="+", help="pixels; 64 for tiny, else 512")
    parser.add_argument("--batch_size", type=int, help="default: by resolution")
    parser.add_argument("--steps", type=int, default=12, help="measured optimizer steps of a rung")
    parser.add_argument("--rungs", nargs="+", choices=EVERY, default=EVERY, help="in the order above")
    parser.add_argument("--activation_checkpointing", action="store_true", help="of ours, in every rung")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("results/training_ladder"), help="folder")
    arguments = parser.parse_args(argv)
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        resolutions = {
            str(resolution): ladder(resolution, arguments, Path(folder))
            for resolution in arguments.resolution or [64 if arguments.size == "tiny" else 512]
        }
    results = {
        "size": arguments.size,
        "device": arguments.device,
        "resolutions": resolutions,
        "settings": {
            "steps": arguments.steps,
            "activation_checkpointing": arguments.activation_checkpointing,
        },
        "seconds": round(time.monotonic() - started, 1),
        "command": shlex.join(["python", "benchmarks/training_ladder.py", *argv]),
        **environment(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
