"""The page of automatic metrics: what is there, what is missing, and where the points lie."""

from __future__ import annotations

import re

import numpy as np
import pytest

from emu_lightning.evaluation import report
from emu_lightning.evaluation.metrics import Measured, Network
from emu_lightning.evaluation.metrics_page import metrics_page, points_of
from tests.evaluation.test_votes_page import words_of

NETWORK = Network("a network", "ab" * 32, "resized to 8")
AXES = {"consistency": "clip", "diversity": "recall", "realism": "distance"}


def metrics(clip: float, recall: float, distance: float, num: int = 20) -> list[Measured]:
    """The distance is better where it is lower."""
    same = {"networks": (NETWORK,), "num": num}
    return [
        Measured("clip", clip, ci95=(clip - 0.01, clip + 0.01), **same),
        Measured("recall", recall, **same),
        Measured("distance", distance, better="lower", depends_on_num=True, num_reference=50, **same),
    ]


THREE = {"base": metrics(0.3, 0.9, 12), "tuned": metrics(0.32, 0.6, 8), "worse": metrics(0.29, 0.5, 13)}


def page_of(measured: dict[str, list[Measured]], axes: dict[str, str] = AXES) -> str:
    return metrics_page("A page", measured, axes, {"axes": axes}, command="emu x", facts={"a": "b"})


def test_every_number_stands_with_its_count_and_its_network() -> None:
    words = words_of(page_of(THREE))
    assert "clip ↑ 20 0.3000 0.2900 to 0.3100 0.3200 0.3100 to 0.3300" in words
    assert "distance ↓ 20 against 50 12.00 8.000 13.00" in words
    assert "a network" in words and ("ab" * 8) in words and "resized to 8" in words
    assert "3 metrics of 3 folders of pictures: base, tuned, worse." in words


def test_the_plot_fills_the_points_that_none_beats_and_puts_better_up_and_right() -> None:
    page = page_of(THREE)
    charts = re.findall(r'<div class="chart plain">(.*?)</div>', page)
    assert len(charts) == 3
    for chart in charts:
        assert re.findall(r'class="(point(?: marked)?)"', chart) == ["point marked", "point marked", "point"]
    places = re.findall(r'class="point[^"]*" cx="([\d.]+)%" cy="([\d.]+)"', charts[1])  # realism by diversity
    x, y = np.array(places, float).T
    assert np.argsort(x).tolist() == [2, 1, 0]  # recall 0.5, 0.6, 0.9
    assert np.argsort(y).tolist() == [1, 0, 2]  # from the top: distance 8, 12, 13
    assert "Consistency, diversity" not in page_of(THREE, {})


def test_points_lie_where_their_numbers_say() -> None:
    drawn = report.scatter_chart(
        "t", ["a", "b", "c"], report.Axis("x", [0, 1, 4]), report.Axis("y", [10, 0, 5], "lower")
    )
    places = re.findall(r'cx="([\d.]+)%" cy="([\d.]+)"', drawn)
    assert [(float(x), float(y)) for x, y in places] == [(0, 220), (25, 0), (100, 110)]


def test_what_is_missing_says_why_and_is_no_zero() -> None:
    broken = {**THREE, "worse": [Measured("clip", None, "no weights here", num=20), *THREE["worse"][1:]]}
    words = words_of(page_of(broken))
    assert "clip, worse: no weights here" in words and "0.3300 missing" in words
    assert "No plot: clip cannot be compared, it is missing: no weights here." in words


def test_numbers_that_move_with_the_number_of_pictures_are_not_compared() -> None:
    words = words_of(page_of({"base": metrics(0.3, 0.9, 12), "few": metrics(0.3, 0.9, 30, num=7)}, {}))
    assert "Not to be compared" in words and "distance moves with the number of pictures" in words
    assert "clip moves" not in words and "7 to 20 against 50" in words


def test_an_axis_that_is_none_is_told_in_a_line() -> None:
    with pytest.raises(ValueError, match="name a metric for diversity and for realism"):
        points_of(THREE, {"consistency": "clip"})
    with pytest.raises(ValueError, match="'fid' is none of the metrics: clip, recall, distance"):
        points_of(THREE, {**AXES, "realism": "fid"})
