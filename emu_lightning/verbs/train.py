"""`emu fit | validate | test | predict`: a LightningCLI whose run folder explains and repeats the run.

A run folder (`--run_dir`, the trainer's `default_root_dir`) holds

    config.yaml              the resolved configuration: `emu fit --config` repeats the run from it
    metrics.csv              every logged metric
    speed.csv                images a second, MFU, waiting for data, peak memory
    checkpoints/last.ckpt    what `--ckpt_path last` resumes
    pretrained/              what training made, for the next stage (where the module hands anything over)
    finished.json            written when training reached its end, and only then: steps, seconds
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from argparse import ArgumentError, ArgumentTypeError
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from emu_lightning import data, modules  # noqa: F401  # so that --model=AutoencoderModule needs no longer path
from emu_lightning.callbacks.checkpoint import RunCheckpoint, last_checkpoint
from emu_lightning.callbacks.data_errors import BrokenFileReport
from emu_lightning.callbacks.metrics import MetricsFile
from emu_lightning.callbacks.progress import StepProgressBar
from emu_lightning.callbacks.throughput import Throughput
from emu_lightning.files import write_whole
from emu_lightning.parallel import REMAINDER, SHARDS_INDEX, Sharded, is_sharded, read_checkpoint, saves
from emu_lightning.verbs.arguments import PARSER_SETTINGS, one_line, use_shipped_configs

EXIT_TERMINATED = 143  # 128 + SIGTERM, as shells have it; Lightning 2.6.6 would exit with 0
EXIT_INTERRUPTED = 130  # 128 + SIGINT
RESUME_HINT = "the same command with --ckpt_path last goes on"


@runtime_checkable
class HandsOver(Protocol):
    """A module whose networks the next stage starts from."""

    def save_pretrained(self, folder: str | Path) -> object:
        """Writes them into ``folder``."""


@runtime_checkable
class LivesInRun(Protocol):
    """A logger with files of its own."""

    run_dir: str | Path


class RunConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run folder, and hands it to the loggers (W&B)."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        # Lightning's own place is the logger's folder, which W&B runs share: the second run would fail.
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        # Judging a run must not rewrite its history.
        name = "config.yaml" if stage == "fit" else f"{stage}.yaml"
        write_whole(Path(trainer.default_root_dir) / name, text)
        for logger in trainer.loggers:
            logger.log_hyperparams({"cli": yaml.safe_load(text)})


def computes_bfloat16() -> bool:
    """Whether torch has fast kernels for it on this CPU; x86 before AVX-512 has none."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def run_folder(path: str) -> str:
    """What `--run_dir` names, with $NAME from the environment, so that each run of a sweep has its own.

    Raises:
        ArgumentTypeError: the environment has no such name.
    """
    filled = os.path.expandvars(path)
    if "$" in filled:
        raise ArgumentTypeError(f"{filled} has a name that the environment does not have")
    return filled


