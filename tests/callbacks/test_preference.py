"""The stop rule: pictures that say how many steps were made, and a scorer that has a script."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from torch import Tensor, nn

from emu_lightning.callbacks import PreferenceEvaluation
from emu_lightning.callbacks.metrics import MetricsFile
from emu_lightning.data.batch import Batch
from emu_lightning.evaluation.generation import to_images
from emu_lightning.modules import QualityTuningModule, load_generator
from emu_lightning.modules.generator import Description, Generator
from tests.tiny import TinyData, make_trainer, tiny_generator

PER_STEP = 4  # of 255: how much brighter the picture is after each step
PROMPTS = ["first", "second", "third", "fourth"]


class Climber(Generator):
    """Its pictures are `PER_STEP` brighter after every step, while its loss rises or falls by `drift`."""

    drawn: list[tuple[int, list[int]]] = []  # (brightness, seeds) of every call

    def __init__(self) -> None:
        super().__init__(torch.optim.SGD, None, 0)
        self.level = nn.Parameter(torch.zeros(()))
        self.drift = 0.0

    def loss(self, batch: Batch, rng: torch.Generator) -> Tensor:
        return -self.level + self.drift * batch.position

    def generate(
        self, prompts: Sequence[str], seeds: Iterable[int], *, num_steps=None, guidance_scale=None
    ) -> Tensor:
        brightness = round(PER_STEP * self.level.item())
        Climber.drawn.append((brightness, list(seeds)))
        return to_images(np.full((len(prompts), 2, 2, 3), brightness, np.uint8))

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        yield self.level

    def update_average(self) -> None:
        pass

    def describe(self) -> Description:
        return {"class_path": f"{__name__}.Climber", "init_args": {}}

    def sampling_state(self) -> dict[str, Tensor]:
        return {"level": self.level.detach()}

    def load_sampling_state(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        self.level.data.copy_(state["level"])
        return [], []


class Script:
    """Scores by the step that a picture shows: how many of the four prompts win, and how many are lost."""

    def __init__(self, script: dict[int, tuple[int, int]]) -> None:
        self.script = script

    def _step(self, images: Tensor) -> int:
        return round(float((images[0, 0, 0, 0] + 1) * 127.5) / PER_STEP)

    def appeal(self, images: Tensor) -> np.ndarray:
        won = self.script.get(self._step(images), (0, 0))[0]
        return np.array([0.9] * won + [0.5] * (4 - won))

    def faithfulness(self, images: Tensor, prompts: Sequence[str]) -> np.ndarray:
        lost = self.script.get(self._step(images), (0, 0))[1]
        return np.array([0.0] * lost + [1.0] * (4 - lost))


# step: (prompts won in appeal, prompts lost in faithfulness)
SCRIPT = {2: (2, 0), 4: (4, 1), 6: (3, 0), 8: (2, 0), 10: (3, 0), 12: (4, 0)}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    Climber.drawn = []
    return Climber().save_pretrained(tmp_path / "base")


def make(start: Path, drift: float = 0.0, script=SCRIPT, **arguments):
    """Module and callback."""
    (start.parent / "prompts.txt").write_text("\n".join(PROMPTS))
    module = QualityTuningModule(str(start), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    module.generator.drift = drift  # type: ignore[assignment]
    defaults = {"every_n_train_steps": 2, "patience": 2, "batch_size": 3, "num_shown": 2}
    prompts = str(start.parent / "prompts.txt")
    return module, PreferenceEvaluation(Script(script), prompts, **{**defaults, **arguments})


def chosen(run: Path) -> tuple[int, float]:
    """The chosen step by its record, and by its weights."""
    return json.loads((run / "chosen.json").read_text())["step"], load_generator(run / "chosen").level.item()


@pytest.mark.parametrize("drift", [0.0, 10.0, -10.0])
def test_the_best_faithful_iteration_is_chosen_whatever_the_loss(
    start: Path, tmp_path: Path, drift: float
) -> None:
    """Step 4 wins most but loses faithfulness; step 10 equals step 6, so two evaluations brought nothing."""
    module, preference = make(start, drift)
    trainer = make_trainer(tmp_path / "run", max_steps=50, callbacks=[preference])
    trainer.fit(module, TinyData())
    assert trainer.global_step == 10
    assert chosen(tmp_path / "run") == (6, 6.0)
    history = [json.loads(line) for line in (tmp_path / "run" / "preference.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history] == [2, 4, 6, 8, 10]
    assert [entry["appeal_win_minus_lose"] for entry in history] == [0.5, 1.0, 0.75, 0.5, 0.75]
    assert [entry["faithfulness_win_minus_lose"] for entry in history] == [0, -0.25, 0, 0, 0]
    reason = json.loads((tmp_path / "run" / "chosen.json").read_text())["reason"]
    assert "appeal win minus lose" in reason and "-0.03" in reason
    assert module.generator.level.item() == 10  # the module itself stands where training ended


def test_a_longer_patience_finds_what_comes_later(start: Path, tmp_path: Path) -> None:
    module, preference = make(start, patience=3)
    trainer = make_trainer(tmp_path, max_steps=14, callbacks=[preference])
    trainer.fit(module, TinyData())
    assert trainer.global_step == 14 and chosen(tmp_path) == (12, 12.0)


def test_how_much_faithfulness_may_fall_is_an_argument(start: Path, tmp_path: Path) -> None:
    module, preference = make(start, max_faithfulness_loss=0.25)
    trainer = make_trainer(tmp_path, max_steps=50, callbacks=[preference])
    trainer.fit(module, TinyData())
    assert trainer.global_step == 8 and chosen(tmp_path) == (4, 4.0)


def test_where_every_iteration_loses_faithfulness_none_is_chosen(start: Path, tmp_path: Path) -> None:
    module, preference = make(start, script={step: (4, 2) for step in range(2, 50)})
    trainer = make_trainer(tmp_path, max_steps=50, callbacks=[preference])
    trainer.fit(module, TinyData())
    assert trainer.global_step == 4
    assert not (tmp_path / "chosen").exists() and not (tmp_path / "chosen.json").exists()
    assert len((tmp_path / "preference.jsonl").read_text().splitlines()) == 2


def test_each_evaluation_is_one_row_of_the_metrics(start: Path, tmp_path: Path) -> None:
    module, preference = make(start, script={2: (2, 0), 4: (1, 1)})
    logger = MetricsFile(tmp_path / "metrics.csv")
    trainer = make_trainer(tmp_path, max_steps=5, callbacks=[preference], logger=logger, log_every_n_steps=1)
    trainer.fit(module, TinyData())
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    judged = [row for row in rows if row["tune/appeal_win_rate"]]
    assert [(row["step"], row["tune/appeal_win_rate"]) for row in judged] == [("1", "0.5"), ("3", "0.25")]
    assert [row["tune/faithfulness_win_minus_lose"] for row in judged] == ["0.0", "-0.25"]
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2", "3", "4"]


def test_start_and_tuned_pictures_have_the_same_seeds(start: Path, tmp_path: Path) -> None:
    module, preference = make(start, first_seed=70)
    make_trainer(tmp_path, max_steps=3, callbacks=[preference]).fit(module, TinyData())
    seeds = [[70, 71, 72], [73]]  # three pictures at a time
    assert Climber.drawn == [(0, seeds[0]), (0, seeds[1]), (2 * PER_STEP, seeds[0]), (2 * PER_STEP, seeds[1])]
    shown = np.asarray(Image.open(tmp_path / "samples" / "step-000002.png"))
    assert shown[::2, ::2, 0].tolist() == [[0, 0], [2 * PER_STEP, 2 * PER_STEP]]  # start above tuned


def test_gradient_accumulation_judges_each_step_once_and_not_the_start(start: Path, tmp_path: Path) -> None:
    module, preference = make(start)
    trainer = make_trainer(tmp_path, max_steps=5, accumulate_grad_batches=3, callbacks=[preference])
    trainer.fit(module, TinyData())
    assert [entry["step"] for entry in preference.history] == [2, 4]


class SaveAt(Callback):
    """Saves after a step, behind the other callbacks, as RunCheckpoint does."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("killed_at", [3, 6, 9, 10])
