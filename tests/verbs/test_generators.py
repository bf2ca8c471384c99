"""`emu generators` on two toys of different kind: what it writes, does not make again, counts and refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu_lightning import cli
from emu_lightning.data import World
from emu_lightning.evaluation.comparison import compare
from emu_lightning.evaluation.generation import read_folder, to_images
from emu_lightning.evaluation.judge import WorldJudge
from emu_lightning.verbs import generators
from emu_lightning.verbs.recipes import Recipe, Stage
from emu_lightning.verbs.tuning import Clock, select, sizes
from emu_lightning.verbs.world_checks import JudgeOnce, world_pictures
from tests.evaluation.test_report import Outline
from tests.tiny import tiny_autoencoder, tiny_generator, tiny_unet
from tests.verbs.test_miniature import write_recipe

pytestmark = pytest.mark.smoke
NAMES = ("ink", "oil")
TUNING = Stage(
    "quality_tuning/miniature.yaml",
    {
        "data.batch_size": 4,
        "data.val_size": 4,
        "trainer.callbacks.prompts": "stop.txt",
        "trainer.callbacks.max_faithfulness_loss": 1.0,  # an untrained toy's pictures are noise
    },
)
NUM_PROMPTS = 14


@pytest.fixture
def toys(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two carried bases of 64 pixels and their recipes: `ink` has latents, made once, `oil` is in pixels."""
    networks = {
        "ink": {"denoiser": tiny_unet(4, block_channels=(8,), transformer_layers=(0,))},
        "oil": {"denoiser": tiny_unet(3, block_channels=(8,), transformer_layers=(0,))},
    }
    networks["ink"]["autoencoder"] = tiny_autoencoder()
    for name, latents_of in zip(NAMES, ("autoencoder", None), strict=True):
        torch.manual_seed(0)
        toy = tiny_generator(**networks[name], image_size=64, num_steps=1, guidance_scale=1.0)
        toy.save_pretrained(in_tmp_path / "carried" / name)
        recipe = Recipe(name.title(), "", "", {}, {}, TUNING, latents_of=latents_of)
        write_recipe(in_tmp_path, name, recipe)
    Path("stop.txt").write_text("a red ball in the snow\na blue star at night\n")
    monkeypatch.setattr(generators, "miniature_path", lambda name: Path("carried") / name)
    monkeypatch.setattr(generators, "sizes", lambda scale: sizes(scale) | {"prompts": NUM_PROMPTS})


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["generators", *argv])
    assert exit_.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_every_generator_is_tuned_judged_and_shown_once(toys: None, capsys) -> None:
    job = ["--run-dir", "run", "--scale", "0.02", "--device", "cpu"]
    cli.main(["generators", *job])
    results = json.loads(Path("run/results.json").read_text())
    for name in NAMES:
        run = Path("run") / name
        drawn = {model: read_folder(run / model) for model in ("base", "tuned")}
        assert drawn["base"][1] == drawn["tuned"][1] and len(drawn["base"][1]) == NUM_PROMPTS
        again = compare(WorldJudge(), drawn["base"][0], drawn["tuned"][0], drawn["base"][1])
        assert results[name]["appeal"] == again.appeal.to_dict("win_rate")
        assert results[name]["faithfulness"] == again.faithfulness.to_dict("win_minus_lose")
        parts = results[name]["seconds_of"]
        assert set(parts) == {"select", "tune", "judge"} and min(parts.values()) > 0
        assert results[name]["seconds"] == pytest.approx(sum(parts.values()), abs=0.1)
        settings = json.loads((run / "settings.json").read_text())
        assert settings["max_steps"] == 50 == results[name]["stop"]["step"]
    assert (Path("run/ink/cache").is_dir(), Path("run/oil/cache").is_dir()) == (True, False)
    assert {"command", "machine", "date", "settings", "peak_memory_gb"} <= set(results)

    page = Path("run/report.html").read_text()
    outline = Outline(page)  # which fails where it is not well formed
    assert {address for address in outline.addresses if not address.startswith("data:")} == {
        f"#{name}" for name in outline.ids
    }
    shown = re.findall(r'alt="((?:ink|oil), \w+): ', page)
    assert shown[:4] == ["ink, base", "oil, base", "ink, tuned", "oil, tuned"] and len(shown) == 12 * 4
    grid = np.asarray(Image.open("run/grid.png")).reshape(4, 64, 12, 64, 3).swapaxes(1, 2)
    rows = [read_folder(Path("run") / name / model)[0][:12] for name in NAMES for model in ("base", "tuned")]
    assert np.array_equal(grid, rows)

    kept = {
        path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.suffix in (".png", ".ckpt")
    }
    Path("run/report.html").unlink()
    cli.main(["generators", *job, "--names", "[oil]"])
    del kept[Path("run/grid.png")]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    alone = json.loads(Path("run/results.json").read_text())
    assert "ink" not in alone and alone["oil"] == results["oil"]  # seconds too: nothing was done again
    assert "begun with other settings" in error_of(capsys, *job[:-3], "0.03")


