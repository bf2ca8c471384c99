"""Prompt sets, against the counts of the published PartiPrompts file where a copy is present."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest

from emu_lightning.evaluation.prompts import PARTI_SHA256, PromptSet, read_lines, read_parti

PARTI = Path(
    os.environ.get(
        "EMU_PARTI_PROMPTS", Path(__file__).parents[2] / ".." / "shared" / "data" / "PartiPrompts.tsv"
    )
)
HEADER = "Prompt\tCategory\tChallenge\tNote\n"


@pytest.mark.skipif(not PARTI.is_file(), reason="no copy of PartiPrompts.tsv (set EMU_PARTI_PROMPTS)")
def test_the_published_file_has_its_known_counts() -> None:
    parti = read_parti(PARTI)
    assert parti.sha256 == PARTI_SHA256 == hashlib.sha256(PARTI.read_bytes()).hexdigest()
    assert len(parti) == len(set(parti.prompts)) == 1632
    assert len(Counter(parti.categories)) == 12 and len(Counter(parti.challenges)) == 11
    assert all(prompt == prompt.strip() for prompt in parti.prompts)
    assert parti.prompts[0] == "bond" and parti.categories[0] == "Abstract"
    stylized = parti.stylized()
    assert len(stylized) == 328 and set(stylized.prompts) < set(parti.prompts)
    assert stylized.sha256 != parti.sha256


def test_a_lone_quotation_mark_swallows_nothing_and_another_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "prompts.tsv"
    rows = '"a sign \tArts \tBasic\t\n a cat\tAnimals\tStyle & Format\t\na dog\tAnimals\tBasic\t\n'
    path.write_text(HEADER + rows)
    with pytest.warns(UserWarning, match="not PartiPrompts as published .* 3 rows, expected 1632"):
        parti = read_parti(path)
    assert parti.prompts == ('"a sign', "a cat", "a dog")
    assert parti.categories == ("Arts", "Animals", "Animals")
    assert parti.stylized().prompts == ('"a sign', "a cat")


@pytest.mark.parametrize(
    "text,match",
    [
        ("", "no column 'Prompt'"),
        ("Prompt\tChallenge\nx\ty\n", "no column 'Category'"),
        (HEADER + " \tArts\tBasic\t\n", "no prompt in row 1"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "prompts.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_parti(path)


def test_lines_are_prompts(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffa cat \r\n\n  a “blue” dog\n".encode())
    lines = read_lines(path)
    assert lines.name == "mine" and lines.prompts == ("a cat", "a “blue” dog") and lines.categories == ()
    assert lines.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="empty"):
        read_lines(tmp_path / "blank.txt")


def test_sets_made_in_memory_are_known_by_their_prompts() -> None:
    a, b = PromptSet.of("held out", ["x", "y"], ["c", "d"]), PromptSet.of("another name", ["x", "y"])
    assert a.sha256 == b.sha256 != PromptSet.of("held out", ["y", "x"]).sha256
    with pytest.raises(ValueError, match="2 prompts but 1"):
        PromptSet.of("held out", ["x", "y"], ["c"])
