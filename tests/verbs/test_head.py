"""`emu head`: labels of some pictures become a column of all, and no picture is read again for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emu_lightning import cli

CONFIG = """
pool: {class_path: tests.curation.planted.Files, init_args: {path: pictures}}
out: run
rows_per_shard: 16
passes:
  - scorers:
      - {class_path: tests.curation.planted.Embedding, init_args: {log: embedded.txt}}
engine: {class_path: tests.curation.planted.Here}
"""
WITH_HEAD = CONFIG.replace(
    "{log: embedded.txt}",
    "{log: embedded.txt, heads: [{class_path: emu_lightning.curation.scorers.LearntHead, "
    "init_args: {name: warm, weights: heads/warm.safetensors}}]}",
)


@pytest.fixture
def pool(in_tmp_path: Path) -> dict[str, bool]:
    """Sixty plain pictures and a broken one, curated in `run`; of each whether red outweighs blue."""
    rng = np.random.default_rng(0)
    Path("pictures").mkdir()
    truth = {}
    for number in range(60):
        colour = rng.integers(0, 256, 3, dtype=np.uint8)
        Image.fromarray(np.tile(colour, (8, 8, 1))).save(f"pictures/{number:02d}.png")
        truth[f"{number:02d}.png"] = bool(colour[0] > colour[2])
    Path("pictures/broken.png").write_bytes(b"no picture")
    Path("config.yaml").write_text(CONFIG)
    Path("with_head.yaml").write_text(WITH_HEAD)
    cli.main(["curate", "--config", "config.yaml"])
    return truth


def write_labels(truth: dict[str, bool], **more: list) -> None:
    labels = {"uid": [*truth, "broken.png", "elsewhere.png"], "warm": [*truth.values(), True, None]}
    pq.write_table(pa.table(labels | more), "labels.parquet")


def learn(*argv: str) -> None:
    cli.main(["head", "--run", "run", "--labels", "labels.parquet", "--out", "heads/warm.safetensors", *argv])


def test_what_some_labels_taught_is_found_in_all(pool, capsys) -> None:
    write_labels(dict(list(pool.items())[:40]))
    learn("--column", "warm")
    told = capsys.readouterr().out
    assert "40 of 41 labels" in told and "area under the ROC curve" in told and "LearntHead" in told
    once = Path("embedded.txt").read_text()
    cli.main(["curate", "--config", "with_head.yaml"])
    assert Path("embedded.txt").read_text() == once  # no picture was read again
    rows = {row["uid"]: row["warm"] for row in pq.read_table("run/manifest.parquet").to_pylist()}
    assert rows.pop("broken.png") is None
    unseen = list(pool)[40:]
    assert np.mean([(rows[uid] > 0.5) == pool[uid] for uid in unseen]) >= 0.9


def test_numbers_are_learnt_as_numbers(pool, capsys) -> None:
    write_labels(pool, stars=[float(warm) for warm in pool.values()] + [3.0, 4.0])
    learn("--column", "stars")
    assert "R²" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--column", "cold"], "labels.parquet has no column cold"),
        (["--column", "uid"], "give true and false, or numbers"),
        (["--column", "warm", "--run", "nowhere"], "nowhere/manifest.parquet does not exist"),
        (["--column", "warm", "--labels", "none.parquet"], "none.parquet do not exist"),
        (["--column", "few"], "too few to learn from"),
        (["--column", "others"], "are they of another pool"),
    ],
)
def test_mistakes_are_told_in_one_line(pool, capsys, argv, message) -> None:
    few = [True, False] + [None] * 60
    others = [None] * 61 + [True]
    write_labels(pool, few=pa.array(few), others=pa.array(others))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        learn(*argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("heads").exists()
