"""What training has made, drawn and judged on prompts that chose nothing."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from emu_lightning import cli
from emu_lightning.callbacks import HeldOutEvaluation, PreferenceEvaluation
from emu_lightning.callbacks.metrics import MetricsFile
from emu_lightning.evaluation.comparison import compare
from emu_lightning.evaluation.generation import generate_pictures, read_folder, to_images, to_uint8
from emu_lightning.modules import QualityTuningModule, load_generator
from emu_lightning.resources import shipped
from emu_lightning.verbs.world_checks import held_out_prompts
from tests.tiny import TinyData, make_trainer, tiny_generator

ROOT = Path(__file__).parent.parent.parent
PROMPTS = ["a red ball", "a blue star at night", "a box"]


class Redness:
    """Likes red, and finds a picture the more faithful the greener it is."""

    def appeal(self, images: torch.Tensor) -> np.ndarray:
        return images[:, 0].mean((1, 2)).double().numpy()

    def faithfulness(self, images: torch.Tensor, prompts: Sequence[str]) -> np.ndarray:
        return images[:, 1].mean((1, 2)).double().numpy()


@pytest.fixture
def base(in_tmp_path: Path) -> Path:
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    return tiny_generator(seed=1).save_pretrained("base")


def tune(base: Path, steps: int, *callbacks, **arguments) -> QualityTuningModule:
    torch.manual_seed(0)
    module = QualityTuningModule(str(base), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    logger = MetricsFile("run/metrics.csv")
    trainer = make_trainer(
        Path("run"), max_steps=steps, callbacks=list(callbacks), logger=logger, **arguments
    )
    trainer.fit(module, TinyData())
    return module


def metric(name: str) -> list[tuple[int, float]]:
    with Path("run/metrics.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def test_stops_and_the_end_are_judged_against_the_start(base: Path) -> None:
    evaluation = HeldOutEvaluation("prompts.txt", Redness(), at_steps=[2, 3], first_seed=70)
    module = tune(base, 4, evaluation)
    pictures = {path.name: read_folder(path)[0] for path in Path("run/held_out").iterdir() if path.is_dir()}
    assert set(pictures) == {"start", "step-000002", "step-000003", "step-000004"}
    seeds = [70, 71, 72]
    assert np.array_equal(pictures["start"], to_uint8(load_generator(base).eval().generate(PROMPTS, seeds)))
    assert np.array_equal(pictures["step-000004"], to_uint8(module.generate(PROMPTS, seeds)))
    results = json.loads(Path("run/held_out/results.json").read_text())
    assert results["kept"] == "step-000004"
    for name in set(pictures) - {"start"}:
        expected = compare(Redness(), pictures["start"], pictures[name], PROMPTS)
        against = results[name]["against_start"]
        assert against["appeal"] == expected.appeal.to_dict("win_rate")
        assert against["faithfulness"] == expected.faithfulness.to_dict("win_minus_lose")
        assert results[name]["appeal"] == pytest.approx(expected.tuned_appeal.mean())
    logged = metric("held_out/appeal_win_minus_lose")
    assert [step for step, _ in logged] == [1, 2, 4]  # as loggers count; the end after the last one
    assert logged[-1][1] == results["step-000004"]["appeal_win_minus_lose"]


def test_what_was_chosen_is_judged_rather_than_the_last_weights(base: Path) -> None:
    chooser = PreferenceEvaluation(Redness(), "prompts.txt", every_n_train_steps=1, max_faithfulness_loss=1)
    tune(base, 6, chooser, HeldOutEvaluation("prompts.txt", Redness()))
    step = json.loads(Path("run/chosen.json").read_text())["step"]
    drawn = read_folder(f"run/held_out/chosen-{step:06d}")[0]
    chosen = load_generator("run/chosen").eval()
    assert np.array_equal(drawn, generate_pictures(chosen, PROMPTS, [0, 1, 2]))
    assert json.loads(Path("run/held_out/results.json").read_text())["kept"] == f"chosen-{step:06d}"


def test_a_run_that_was_killed_while_it_was_judged_is_judged_by_the_next_start(base: Path) -> None:
    module = tune(base, 2, HeldOutEvaluation("prompts.txt", Redness()))
    results = Path("run/held_out/results.json").read_text()
    module.trainer.save_checkpoint("last.ckpt")
    Path("run/held_out/results.json").unlink()
    Path("run/held_out/step-000002/00001.png").unlink()
    again = QualityTuningModule(str(base), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    trainer = make_trainer(
        Path("run"), max_steps=2, callbacks=[HeldOutEvaluation("prompts.txt", Redness())], logger=False
    )
    trainer.fit(again, TinyData(), ckpt_path="last.ckpt")  # nothing is left to train
    assert Path("run/held_out/results.json").read_text() == results


def test_a_generator_without_a_start_is_judged_by_itself(in_tmp_path: Path) -> None:
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    logger = MetricsFile("run/metrics.csv")
    evaluation = HeldOutEvaluation("prompts.txt", Redness())
    module = tiny_generator()
    make_trainer(Path("run"), max_steps=1, callbacks=[evaluation], logger=logger).fit(module, TinyData())
    drawn = read_folder("run/held_out/step-000001")[0]
    assert metric("held_out/appeal") == [(1, pytest.approx(drawn[..., 0].mean() / 127.5 - 1))]
    assert "held_out/appeal_win_rate" not in Path("run/metrics.csv").read_text()


def test_without_a_judge_pictures_are_drawn_all_the_same(base: Path) -> None:
    tune(base, 1, HeldOutEvaluation("prompts.txt"))
    assert len(read_folder("run/held_out/step-000001")[0]) == 3
    assert not Path("run/held_out/results.json").exists()


def test_the_miniatures_prompts_are_those_that_nothing_is_trained_or_chosen_on() -> None:
    """Held-out triples, whose captions no training draws; and none of the prompts of the stop."""
    prompts = shipped("configs/prompts/world_held_out.txt").read_text().splitlines()
    assert prompts == held_out_prompts(360)
    assert not set(prompts) & set(shipped("configs/prompts/world_stop.txt").read_text().splitlines())


@pytest.mark.smoke
def test_a_set_of_no_pictures_leaves_the_base_as_it_is(in_tmp_path: Path) -> None:
    """The first point of the ablation, by the sweep's own configurations: training ends before it begins."""
    Path("prompts.txt").write_text("\n".join(held_out_prompts(4)))
    configs = ["configs/quality_tuning/miniature.yaml", "sweeps/overlays/miniature_tuning.yaml"]
    options = ["--data.subset_size=0", "--data.val_size=4", "--trainer.callbacks.prompts=prompts.txt"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--run_dir=run"]
    cli.main(["fit", *(f"--config={ROOT / config}" for config in configs), *options, *quiet])
    assert json.loads(Path("run/finished.json").read_text())["step"] == 0
    results = json.loads(Path("run/held_out/results.json").read_text())
    assert results["step-000000"]["against_start"]["appeal"]["tie_rate"] == 1
    assert metric("held_out/faithfulness") == [(0, results["step-000000"]["faithfulness"])]
    assert set(results) == {"start", "kept", "step-000000"}
    assert not Path("run/chosen").exists()


class MeanColour:
    """Places a picture by its mean colour."""

    def embed_images(self, images: torch.Tensor) -> np.ndarray:
        return images.double().mean((2, 3)).numpy()


def test_diversity_is_that_of_other_seeds_of_the_same_prompts(base: Path) -> None:
    evaluation = HeldOutEvaluation(
        "prompts.txt", embedder=MeanColour(), num_varied=2, num_variations=3, at_steps=[1]
    )
    tune(base, 2, evaluation)
    start = load_generator(base).eval()
    variations = [
        start.generate([prompt] * 3, range(3 + 3 * i, 6 + 3 * i)) for i, prompt in enumerate(PROMPTS[:2])
    ]
    expected = [
        _effective_number(MeanColour().embed_images(to_images(to_uint8(each)))) for each in variations
    ]
    results = json.loads(Path("run/held_out/results.json").read_text())
    assert results["start"]["diversity_by_prompt"] == pytest.approx(expected)
    assert all(1 <= results[name]["diversity"] <= 3 for name in ("start", "step-000001", "step-000002"))
    assert metric("held_out/diversity")[-1][1] == results["step-000002"]["diversity"]


def _effective_number(x: np.ndarray) -> float:
    """The exponential of the entropy of the eigenvalues of the cosines, as Friedman and Dieng define it."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(x @ x.T / len(x)).clip(1e-300)
    return float(np.exp(-(values * np.log(values)).sum()))