def test_a_resumed_run_judges_and_stops_as_if_it_had_not_been_killed(
    start: Path, tmp_path: Path, killed_at: int
) -> None:
    module, preference = make(start)
    callbacks = [preference, SaveAt(killed_at, tmp_path / "last.ckpt")]
    make_trainer(tmp_path / "run", max_steps=50, callbacks=callbacks).fit(module, TinyData())
    whole = preference.history
    files = {name: (tmp_path / "run" / name).read_bytes() for name in ("preference.jsonl", "chosen.json")}

    Climber.drawn = []
    module, preference = make(start)
    trainer = make_trainer(tmp_path / "run", max_steps=50, callbacks=[preference])
    trainer.fit(module, TinyData(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 10
    assert preference.history == whole
    assert chosen(tmp_path / "run") == (6, 6.0)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in files} == files
    assert not any(brightness == 0 for brightness, _ in Climber.drawn)  # the start's pictures were there


def test_a_module_without_a_start_is_refused_in_one_line(start: Path, tmp_path: Path) -> None:
    _, preference = make(start)
    with pytest.raises(ValueError, match="DiffusionModule has no frozen start") as error:
        make_trainer(tmp_path, max_steps=2, callbacks=[preference]).fit(tiny_generator(), TinyData())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["every_n_train_steps", "patience"])
def test_numbers_below_one_are_refused(start: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*at least 1"):
        make(start, **{name: 0})
