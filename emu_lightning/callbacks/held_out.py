"""What training has made, on prompts that chose nothing: when it has ended, and at stops on the way."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor

from emu_lightning.callbacks.samples import Tunes, show
from emu_lightning.evaluation.comparison import compare
from emu_lightning.evaluation.generation import (
    Generates,
    fill_folder,
    generate_pictures,
    read_folder,
    to_images,
)
from emu_lightning.evaluation.prompts import read_prompts
from emu_lightning.evaluation.scorers import Scorer
from emu_lightning.files import write_whole
from emu_lightning.resources import shipped

Pictures = NDArray[np.uint8]


@runtime_checkable
class LoadsLikeStart(Protocol):
    """A module that can draw with other weights as its start draws."""

    def load_like_start(self, path: str | Path) -> Generates:
        """The generator in a folder, such as ``<run>/chosen``."""


class HeldOutEvaluation(Callback):
    """Draws prompts with what training has made, and judges the pictures.

    When training has ended the model that is kept is drawn, ``<run>/chosen`` where
    :class:`PreferenceEvaluation` chose one, else the last weights; and on the way that of each of
    ``at_steps``. Pictures go to ``<run>/held_out/chosen-<n>`` or ``<run>/held_out/step-<n>``, as `emu sample`
    leaves them, so that people can be asked about them, too.

    With a scorer it logs ``held_out/appeal`` and ``held_out/faithfulness``, means; and of quality-tuning,
    against its frozen start in ``<run>/held_out/start``, ``held_out/appeal_win_rate``,
    ``held_out/appeal_win_minus_lose`` and ``held_out/faithfulness_win_minus_lose``. With intervals they are
    in ``<run>/held_out/results.json``, by the folders' names; ``kept`` there is that of the model that is
    kept.

    Args:
        prompts: file of prompts, as `read_prompts` takes it. Not those that choose the stop.
        scorer: judges appeal and faithfulness; None only draws.
        at_steps: optimizer steps.
        first_seed: prompt i has seed ``first_seed + i``.
        batch_size: pictures generated at once.
        num_shown: pictures that loggers are shown.
    """

    def __init__(
        self,
        prompts: str,
        scorer: Scorer | None = None,
        at_steps: Sequence[int] = (),
        first_seed: int = 0,
        batch_size: int = 64,
        num_shown: int = 16,
    ) -> None:
        self.prompts = list(read_prompts(shipped(prompts)).prompts)
        self.seeds = range(first_seed, first_seed + len(self.prompts))
        self.scorer, self.at_steps = scorer, frozenset(at_steps)
        self.batch_size, self.num_shown = batch_size, num_shown
        self._drawn_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # With gradient accumulation several batches end at the same step.
        if step in self.at_steps and step != self._drawn_step:
            self._evaluate_now(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # the Trainer declares little
            return
        chosen = Path(trainer.default_root_dir) / "chosen"
        if isinstance(pl_module, LoadsLikeStart) and chosen.is_dir():
            name = f"chosen-{json.loads(chosen.with_suffix('.json').read_text())['step']:06d}"
            pictures = self._draw(trainer, pl_module.load_like_start(chosen), name, {})
            self._evaluate(trainer, pl_module, name, pictures, is_kept=True)
        elif trainer.global_step != self._drawn_step or trainer.global_step == 0:
            self._evaluate_now(trainer, pl_module, is_kept=True)

    def _evaluate_now(self, trainer: Trainer, pl_module: LightningModule, is_kept: bool = False) -> None:
        self._drawn_step = trainer.global_step
        name = f"step-{self._drawn_step:06d}"
        self._evaluate(trainer, pl_module, name, self._draw_now(trainer, pl_module, name), is_kept)

    def _draw_now(self, trainer: Trainer, pl_module: Any, name: str) -> Pictures:
        """With the weights as they are; where those are sharded, all processes have to draw equally often."""
        num, world_size = len(self.prompts), trainer.world_size
        rows = [min(row, num - 1) for row in range(trainer.global_rank, num + -num % world_size, world_size)]
        pictures = generate_pictures(
            pl_module,
            [self.prompts[row] for row in rows],
            [self.seeds[row] for row in rows],
            batch_size=self.batch_size,
            description=f"held-out prompts: {name}",
        )
        drawn = dict(zip((self.seeds[row] for row in rows), pictures, strict=True))
        return self._draw(trainer, Drawn(drawn), name, {})

    def _draw(self, trainer: Trainer, generator: Generates, name: str, settings: dict[str, Any]) -> Pictures:
        """With a generator that every process has; each draws its share."""
        folder = Path(trainer.default_root_dir) / "held_out" / name
        fill_folder(
            generator,
            self.prompts,
            self.seeds,
            folder,
            settings=settings,
            batch_size=self.batch_size,
            description=f"held-out prompts: {name}",
            share=(trainer.global_rank, trainer.world_size),
        )
        trainer.strategy.barrier("HeldOutEvaluation")
        return read_folder(folder)[0]

    def _evaluate(
        self, trainer: Trainer, pl_module: LightningModule, name: str, pictures: Pictures, is_kept: bool
    ) -> None:
        drawn = {"picture": pictures}
        if isinstance(pl_module, Tunes):
            settings = {"init_from": str(pl_module.init_from)}
            start = self._draw(trainer, pl_module.load_start(), "start", settings)
            drawn = {"start": start, "tuned": pictures}
        if not trainer.is_global_zero:
            return
        num = self.num_shown
        shown = {column: each[:num] for column, each in drawn.items()}
        show(trainer, "held_out/pictures", self.prompts[:num], self.seeds[:num], shown)
        if self.scorer is None:
            return
        values, judged = self._judge(self.scorer, drawn)
        # A step further on at the end: the metrics file of a run that is begun again keeps what came before.
        step = trainer.global_step if is_kept else trainer.global_step - 1
        for logger in trainer.loggers:
            logger.log_metrics({f"held_out/{key}": value for key, value in values.items()}, step)
        results = Path(trainer.default_root_dir) / "held_out" / "results.json"
        known = json.loads(results.read_text()) if results.is_file() else {}
        known |= {name: {"step": trainer.global_step, **values, **judged}, "kept": name}
        write_whole(results, json.dumps(known, indent=1) + "\n")

    def _judge(
        self, scorer: Scorer, drawn: dict[str, Pictures]
    ) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
        """Plain values, and what there is to read about a comparison."""
        if "start" not in drawn:
            images = to_images(drawn["picture"])
            appeal, faithfulness = scorer.appeal(images), scorer.faithfulness(images, self.prompts)
            return {"appeal": float(appeal.mean()), "faithfulness": float(faithfulness.mean())}, {}
        result = compare(scorer, drawn["start"], drawn["tuned"], self.prompts)
        values = {
            "appeal": float(result.tuned_appeal.mean()),
            "faithfulness": float(result.tuned_faithfulness.mean()),
            "appeal_win_rate": result.appeal.win_rate,
            "appeal_win_minus_lose": result.appeal.win_minus_lose,
            "faithfulness_win_minus_lose": result.faithfulness.win_minus_lose,
        }
        return values, {
            "against_start": {
                "appeal": result.appeal.to_dict("win_rate"),
                "faithfulness": result.faithfulness.to_dict("win_minus_lose"),
            }
        }


class Drawn:
    """Draws what is drawn already: pictures (H, W, 3) by their seeds."""

    def __init__(self, pictures: Mapping[int, Pictures]) -> None:
        self._pictures = pictures

    def generate(self, prompts: Sequence[str], seeds: Iterable[int], **_: Any) -> Tensor:
        return to_images(np.stack([self._pictures[seed] for seed in seeds]))
