"""`emu dashboard` on run folders whose figures are known."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from emu_lightning import cli
from emu_lightning.callbacks.metrics import MetricsFile
from emu_lightning.dashboard.ablations import Estimate, answers, varied
from emu_lightning.dashboard.runs import flatten, read_run, read_runs
from emu_lightning.dashboard.stopping import read_stops
from emu_lightning.evaluation.generation import MANIFEST, write_png
from emu_lightning.evaluation.stopping import choose_stop

T_2 = 4.302653  # 97.5 % point of Student's t with 2 degrees of freedom, from a printed table
CHANNELS = {(4, ()): (24.0, 24.2, 24.4), (8, ()): (26.0, 26.1, 26.3), (16, ()): (26.2, 26.0, 27.0)}


def write_run(folder: Path, config: Mapping[str, Any], metrics: list[tuple[int, dict[str, float]]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run_dir": str(folder), **config}))
    (folder / "finished.json").write_text(json.dumps({"step": metrics[-1][0] + 1, "seconds": 60.0}))
    file = MetricsFile(folder / "metrics.csv")
    for step, values in metrics:
        file.log_metrics(values, step)
    return folder


def autoencoder(channels: int, fourier: list[int], seed: int) -> dict[str, Any]:
    settings = {"latent_channels": channels, "fourier_frequencies": fourier}
    inner = {"class_path": "emu_lightning.models.Autoencoder", "init_args": settings}
    module = {"class_path": "emu_lightning.modules.AutoencoderModule", "init_args": {"autoencoder": inner}}
    return {"seed_everything": seed, "model": module}


def write_sweep(folder: Path, runs: list[Path], state: str = "finished") -> Path:
    entries = [
        {"name": run.name, "state": state, "seconds": 61.5, "folder": str(run), "parameters": {}}
        for run in runs
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"runs": entries}))
    return folder


@pytest.fixture
def channels(in_tmp_path: Path) -> Path:
    runs = []
    for (latents, fourier), values in CHANNELS.items():
        for seed, psnr in enumerate(values):
            logged = [(9, {"train/loss": 1.0}), (19, {"val/psnr": psnr, "val/rfd_random": 50 - psnr})]
            folder = Path("elsewhere") / f"{latents}-{seed}"
            runs.append(write_run(folder, autoencoder(latents, list(fourier), seed), logged))
    return write_sweep(Path("sweep"), runs)


def test_an_estimate_is_a_mean_with_students_interval() -> None:
    low, high = Estimate.of([1, 2, 3]).ci95 or (0, 0)
    assert (low, high) == pytest.approx((2 - T_2 / np.sqrt(3), 2 + T_2 / np.sqrt(3)), abs=1e-5)
    assert Estimate.of([5.0]).ci95 is None and Estimate.of([5.0]).verdict == "not settled"
    assert Estimate.of([1.0, 1.1, 0.9]).verdict == "holds"
    assert Estimate.of([-1.0, -1.1, -0.9]).verdict == "does not hold"
    assert Estimate.of([1.0, -1.1, 0.9]).verdict == "not settled"
    assert Estimate.of([0.0, 0.0, 0.0]).verdict == "does not hold"


def test_runs_of_a_sweep_answer_the_question_about_channels(channels: Path) -> None:
    runs = read_runs(channels)
    assert varied(runs) == ["model.autoencoder.latent_channels"]
    (answer,) = answers(runs)
    assert answer.ablation.key == "channels" and [point.value for point in answer.points] == ["4", "8", "16"]
    assert [point.estimates["val/psnr"].mean for point in answer.points] == pytest.approx(
        [24.2, 26.1333, 26.4], abs=1e-3
    )
    assert [point.seconds for point in answer.points] == [61.5] * 3
    verdicts = {(each.metric.name, *each.claim.weights): each.difference for each in answer.claims}
    assert verdicts["val/psnr", "8", "4"].verdict == "holds"
    # 16 over 8 by seed: 0.2, -0.1, 0.7; paired, since a seed is the same start for all.
    paired = verdicts["val/psnr", "16", "8"]
    spread = np.std([0.2, -0.1, 0.7], ddof=1) / np.sqrt(3)
    assert paired.mean == pytest.approx(0.8 / 3) and paired.verdict == "not settled"
    assert paired.ci95 == pytest.approx((0.8 / 3 - T_2 * spread, 0.8 / 3 + T_2 * spread), abs=1e-4)
    falls = verdicts["val/rfd_random", "8", "4"]  # lower is better, so a fall is above 0
    assert falls.mean == pytest.approx(verdicts["val/psnr", "8", "4"].mean) and falls.verdict == "holds"
    assert not any("16 + Fourier" in each.claim.weights for each in answer.claims)  # nothing of it was run


def test_an_unfinished_run_counts_for_nothing(channels: Path) -> None:
    summary = json.loads((channels / "sweep.json").read_text())
    summary["runs"][0]["state"] = "failed"
    summary["runs"].append(
        {"name": "later", "state": "waiting", "seconds": 0, "folder": None, "parameters": {}}
    )
    (channels / "sweep.json").write_text(json.dumps(summary))
    (answer,) = answers(read_runs(channels))
    assert [point.estimates["val/psnr"].seeds for point in answer.points] == [2, 3, 3]
    assert answer.points[0].estimates["val/psnr"].mean == pytest.approx(24.3)


def test_what_a_finished_run_does_not_have_is_left_out(channels: Path) -> None:
    for seed in range(3):
        (Path("elsewhere") / f"16-{seed}" / "metrics.csv").write_text("step,train/loss\n9,1.0\n")
    (Path("elsewhere") / "4-0" / "metrics.csv").write_text("step,val/rfd_random\n9,1.0\n")
    (answer,) = answers(read_runs(channels))
    assert [point.value for point in answer.points] == ["4", "8"]
    assert [point.estimates["val/psnr"].seeds for point in answer.points] == [2, 3]
    cli.main(["dashboard", "sweep", "--out", "page"])
    assert "24.30 (" in Path("page/report.html").read_text()


def test_runs_that_differ_in_something_else_are_no_ablation(channels: Path) -> None:
    config = yaml.safe_load(Path("elsewhere/4-0/config.yaml").read_text())
    config["model"]["init_args"]["kl_weight"] = 2.0
    Path("elsewhere/4-0/config.yaml").write_text(yaml.safe_dump(config))
    assert answers(read_runs(channels)) == []


def test_generators_are_compared_by_their_autoencoders(in_tmp_path: Path) -> None:
    shown = {(8, "8"): (0.6, 0.7), (16, "16"): (0.5, 0.9), (16, "16_fourier"): (0.3, 0.4)}
    runs = []
    for (channels, name), values in shown.items():
        folder = f"runs/autoencoder_{name}/pretrained"
        model = {
            "autoencoder": {"class_path": "m.load_autoencoder", "init_args": {"folder": folder}},
            "denoiser": {"class_path": "m.UNet", "init_args": {"in_channels": channels}},
        }
        settings = {
            "model": {"class_path": "m.DiffusionModule", "init_args": model},
            "data": {"class_path": "d.Data", "init_args": {"latents_from": folder}},
        }
        for seed, share in enumerate(values):
            config = {"seed_everything": seed, **settings}
            runs.append(
                write_run(Path("all") / f"{name}-{seed}", config, [(9, {"held_out/faithfulness": share})])
            )
    (answer,) = answers(read_runs(write_sweep(Path("sweep"), runs)))
    assert answer.ablation.key == "channels_generation" and not answer.claims
    assert {p.value: p.estimates["held_out/faithfulness"].mean for p in answer.points} == pytest.approx(
        {"8": 0.65, "16": 0.7, "16 + Fourier": 0.35}
    )
    cli.main(["dashboard", "sweep", "--out", "page"])
    page = Path("page/report.html").read_text()
    assert answer.ablation.title in page and "65.0" in page


def test_settings_lie_under_what_they_are_for() -> None:
    config = {
        "model": {"class_path": "m.M", "init_args": {"a": {"class_path": "n.N", "init_args": {"x": 1}}}}
    }
    assert flatten({"seed": 0, **config}) == {"seed": 0, "model": "m.M", "model.a": "n.N", "model.a.x": 1}


# --- stopping --------------------------------------------------------------------------------------------


def judged(step: int, appeal: float, faithfulness: float, diversity: float) -> dict[str, float]:
    return {
        "step": step,
        "appeal_win_minus_lose": appeal,
        "faithfulness_win_minus_lose": faithfulness,
        "diversity": diversity,
    }


def test_the_stop_is_the_most_appealing_that_is_faithful() -> None:
    entries = [judged(50, 0.5, 0.0, 2), judged(100, 0.8, -0.02, 2), judged(150, 0.9, -0.04, 2)]
    assert choose_stop(entries) == entries[1]
    assert choose_stop(entries, max_faithfulness_loss=0.05) == entries[2]
    assert choose_stop(entries[2:]) is None


@pytest.fixture
def tunings(in_tmp_path: Path) -> Path:
    runs = []
    for seed in range(3):
        # The loss falls by one hundredth a step; logged twice between two stops.
        logged = [(step - 1, {"train/loss": 10 - step / 100}) for step in range(25, 201, 25)]
        folder = write_run(Path("tunings") / str(seed), {"data": {"subset_seed": seed}}, logged)
        stops = {
            "start": {"step": 0, "diversity": 3.0},
            "step-000050": judged(50, 0.5 + seed / 100, 0.01, 2.9),
            "step-000100": judged(100, 0.8, -0.01, 2.5),
            "step-000200": judged(200, 0.7, -0.10 - seed / 100, 2.0 + seed / 10),
            "kept": "step-000200",
        }
        (folder / "held_out").mkdir()
        (folder / "held_out" / "results.json").write_text(json.dumps(stops))
        runs.append(folder)
    return write_sweep(Path("tunings"), runs)


def test_stopping_is_read_from_what_was_judged_on_the_way(tunings: Path) -> None:
    table = read_stops(read_runs(tunings))
    assert table is not None and table.steps == [0, 50, 100, 200] and table.stop == 100
    appeal = table.estimates["appeal_win_minus_lose"]
    assert [each and each.mean for each in appeal] == pytest.approx([0, 0.51, 0.8, 0.7])
    loss = table.estimates["train/loss"]
    assert loss[0] is None and loss[1] is not None
    assert loss[1].mean == pytest.approx(10 - 0.375)  # of steps 25 and 50
    drifts = table.drifts
    assert drifts["the training loss still falls"].mean == pytest.approx(
        (125 + 150 + 175 + 200) / 400 - 0.875
    )
    assert (
        drifts["faithfulness is lost"].mean == pytest.approx(0.1)
        and drifts["faithfulness is lost"].verdict == "holds"
    )
    assert drifts["diversity is lost"].mean == pytest.approx(0.4)


def test_a_single_tuning_is_read_by_what_chose_its_stop(in_tmp_path: Path) -> None:
    folder = write_run(Path("tuning"), {}, [(49, {"train/loss": 2.0}), (99, {"train/loss": 1.0})])
    lines = [judged(50, 0.4, 0.0, 1), judged(100, 0.6, -0.5, 1)]
    (folder / "preference.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = read_stops([read_run(folder)])
    assert (
        table is not None and table.stop == 50 and table.drifts["appeal is lost"].mean == pytest.approx(-0.2)
    )
    assert table.drifts["appeal is lost"].ci95 is None


def test_where_the_last_stop_is_the_best_it_is_compared_with_the_first(in_tmp_path: Path) -> None:
    metrics = [(step - 1, {"train/loss": 3 - step / 100, "val/loss": step / 100}) for step in (50, 100, 150)]
    folder = write_run(Path("tuning"), {}, metrics)
    lines = [judged(50, 0.4, 0.0, 3), judged(100, 0.6, 0.0, 2), judged(150, 0.7, 0.0, 1)]
    (folder / "preference.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = read_stops([read_run(folder)])
    assert table is not None and (table.stop, table.since) == (150, 50)
    means = {statement: drift.mean for statement, drift in table.drifts.items()}
    assert means == pytest.approx(
        {
            "the training loss still falls": 1.0,
            "the validation loss rises": 1.0,
            "faithfulness is lost": 0.0,
            "diversity is lost": 2.0,
            "appeal is lost": -0.3,
        }
    )


# --- the command -----------------------------------------------------------------------------------------


def add_pictures(run: Path, colour: int) -> None:
    folder = run / "held_out" / "step-000010"
    folder.mkdir(parents=True)
    for row in range(2):
        write_png(folder / f"{row:05d}.png", np.full((8, 8, 3), colour, np.uint8))
    manifest = {"settings": {}, "prompts": ["a <b>ball</b>", "a star"], "seeds": [0, 1], "sha256": ""}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    results = {"step-000010": {"step": 10}, "kept": "step-000010"}
    (run / "held_out" / "results.json").write_text(json.dumps(results))


def test_the_page_says_what_the_figures_say(
    channels: Path, tunings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for latents in (4, 8, 16):
        add_pictures(Path("elsewhere") / f"{latents}-0", latents)
    cli.main(["dashboard", "sweep", "tunings", "--out", "page"])
    assert capsys.readouterr().out.strip() == "page/report.html"
    results = json.loads(Path("page/results.json").read_text())
    points = results["ablations"]["channels"]["points"]
    assert [(point["value"], point["seeds"]) for point in points] == [("4", 3), ("8", 3), ("16", 3)]
    assert points[0]["mean"] == pytest.approx(24.2) and points[0]["seconds"] == 61.5
    assert results["stopping"]["tunings"]["stop"] == 100
    assert results["command"] == "emu dashboard sweep tunings --out page" and len(results["runs"]) == 12
    page = Path("page/report.html").read_text()
    assert "28.64, recalled" in page and "24.20" in page and "Stop after 100 steps" in page
    assert page.count('<img alt="latent channels 4: ') == 2 and "<b>ball</b>" not in page
    assert len(re.findall(r'class="line thin"', page)) == 9  # a line a run
    assert "<script" not in page and not re.search(r'(?:src|href)="(?!data:|#)', page)  # nothing is fetched
    held = re.search(r"(\d+) of (\d+) hold; not: (\d+); not settled: (\d+)", page)
    assert held is not None
    told = [each["verdict"] for each in results["ablations"]["channels"]["trends"]]
    told += [each["verdict"] for each in results["stopping"]["tunings"]["drifts"].values()]
    assert [int(number) for number in held.groups()] == [
        told.count("holds"),
        len(told),
        told.count("does not hold"),
        told.count("not settled"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no folder: name folders of runs, or wandb:ENTITY/PROJECT"),
        (["empty"], "empty holds no run"),
        (["broken"], "broken has a damaged file ("),
        ([], "runs"),
        (["empty", "--outt", "x"], "'outt' is not an option; did you mean 'out'?"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("empty").mkdir()
    broken = write_run(Path("broken"), {}, [(9, {"train/loss": 1.0})])
    (broken / "finished.json").write_text('{"step": 1')
    with pytest.raises(SystemExit) as exit_:
        cli.main(["dashboard", *arguments])
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and message in error and "\n" not in error
