from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emu_lightning.evaluation.generation import (
    generate_folder,
    generate_pictures,
    read_folder,
    to_images,
    to_uint8,
    write_png,
)

PROMPTS = [f"prompt {index}" for index in range(5)]
SEEDS = [10, 11, 12, 13, 14]
SETTINGS = {"model": "a", "num_steps": 7, "guidance_scale": 1.5}


class Painter:
    """Fills a picture with a colour that its prompt and seed decide, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[int]]] = []
        self.options: list[dict[str, Any]] = []

    def generate(self, prompts: Sequence[str], seeds: Iterable[int], **options: Any) -> torch.Tensor:
        seeds = list(seeds)
        self.calls.append((list(prompts), seeds))
        self.options.append(options)
        pairs = zip(prompts, seeds, strict=True)
        colours = [[seed * 8, len(prompt), ord(prompt[-1])] for prompt, seed in pairs]
        images = to_images(np.asarray(colours, np.uint8)[:, None, None])
        return images.expand(-1, -1, 4, 6)


def colours_of(pictures: np.ndarray) -> list[list[int]]:
    return pictures[:, 0, 0].tolist()


EXPECTED = [[seed * 8, 8, ord(str(index))] for index, seed in enumerate(SEEDS)]


# --- pixels -------------------------------------------------------------------------------------------------


def test_every_value_of_a_picture_survives_being_an_image() -> None:
    pictures = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    images = to_images(pictures)
    assert images.shape == (1, 3, 16, 16) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert np.array_equal(to_uint8(images), pictures)
    for dtype in (torch.float16, torch.bfloat16):  # half a step of 8 bits is 0.004, bfloat16's near 1 as much
        assert np.abs(to_uint8(images.to(dtype)).astype(int) - pictures).max() <= (dtype == torch.bfloat16)


def test_values_out_of_range_are_clamped_and_channels_keep_their_order() -> None:
    image = torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1).expand(2, 3, 5, 4)
    pictures = to_uint8(image)
    assert pictures.shape == (2, 5, 4, 3) and pictures.dtype == np.uint8
    assert colours_of(pictures) == [[0, 128, 255]] * 2


def test_a_png_holds_exactly_the_picture(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


# --- pictures of prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_pictures_come_in_the_order_of_the_prompts(batch_size: int) -> None:
    painter = Painter()
    pictures = generate_pictures(
        painter, PROMPTS, SEEDS, batch_size=batch_size, num_steps=3, guidance_scale=2.0
    )
    assert colours_of(pictures) == EXPECTED
    assert max(len(prompts) for prompts, _ in painter.calls) <= batch_size
    assert painter.options[0] == {"num_steps": 3, "guidance_scale": 2.0}


def test_a_folder_holds_the_pictures_and_what_they_are_of(tmp_path: Path) -> None:
    painter = Painter()
    pictures = generate_folder(painter, PROMPTS, SEEDS, tmp_path / "a" / "b", settings=SETTINGS, batch_size=2)
    assert colours_of(pictures) == EXPECTED
    assert painter.options[0] == {"num_steps": 7, "guidance_scale": 1.5}
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png", "00003.png", "00004.png", "manifest.json"]
    manifest = json.loads((tmp_path / "a" / "b" / "manifest.json").read_text())
    assert (manifest["prompts"], manifest["seeds"], manifest["settings"]) == (PROMPTS, SEEDS, SETTINGS)
    read, prompts = read_folder(tmp_path / "a" / "b")
    assert np.array_equal(read, pictures) and prompts == PROMPTS


@pytest.mark.parametrize("settings", [{}, {"num_steps": 7}, {"negative_prompt": "blurred", "weights": "a"}])
def test_a_generator_is_asked_for_what_is_set_only(settings: dict[str, Any], tmp_path: Path) -> None:
    """Not every generator of a user's own knows them all."""
    painter = Painter()
    generate_folder(painter, PROMPTS, SEEDS, tmp_path, settings=settings)
    assert painter.options == [{name: value for name, value in settings.items() if name != "weights"}]


def test_only_missing_pictures_are_made_again(tmp_path: Path) -> None:
    generate_folder(Painter(), PROMPTS, SEEDS, tmp_path, settings=SETTINGS)
    (tmp_path / "00001.png").unlink()
    (tmp_path / "00004.png").unlink()
    (tmp_path / "00004.tmp").write_bytes(b"torn by a kill")
    painter = Painter()
    pictures = generate_folder(painter, PROMPTS, SEEDS, tmp_path, settings=SETTINGS)
    assert painter.calls == [(["prompt 1", "prompt 4"], [11, 14])]
    assert colours_of(pictures) == EXPECTED
    painter = Painter()
    generate_folder(painter, PROMPTS, SEEDS, tmp_path, settings=SETTINGS)
    assert painter.calls == []


def test_a_killed_generation_goes_on(tmp_path: Path) -> None:
    class Killed(Painter):
        def generate(self, *args: Any, **options: Any) -> torch.Tensor:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().generate(*args, **options)

    with pytest.raises(KeyboardInterrupt):
        generate_folder(Killed(), PROMPTS, SEEDS, tmp_path, settings=SETTINGS, batch_size=2)
    painter = Painter()
    pictures = generate_folder(painter, PROMPTS, SEEDS, tmp_path, settings=SETTINGS, batch_size=2)
    assert painter.calls == [(["prompt 4"], [14])] and colours_of(pictures) == EXPECTED


@pytest.mark.parametrize(
    "changed",
    [
        {"prompts": [*PROMPTS[:4], "another"]},
        {"seeds": [*SEEDS[:4], 99]},
        {"settings": {**SETTINGS, "guidance_scale": 2.0}},
        {"prompts": PROMPTS[:4], "seeds": SEEDS[:4]},
    ],
)
def test_a_folder_of_other_pictures_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    arguments = {"prompts": PROMPTS, "seeds": SEEDS, "settings": SETTINGS}
    generate_folder(Painter(), folder=tmp_path, **arguments)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    painter = Painter()
    with pytest.raises(ValueError, match="holds pictures of other prompts, seeds or settings") as error:
        generate_folder(painter, folder=tmp_path, **{**arguments, **changed})
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert painter.calls == [] and {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_missing_in_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):
        read_folder(tmp_path)
    generate_folder(Painter(), PROMPTS, SEEDS, tmp_path, settings=SETTINGS)
    (tmp_path / "00003.png").unlink()
    with pytest.raises(FileNotFoundError, match="00003.png is missing"):
        read_folder(tmp_path)
