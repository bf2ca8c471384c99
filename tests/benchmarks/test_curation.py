"""What benchmarks.curation counts and times is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import curation


def rows(**counts: int) -> list[dict]:
    """`planted__rejected_by` -> how many; `None` is written `kept`."""
    made = []
    for key, count in counts.items():
        planted, _, rejected_by = key.partition("__")
        made += [{"planted": planted, "rejected_by": None if rejected_by == "kept" else rejected_by}] * count
    return made


def test_each_filter_is_measured_on_what_the_ones_before_left() -> None:
    found = curation.per_filter(
        rows(
            corrupt__readable=4,
            offensive__offensive=6,
            nothing__offensive=2,
            offensive__sharp=1,
            offensive__kept=1,
            blur__offensive=5,
            blur__sharp=3,
            blur__kept=1,
            nothing__kept=50,
        )
    )
    assert (found["readable"]["precision"], found["readable"]["recall"]) == (1, 1)
    assert found["offensive"]["precision"] == round(6 / 13, 4)  # what it rejected: 6, 2 and 5
    assert found["offensive"]["recall"] == 6 / 8
    assert found["sharp"]["precision"] == 3 / 4
    assert found["sharp"]["recall"] == 3 / 4  # five of the blurred had gone before
    assert found["text"]["precision"] is found["text"]["recall"] is None  # none is there, none was rejected


def test_a_pass_is_timed_against_bare_decoding(tmp_path: Path) -> None:
    found = curation.cheap_scorers(tmp_path, num=3, rounds=2, width=64, height=48)
    assert len(found["ratios"]) == 2 and 0 < found["ratio"] < 1.5
    (scores,) = (tmp_path / "cheap" / "scores").glob("photometry-*/*.parquet")
    assert scores.is_file()


@pytest.mark.smoke
def test_a_part_keeps_the_figures_of_others(in_tmp_path: Path, monkeypatch) -> None:
    Path("out").mkdir()
    Path("out/results.json").write_text(json.dumps({"kill": {"runs": 1}, "about": {"kill": {}}}))
    curation.main(["--out", "out", "--parts", "fuzz", "--scale", "0.02"])
    results = json.loads(Path("out/results.json").read_text())
    assert results["kill"] == {"runs": 1} and results["fuzz"]["images"] == 20
    assert results["about"]["fuzz"]["command"] == "python -m benchmarks.curation --parts fuzz --scale 0.02"
    assert results["about"].keys() == {"kill", "fuzz"}
