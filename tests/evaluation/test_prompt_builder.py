"""The built prompt set, on logs whose right answer is known."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emu_lightning.evaluation.prompt_builder import (
    Choices,
    Keywords,
    Nearest,
    UserPrompt,
    build_prompts,
    is_safe,
    merge_alike,
    merge_equal,
    normalise,
    read_log,
)
from emu_lightning.evaluation.prompts import read_prompts


def texts(prompts: Sequence[UserPrompt]) -> list[tuple[str, int]]:
    return [(prompt.text, prompt.count) for prompt in prompts]


# --- the log ------------------------------------------------------------------------------------------------


def test_logs_of_three_kinds_say_the_same(tmp_path: Path) -> None:
    typed = ["a cat", "a dog, running", "a cat", "a hen", "a cat", "a hen"]
    (tmp_path / "log.txt").write_text("\n".join(typed))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"text": one, "user": 3}) + "\n" for one in typed))
    with (tmp_path / "log.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "times"], ["a cat", 2], ["a dog, running", 1], ["a hen", 2]])
        csv.writer(file).writerow(["a cat", 1])
    expected = [("a cat", 3), ("a hen", 2), ("a dog, running", 1)]
    assert texts(merge_equal(read_log(tmp_path / "log.txt"))) == expected
    assert texts(read_log(tmp_path / "log.jsonl", "text")) == expected
    assert texts(read_log(tmp_path / "log.csv", "text", "times")) == expected


@pytest.mark.parametrize(
    "name,content,match",
    [
        ("log.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "row 2, has no text under 'prompt'"),
        ("log.jsonl", '{"prompt": "x"}\n{"prompt"\n', "row 2, has no text"),
        ("log.csv", "prompt,count\nx,2\ny,many\n", "row 2, has no whole number under 'count'"),
        ("log.csv", "prompt\nx\n", "row 1, has no whole number"),
        ("log.parquet", "x", "'.parquet': give .jsonl"),
    ],
)
def test_a_log_that_is_not_understood_is_refused(name: str, content: str, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=match):
        read_log(tmp_path / name, count_column="count" if name.endswith("csv") else None)


# --- normalised, merged -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed,text",
    [
        ("  a   cat\n on a\tmat ", "a cat on a mat"),
        ("a cat --ar 16:9 --v 6", "a cat"),
        ("a cat <lora:fur_v2:0.8>, fluffy", "a cat , fluffy"),
        ("“a cat”", "a cat"),
        ('a sign saying "stop"', 'a sign saying "stop"'),
        ("a\u200bcat\ufeff", "acat"),
        ("ｗｉｄｅ cat", "wide cat"),
        ("a well--known cat -- asleep", "a well--known cat -- asleep"),
        ("👩\u200d🚀 in space,", "👩\u200d🚀 in space"),
        ("--tile", ""),
    ],
)
def test_what_only_a_tool_reads_is_taken_off(typed: str, text: str) -> None:
    assert normalise(typed) == text and normalise(text) == text


def test_equal_words_are_merged_under_their_most_frequent_form() -> None:
    log = [UserPrompt("a cat!", 2), UserPrompt("A  Cat", 5), UserPrompt("a dog", 6), UserPrompt("!!!", 9)]
    assert texts(merge_equal(log)) == [("A Cat", 7), ("a dog", 6)]


def pairs_of(text: str) -> set[tuple[str, str]]:
    words = ["<", *text.lower().split(), ">"]
    return set(zip(words, words[1:], strict=False))


def test_alike_prompts_are_merged_as_an_exhaustive_search_says() -> None:
    """A thousand random texts with planted near-copies, against all pairs compared exactly."""
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in range(40)]
    originals = [list(rng.choice(words, rng.integers(4, 16))) for _ in range(250)]
    log = []
    for each in originals:
        for _ in range(4):
            copy = list(each)
            for _ in range(rng.integers(0, 3)):
                copy[rng.integers(len(copy))] = str(rng.choice(words))
            log.append(UserPrompt(" ".join(copy), int(rng.integers(1, 1000))))
    log = merge_equal(log)
    for similarity, least in ((0.6, 100), (0.7, 25)):
        kept: list[tuple[set, list]] = []
        for prompt in sorted(log, key=lambda one: -one.count):
            own = pairs_of(prompt.text)
            near = [(len(own & pairs) / len(own | pairs), -row) for row, (pairs, _) in enumerate(kept)]
            best = max(near, default=(0.0, 0))
            if best[0] >= similarity:
                kept[-best[1]][1][1] += prompt.count
            else:
                kept.append((own, [prompt.text, prompt.count]))
        expected = {text: count for _, (text, count) in kept}
        found = dict(texts(merge_alike(log, similarity)))
        assert sum(found.values()) == sum(expected.values())
        assert 200 < len(expected) < len(log) - least  # there is something to find
        # A pair just alike enough may share no band: 1.2 % of those at 0.6, 0.02 % of those at 0.7.
        assert len(found.items() ^ expected.items()) <= 0.02 * len(expected)


def test_one_changed_word_of_many_is_merged_and_short_prompts_stay() -> None:
    long = "a very old red fox that sleeps under the big green tree at night"
    log = [UserPrompt(long, 2), UserPrompt(long.replace("green", "tall"), 5), UserPrompt("a cat", 1)]
    log += [UserPrompt("a bat", 1), UserPrompt("cat", 1)]
    assert texts(merge_alike(log)) == [
        (long.replace("green", "tall"), 7),
        ("a cat", 1),
        ("a bat", 1),
        ("cat", 1),
    ]
    with pytest.raises(ValueError, match="similarity is 0.3"):
        merge_alike(log, 0.3)


# --- safe ---------------------------------------------------------------------------------------------------


def test_blocked_words_are_whole_words_of_any_case() -> None:
    asked = ["a Gun on a table", "two guns", "a gunner", "begun", "a shot gun.", "dead  body", "a body"]
    assert is_safe(asked, ["GUN", "dead body"]) == [False, False, True, True, False, True, True]
    assert is_safe(["what is (this)?", "a.b"], ["(this)?", "a.b", " "]) == [False, False]


def test_addresses_and_long_numbers_are_somebodys() -> None:
    private = ["write to jo@example.org", "see https://a.b/c", "call +49 170 123 4567", "www.me.com logo"]
    public = ["a 1920s car", "a 4k photo from 2020", "3 cats @ home", "route 66, 1:24 scale"]
    assert is_safe(private + public) == [False] * 4 + [True] * 4


def test_a_scorer_says_how_unsafe_a_text_is_of_those_the_words_let_pass() -> None:
    seen: list[str] = []

    def score(texts: Sequence[str]) -> list[float]:
        seen.extend(texts)
        return [0.5 if "knife" in text else 0.51 if "blood" in text else 0.0 for text in texts]

    asked = ["a gun", "a knife", "blood", "a cat"]
    assert is_safe(asked, ["gun"], score) == [False, True, False, True] and seen == asked[1:]
    assert is_safe(asked, [], score, max_unsafe=0.2) == [True, False, False, True]
    with pytest.raises(ValueError, match="one number for each"):
        is_safe(asked, [], lambda texts: [0.0])


# --- concepts -----------------------------------------------------------------------------------------------


def test_keywords_find_the_concept_with_the_most_hits() -> None:
    concepts = Keywords({"portrait": ["woman", "man", "close up"], "animal": ["cat", "dog"], "none": []})
    asked = [
        "a Woman with two dogs and a cat",
        "a man and a cat",
        "close up of a box",
        "a catalogue",
        "boxes",
    ]
    assert concepts(asked) == ["animal", "portrait", "portrait", "other", "other"]


class Letters:
    """Counts letters."""

    name, weights_sha256 = "letters", "0"

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[text.count(letter) for letter in "abc"] for text in texts], np.float32)


def test_an_embedder_finds_the_nearest_description() -> None:
    concepts = {"A": "aaaa", "B": "b"}
    assert Nearest(Letters(), concepts)(["aab", "bbbbba", "ccca"]) == ["A", "B", "A"]
    assert Nearest(Letters(), concepts, min_similarity=0.8)(["aab", "bbbbba", "ccca"]) == ["A", "B", "other"]
    assert Nearest(Letters(), concepts)([]) == []


# --- all of it ----------------------------------------------------------------------------------------------

LOG = [
    UserPrompt("a photo of a cat --ar 1:1", 9),
    UserPrompt("A photo of a cat", 3),
    UserPrompt("a dog that runs over a green meadow at noon", 5),
    UserPrompt("a dog that runs over a green meadow at night", 4),
    UserPrompt("a hen", 3),
    UserPrompt("my cat, jo@example.org", 50),
    UserPrompt("a gun", 40),
    UserPrompt("a portrait of a woman", 8),
    UserPrompt("a man", 2),
    UserPrompt("a blue box", 7),
]
CONCEPTS = Keywords({"animal": ["cat", "dog", "hen"], "person": ["woman", "man"]})


class Backwards:
    """Says the words backwards; what it says of some is of no use."""

    num_workers = 2
    settings = {"which": "backwards"}
    odd = {"a hen": "a gun", "a man": "no\nman"}

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, text: str) -> str:
        self.asked.append(text)
        return self.odd.get(text, f'"{" ".join(reversed(text.split()))}"')


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


def test_the_funnel_and_the_quotas(tmp_path: Path) -> None:
    choices = Choices(blocked=("gun",), quotas={"animal": 2, "person": 5}, similarity=0.6, min_count=2)
    manifest = build_prompts(LOG, tmp_path, choices, concepts=CONCEPTS, source="made up")
    assert [(step["step"], step["num_prompts"], step["num_typed"]) for step in manifest["funnel"]] == [
        ("log", 10, 131),
        ("equal ones merged", 9, 131),
        ("safe", 7, 41),
        ("alike ones merged", 6, 41),
        ("frequent", 6, 41),
        ("chosen", 4, 31),
        ("distinct in the end", 4, 31),
    ]
    assert [(row["prompt"], row["category"], row["count"]) for row in rows_of(tmp_path)] == [
        ("a photo of a cat", "animal", 12),
        ("a dog that runs over a green meadow at noon", "animal", 9),
        ("a portrait of a woman", "person", 8),
        ("a man", "person", 2),
    ]
    assert manifest["concepts"] == {
        "animal": {"candidates": 3, "wanted": 2, "taken": 2},
        "other": {"candidates": 1, "wanted": None, "taken": 0},
        "person": {"candidates": 2, "wanted": 5, "taken": 2},
    }
    prompts = read_prompts(tmp_path)
    assert prompts.name == "users' prompts (ours)" and prompts.categories[0] == "animal"
    assert prompts.ids[0] == hashlib.sha256(b"a photo of a cat").hexdigest()[:12]
    assert manifest["prompts_sha256"] == prompts.sha256
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest


def test_rewrites_stand_beside_their_originals_and_useless_ones_are_left_out(tmp_path: Path) -> None:
    rewriter = Backwards()
    choices = Choices(blocked=("gun",), similarity=0.6)
    manifest = build_prompts(LOG, tmp_path, choices, rewriter=rewriter)
    rows = {row["original"]: row for row in rows_of(tmp_path)}
    cat = rows["a photo of a cat"]
    assert (cat["prompt"], cat["rewrite"], cat["rejected"]) == ("cat a of photo a", '"cat a of photo a"', "")
    assert (rows["a hen"]["prompt"], rows["a hen"]["rewrite"], rows["a hen"]["rejected"]) == (
        "a hen", "a gun", "unsafe",
    )  # fmt: skip
    assert (rows["a man"]["prompt"], rows["a man"]["rejected"]) == ("a man", "several lines")
    assert manifest["rewrites_left_out"] == {"unsafe": 1, "several lines": 1}
    assert manifest["settings"]["rewriter"] == Backwards.settings
    assert sorted(rewriter.asked) == sorted(rows)
    again = Backwards()
    assert build_prompts(LOG, tmp_path, choices, rewriter=again) == manifest and again.asked == []


def test_rewrites_that_say_the_same_become_one(tmp_path: Path) -> None:
    class Same(Backwards):
        def __call__(self, text: str) -> str:
            return "a pet" if "cat" in text or "hen" in text else text

    manifest = build_prompts(LOG, tmp_path, Choices(num_prompts=4), rewriter=Same())
    assert [row["prompt"] for row in rows_of(tmp_path)][0] == "a gun"
    assert len(rows_of(tmp_path)) == 4
    manifest = build_prompts(LOG, tmp_path / "all", rewriter=Same())
    assert [row["prompt"] for row in rows_of(tmp_path / "all")].count("a pet") == 1
    assert manifest["funnel"][-1]["num_prompts"] == manifest["funnel"][-2]["num_prompts"] - 1


def test_the_settings_hash_changes_with_every_setting_and_with_nothing_else(tmp_path: Path) -> None:
    folders = itertools.count()

    def hash_of(log: Sequence[UserPrompt] = LOG, **options: Any) -> str:
        return build_prompts(log, tmp_path / str(next(folders)), **options)["settings_sha256"]

    others = [
        hash_of(LOG[:-1]),
        hash_of(choices=Choices(num_prompts=3)),
        hash_of(choices=Choices(blocked=("gun",))),
        hash_of(choices=Choices(similarity=0.9)),
        hash_of(concepts=CONCEPTS),
        hash_of(concepts=Keywords({"animal": ["cat"]})),
        hash_of(concepts=Nearest(Letters(), {"A": "a"})),
        hash_of(unsafe_score=lambda texts: np.zeros(len(texts))),
        hash_of(rewriter=Backwards()),
        hash_of(source="elsewhere"),
    ]
    assert len({hash_of(), *others}) == 1 + len(others)
    assert hash_of() == hash_of()


@pytest.mark.parametrize("name", ["OUI", "our oui, rebuilt", "Open User Input", "open-user-input v2"])
def test_it_is_never_named_as_the_papers(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the name of the paper's set"):
        Choices(name=name)
    assert "not the Open User Input set" in build_prompts(LOG, tmp_path)["what_it_is"]


def test_what_cannot_be_built_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quotas need concepts"):
        build_prompts(LOG, tmp_path, Choices(quotas={"animal": 3}))
    with pytest.raises(ValueError, match="num_prompts or quotas"):
        Choices(quotas={"animal": 3}, num_prompts=3)
    with pytest.raises(ValueError, match="no prompt of the log is left: log 1, equal ones merged 1, safe 0"):
        build_prompts([UserPrompt("jo@example.org")], tmp_path)
