"""Prompt sets, against the counts of the published PartiPrompts file where a copy is present."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from emu_lightning.evaluation.prompts import (
    PARTI_SHA256,
    PromptSet,
    read_csv,
    read_lines,
    read_parti,
    read_prompts,
)

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
    assert stylized.ids == tuple(f"{row:05d}" for row, marked in enumerate(parti.is_stylized) if marked)
    assert read_prompts(PARTI) == parti


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


# --- any of them, by what the file is -----------------------------------------------------------------------


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_table_in_the_form_of_drawbench(tmp_path: Path) -> None:
    path = write(
        tmp_path / "DrawBench.csv", 'Prompts,Category\nA red car.,Colors\n"One cat, two dogs",Counting\n'
    )
    prompts = read_prompts(path)
    assert prompts.name == "DrawBench" and prompts.prompts == ("A red car.", "One cat, two dogs")
    assert prompts.categories == ("Colors", "Counting") and prompts.challenges == ()
    assert prompts.ids == ("00000", "00001") and prompts.is_stylized == (False, False)
    assert prompts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    own = read_csv(write(tmp_path / "own.csv", "id,prompt\nx7,a cat\nx8,a dog\n"))
    assert own.ids == ("x7", "x8") and own.categories == () and own.is_stylized == ()


@pytest.mark.parametrize(
    "text,match",
    [
        ("Text,Category\na,b\n", "0 columns named Prompt"),
        ("Prompt,Prompts\na,b\n", "2 columns named Prompt"),
        ("Prompts,Category\na cat, a dog,Animals\n", "more cells in row 1"),
        ('Prompts,Category\n"a cat,Animals\na dog,Animals\n', "not comma-separated text"),
        ("Prompts,Category\n,Animals\n", "no prompt in row 1"),
        ("id,Prompts\na,x\na,y\n", "the id 'a' twice"),
    ],
)
def test_a_table_that_would_lose_prompts_silently_is_refused(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_prompts(write(tmp_path / "table.csv", text))


def test_lists_by_style_in_the_forms_of_hpsv2(tmp_path: Path) -> None:
    (tmp_path / "hps").mkdir()
    styles = {"anime": ["a girl", "a robot"], "photo": ["a dog"]}
    for style, prompts in styles.items():
        write(tmp_path / "hps" / f"{style}.json", prompts)
    folder, file = read_prompts(tmp_path / "hps"), read_prompts(write(tmp_path / "all.json", styles))
    for read in (folder, file):
        assert read.prompts == ("a girl", "a robot", "a dog")
        assert read.categories == ("anime", "anime", "photo")
        assert read.stylized().prompts == ("a girl", "a robot")
    assert folder.sha256 != file.sha256
    alone = read_prompts(tmp_path / "hps" / "anime.json")
    assert alone.prompts == ("a girl", "a robot") and alone.categories == ()
    before = folder.sha256
    write(tmp_path / "hps" / "photo.json", ["a cat"])
    assert read_prompts(tmp_path / "hps").sha256 != before


@pytest.mark.parametrize("content", [{"anime": "a girl"}, ["a", 3], [" "], "[", 7])
def test_json_that_is_no_list_of_prompts_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(ValueError, match="not a list of prompts|not JSON"):
        read_prompts(write(tmp_path / "x.json", content))


def test_json_lines_carry_ids_and_groups_in_all_or_none(tmp_path: Path) -> None:
    rows = [
        {"prompt": " a cat", "id": "u1", "category": "animal", "count": 3},
        {"prompt": "a\u2028dog", "id": 2},
    ]
    rows[1]["category"] = "animal"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    read = read_prompts(write(tmp_path / "own.jsonl", lines))
    assert read.prompts == ("a cat", "a\u2028dog") and read.ids == ("u1", "2")
    assert read.categories == ("animal", "animal") and read.challenges == ()
    del rows[1]["category"]
    with pytest.raises(ValueError, match="'category' in 1 of 2"):
        read_prompts(write(tmp_path / "own.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    for line in ('{"text": "a cat"}', '"a cat"', "a cat"):
        with pytest.raises(ValueError, match="own.jsonl:2"):
            read_prompts(write(tmp_path / "own.jsonl", f'{{"prompt": "x"}}\n{line}\n'))


def test_the_ending_decides_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "a"):
        assert read_prompts(write(tmp_path / name, '{"prompt": "x"}\n')).prompts == ('{"prompt": "x"}',)
    with pytest.raises(ValueError, match="'.yaml': give one of .txt"):
        read_prompts(write(tmp_path / "a.yaml", "x\n"))
    with pytest.raises(ValueError, match="name it .tsv"):
        read_prompts(write(tmp_path / "a.txt", HEADER + "a\tb\tc\t\n"))
    with pytest.raises(ValueError, match="not UTF-8"):
        (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
        read_prompts(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "none.txt")
