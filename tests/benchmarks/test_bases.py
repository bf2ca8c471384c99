"""What bases have learnt, measured on a few pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bases
from emu_lightning.verbs.recipes import recipe_names


def test_one_word_of_a_caption_is_exchanged_for_another_of_its_kind() -> None:
    caption = "a red ball on a beach on the left"
    for kind, kept in {
        "subject": "a red * on a beach on the left",
        "colour": "a * ball on a beach on the left",
        "background": "a red ball * on the left",
        "place": "a red ball on a beach on the *",
    }.items():
        words = bases.WORDS[kind]
        before, after = kept.split("*")
        seen = set()
        for seed in range(40):
            other = bases.exchanged(caption, words, np.random.default_rng(seed))
            assert other.startswith(before) and other.endswith(after)
            seen.add(other[len(before) : len(other) - len(after)])
        assert seen == {word for word in words if word not in caption}
    assert bases.exchanged("a red ball", bases.WORDS["place"], np.random.default_rng(0)) == "a red ball"


@pytest.mark.smoke
def test_every_carried_base_is_measured(in_tmp_path: Path) -> None:
    results = bases.main(["--out=out", "--pictures=3"])
    assert set(results["captions"]) <= set(recipe_names()) and "latent" in results["captions"]
    assert all(found["true"] > 0 for found in results["captions"].values())
    assert json.loads(Path("out/results.json").read_text()) == results
