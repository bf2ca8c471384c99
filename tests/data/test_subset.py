from __future__ import annotations

import json

import numpy as np
import pytest

from emu_lightning.data.source import Sample, Source
from emu_lightning.data.subset import Subset, find_uids, nested_subset, read_selection

UIDS = [f"image-{i}.png" for i in range(1000)]


class Dots(Source):
    def __init__(self, num: int = 6) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Sample:
        return Sample(np.full((4, 4, 3), index, np.uint8), f"dot {index}", f"dot-{index}", (4, 4))

    def fingerprint(self) -> str:
        return f"dots:{self.num}"


def test_smaller_subsets_are_inside_larger_ones():
    large = nested_subset(UIDS, 500, seed=0)
    assert nested_subset(UIDS, 100, seed=0) == large[:100]
    assert len(set(large)) == 500


def test_more_images_do_not_reshuffle_the_others():
    few, many = UIDS[:600], ["new.png", *UIDS]
    before = [few[i] for i in nested_subset(few, 600, seed=0)]
    after = [many[i] for i in nested_subset(many, len(many), seed=0)]
    assert [uid for uid in after if uid in set(few)] == before


def test_another_seed_is_another_subset():
    one, two = (set(nested_subset(UIDS, 500, seed)) for seed in (0, 1))
    assert 200 < len(one & two) < 300  # 250 by chance


@pytest.mark.parametrize("size", [0, 1001])
def test_impossible_sizes_are_named(size):
    with pytest.raises(ValueError, match=f"the 1000 images there are, got {size}"):
        nested_subset(UIDS, size, seed=0)


def test_subset_answers_for_its_source():
    subset = Subset(Dots(), [4, 1])
    assert len(subset) == 2 and subset.uids() == ["dot-4", "dot-1"] and subset.text(1) == "dot 1"
    assert subset[0].image[0, 0, 0] == 4
    assert (
        subset.fingerprint() != Subset(Dots(), [1, 4]).fingerprint() != Subset(Dots(7), [1, 4]).fingerprint()
    )
    assert subset.fingerprint() == Subset(Dots(), [4, 1]).fingerprint()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("some.txt", "dot-3\n\n dot-1 \ndot-3\n"),
        ("some.json", json.dumps(["dot-3", "dot-1"])),
        ("some.json", json.dumps({"made_by": "hand", "uids": ["dot-3", "dot-1"]})),
    ],
)
def test_selection_files(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert find_uids(Dots(), read_selection(tmp_path / name)) == [3, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("some.json", "[1, 2]", "must hold a list of uids"),
        ("some.json", "{", "is not JSON"),
        ("some.txt", "\n", "selects nothing"),
    ],
)
def test_wrong_selection_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_selection(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        read_selection(tmp_path / "nowhere.txt")


def test_unknown_uids_are_named():
    with pytest.raises(ValueError, match="1 of 2 selected uids .* such as 'cat'"):
        find_uids(Dots(), ["dot-1", "cat"])