def test_what_cannot_be_tuned_is_one_line(toys: None, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no recipe 'ing'; there are ink, oil" in error_of(capsys, "--names", "[ing]")
    assert "--scale -1" in error_of(capsys, "--scale", "-1")
    monkeypatch.setattr(generators, "miniature_path", lambda name: Path("nowhere") / name)
    assert "make it by `emu miniature --recipe ink`" in error_of(capsys)


def test_the_selection_is_what_the_judge_finds_most_appealing(tmp_path: Path) -> None:
    settings = sizes(0.02)
    selection = json.loads(select(tmp_path / "selection.json", settings).read_text())
    pool = World(num_images=60, seed=100)
    appeal = WorldJudge().appeal(to_images(world_pictures(pool)[0]))
    best = np.argsort(-appeal)[:6]
    assert selection["uids"] == sorted(pool.uid(i) for i in best)
    assert selection["appeal"]["selected_lowest"] == pytest.approx(appeal[best].min())


def test_a_judge_who_looks_once_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, prompts = world_pictures(World(64, 6, 3))
    images, looks = to_images(pictures), []

    def read(judge: WorldJudge, images: torch.Tensor) -> list:
        looks.append(len(images))
        return unpatched(judge, images)

    unpatched = WorldJudge.read
    expected = {
        "appeal": WorldJudge().appeal(images),
        "faithfulness": WorldJudge().faithfulness(images, prompts),
    }
    monkeypatch.setattr(WorldJudge, "read", read)
    once = JudgeOnce()
    order = [3, 0, 0, 5]
    assert once.appeal(images).tolist() == expected["appeal"].tolist()
    assert once.faithfulness(images, prompts).tolist() == expected["faithfulness"].tolist()
    assert once.appeal(images[order]).tolist() == expected["appeal"][order].tolist()
    assert sum(looks) == 6


def ticking(times: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock shows ``times``, one each time somebody looks."""
    shown = iter(times)
    monkeypatch.setattr("emu_lightning.verbs.tuning.time.monotonic", lambda: next(shown))


def test_seconds_add_up_over_starts_until_a_part_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clock.json"
    ticking([100, 103, 500, 504, 504, 509], monkeypatch)
    with pytest.raises(KeyboardInterrupt), Clock(path).part("tune"):
        raise KeyboardInterrupt  # after 3 seconds
    clock = Clock(path)
    with clock.part("tune"):
        pass  # 4 more
    with Clock(path).part("tune"):
        pass  # a later start finds the result there, and does not look at the time
    assert Clock(path).seconds == clock.seconds == {"tune": 7}
    with clock.part("judge"):
        pass
    clock.at_least("judge", 20)
    clock.at_least("tune", 5)
    assert clock.seconds == {"tune": 7, "judge": 20} and clock.total == 27
