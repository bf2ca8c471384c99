from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emu_lightning.evaluation.generation import (
    fill_folder,
    generate_folder,
    generate_pictures,
    open_folder,
    read_folder,
    to_images,
    to_uint8,
    write_png,
)
from emu_lightning.evaluation.prompts import PromptSet

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


# --- shared between processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7])
def test_shares_make_every_picture_once_and_together_the_whole(num_shares: int, tmp_path: Path) -> None:
    painters = [Painter() for _ in range(num_shares)]
    for index, painter in enumerate(painters):
        fill_folder(
            painter, PROMPTS, SEEDS, tmp_path, settings=SETTINGS, share=(index, num_shares), batch_size=2
        )
    made = [prompt for painter in painters for prompts, _ in painter.calls for prompt in prompts]
    assert sorted(made) == PROMPTS
    assert colours_of(read_folder(tmp_path)[0]) == EXPECTED


@pytest.mark.parametrize("share", [(2, 2), (-1, 2), (0, 0)])
def test_a_share_that_does_not_exist_is_refused(share: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        fill_folder(Painter(), PROMPTS, SEEDS, tmp_path, settings=SETTINGS, share=share)


def test_processes_that_make_the_same_pictures_at_a_time_leave_whole_ones(tmp_path: Path) -> None:
    threads = [
        Thread(
            target=fill_folder, args=(Painter(), PROMPTS * 8, SEEDS * 8, tmp_path), kwargs={"settings": {}}
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert colours_of(read_folder(tmp_path)[0]) == EXPECTED * 8
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_of_before_stays_valid_and_its_manifest_as_it_was(tmp_path: Path) -> None:
    """Written down as an earlier version wrote it."""
    manifest = {"settings": SETTINGS, "prompts": PROMPTS, "seeds": SEEDS}
    manifest["sha256"] = "b5106a3f0f04766f5e5f3aeaef16d4cfbb741da8a788bece95b7d7e6e2f10f8d"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    notes = {"prompt_set": "x", "seeds": "not to be changed by a note"}
    fill_folder(Painter(), PROMPTS, SEEDS, tmp_path, settings=SETTINGS, notes=notes)
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    fill_folder(Painter(), PROMPTS, SEEDS, tmp_path / "new", settings=SETTINGS, notes=notes)
    new = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert new == {"prompt_set": "x", **manifest}


# --- pictures made elsewhere --------------------------------------------------------------------------------


def paint(folder: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    """Pictures of these names and sizes, each of its own grey."""
    folder.mkdir()
    for grey, (name, size) in enumerate(sizes.items()):
        Image.new("RGB", size, (grey, grey, grey)).save(folder / name)
    return folder


NAMED = PromptSet("named", ("a cat", "a dog", "a hen"), (), (), "0", ("p-7", "p-3", "p-9"))


@pytest.mark.parametrize(
    "names", [["p-7.png", "p-3.jpg", "p-9.webp"], ["00000.png", "00001.png", "00002.JPEG"]]
)
def test_pictures_are_found_by_id_or_by_row(names: list[str], tmp_path: Path) -> None:
    sizes = dict(zip(names, [(8, 6), (10, 4), (10, 4)], strict=True))
    folder = paint(tmp_path / "x", {**sizes, "zzz.png": (1, 1)})
    found = open_folder(folder, NAMED)
    assert found.prompts == NAMED.prompts and [file.name for file in found.files] == names
    assert [found[row].shape for row in range(3)] == [(6, 8, 3), (4, 10, 3), (4, 10, 3)]
    assert [int(found[row].mean().round()) for row in range(3)] == [0, 1, 2]
    batches = list(found.batches(8))
    assert [rows for rows, _ in batches] == [slice(0, 1), slice(1, 3)]
    assert [pictures.shape for _, pictures in batches] == [(1, 6, 8, 3), (2, 4, 10, 3)]
    assert [len(pictures) for _, pictures in found.batches(1)] == [1, 1, 1]
    with pytest.raises(ValueError, match="several sizes"):
        read_folder(folder, NAMED)


def test_ids_that_look_like_rows_are_ids_where_all_are_there(tmp_path: Path) -> None:
    counted_from_one = PromptSet("one", ("a cat", "a dog"), (), (), "0", ("00001", "00002"))
    folder = paint(tmp_path / "x", {"00001.png": (2, 2), "00002.png": (2, 2)})
    assert [file.stem for file in open_folder(folder, counted_from_one).files] == ["00001", "00002"]
    (folder / "00002.png").rename(folder / "00000.png")
    assert [file.stem for file in open_folder(folder, counted_from_one).files] == ["00000", "00001"]


def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path) -> None:
    folder = paint(tmp_path / "x", {"p-7.png": (2, 2), "p-3.png": (2, 2)})
    with pytest.raises(FileNotFoundError, match="lacks 1 of 3 pictures, such as p-9.png"):
        open_folder(folder, NAMED)
    Image.new("RGB", (2, 2)).save(folder / "p-9.png")
    Image.new("RGB", (2, 2)).save(folder / "p-9.jpg")
    with pytest.raises(ValueError, match="two pictures named p-9"):
        open_folder(folder, NAMED)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_folder(tmp_path / "none", NAMED)
    generate_folder(Painter(), PROMPTS, SEEDS, tmp_path / "made", settings=SETTINGS)
    with pytest.raises(ValueError, match="other prompts than 'named'"):
        open_folder(tmp_path / "made", NAMED)
    assert open_folder(tmp_path / "made", PromptSet.of("same", PROMPTS)).manifest["settings"] == SETTINGS