class EmuCLI(LightningCLI):
    """LightningCLI with one run folder, checkpoints that never rule the config, and one-line errors."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=RunConfig,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={
                # Data order is a function of (seed, position, rank): an injected sampler would break it.
                "use_distributed_sampler": False,
                # Training data never ends, so time is counted in steps, not in epochs.
                "check_val_every_n_epoch": None,
                "val_check_interval": 1000,
                "log_every_n_steps": 10,
            },
            parser_kwargs={
                "prog": "emu",
                **PARSER_SETTINGS,
                **{verb: dict(PARSER_SETTINGS) for verb in self.subcommands()},
            },
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=run_folder,
            default="runs/unnamed",
            help="Folder for all of this run; $NAME in it is read from the environment.",
        )
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.add_class_arguments(RunCheckpoint, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        try:
            self.config = parser.parse_args(use_shipped_configs(args))
        except ArgumentError as error:
            verbs = [name for name in self._subcommand_parsers if name in args]
            keys = [key for name in verbs for key in self._subcommand_parsers[name].get_defaults().keys()]
            raise ValueError(one_line(str(error), args, keys)) from error

    def _parse_ckpt_path(self) -> None:
        """Does nothing, where Lightning puts a checkpoint's hyper-parameters and class over the config."""

    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.subcommand].trainer
        on_cpu = trainer.accelerator == "cpu" or (
            trainer.accelerator == "auto" and not torch.accelerator.is_available()
        )
        if on_cpu and trainer.precision == "bf16-mixed" and not computes_bfloat16():
            trainer.precision = "32-true"
            rank_zero_info(
                "emu: trainer.precision is 32-true, not bf16-mixed, which this CPU emulates many times slower"
            )

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # of a constructor, within all that jsonargparse tried instead
            raise ValueError(one_line(str(error), [], ())) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer")
        if self.subcommand == "fit" and not settings.fast_dev_run:
            if settings.max_steps == -1 and settings.max_epochs is None and settings.max_time is None:
                raise ValueError("training would never end: say how long, such as --trainer.max_steps 1000")
        # The clock comes first: what other callbacks do after a batch is not part of its time.
        is_timed = self.subcommand == "fit" and not settings.fast_dev_run and settings.logger is not False
        clock = [Throughput()] if is_timed else []
        callbacks: list[Callback] = [*clock, *_listed(settings.callbacks), BrokenFileReport()]
        if settings.enable_progress_bar is not False:
            callbacks.append(StepProgressBar())
        if settings.enable_checkpointing is not False and not settings.fast_dev_run:
            callbacks.append(self._get(self.config_init, "checkpoint"))
        loggers = self._loggers(settings.logger)
        return super().instantiate_trainer(callbacks=callbacks, logger=loggers, **kwargs)

    def _loggers(self, configured: Any) -> list[Logger] | bool:
        """The metrics file, then what the config adds; nothing where it says `logger: false`."""
        if configured is False:
            return False
        name = "metrics" if self.subcommand == "fit" else self.subcommand
        run = self._get(self.config, "run_dir")
        others = _listed(configured) if configured is not True else []
        for logger in others:
            if isinstance(logger, LivesInRun):
                logger.run_dir = run
        return [MetricsFile(Path(run) / f"{name}.csv"), *others]

    def after_instantiate_classes(self) -> None:
        last = last_checkpoint(self.trainer.default_root_dir)
        settings = self.config_init[self.subcommand]
        if settings.ckpt_path == "last":
            settings.ckpt_path = str(last) if last.exists() else None
            if settings.ckpt_path is None and self.subcommand != "fit":
                raise FileNotFoundError(f"{last} does not exist: train it with `emu fit`, or name --run_dir")
        if settings.ckpt_path:
            self._refuse_unreadable(Path(settings.ckpt_path))
        if self.subcommand == "fit":
            self._refuse_mixed_runs(settings.ckpt_path)
        elif settings.ckpt_path is None:
            print(f"emu: {self.subcommand} without --ckpt_path: the model's initial weights", file=sys.stderr)

    def _refuse_unreadable(self, ckpt_path: Path) -> None:
        """Says what is wrong with a checkpoint before Lightning fails at it.

        Raises:
            ValueError: it is no checkpoint, is damaged, or is sharded and the strategy is not.
        """
        if ckpt_path.is_file():
            read_checkpoint(ckpt_path, mmap=True)
        elif ckpt_path.is_dir() and not is_sharded(ckpt_path):
            raise ValueError(
                f"{ckpt_path} is not a complete sharded checkpoint: it needs {SHARDS_INDEX} and {REMAINDER}"
            )
        elif ckpt_path.is_dir() and not isinstance(self.trainer.strategy, Sharded):
            raise ValueError(
                f"{ckpt_path} is sharded: add --config configs/hardware/fsdp.yaml, on any number of devices; "
                "`emu export` makes its weights one file"
            )

    def _refuse_mixed_runs(self, ckpt_path: str | None) -> None:
        """One run folder is one run: of one model, and never overwritten by another.

        Raises:
            ValueError: a fresh run would overwrite the folder's checkpoint, or the checkpoint to resume was
                trained with other model settings than the configuration asks for.
        """
        if self._get(self.config, "trainer").fast_dev_run:
            return
        run = Path(self.trainer.default_root_dir)
        if ckpt_path is None:
            if last_checkpoint(run).exists():
                raise ValueError(
                    f"{run} holds another run: go on with it by --ckpt_path last, or name a new --run_dir"
                )
            return
        trained_with = Path(ckpt_path).parent.parent / "config.yaml"
        if trained_with.is_file():
            asked_for = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
            before = _flat(yaml.safe_load(trained_with.read_text()).get("model"))
            now = _flat(yaml.safe_load(asked_for).get("model"))
            for key in before:
                if before[key] != now.get(key):
                    raise ValueError(
                        f"{ckpt_path} was trained with model.{key}={before[key]}, config says {now.get(key)};"
                        " resuming goes on with the same model; another stage starts from it by init_from"
                    )

    def before_fit(self) -> None:
        self._finished_marker.unlink(missing_ok=True)

    def after_fit(self) -> None:
        if self._get(self.config, "trainer").fast_dev_run:
            return
        if isinstance(self.model, HandsOver) and saves(self.trainer):
            self.model.save_pretrained(Path(self.trainer.default_root_dir) / "pretrained")
        if self.trainer.is_global_zero:
            seconds = round(self._get(self.config_init, "checkpoint").seconds, 1)
            finished = {"step": self.trainer.global_step, "seconds": seconds}
            write_whole(self._finished_marker, json.dumps(finished) + "\n")

    @property
    def _finished_marker(self) -> Path:
        return Path(self.trainer.default_root_dir) / "finished.json"


def main(argv: list[str]) -> None:
    """Run one of the four verbs.

    Args:
        argv: the verb and its options, such as `["fit", "--config", "configs/autoencoder/miniature.yaml"]`.

    Raises:
        ValueError: the configuration or the checkpoint is not usable; one line naming the key or file.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM.
    """
    _silence_advertisements()
    try:
        EmuCLI(argv)
    except SIGTERMException:
        print(f"emu: terminated; {RESUME_HINT}", file=sys.stderr)
        raise SystemExit(EXIT_TERMINATED) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into exit code 1
            print(f"emu: interrupted; {RESUME_HINT}", file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED) from None
        raise
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        if "Error(s) in loading state_dict" in str(error):
            first = " ".join(str(error).split(", ")[0].split())  # torch names all weights
            raise ValueError(f"the checkpoint does not fit the configured model: {first}") from error
        if "does not allow for gradient clipping" in str(error):  # Lightning, of a fused optimizer
            raise ValueError(f"{error} Take emu_lightning.optimizers.AdamW") from error
        raise


def _silence_advertisements() -> None:
    """Keep what a user can act on, which Lightning's tips and its own deprecations are not."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: "Tip:" not in record.getMessage())
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")


def _listed(value: Any) -> list[Any]:
    """What Lightning takes as None, one or a list, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys, without `init_args`, as on the command line."""
    if not isinstance(settings, dict):
        return {prefix.removesuffix("."): settings}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, prefix if key == "init_args" else f"{prefix}{key}.")
    return flat
