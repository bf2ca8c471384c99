"""The stop that quality-tuning is chosen by: preference over the frozen start, never the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from emu_lightning.callbacks.samples import pictures_of_the_start, show, side_by_side, write_step
from emu_lightning.evaluation.comparison import compare
from emu_lightning.evaluation.generation import generate_pictures
from emu_lightning.evaluation.prompts import read_lines
from emu_lightning.evaluation.scorers import Scorer
from emu_lightning.evaluation.stopping import MAX_FAITHFULNESS_LOSS, REASON, choose_stop
from emu_lightning.files import write_whole
from emu_lightning.parallel import saves
from emu_lightning.resources import shipped


class PreferenceEvaluation(Callback):
    """Judges the tuned model against its frozen start, and chooses the iteration to keep.

    Every ``every_n_train_steps`` it generates pictures of ``prompts`` at fixed seeds, lets ``scorer`` judge
    them against those of the start, logs ``tune/appeal_win_rate``, ``tune/appeal_win_minus_lose``
    and ``tune/faithfulness_win_minus_lose``, appends to ``<run>/preference.jsonl``, and draws start above
    tuned into ``<run>/samples``. The best iteration so far is the one with the highest appeal win minus lose
    among those whose faithfulness win minus lose is at least ``-max_faithfulness_loss``; its generator is
    written to ``<run>/chosen`` with the reason in ``chosen.json``. Training stops after ``patience``
    evaluations without a better one. The rule is a choice: the paper says that people chose, not how.

    Args:
        scorer: judges appeal and faithfulness.
        prompts: file of prompts, one a line. Not those the final evaluation reports on.
        every_n_train_steps: optimizer steps between evaluations.
        patience: evaluations without improvement before training stops.
        max_faithfulness_loss: how much faithfulness may fall, as a share of prompts in [0, 1].
        first_seed: prompt i has seed ``first_seed + i``.
        batch_size: pictures generated at once.
        num_shown: pairs in a side-by-side grid.
    """

    def __init__(
        self,
        scorer: Scorer,
        prompts: str,
        every_n_train_steps: int = 50,
        patience: int = 3,
        max_faithfulness_loss: float = MAX_FAITHFULNESS_LOSS,
        first_seed: int = 10_000,
        batch_size: int = 64,
        num_shown: int = 16,
    ) -> None:
        if every_n_train_steps < 1 or patience < 1:
            raise ValueError("every_n_train_steps and patience of PreferenceEvaluation must be at least 1")
        self.scorer, self.prompts = scorer, list(read_lines(shipped(prompts)).prompts)
        self.every_n_train_steps, self.patience = every_n_train_steps, patience
        self.max_faithfulness_loss, self.batch_size = max_faithfulness_loss, batch_size
        self.num_shown = num_shown
        self.seeds = list(range(first_seed, first_seed + len(self.prompts)))
        self.history: list[dict[str, float]] = []
        self._start: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = pictures_of_the_start(trainer, pl_module, self.prompts, self.seeds, self.batch_size)
        self._stop_where_due(trainer)  # the run may have been killed after its last evaluation

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # With gradient accumulation several batches end at the same step, the first ones at step 0.
        done = step == 0 or (self.history and self.history[-1]["step"] == step)
        if step % self.every_n_train_steps or done:
            return
        tuned = generate_pictures(
            pl_module,  # type: ignore[arg-type]
            self.prompts,
            self.seeds,
            batch_size=self.batch_size,
            description=f"pictures after {step} steps",
        )
        result = compare(self.scorer, self._start, tuned, self.prompts)
        judged = {
            "step": step,
            "appeal_win_rate": result.appeal.win_rate,
            "appeal_win_minus_lose": result.appeal.win_minus_lose,
            "faithfulness_win_minus_lose": result.faithfulness.win_minus_lose,
            "faithfulness": float(result.tuned_faithfulness.mean()),
            "appeal": float(result.tuned_appeal.mean()),
        }
        # GPUs may differ in the last bits of a picture, but all processes have to choose and stop together.
        judged = trainer.strategy.broadcast(judged)
        self.history.append(judged)
        # Lightning's `log_dict` would repeat the values in every later row, as if they had been judged again.
        values = {f"tune/{name}": value for name, value in judged.items() if name != "step"}
        for logger in trainer.loggers:
            logger.log_metrics(values, step - 1)  # loggers number the steps from 0
        if self._best() is judged and saves(trainer):
            pl_module.generator.save_pretrained(Path(trainer.default_root_dir) / "chosen")  # type: ignore[union-attr,operator]
        if trainer.is_global_zero:
            self._record(trainer, tuned)
        self._stop_where_due(trainer)

    def _stop_where_due(self, trainer: Trainer) -> None:
        best = self._best()
        since = sum(entry["step"] > best["step"] for entry in self.history) if best else len(self.history)
        if since >= self.patience:
            trainer.should_stop = True

    def _best(self) -> Mapping[str, float] | None:
        """The entry to keep, by the rule above; None while every one lost too much faithfulness."""
        return choose_stop(self.history, self.max_faithfulness_loss)

    def _record(self, trainer: Trainer, tuned: Any) -> None:
        run = Path(trainer.default_root_dir)
        num = self.num_shown
        start, tuned = self._start[:num], tuned[:num]
        write_step(trainer, side_by_side(start, tuned))
        show(trainer, "samples", self.prompts[:num], self.seeds[:num], {"start": start, "tuned": tuned})
        write_whole(run / "preference.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.history))
        if self._best() is self.history[-1]:
            reason = REASON.format(-self.max_faithfulness_loss)
            write_whole(
                run / "chosen.json", json.dumps({**self.history[-1], "reason": reason}, indent=1) + "\n"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])
