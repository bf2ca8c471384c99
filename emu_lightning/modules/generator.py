"""The one interface that quality-tuning, sampling, evaluation, export and callbacks speak to.

A generator on disk is a folder of two files: ``generator.yaml`` (class paths and arguments of the module and
of every network in it, enough to build it) and ``model.safetensors``. Our Lightning checkpoints carry the
same description, so that either can be loaded by :func:`load_generator` without the run's configuration.
"""

from __future__ import annotations

import hashlib
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from emu_lightning.data.batch import Batch
from emu_lightning.files import write_whole
from emu_lightning.models import FrozenTextEncoder
from emu_lightning.models.pipeline_folder import INDEX_FILE, content_hash, is_pipeline, pipeline_folder
from emu_lightning.parallel import (
    Sharded,
    consolidate,
    gathered,
    is_sharded,
    mean_where_logged,
    original_type,
    read_checkpoint,
)
from emu_lightning.processes.seeding import Rng, generators_for
from emu_lightning.resources import shipped

Description = dict[str, Any]  # {"class_path": ..., "init_args": {...}}, nested
DESCRIPTION_FILE, WEIGHTS_FILE = "generator.yaml", "model.safetensors"

_ARGUMENT = re.compile(r'Parser key "([^"]+)":')
_NO_CLASS = re.compile(r"class_path '([^']+)':\s+(?:module '\S+' has no attribute|No module named)")
# What jsonargparse says of where it was looking, and of the None that it tried, too.
_SCAFFOLD = re.compile(
    r"^ *- |Does not validate against any of the Union subtypes|Subtypes: \[.*\]|Errors:"
    r"|Problem with given class_path '[^']+':|Parser key \"[^\"]+\":|Expected a <class 'NoneType'>",
    re.MULTILINE,
)


class Trainable(LightningModule, ABC):
    """A LightningModule whose loss is a pure function of weights, samples and (seed, each sample's position).

    A generator, a super-resolution stage and quality-tuning train in the same way; they differ in where the
    weights come from. After every optimizer step the average of the weights moves, inside the step, so that a
    checkpoint taken after it is never one update behind.
    """

    generator: Learner

    def __init__(
        self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None, seed: int
    ) -> None:
        super().__init__()
        self._optimizer, self._lr_scheduler, self._seed = optimizer, lr_scheduler, seed

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, Sharded):
            self.trainer.strategy.shard(self.generator.networks())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(batch, "test")

    def _step(self, batch: Batch, stage: str) -> Tensor:
        loss = self.generator.loss(batch, generators_for(self._seed, batch.positions, self.device))
        is_trained = stage == "train"
        logged = mean_where_logged(self.trainer, loss) if is_trained else loss
        self.log(
            f"{stage}/loss", logged, prog_bar=True, batch_size=len(batch.texts), sync_dist=not is_trained
        )
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.generator.update_average()

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.generator.trainable_parameters())
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler(optimizer), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["generator"] = self.generator.describe()


class Learner(Trainable):
    """What has a loss, weights to train and to average, and a description: a generator or an upsampler.

    Attributes:
        image_size: side in pixels of the pictures that it learns and makes.
        verb: the command that runs it.
    """

    image_size: int
    verb: ClassVar[str]

    @property
    def generator(self) -> Learner:  # type: ignore[override]
        return self

    @abstractmethod
    def loss(self, batch: Batch, rng: Rng) -> Tensor:
        """The training loss, a mean over the batch. All randomness comes from ``rng``."""

    def networks(self) -> Iterable[nn.Module]:
        """The parts that are each called as a whole, as sharding needs them."""
        return self.children()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, and afterwards the mode that was."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def encode(self, images: Tensor) -> Tensor | None:
        """What is learned of images (B, 3, H, W) in [-1, 1]: latents, not sampled; None where not known."""
        return None

    def frozen_text(self) -> FrozenTextEncoder | None:
        """The text encoder whose embeddings may be cached; None where it is trained."""
        return None

    @abstractmethod
    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer moves: not the frozen autoencoder, not the average."""

    @abstractmethod
    def update_average(self) -> None:
        """Moves the averaged weights one step towards the current ones."""

    @abstractmethod
    def describe(self) -> Description:
        """Class path and arguments, nested, from which :func:`build_learner` makes an equal one."""

    @abstractmethod
    def sampling_state(self) -> dict[str, Tensor]:
        """The weights that ``generate`` uses, under the names of a generator without an average."""

    @abstractmethod
    def load_sampling_state(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Inverse of :meth:`sampling_state`; of a training checkpoint it takes the averaged weights.

        The average starts anew from what was loaded. Returns the names that are missing and unexpected.
        """

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes ``generator.yaml`` and ``model.safetensors``; returns the folder.

        ``dtype`` casts floating weights. Where the weights are sharded every process takes part; the first
        one writes.
        """
        folder = Path(folder)
        state = gathered(self.sampling_state())
        if state is None:
            return folder
        state = {
            name: (value.to(dtype) if dtype and value.is_floating_point() else value).contiguous().clone()
            for name, value in state.items()
        }
        write_whole(folder / DESCRIPTION_FILE, yaml.safe_dump(self.describe(), sort_keys=False))
        write_whole(folder / WEIGHTS_FILE, save(state, metadata={"format": "pt"}))
        return folder


class Generator(Learner):
    """Text to images. Subclasses are concrete generators; nothing ever asks which one it holds."""

    verb = "sample"

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Iterable[int],
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], one a prompt, with the averaged weights where there are any.

        Args:
            prompts: B texts.
            seeds: B integers; a picture is a function of its prompt and seed, not of the batch it is made in.
            num_steps: sampling steps; None is the generator's own default.
            guidance_scale: 1.0 is off; None is the generator's own default.
            negative_prompt: what guidance moves away from, in place of no text.
        """

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] for the batch's texts."""
        return self.generate(batch.texts, batch.positions)


