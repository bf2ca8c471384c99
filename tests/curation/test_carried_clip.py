"""The CLIP that travels with the project, and its heads, on pictures that neither has seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.stats import mannwhitneyu

from emu_lightning.curation.planted import write_planted_pool
from emu_lightning.curation.scorer import Picture
from emu_lightning.curation.scorers import Clip, LearntHead, ZeroShot
from emu_lightning.data import World
from emu_lightning.data.world import HUES, SUBJECTS

FOLDER = "emu_lightning/miniature/clip"


@pytest.fixture(scope="module")
def clip() -> Clip:
    heads = [LearntHead(name, f"{FOLDER}/{name}.safetensors") for name in ("offensive", "photogenic")]
    clip = Clip(
        FOLDER, heads=[*heads, ZeroShot({name: [f"a {hue} {name}" for hue in HUES] for name in SUBJECTS})]
    )
    clip.start()
    return clip


def scored(clip: Clip, pictures: list[Picture]) -> dict[str, list]:
    """All columns, of the network and of its heads."""
    columns = clip.score(pictures)
    own = pa.table({name: pa.array(columns[name], type_) for name, type_ in clip.columns.items()})
    return {**columns, **{name: values for head in clip.derived for name, values in head.derive(own).items()}}


def auc(scores: np.ndarray, yes: np.ndarray) -> float:
    return mannwhitneyu(scores[yes], scores[~yes]).statistic / (yes.sum() * (~yes).sum())


def test_captions_and_subjects_of_combinations_that_training_does_not_draw(clip) -> None:
    world = World(64, 120, seed=905, triples="held_out", skilled_fraction=1.0)
    samples = [world[n] for n in range(len(world))]
    right = scored(clip, [Picture(b"", Image.fromarray(one.image), {"caption": one.text}) for one in samples])
    others = [samples[n - 1].text for n in range(len(samples))]
    wrong = scored(
        clip,
        [
            Picture(b"", Image.fromarray(a.image), {"caption": b})
            for a, b in zip(samples, others, strict=True)
        ],
    )
    differ = np.array([one.text != other for one, other in zip(samples, others, strict=True)])
    better = np.array(right["clip_score"]) > np.array(wrong["clip_score"])
    assert better[differ].mean() > 0.9
    subjects = [next(name for name in SUBJECTS if name in one.text) for one in samples]
    assert np.mean([a == b for a, b in zip(right["concept"], subjects, strict=True)]) > 0.8


def test_heads_find_what_they_were_taught(clip, tmp_path: Path) -> None:
    truth = pq.read_table(write_planted_pool(tmp_path / "pool", 200, seed=4)).to_pylist()
    whole = [row for row in truth if row["planted"] != "corrupt"]
    images = [Image.open(tmp_path / "pool" / row["uid"]).convert("RGB") for row in whole]
    columns = scored(clip, [Picture(b"", image, {"caption": None}) for image in images])
    for name in ("offensive", "photogenic"):
        assert auc(np.array(columns[name]), np.array([row["planted"] == name for row in whole])) > 0.9
