"""The verbs around training, on a tiny generator of the world: what they write, resume and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu_lightning import cli
from emu_lightning.data import World
from emu_lightning.evaluation.judge import facts_of
from emu_lightning.models import Autoencoder, SmallTextEncoder, UNet
from emu_lightning.modules import DiffusionModule, load_generator
from emu_lightning.processes import Diffusion
from emu_lightning.verbs import quickstart, world_checks
from emu_lightning.verbs.arguments import call

pytestmark = pytest.mark.smoke
JUDGE = "emu_lightning.evaluation.judge.WorldJudge"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator of 64-pixel noise: the world's size with next to no weights."""
    torch.manual_seed(0)
    generator = DiffusionModule(
        denoiser=UNet(
            in_channels=4,
            sample_size=8,
            block_channels=(8,),
            transformer_layers=(1,),
            head_dim=8,
            sequence_dim=8,
            pooled_dim=8,
            norm_groups=4,
        ),
        text_encoder=SmallTextEncoder(dim=8, num_layers=1, num_heads=1, embedding_dim=4),
        process=Diffusion(),
        autoencoder=Autoencoder(4, (4, 4, 4, 4), norm_groups=2, use_mid_attention=False),
        num_steps=2,
    )
    return generator.save_pretrained(tmp_path_factory.mktemp("base"))


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(argv))
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emu: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_sample_draws_the_same_picture_alone_and_in_a_batch(base: Path, in_tmp_path: Path) -> None:
    cli.main(["sample", "--model", str(base), "--prompts", '["a", "b", "c"]', "--seed", "5", "--out", "all"])
    cli.main(["sample", "--model", str(base), "--prompts", '["b"]', "--seed", "6", "--out", "one"])
    pictures = [np.asarray(Image.open(path), int) for path in ("all/00001.png", "one/00000.png")]
    assert pictures[0].shape == (64, 64, 3) and np.abs(pictures[0] - pictures[1]).max() <= 1
    assert Image.open("all/grid.png").size == (3 * 64, 64)


def test_sample_wants_one_source_of_prompts(base: Path, capsys, in_tmp_path: Path) -> None:
    assert "--prompts_file" in error_of(capsys, "sample", "--model", str(base))
    assert "no generator at nowhere" in error_of(capsys, "sample", "--model", "nowhere", "--prompts", '["a"]')


def test_export_halves_the_file_and_draws_alike(base: Path, in_tmp_path: Path) -> None:
    cli.main(["export", "--model", str(base), "--out", "half", "--dtype", "float16"])
    sizes = [(path / "model.safetensors").stat().st_size for path in (base, Path("half"))]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    drawn = [load_generator(path).generate(["a red ball"], [0]) for path in (base, "half")]
    assert torch.allclose(*drawn, atol=0.05)


def test_evaluate_of_a_model_against_itself_is_all_ties(base: Path, capsys, in_tmp_path: Path) -> None:
    Path("prompts.txt").write_text("a red ball in the snow\na blue star at night\n")
    both = ["--base", str(base), "--tuned", str(base), "--scorer.class_path", JUDGE]
    cli.main(["evaluate", *both, "--prompts_file", "prompts.txt", "--out", "judged"])
    results = json.loads(Path("judged/results.json").read_text())
    assert results["appeal"]["tie_rate"] == results["faithfulness"]["tie_rate"] == 1
    assert "<html" in Path("judged/report.html").read_text()
    # two folders of pictures need no prompts; two models do
    cli.main(["evaluate", "--base", "judged/base", "--tuned", "judged/tuned", "--scorer.class_path", JUDGE])
    assert "--prompts_file" in error_of(capsys, "evaluate", *both)


def test_quickstart_writes_its_report_goes_on_and_refuses_another_job(
    base: Path, capsys, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "miniature_path", lambda: base)
    monkeypatch.setattr(world_checks.judge_figures, "__defaults__", (20, 901))
    monkeypatch.setattr(world_checks.autoencoder_psnr, "__defaults__", (64, 8, 902))
    job = ["quickstart", "--run-dir", "run", "--scale", "0.02"]
    cli.main(job)
    results = json.loads(Path("run/results.json").read_text())
    for keys in (
        "autoencoder.psnr_db",
        "pretrained.faithfulness",
        "appeal.win_rate",
        "appeal.ci95",
        "faithfulness.ci95",
        "faithfulness.win_minus_lose",
        "judge.accuracy",
        "judge.auc",
        "seconds",
        "peak_memory_gb",
        "command",
        "machine",
        "date",
    ):
        value = results
        for key in keys.split("."):
            value = value[key]
    page = Path("run/report.html").read_text()
    assert "The stop" in page and "://" not in page.replace("http://www.w3.org", "")
    kept = {path: path.stat().st_mtime_ns for path in Path("run/base").iterdir() if path.suffix == ".png"}
    assert len(kept) == 64
    Path("run/report.html").unlink()
    cli.main(job)  # goes on: nothing is drawn or trained again
    assert Path("run/report.html").is_file()
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert "begun with other settings" in error_of(capsys, *job[:-1], "0.03")
    assert "--scale" in error_of(capsys, "quickstart", "--scale", "-1")


def test_a_switch_needs_no_value_and_hyphens_are_underscores() -> None:
    def verb(from_scratch: bool = False, run_dir: str = "runs") -> tuple[bool, str]:
        return from_scratch, run_dir

    assert call(verb, ["--from-scratch", "--run-dir", "x"], "emu verb") == (True, "x")
    assert call(verb, ["--from_scratch", "false", "--run-dir=y"], "emu verb") == (False, "y")


def test_held_out_prompts_differ_and_are_in_no_training_world() -> None:
    prompts = world_checks.held_out_prompts(360)
    assert len(set(prompts)) == 360
    trained = World(num_images=3000, seed=1)
    seen = {
        tuple(facts_of(trained.text(i))[f] for f in ("subject", "colour", "background")) for i in range(3000)
    }
    asked = {
        tuple(facts_of(prompt)[fact] for fact in ("subject", "colour", "background")) for prompt in prompts
    }
    assert not seen & asked and len(asked) == 25
    with pytest.raises(ValueError, match="only 375 different"):
        world_checks.held_out_prompts(376)