class Upsampler(Learner):
    """Images and their texts to larger images: a super-resolution stage.

    Attributes:
        factor: how many times larger images become, per side.
        low_size: side in pixels of the only images that it takes; None where any will do.
        side_multiple: of it are the sides in pixels of all that it makes.
    """

    factor: int
    low_size: int | None
    side_multiple: int
    verb = "upsample"

    @abstractmethod
    def upsample(
        self,
        images: Tensor,
        prompts: Sequence[str],
        seeds: Iterable[int],
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], with the averaged weights where there are any.

        Args:
            images: (B, 3, h, w) in [-1, 1], smaller by the stage's factor.
            prompts, seeds, num_steps, guidance_scale, negative_prompt: as for :meth:`Generator.generate`.
            size: H and W in pixels where they are not those of ``images`` times the factor.

        Raises:
            ValueError: it takes no images of this size, or makes none of ``size``.
        """


def class_path(cls: type) -> str:
    """Import path of a class, by the outermost package that exports it: a file inside may be renamed."""
    parts = cls.__module__.split(".")
    packages = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    exporting = (each for each in packages if getattr(sys.modules.get(each), cls.__name__, None) is cls)
    return f"{next(exporting, cls.__module__)}.{cls.__name__}"


def describe(component: Any) -> Description:
    """Description of a network that carries its own arguments, as diffusers' ``ConfigMixin`` does."""
    plain = {name: value for name, value in dict(component.config).items() if not name.startswith("_")}
    for name, value in plain.items():
        if isinstance(value, tuple):
            plain[name] = list(value)
        elif isinstance(value, nn.Module):
            plain[name] = describe(value)
    cls = original_type(component)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": plain}


def build_learner(description: Description, overrides: Mapping[str, Any] | None = None) -> Learner:
    """Builds a generator or an upsampler with fresh weights.

    Args:
        description: as :meth:`Learner.describe` gives it.
        overrides: dotted argument names and their new values, e.g. ``{"process.noise_offset": 0.1}``.

    Raises:
        ValueError: an argument does not exist or has the wrong type; the message names it.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Learner, "generator", required=True)
    changed = _override(description, overrides or {})
    try:
        config = parser.parse_object({"generator": changed})
        learner: Learner = parser.instantiate(config).generator
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"this description does not make a generator: {_cause(str(error))}") from None
    return learner


def _cause(message: str) -> str:
    """What jsonargparse refused, behind the names of the arguments that it is inside."""
    message = message.partition("Given value")[0]  # what follows repeats the whole description
    names = _ARGUMENT.findall(message)[1:]  # the first is the generator itself
    cause = " ".join(_SCAFFOLD.sub("", message).split())
    cause = re.sub(r"Option ('[^']+') is not accepted", r"there is no \1", cause)
    if gone := _NO_CLASS.search(message):
        cause = f"there is no class {gone[1]}: was it renamed, or is its package not installed here?"
    return f"{'.'.join(names)}: {cause}" if names else cause


def _override(description: Description, overrides: Mapping[str, Any]) -> Description:
    changed = yaml.safe_load(yaml.safe_dump(description))
    for dotted, value in overrides.items():
        *parents, name = dotted.split(".")
        place = changed["init_args"]
        for parent in parents:
            inside = place[_key(place, parent, dotted)]
            place = inside.get("init_args", inside) if isinstance(inside, dict) else inside
        # as jsonargparse reads null of a command line
        place[_key(place, name, dotted)] = None if value == "None" else deepcopy(value)
    return changed


def _key(place: Any, name: str, dotted: str) -> Any:
    """What `name` stands for in arguments, or in a list such as a cascade's: `upsamplers.0`."""
    there = range(len(place)) if isinstance(place, list) else place if isinstance(place, dict) else ()
    keys = {str(each): each for each in there}
    if name not in keys:
        raise ValueError(f"override {dotted!r}: there is no {name!r}; there is {sorted(keys) or 'nothing'}")
    return keys[name]


