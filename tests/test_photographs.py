"""A user's own photographs, from a folder to a tuned model, by the commands of docs/your_photographs.md."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu_lightning import cli
from emu_lightning.data.folder import Folder
from examples.photographs import PHOTOGRAPHS, write_photographs
from tests.tiny import tiny_generator

ROOT = Path(__file__).parent.parent
COMMAND = ["fit", "--config", "configs/quality_tuning/folder.yaml", "--data.path"]

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a base of 16 pixels and for so short a run that it takes seconds."""
    generator = tiny_generator(in_pixels=False, image_size=16)
    base = generator.save_pretrained(tmp_path_factory.mktemp("base"))
    return [
        f"--model.init_from={base}",
        "--data.resolution=16",
        "--data.batch_size=8",
        "--data.num_workers=1",
        "--trainer.max_steps=3",
        "--trainer.callbacks.every_n_train_steps=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_model_summary=false",
        "--checkpoint.keep_steps=[2]",
    ]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real photographs, three as odd as people's files are, and one that was cut off."""
    folder = tmp_path_factory.mktemp("photographs")
    written = write_photographs(folder)
    astronaut, coffee, rocket = (
        Image.open(folder / f"{name}.jpg") for name in ("astronaut", "coffee", "rocket")
    )
    upright = Image.Exif()
    upright[0x0112] = 6  # orientation: a camera that was turned by 90 degrees
    rocket.save(folder / "turned.jpg", exif=upright)
    coffee.convert("CMYK").save(folder / "cmyk.jpg")
    astronaut.putalpha(Image.linear_gradient("L").resize(astronaut.size))
    astronaut.save(folder / "transparent.png")
    whole = (folder / "cat.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    for name, caption in {
        "turned": "a rocket that stands upright",
        "cmyk": "a cup of coffee, for print",
        "transparent": "an astronaut who fades",
        "truncated": "half a cat",
    }.items():
        (folder / f"{name}.txt").write_text(caption)
    assert len(written) == len(PHOTOGRAPHS)
    return folder


def test_from_the_folder_to_the_pictures(photographs, tiny, in_tmp_path, capsys) -> None:
    cli.main([*COMMAND, str(photographs), *tiny])
    run = in_tmp_path / "runs" / "photographs"
    said = capsys.readouterr().out
    assert "1 broken file was skipped: truncated.jpg" in said and "broken_files.txt" in said
    assert (run / "broken_files.txt").read_text() == "truncated.jpg\n"

    losses = [float(row["train/loss"]) for row in csv.DictReader((run / "metrics.csv").open())]
    assert len(losses) == 3 and all(map(math.isfinite, losses))

    start = run / "samples" / "start"
    prompts = json.loads((start / "manifest.json").read_text())["prompts"]
    assert prompts[3:5] == [PHOTOGRAPHS["astronaut"][1], PHOTOGRAPHS["cameraman"][1]] and len(prompts) == 12
    above = np.concatenate([np.asarray(Image.open(start / f"{i:05d}.png")) for i in range(12)], axis=1)
    for step in (2, 3):
        shown = np.asarray(Image.open(run / "samples" / f"step-{step:06d}.png"))
        assert shown.shape == (32, 12 * 16, 3)
        assert (shown[:16] == above).all() and (shown[16:] != above).any()

    # What the page says next: go on, keep an earlier iteration instead, draw with either.
    cli.main([*COMMAND, str(photographs), *tiny, "--trainer.max_steps=4", "--ckpt_path=last"])
    assert json.loads((run / "finished.json").read_text())["step"] == 4
    assert (run / "samples" / "step-000004.png").is_file()
    cli.main(["export", f"--model={run}/checkpoints/step-2.ckpt", "--out=early"])
    for model in ("early", f"{run}/pretrained"):
        out = f"{model}-pictures"
        cli.main(["sample", f"--model={model}", '--prompts=["a cat"]', f"--out={out}", "--device=cpu"])
        assert Image.open(f"{out}/grid.png").size == (16, 16)


def test_odd_photographs_are_seen_as_people_see_them(photographs) -> None:
    folder = Folder(photographs)
    shown = {folder.uid(i): folder[i].image for i in range(len(folder)) if folder.uid(i) != "truncated.jpg"}
    assert {image.mode for image in shown.values()} == {"RGB"}
    rocket = shown["rocket.jpg"]
    assert shown["turned.jpg"].size == rocket.size[::-1]
    back = np.asarray(shown["turned.jpg"].transpose(Image.Transpose.ROTATE_90)).astype(int)
    assert np.abs(back - np.asarray(rocket)).mean() < 3  # but for a second compression
    coffee = np.asarray(shown["coffee.jpg"]).astype(int)
    assert np.abs(np.asarray(shown["cmyk.jpg"]) - coffee).mean() < 6
    fading, whole = np.asarray(shown["transparent.png"]).astype(int), np.asarray(shown["astronaut.jpg"])
    assert (fading[0] == 255).all() and np.abs(fading[-1] - whole[-1]).mean() < 3  # from white to opaque


def nothing(folder: Path) -> None:
    """An empty folder."""


def uncaptioned(folder: Path) -> None:
    write_photographs(folder)
    (folder / "cat.txt").unlink()


def all_broken(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "a.txt").write_text("a cat")


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        (None, "image folder {folder} does not exist"),
        (nothing, "{folder} holds no images"),
        (uncaptioned, "1 of 9 images in {folder} have no caption, such as cat.jpg: write one into cat.txt"),
        (all_broken, "none of the 1 images can be decoded (the first: a.jpg)"),
    ],
)
def test_an_unusable_folder_ends_in_one_line(fill, expected, tiny, in_tmp_path, capsys) -> None:
    folder = in_tmp_path / "mine"
    if fill is not None:
        folder.mkdir()
        fill(folder)
    error = error_of(capsys, [*COMMAND, str(folder), *tiny, "--data.num_workers=0"])
    assert error.startswith(expected.format(folder=folder))


def test_a_folder_that_is_not_named_ends_in_one_line(tiny, in_tmp_path, capsys) -> None:
    assert error_of(capsys, [*COMMAND[:-1], *tiny]).startswith("missing: --data.path")


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """What stands behind `emu: error: `, on a line of its own."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith("emu: error: ")
    return lines[0].removeprefix("emu: error: ")


def test_the_example_says_what_to_do_next(in_tmp_path) -> None:
    def example(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(ROOT / "examples" / "photographs.py"), *arguments]
        return subprocess.run(argv, capture_output=True, text=True)

    done = example("mine")
    assert f"emu {' '.join(COMMAND)} mine" in done.stdout
    assert len(Folder("mine")) == len(PHOTOGRAPHS) == 9
    assert example().stderr == "usage: python examples/photographs.py FOLDER\n"
    Path("file").touch()
    failed = example("file")
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1
