"""The planted pool: what its truth says of a picture is so, by measures that did not make it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError
from skimage import data
from skimage.metrics import structural_similarity

from emu_lightning.curation.planted import CROPS, SHARES, SIDE, write_planted_pool


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, list[dict], list[dict]]:
    """The folder, the truth, and what is said beside the pictures."""
    folder = tmp_path_factory.mktemp("planted") / "pool"
    truth = pq.read_table(write_planted_pool(folder, 100, 3, [Image.fromarray(data.chelsea())])).to_pylist()
    return folder, truth, [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def opened(folder: Path, truth: list[dict], kind: str) -> list[Image.Image]:
    return [Image.open(folder / row["uid"]) for row in truth if row["planted"] == kind]


def test_every_defect_has_its_share_and_every_file_its_truth(planted) -> None:
    folder, truth, said = planted
    counts = Counter(row["planted"] for row in truth if not row["is_photograph"])
    assert {kind: counts[kind] for kind in SHARES} == {kind: round(100 * s) for kind, s in SHARES.items()}
    assert counts.total() == 100 and [r["planted"] for r in truth if r["is_photograph"]] == CROPS
    names = [row["uid"] for row in truth]
    assert names == sorted(path.name for path in folder.glob("*.jpg")) == [one["file_name"] for one in said]
    assert ["text" in one for one in said] == [not row["is_photograph"] for row in truth]


def test_defects_are_there(planted) -> None:
    folder, truth, _ = planted
    assert {image.size for image in opened(folder, truth, "nothing")} == {(SIDE, SIDE)}
    assert max(max(image.size) for image in opened(folder, truth, "low_resolution")) < 128
    assert min(max(i.size) / min(i.size) for i in opened(folder, truth, "extreme_aspect")) > 3.5
    fine = [_fine(image) for image in opened(folder, truth, "nothing")]
    assert max(_fine(image) for image in opened(folder, truth, "blur")) < min(fine)
    for row in truth:
        if row["planted"] == "corrupt":
            with pytest.raises((UnidentifiedImageError, OSError, SyntaxError)):
                Image.open(folder / row["uid"]).load()


def _fine(image: Image.Image) -> float:
    """Energy of a picture's spectrum beyond a quarter of the sampling rate, its edges faded out."""
    window = np.hanning(SIDE)
    spectrum = np.abs(np.fft.fft2(np.asarray(image.convert("L"), float) * np.outer(window, window)))
    far = np.maximum(*np.meshgrid(*[np.abs(np.fft.fftfreq(SIDE))] * 2)) > 0.25
    return float((spectrum[far] ** 2).mean())


def test_duplicates_are_like_their_originals_and_wrong_captions_name_another_subject(planted) -> None:
    folder, truth, said = planted

    def pixels(uid: str) -> np.ndarray:
        return np.asarray(Image.open(folder / uid).convert("L").resize((128, 128)))

    for row, one in zip(truth, said, strict=True):
        if row["planted"] == "duplicate":
            assert structural_similarity(pixels(row["uid"]), pixels(row["original"])) > 0.8
        elif not row["is_photograph"]:
            assert (row["subject"] in one["text"]) == (row["planted"] != "wrong_caption")


def test_the_same_seed_writes_the_same_files(planted, tmp_path) -> None:
    folder, _, _ = planted
    write_planted_pool(tmp_path / "pool", 100, 3, [Image.fromarray(data.chelsea())])
    for path in sorted(folder.iterdir()):
        assert (tmp_path / "pool" / path.name).read_bytes() == path.read_bytes()