def load_generator(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Generator:
    """Loads a generator folder, one of our checkpoints (of pre-training or of quality-tuning) or a pipeline.

    Args:
        path: a folder with ``generator.yaml``, a ``.ckpt`` file, a diffusers pipeline folder or a hub id.
        overrides: see :func:`build_learner`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not a generator, or its weights do not fit its description.
    """
    learner = load_learner(path, overrides)
    if not isinstance(learner, Generator):
        raise ValueError(
            f"{path} is a super-resolution stage, which draws nothing from text alone: enlarge pictures with "
            "it by `emu upsample`, or make it part of a cascade"
        )
    return learner


def load_upsampler(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Upsampler:
    """Loads a super-resolution stage; arguments and errors as :func:`load_generator`."""
    learner = load_learner(path, overrides)
    if not isinstance(learner, Upsampler):
        raise ValueError(f"{path} is a generator of pictures from text, not a super-resolution stage")
    return learner


def load_learner(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Learner:
    """Loads a generator or a super-resolution stage; arguments and errors as :func:`load_generator`."""
    path = shipped(path)
    if is_pipeline(path):
        from emu_lightning.modules.pipeline import describe_pipeline  # a pipeline is a kind of generator

        description, state = describe_pipeline(path), None
    else:
        description, state = _read(path)
    try:
        learner = build_learner(description, overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if state is not None:  # a pipeline's weights came with it
        _load_state(learner, state, path)
    return learner


def load_weights(learner: Learner, path: str | Path) -> None:
    """Loads the weights of a generator folder or checkpoint into one of the same networks.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_generator`.
    """
    path = shipped(path)
    _load_state(learner, _read(path)[1], path)


def _load_state(learner: Learner, state: Mapping[str, Tensor], path: Path) -> None:
    try:
        missing, unexpected = learner.load_sampling_state(state)
    except RuntimeError as error:  # sizes differ; torch names every one, a line each
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"the weights in {path} do not fit their description: {first}") from None
    if missing or unexpected:
        raise ValueError(
            f"the weights in {path} do not fit their description: "
            f"{len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )


def weights_sha256(path: str | Path) -> str:
    """Hash of a generator's weights file: pictures by other weights of the same name are told apart by it."""
    path = shipped(path)
    if is_pipeline(path):
        folder = pipeline_folder(path)
        return content_hash(folder, [each.name for each in folder.iterdir() if each.is_dir()])
    if is_sharded(path):
        shards = (_sha256(shard) for shard in sorted(path.glob("*.distcp")))
        return hashlib.sha256("".join(shards).encode()).hexdigest()
    return _sha256(path / WEIGHTS_FILE if path.is_dir() else path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> tuple[Description, dict[str, Tensor]]:
    if is_sharded(path):
        return _of_checkpoint(consolidate(path), path)
    if path.is_dir():
        if not (path / DESCRIPTION_FILE).is_file() or not (path / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(
                f"{path} is not a generator folder: it needs {DESCRIPTION_FILE} and {WEIGHTS_FILE}, or, as a "
                f"pipeline, {INDEX_FILE}"
            )
        try:
            state = load_file(path / WEIGHTS_FILE)
        except SafetensorError as error:
            raise ValueError(f"{path / WEIGHTS_FILE} cannot be read ({error}): is it truncated?") from None
        try:
            description = yaml.safe_load((path / DESCRIPTION_FILE).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            cause = " ".join(str(error).split())
            raise ValueError(f"{path / DESCRIPTION_FILE} is not valid YAML: {cause}") from None
        return (
            description,
            {name: value.float() if value.is_floating_point() else value for name, value in state.items()},
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"no generator at {path}: give a folder with {DESCRIPTION_FILE}, a pipeline or a .ckpt file"
        )
    return _of_checkpoint(read_checkpoint(path), path)


def _of_checkpoint(checkpoint: dict[str, Any], path: Path) -> tuple[Description, dict[str, Tensor]]:
    if "generator" not in checkpoint:
        raise ValueError(f"{path} holds no generator: it is a checkpoint of another stage")
    state = {name.removeprefix("generator."): value for name, value in checkpoint["state_dict"].items()}
    return checkpoint["generator"], state
