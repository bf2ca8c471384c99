from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from emu_lightning.evaluation.comparison import Comparison, compare
from emu_lightning.evaluation.comparison_page import comparison_page, environment
from emu_lightning.evaluation.report import write_report

HOSTILE = "<script>alert('x')</script> & \"quoted\" </td>"


class ChannelScorer:
    """Appeal is the red channel and faithfulness the green one, from 0 to 1; blue tells pictures apart."""

    def appeal(self, images: torch.Tensor) -> np.ndarray:
        return ((images[:, 0].mean((1, 2)) + 1) / 2).double().numpy()

    def faithfulness(self, images: torch.Tensor, prompts: Sequence[str]) -> np.ndarray:
        return ((images[:, 1].mean((1, 2)) + 1) / 2).double().numpy()


def pictures(appeals: Sequence[int], faithfulness: Sequence[int]) -> np.ndarray:
    """(N, 8, 8, 3) of these values in 0 ... 255."""
    colours = np.stack([appeals, faithfulness, np.arange(len(appeals))], axis=1).astype(np.uint8)
    return colours[:, None, None].repeat(8, 1).repeat(8, 2)


PROMPTS = [HOSTILE, "b", "c", "d", "e"]
BASE = pictures([100, 100, 100, 100, 100], [51, 102, 153, 204, 255])
TUNED = pictures([200, 105, 106, 50, 95], [51, 103, 152, 204, 255])


@pytest.fixture
def result() -> Comparison:
    return compare(ChannelScorer(), BASE, TUNED, PROMPTS)


def test_known_scores_have_known_labels(result: Comparison) -> None:
    """The margin is 0.02: 5 of 255 is a tie, 6 of 255 is a win."""
    assert result.appeal_labels.tolist() == ["B", "Tie", "B", "A", "Tie"]
    assert result.faithfulness_labels.tolist() == ["Tie", "B", "A", "Tie", "Tie"]
    assert (result.appeal.win, result.appeal.tie, result.appeal.lose) == (0.4, 0.4, 0.2)
    assert result.appeal.win_minus_lose == pytest.approx(0.2)
    assert result.faithfulness.win_minus_lose == 0
    assert result.base_appeal == pytest.approx(np.full(5, 100 / 255), abs=1e-6)
    assert result.tuned_faithfulness == pytest.approx(np.array([51, 103, 152, 204, 255]) / 255, abs=1e-6)


def test_exchanging_the_models_exchanges_the_labels(result: Comparison) -> None:
    other = compare(ChannelScorer(), TUNED, BASE, PROMPTS)
    exchanged = {"A": "B", "B": "A", "Tie": "Tie"}
    assert other.appeal_labels.tolist() == [exchanged[label] for label in result.appeal_labels]
    assert other.appeal.win_minus_lose == -result.appeal.win_minus_lose
    assert other.faithfulness.win == result.faithfulness.lose


def test_a_model_against_itself_ties_everywhere() -> None:
    result = compare(ChannelScorer(), BASE, BASE, PROMPTS, appeal_margin=0.0)
    assert set(result.appeal_labels) == set(result.faithfulness_labels) == {"Tie"}
    low, high = result.appeal.win_minus_lose_ci95
    assert low < 0 < high


def test_a_wider_margin_makes_more_ties() -> None:
    labels = compare(ChannelScorer(), BASE, TUNED, PROMPTS, appeal_margin=0.3).appeal_labels
    assert labels.tolist() == ["B", "Tie", "Tie", "Tie", "Tie"]


def test_repeated_prompts_count_once_in_the_intervals() -> None:
    repeated = compare(ChannelScorer(), *(np.tile(p, (4, 1, 1, 1)) for p in (BASE, TUNED)), PROMPTS * 4)
    assert (repeated.appeal.num_labels, repeated.appeal.num_prompts) == (20, 5)


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(ValueError):
        compare(ChannelScorer(), BASE, TUNED[:4], PROMPTS)


# --- the page -----------------------------------------------------------------------------------------------


def page_of(result: Comparison, **options: object) -> str:
    shown = {"base": BASE, "tuned": TUNED}
    arguments = {"settings": {"guidance": 3.0, "note": HOSTILE}, "command": f"emu x '{HOSTILE}'", **options}
    return comparison_page("A & B", result, shown, PROMPTS, **arguments)  # type: ignore[arg-type]


def test_the_page_shows_both_models_and_every_figure(result: Comparison, tmp_path: Path) -> None:
    slices = {"colour": ["red", "red", "blue", "blue", HOSTILE]}
    page = page_of(result, facts={"seconds": "12.5"}, slices=slices, judge="the red channel")
    path = write_report(tmp_path / "run", {"appeal": result.appeal.to_dict("win_rate")}, page)
    text = Path(path).read_text()
    assert Path(path).name == "report.html" and (tmp_path / "run" / "results.json").is_file()
    labels = ("base", "tuned", "A &amp; B", "the red channel", "Where tuning lost", "blue")
    for shown in (*labels, "40.0", "12.5"):
        assert shown in text, shown
    for package in ("torch", "lightning", "diffusers"):
        assert package in environment()["versions"] and package in text
    # Self-contained: nothing is fetched, each picture of both models is inside.
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", text)
    assert text.count("data:image/") >= 2 * len(PROMPTS)


def test_hostile_prompts_are_escaped_everywhere(result: Comparison) -> None:
    text = str(page_of(result, slices={"colour": ["red", "red", "blue", "blue", HOSTILE]}))
    assert "<script>alert" not in text and "</td> &" not in text
    assert text.count("&lt;script&gt;") >= 4  # prompt, settings, command, slice


def test_nothing_lost_shows_no_losses() -> None:
    better = pictures([200] * 5, [255] * 5)
    result = compare(ChannelScorer(), BASE, better, PROMPTS)
    assert "Where tuning lost" not in str(page_of(result))
