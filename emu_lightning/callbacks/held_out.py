"""What training has made, on prompts that chose nothing: when it has ended, and at stops on the way."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
from emu_lightning.evaluation.metrics import Embedder
from emu_lightning.evaluation.metrics.distances import vendi_score
from emu_lightning.evaluation.prompts import read_prompts
from emu_lightning.evaluation.scorers import Scorer
from emu_lightning.files import write_whole
from emu_lightning.resources import shipped

Pictures = NDArray[np.uint8]
RESULTS = "results.json"
VARIATIONS = "variations"


@runtime_checkable
class LoadsLikeStart(Protocol):
    """A module that can draw with other weights as its start draws."""

    def load_like_start(self, path: str | Path) -> Generates:
        """The generator in a folder, such as ``<run>/chosen``."""


class Asked(NamedTuple):
    """Prompts and their seeds, drawn into a folder of ``<run>/held_out``."""

    folder: str
    prompts: Sequence[str]
    seeds: Sequence[int]


class HeldOutEvaluation(Callback):
    """Draws prompts with what training has made, and judges the pictures.

    When training has ended the model that is kept is drawn, ``<run>/chosen`` where
    :class:`PreferenceEvaluation` chose one, else the last weights; and on the way that of each of
    ``at_steps``. Pictures go to ``<run>/held_out/chosen-<n>`` or ``<run>/held_out/step-<n>``, as `emu sample`
    leaves them, so that people can be asked about them, too. It draws in the precision that training has.

    With a scorer it logs ``held_out/appeal`` and ``held_out/faithfulness``, means; and of quality-tuning,
    against its frozen start in ``<run>/held_out/start``, ``held_out/appeal_win_rate``,
    ``held_out/appeal_win_minus_lose`` and ``held_out/faithfulness_win_minus_lose``. With intervals they are
    in ``<run>/held_out/results.json``, by the folders' names; ``kept`` there is that of the model that is
    kept.

    With an embedder the first prompts are drawn again, with other seeds, into ``<run>/held_out/variations``;
    ``held_out/diversity`` is how many different pictures those of a prompt are as good as (Vendi score, from
    1 to ``num_variations``), on average.

    Args:
        prompts: file of prompts, as `read_prompts` takes it. Not those that choose the stop.
        scorer: judges appeal and faithfulness; None only draws.
        at_steps: optimizer steps.
        first_seed: prompt i has seed ``first_seed + i``.
        batch_size: pictures generated at once.
        num_shown: pictures that loggers are shown.
        embedder: places pictures, such as a CLIP; None leaves diversity out.
        num_varied: prompts that diversity is measured on.
        num_variations: pictures of each of them.
    """

    def __init__(
        self,
        prompts: str,
        scorer: Scorer | None = None,
        at_steps: Sequence[int] = (),
        first_seed: int = 0,
        batch_size: int = 64,
        num_shown: int = 16,
        embedder: Embedder | None = None,
        num_varied: int = 24,
        num_variations: int = 8,
    ) -> None:
        self.prompts = list(read_prompts(shipped(prompts)).prompts)
        self.seeds = range(first_seed, first_seed + len(self.prompts))
        self.embedder, self.num_variations = embedder, num_variations
        self._asked = [Asked("", self.prompts, self.seeds)]
        if embedder is not None:
            varied = [prompt for prompt in self.prompts[:num_varied] for _ in range(num_variations)]
            # Seeds that no prompt has, so that no picture is drawn twice.
            self._asked.append(
                Asked(VARIATIONS, varied, range(self.seeds.stop, self.seeds.stop + len(varied)))
            )
        self.scorer, self.at_steps = scorer, frozenset(at_steps)
        self.batch_size, self.num_shown = batch_size, num_shown
        self._drawn_step = 0
        self._has_start = False  # its pictures stay the same, and its weights may be large

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
            self._draw(trainer, pl_module.load_like_start(chosen), name, {})
            self._evaluate(trainer, pl_module, name, is_kept=True)
        elif trainer.global_step != self._drawn_step or trainer.global_step == 0:
            self._evaluate_now(trainer, pl_module, is_kept=True)

    def _evaluate_now(self, trainer: Trainer, pl_module: LightningModule, is_kept: bool = False) -> None:
        self._drawn_step = trainer.global_step
        name = f"step-{self._drawn_step:06d}"
        self._draw_now(trainer, pl_module, name)
        self._evaluate(trainer, pl_module, name, is_kept)

    def _draw_now(self, trainer: Trainer, pl_module: Any, name: str) -> None:
        """With the weights as they are; where those are sharded, all processes have to draw equally often."""
        for asked in self._asked:
            num, size = len(asked.prompts), trainer.world_size
            rows = [min(row, num - 1) for row in range(trainer.global_rank, num + -num % size, size)]
            with trainer.precision_plugin.val_step_context():
                pictures = generate_pictures(
                    pl_module,
                    [asked.prompts[row] for row in rows],
                    [asked.seeds[row] for row in rows],
                    batch_size=self.batch_size,
                    description=f"held-out prompts: {name}",
                )
            drawn = dict(zip((asked.seeds[row] for row in rows), pictures, strict=True))
            self._fill(trainer, Drawn(drawn), asked, name, {})
        trainer.strategy.barrier("HeldOutEvaluation")

    def _draw(self, trainer: Trainer, generator: Generates, name: str, settings: dict[str, Any]) -> None:
        """With a generator that every process has; each draws its share."""
        for asked in self._asked:
            self._fill(trainer, generator, asked, name, settings)
        trainer.strategy.barrier("HeldOutEvaluation")

    def _fill(
        self, trainer: Trainer, generator: Generates, asked: Asked, name: str, settings: dict[str, Any]
    ) -> None:
        with trainer.precision_plugin.val_step_context():
            fill_folder(
                generator,
                asked.prompts,
                asked.seeds,
                _folder(trainer) / asked.folder / name,
                settings={**settings, "precision": str(trainer.precision)},
                batch_size=self.batch_size,
                description=f"held-out prompts: {name}",
                share=(trainer.global_rank, trainer.world_size),
            )

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, name: str, is_kept: bool) -> None:
        columns = {"picture": name}
        if isinstance(pl_module, Tunes):
            if not self._has_start:
                self._draw(trainer, pl_module.load_start(), "start", {"init_from": str(pl_module.init_from)})
                self._has_start = True
            columns = {"start": "start", "tuned": name}
        if not trainer.is_global_zero:
            return
        drawn = {column: read_folder(_folder(trainer) / each)[0] for column, each in columns.items()}
        num = self.num_shown
        shown = {column: each[:num] for column, each in drawn.items()}
        show(trainer, "held_out/pictures", self.prompts[:num], self.seeds[:num], shown)
        values, details = self._measure(trainer, name, drawn)
        if not values:
            return
        # A step further on at the end: the metrics file of a run that is begun again keeps what came before.
        step = trainer.global_step if is_kept else trainer.global_step - 1
        for logger in trainer.loggers:
            logger.log_metrics({f"held_out/{key}": value for key, value in values.items()}, step)
        results = _folder(trainer) / RESULTS
        known = json.loads(results.read_text()) if results.is_file() else {}
        if "start" in drawn and "start" not in known:
            start, by_prompt = self._measure(trainer, "start", {"picture": drawn["start"]})
            known["start"] = {"step": 0, **start, **by_prompt}
        known |= {name: {"step": trainer.global_step, **values, **details}, "kept": name}
        write_whole(results, json.dumps(known, indent=1) + "\n")

    def _measure(
        self, trainer: Trainer, name: str, drawn: dict[str, Pictures]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Plain values, and what there is to read about them; none without a scorer and an embedder."""
        values: dict[str, float] = {}
        details: dict[str, Any] = {}
        if self.scorer is not None:
            values, details = self._judge(self.scorer, drawn)
        if self.embedder is not None:
            details["diversity_by_prompt"] = self._diversity(self.embedder, trainer, name)
            values["diversity"] = float(np.mean(details["diversity_by_prompt"]))
        return values, details

    def _diversity(self, embedder: Embedder, trainer: Trainer, name: str) -> list[float]:
        """Of each varied prompt."""
        pictures = read_folder(_folder(trainer) / VARIATIONS / name)[0]
        places = embedder.embed_images(to_images(pictures))
        return [vendi_score(each) for each in np.split(places, len(places) // self.num_variations)]

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


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "held_out"


class Drawn:
    """Draws what is drawn already: pictures (H, W, 3) by their seeds."""

    def __init__(self, pictures: Mapping[int, Pictures]) -> None:
        self._pictures = pictures

    def generate(self, prompts: Sequence[str], seeds: Iterable[int], **_: Any) -> Tensor:
        return to_images(np.stack([self._pictures[seed] for seed in seeds]))
