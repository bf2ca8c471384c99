"""Any diffusers pipeline of a known family as a generator: tuned whole or by LoRA, handed back as one."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, SchedulerMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from emu_lightning.data.batch import Batch
from emu_lightning.files import write_whole
from emu_lightning.models import EMA, Frozen, FrozenTextEncoder, Text
from emu_lightning.models.lora import LORA_FILE, Lora, add_lora, merge_lora, save_lora
from emu_lightning.models.pipeline_families import (
    PipelineFamily,
    PipelineTextEncoder,
    assemble,
    load_denoiser,
    pipeline_family,
)
from emu_lightning.models.pipeline_folder import INDEX_FILE, copy_component, pipeline_folder, read_json
from emu_lightning.models.pipeline_vae import PipelineVAE
from emu_lightning.modules.diffusion import denoising_loss
from emu_lightning.modules.generator import DESCRIPTION_FILE, Description, Generator
from emu_lightning.modules.text_learner import DECODE_PIXELS, encode_text
from emu_lightning.optimizers import AdamW
from emu_lightning.parallel import gathered
from emu_lightning.processes import Diffusion, Process, RectifiedFlow
from emu_lightning.processes.seeding import Rng, picture_generators

CLASS_PATH = "emu_lightning.modules.PipelineModule"


class PipelineModule(Generator):
    """A pre-trained text-to-image pipeline: SD 1.x and 2.x, SDXL, PixArt-alpha and -Sigma, SD3, FLUX.

    Only the denoiser, or with `lora` only its adapters, is trained, averaged and kept in checkpoints. Text
    encoders and autoencoder are read from the pipeline's folder at first use and stay as they are.

    Args:
        pipeline: folder with model_index.json, or hub id.
        lora: train adapters; None trains the whole denoiser.
        process: of training. None is what the pipeline's scheduler reverses: its schedule and prediction, all
            times weighted alike; for flows the times of Esser et al. 2024 (logit-normal, shifted as the
            scheduler does at `image_size`). Sampling keeps the pipeline's scheduler unless a diffusion
            process with another schedule, prediction or sampler is given.
        image_size: side of generated pictures, pixels; None is the pipeline's own.
        text_dropout: share of captions replaced by no caption.
        ema_decay: of the average of what is trained; None keeps none.
        num_steps, guidance_scale: defaults of ``generate``; None is the default of the pipeline's call.
        frozen_dtype: of text encoders and, with `lora`, of the frozen denoiser, in memory. What is trained is
            kept in float32.
        offload_text: keep and run the text encoders in host memory.
        optimizer, lr_scheduler, seed: as in every training.

    Raises:
        FileNotFoundError: no pipeline is there, or a component is missing.
        ValueError: the pipeline is of no known family, its parts do not fit together, its weights are pickles
            or damaged, or an argument is out of its range.
        OSError: the hub cannot be reached.
    """

    def __init__(
        self,
        pipeline: str,
        lora: Lora | None = None,
        process: Process | None = None,
        image_size: int | None = None,
        text_dropout: float = 0.1,
        ema_decay: float | None = 0.999,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        frozen_dtype: Literal["float32", "bfloat16"] = "float32",
        offload_text: bool = False,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed)
        self.pipeline, self.folder = pipeline, pipeline_folder(pipeline)
        self.family = pipeline_family(self.folder)
        self.scheduler = load_scheduler(self.folder)
        own_process = process_of(self.scheduler, self.folder, self.family, image_size)
        self.process = own_process if process is None else process
        if isinstance(self.process, RectifiedFlow) != self.family.is_flow:
            raise ValueError(
                f"process {type(self.process).__name__} does not suit {pipeline}: its denoiser is made for "
                f"{'RectifiedFlow' if self.family.is_flow else 'Diffusion'}"
            )
        if not _reverses_alike(self.process, own_process):
            self.scheduler = self.process.scheduler()

        dtype: torch.dtype = getattr(torch, frozen_dtype)
        self.denoiser = load_denoiser(self.folder, self.family, torch.float32 if lora is None else dtype)
        if lora is not None:
            add_lora(self.denoiser, lora)
        self.lora = lora
        self._trained = [name for name, each in self.denoiser.named_parameters() if each.requires_grad]
        self.average = EMA(self._followed(), ema_decay) if ema_decay is not None else None
        self.text_encoder = PipelineTextEncoder(self.family, self.folder, dtype, offload_text)
        folder = self.folder
        self.vae = Frozen(lambda: PipelineVAE.from_pretrained(folder))

        call = inspect.signature(self.family.pipeline.__call__).parameters
        self.image_size = image_size or own_image_size(self.folder, self.family)
        self.num_steps: int = call["num_inference_steps"].default if num_steps is None else num_steps
        self.guidance_scale: float = (
            call["guidance_scale"].default if guidance_scale is None else guidance_scale
        )
        self.text_dropout, self.ema_decay = text_dropout, ema_decay
        self.frozen_dtype, self.offload_text = frozen_dtype, offload_text
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_do_not_miss_frozen)
        self.train()  # what diffusers loads is in evaluation mode

    # --- training -------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, rng: Rng) -> Tensor:
        """Weighted mean squared error of the prediction."""
        x_0 = self._latents(batch, rng)
        text = encode_text(self.text_encoder, batch, self.text_dropout, rng)
        with nullcontext(self.denoiser) if self.training else self._sampling_denoiser() as denoiser:
            size = torch.cat([batch.original_size, batch.crop, batch.target_size], 1)

            def predict(x_t: Tensor, t: Tensor) -> Tensor:
                return self.predict(denoiser, x_t, t, text, size)

            return denoising_loss(predict, self.process, x_0, rng)

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, text: Text, size: Tensor) -> Tensor:
        """The denoiser's prediction (B, C, H, W) at x_t and t (B,), in its precision and on its device.

        Args:
            denoiser: the trained or the averaged one.
            x_t: (B, C, H, W).
            t: (B,) in [0, 1].
            text: of B texts, from wherever it was embedded.
            size: (B, 6) in pixels: original height and width, top and left of the crop, target height and
                width.
        """
        place: Any = {"device": x_t.device, "dtype": denoiser.dtype}
        text = Text(text.sequence.to(**place), text.mask.to(x_t.device), text.pooled.to(**place))
        return self.family.predict(denoiser, x_t.to(**place), t, text, size.to(x_t.device, torch.float32))

    def _latents(self, batch: Batch, rng: Rng) -> Tensor:
        if batch.latents is not None:
            return batch.latents
        assert batch.images is not None  # a batch holds one of the two
        with torch.no_grad():
            return self.vae.network.encode(batch.images, rng).float()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.vae.network.encode(images).float()

    def frozen_text(self) -> FrozenTextEncoder:
        return self.text_encoder

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        for name in self._trained:
            yield self.denoiser.get_parameter(name)

    def _followed(self) -> nn.Module:
        """What the average follows: the denoiser, or its adapters alone."""
        return self.denoiser if self.lora is None else nn.ParameterList(self.trainable_parameters())

    def update_average(self) -> None:
        if self.average is not None:
            self.average.update(self._followed())

    # --- sampling -------------------------------------------------------------------------------------------

    @contextmanager
    def _sampling_denoiser(self) -> Iterator[Any]:
        """The averaged denoiser; with adapters, the only one, with the averaged adapters in their place."""
        if self.average is None:
            yield self.denoiser
        elif self.lora is None:
            yield self.average.model
        else:
            _exchange(self._followed(), self.average.model)
            try:
                yield self.denoiser
            finally:
                _exchange(self._followed(), self.average.model)

    @contextmanager
    def _slicing_for(self, num: int) -> Iterator[None]:
        """Many large pictures are decoded one by one: all at once would not fit beside a training."""
        vae = self.vae.network.vae
        vae.use_slicing = num * self.image_size**2 > DECODE_PIXELS
        try:
            yield
        finally:
            vae.use_slicing = False  # pictures to encode are of a batch that fits

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Iterable[int],
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
    ) -> Tensor:
        """As every generator; the pictures are those of the pipeline's own call."""
        with self.evaluating(), self._slicing_for(len(prompts)):
            scale = self.guidance_scale if guidance_scale is None else guidance_scale
            text = self.text_encoder.embed_for_call(list(prompts), negative_prompt if scale > 1 else None)
            with self._sampling_denoiser() as denoiser:
                pipeline = assemble(
                    self.family,
                    self.folder,
                    vae=self.vae.network.vae,
                    scheduler=type(self.scheduler).from_config(self.scheduler.config),
                    **{self.family.denoiser_name: denoiser},
                )
                mixes = denoiser.dtype != torch.float32  # the autoencoder always is
                with torch.autocast(self.device.type, denoiser.dtype) if mixes else nullcontext():
                    images: Tensor = pipeline(
                        **{name: _like(value, denoiser) for name, value in text.items()},
                        height=self.image_size,
                        width=self.image_size,
                        num_inference_steps=self.num_steps if num_steps is None else num_steps,
                        guidance_scale=scale,
                        generator=picture_generators(seeds),
                        output_type="pt",
                        **self.family.call_arguments,
                    ).images
            return (2 * images.float() - 1).clamp(-1, 1)

    # --- handing over ---------------------------------------------------------------------------------------

    def describe(self) -> Description:
        return {
            "class_path": CLASS_PATH,
            "init_args": {
                "pipeline": self.pipeline,
                "lora": None
                if self.lora is None
                else {**asdict(self.lora), "targets": list(self.lora.targets)},
                "process": self.process.describe(),
                "image_size": self.image_size,
                "text_dropout": self.text_dropout,
                "ema_decay": self.ema_decay,
                "num_steps": self.num_steps,
                "guidance_scale": self.guidance_scale,
                "frozen_dtype": self.frozen_dtype,
                "offload_text": self.offload_text,
            },
        }

    def sampling_state(self) -> dict[str, Tensor]:
        followed = self._followed() if self.average is None else self.average.model
        names = self._names_of_followed().values()
        return {
            f"denoiser.{name}": value
            for name, value in zip(names, followed.state_dict().values(), strict=True)
        }

    def load_sampling_state(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        own = {name: value for name, value in state.items() if not name.startswith("average.")}
        averaged = {
            f"denoiser.{name}": state[f"average.model.{key}"]
            for key, name in self._names_of_followed().items()
            if f"average.model.{key}" in state
        }
        missing, unexpected = self.load_state_dict(own | averaged, strict=False)
        if self.average is not None:
            self.average.restart(self._followed())
        return [name for name in missing if not name.startswith("average.")], list(unexpected)

    def _names_of_followed(self) -> dict[str, str]:
        """Names in the average's network -> names in the denoiser."""
        if self.lora is None:
            return {name: name for name in self.denoiser.state_dict()}
        return {str(index): name for index, name in enumerate(self._trained)}

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes a pipeline folder that diffusers and :func:`load_generator` read; returns the folder.

        Where the weights are sharded every process takes part; the first one writes.
        Adapters are merged into the denoiser and also lie beside it, for ``load_lora_weights``. The other
        components are linked to the base's files where the disk allows it, else copied. model_index.json
        comes last: a folder without it is unfinished.

        Args:
            folder: to write; not the one that the generator was loaded from.
            dtype: of the denoiser in the file; None is float32.

        Raises:
            ValueError: `folder` is the base itself.
        """
        folder = Path(folder)
        if folder.resolve() == self.folder.resolve():
            raise ValueError(f"{folder} is the base that is tuned: export to another folder")
        state = gathered(self.sampling_state())
        if state is None:
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in (INDEX_FILE, LORA_FILE):  # of an earlier export
            (folder / name).unlink(missing_ok=True)
        denoiser = load_denoiser(self.folder, self.family)
        state = {name.removeprefix("denoiser."): value for name, value in state.items()}
        if self.lora is None:
            denoiser.load_state_dict(state)
        else:
            add_lora(denoiser, self.lora)
            denoiser.load_state_dict(state, strict=False)  # all but the adapters is as it was
            save_lora(denoiser, self.family.denoiser_name, folder)
            merge_lora(denoiser)
        nn.Module.to(denoiser, dtype or torch.float32)  # diffusers' own warns of nothing
        denoiser.save_pretrained(folder / self.family.denoiser_name)
        self.scheduler.save_pretrained(folder / "scheduler")

        index = read_json(self.folder / INDEX_FILE)
        index["scheduler"] = ["diffusers", type(self.scheduler).__name__]
        for name, value in index.items():
            if isinstance(value, list) and name not in ("scheduler", self.family.denoiser_name):
                if value[0] is not None and not copy_component(self.folder / name, folder / name):
                    index[name] = [None, None]
        description = self.describe()
        description["init_args"] |= {"pipeline": ".", "lora": None}
        write_whole(folder / DESCRIPTION_FILE, yaml.safe_dump(description, sort_keys=False))
        write_whole(folder / "README.md", self._model_card(dtype or torch.float32))
        write_whole(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
        return folder

    def _model_card(self, dtype: torch.dtype) -> str:
        licence = _front_matter(self.folder / "README.md").get("license", "unknown")
        front = {
            "base_model": self.pipeline,
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "license": licence,
        }
        network = self.family.denoiser_name
        tuned = (
            f"the whole {network}" if self.lora is None else f"the {network} by LoRA of rank {self.lora.rank}"
        )
        beside = f"; the adapters alone are in `{LORA_FILE}`" if self.lora else ""
        averaged = "" if self.ema_decay is None else f", averaged with decay {self.ema_decay}"
        return f"""---
{yaml.safe_dump(front, sort_keys=False)}---
# A quality-tuned {self.family.pipeline.__name__}

- Base: `{self.pipeline}`. Its licence as its card states it: {licence}.
- Tuned: {tuned}{averaged}{beside}. Everything else is the base's, unchanged.
- Weights of the {network}: {str(dtype).removeprefix("torch.")}, safetensors.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this folder")
settings = {{"num_inference_steps": {self.num_steps}, "guidance_scale": {self.guidance_scale}}}
image = pipeline("a photograph", **settings).images[0]
```

Settings of the generator (emu_lightning):

```yaml
{yaml.safe_dump(self.describe(), sort_keys=False)}```
"""


def describe_pipeline(path: str | Path) -> Description:
    """Description of the generator that a pipeline makes: as exported by us, else with all defaults.

    Raises:
        FileNotFoundError, ValueError, OSError: see :class:`PipelineModule`.
    """
    folder = pipeline_folder(path)
    family = pipeline_family(folder)
    if (folder / DESCRIPTION_FILE).is_file():
        try:
            description: Description = yaml.safe_load((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
            description["init_args"]["pipeline"] = str(path)
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
            raise ValueError(
                f"{folder / DESCRIPTION_FILE} describes no generator: delete it, and the defaults hold"
            ) from None
        return description
    process = process_of(load_scheduler(folder), folder, family)
    arguments = {
        name: each.default
        for name, each in inspect.signature(PipelineModule.__init__).parameters.items()
        if name not in ("self", "optimizer", "lr_scheduler", "seed")
    }
    return {
        "class_path": CLASS_PATH,
        "init_args": arguments | {"pipeline": str(path), "process": process.describe()},
    }


def load_scheduler(folder: Path) -> Any:
    """The scheduler of a pipeline folder.

    Raises:
        ValueError: diffusers has none of this name.
    """
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"{folder / 'scheduler'}: diffusers has no scheduler {config.get('_class_name')!r}")
    scheduler: Any = kind
    return scheduler.from_config(config)


def own_image_size(folder: Path, family: PipelineFamily) -> int:
    """Side in pixels of the pictures that a pipeline was made for."""
    denoiser = read_json(folder / family.denoiser_name / "config.json")
    levels = len(read_json(folder / "vae" / "config.json")["block_out_channels"])
    side: int = denoiser.get("sample_size", family.default_sample_size) * 2 ** (levels - 1)
    return side


def process_of(
    scheduler: Any, folder: Path, family: PipelineFamily, image_size: int | None = None
) -> Process:
    """The process that a pipeline's scheduler reverses, with customary training times and no weighting.

    Args:
        scheduler: of the pipeline.
        folder: of the pipeline.
        family: of the pipeline.
        image_size: side in pixels; schedulers with dynamic shifting move time further for larger pictures.

    Raises:
        ValueError: its schedule or prediction is not one of ours.
    """
    config = scheduler.config
    if isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)):
        shift = config.shift
        if config.get("use_dynamic_shifting"):
            levels = len(read_json(folder / "vae" / "config.json")["block_out_channels"])
            patches = (
                image_size or own_image_size(folder, family)
            ) // 2**levels  # two latent pixels to a patch
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            shift = math.exp(calculate_shift(patches**2, *(config[name] for name in names)))
        return RectifiedFlow(time_shift=shift, time_sampling="logit_normal")
    predictions: Any = {"epsilon": "noise", "v_prediction": "velocity", "sample": "x_0"}
    for schedule in ("scaled_linear", "linear", "cosine"):
        if config.get("prediction_type") not in predictions or not hasattr(scheduler, "alphas_cumprod"):
            break
        process = Diffusion(
            schedule=schedule,
            num_timesteps=config.num_train_timesteps,
            prediction=predictions[config.prediction_type],
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr")),
            min_snr_gamma=None,
            sampler=type(scheduler),
        )
        if torch.allclose(process.alphas_cumprod.float(), scheduler.alphas_cumprod, atol=1e-5):
            return process
    raise ValueError(
        f"{folder / 'scheduler'}: {type(scheduler).__name__} with schedule {config.get('beta_schedule')!r} "
        f"and prediction {config.get('prediction_type')!r} is not known: put another scheduler there"
    )


def _reverses_alike(process: Process, own: Process) -> bool:
    """Whether the scheduler that reverses `own` also reverses `process`. A flow's reverses every flow."""
    if not isinstance(process, Diffusion) or not isinstance(own, Diffusion):
        return True
    names = ("schedule", "num_timesteps", "prediction", "zero_terminal_snr", "sampler")
    return all(getattr(process, name) == getattr(own, name) for name in names)


def _leave_out_frozen(module: Any, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Keeps of a denoiser with adapters only these in a state."""
    if module.lora is not None:
        kept = {f"{prefix}denoiser.{name}" for name in module._trained}
        for name in [name for name in state if name.startswith(f"{prefix}denoiser.") and name not in kept]:
            del state[name]


def _do_not_miss_frozen(module: Any, incompatible: Any) -> None:
    if module.lora is not None:
        trained = set(module._trained)
        incompatible.missing_keys[:] = [
            name
            for name in incompatible.missing_keys
            if "denoiser." not in name or name.partition("denoiser.")[2] in trained
        ]


@torch.no_grad()
def _exchange(one: nn.Module, other: nn.Module) -> None:
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)


def _like(value: Tensor, denoiser: Any) -> Tensor:
    """On the denoiser's device and, where it is a floating number, in its precision."""
    return value.to(denoiser.device, denoiser.dtype if value.is_floating_point() else None)


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty where there is none."""
    parts = path.read_text(encoding="utf-8").split("---\n", 2) if path.is_file() else []
    try:
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else {}
    except yaml.YAMLError:
        head = {}
    return head if isinstance(head, dict) else {}
