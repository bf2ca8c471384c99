"""The judge of the synthetic world, on pictures of seeds that it was not developed on."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import mannwhitneyu

from emu_lightning.data.world import (
    ALL_TRIPLES,
    BACKGROUNDS,
    DRAWING_TEMPLATE,
    HUES,
    PLACES,
    SUBJECTS,
    TEMPLATES,
    Hand,
    Scene,
    World,
    draw_scene,
    render,
    skilled_hand,
)
from emu_lightning.evaluation.generation import to_images
from emu_lightning.evaluation.judge import (
    Marks,
    Reading,
    WorldJudge,
    facts_of,
    read_picture,
    share_of_facts,
    shows_all_three,
)

MARKS = [field.name for field in fields(Marks)]


def readings_of(world: World) -> list[Reading]:
    return [read_picture(np.asarray(world[index].image) / 255) for index in range(len(world))]


@pytest.fixture(scope="module")
def fresh() -> dict[str, tuple[World, list[Reading]]]:
    """300 pictures of each hand."""
    shares = {"ordinary": (4101, 0.0), "skilled": (4102, 1.0)}
    worlds = {name: World(64, 300, seed, share) for name, (seed, share) in shares.items()}
    return {name: (world, readings_of(world)) for name, world in worlds.items()}


@pytest.mark.parametrize("hand", ["ordinary", "skilled"])
def test_it_names_subject_colour_and_background(fresh, hand) -> None:
    world, readings = fresh[hand]
    scenes = [world.describe(index)[0] for index in range(len(world))]
    for fact in ("subject", "colour", "background"):
        right = [
            getattr(reading, fact) == getattr(scene, fact)
            for reading, scene in zip(readings, scenes, strict=True)
        ]
        assert np.mean(right) >= 0.98, fact
    all_three = [shows_all_three(reading, world.text(index)) for index, reading in enumerate(readings)]
    assert np.mean(all_three) >= 0.98
    sides = [(r.place, s.place) for r, s in zip(readings, scenes, strict=True) if s.place != "anywhere"]
    assert np.mean([said == true for said, true in sides]) >= 0.98


def test_it_orders_skilled_above_ordinary_pictures(fresh) -> None:
    skilled, ordinary = ([r.marks.appeal for r in fresh[hand][1]] for hand in ("skilled", "ordinary"))
    assert mannwhitneyu(skilled, ordinary).statistic / (len(skilled) * len(ordinary)) >= 0.95
    assert all(0 <= getattr(reading.marks, mark) <= 1 for reading in fresh["ordinary"][1] for mark in MARKS)


def test_every_mark_is_higher_for_the_skilled_hand(fresh) -> None:
    for mark in MARKS:
        skilled, ordinary = ([getattr(r.marks, mark) for r in fresh[h][1]] for h in ("skilled", "ordinary"))
        assert mannwhitneyu(skilled, ordinary, alternative="greater").pvalue < 0.01, mark


# --- one defect at a time -----------------------------------------------------------------------------------


def scenes_well_shot(num: int) -> list[tuple[Scene, Hand]]:
    rng = np.random.default_rng(4103)
    scenes = [replace(draw_scene(rng, ALL_TRIPLES), place="anywhere") for _ in range(num)]
    return [(scene, skilled_hand(rng, scene.place)) for scene in scenes]


def read(scene: Scene, hand: Hand, seed: int) -> Reading:
    return read_picture(render(scene, hand, 64, np.random.default_rng((4104, seed))) / 255)


@pytest.mark.parametrize(
    ("defect", "mark", "least_fall", "also"),
    [
        ({"x": 0.5}, "composition", 0.3, ()),
        ({"y": 0.3}, "composition", 0.3, ()),
        ({"radius": 0.12}, "composition", 0.3, ()),
        ({"gain": 0.5}, "exposure", 0.5, ()),
        ({"contrast": 0.6}, "contrast", 0.3, ("exposure",)),  # a subject turned towards grey is also darker
        ({"num_distractors": 5}, "clutter", 0.0, ()),
        ({"noise": 0.022}, "noise", 0.5, ()),
        ({"noise": 0.04}, "noise", 0.9, ("sharpness", "clutter")),
        ({"focus": 0.02}, "sharpness", 0.3, ()),
    ],
)
def test_a_defect_lowers_its_own_mark_and_changes_no_fact(
    defect: dict[str, Any], mark: str, least_fall: float, also: tuple[str, ...]
) -> None:
    falls: dict[str, list[float]] = {name: [] for name in MARKS}
    for seed, (scene, hand) in enumerate(scenes_well_shot(20)):
        before, after = read(scene, hand, seed), read(scene, replace(hand, **defect), seed)
        truth = (scene.subject, scene.colour, scene.background)
        assert (before.subject, before.colour, before.background) == truth
        assert (after.subject, after.colour, after.background) == truth
        for name in MARKS:
            falls[name].append(getattr(before.marks, name) - getattr(after.marks, name))
    # Some pebbles lie where nobody looks, at the edge or on a hill, so of clutter only the median must fall.
    assert min(falls[mark]) >= least_fall - 1e-9
    assert np.median(falls[mark]) > 0.25
    for name in set(MARKS) - {mark, *also}:
        assert abs(np.median(falls[name])) < 0.05, name


def test_worse_is_never_better() -> None:
    """More of a defect, a lower mark."""
    scene, hand = scenes_well_shot(1)[0]
    for field, mark, values in [
        ("gain", "exposure", (0.95, 0.8, 0.65, 0.5)),
        ("contrast", "contrast", (1.0, 0.85, 0.7, 0.55)),
        ("noise", "noise", (0.0, 0.01, 0.02, 0.03)),
        ("focus", "sharpness", (0.0, 0.01, 0.02, 0.03)),
    ]:
        marks = [getattr(read(scene, replace(hand, **{field: value}), 0).marks, mark) for value in values]
        assert marks == sorted(marks, reverse=True) and marks[0] > marks[-1], field


@pytest.mark.parametrize("grey", [0.0, 0.5, 1.0])
def test_a_blank_picture_names_no_subject_and_has_no_appeal(grey: float) -> None:
    reading = read_picture(np.full((64, 64, 3), grey))
    assert (reading.subject, reading.colour, reading.place) == ("", "", "")
    assert reading.marks.appeal == 0
    assert not shows_all_three(reading, "a red ball in the snow")


def test_pictures_of_nothing_have_marks() -> None:
    """What a model draws before it has learnt, or after it has diverged, must not stop an evaluation.

    That blobs of colour can have a high appeal is why faithfulness is judged beside it.
    """
    rng = np.random.default_rng(4105)
    line, blobs = np.full((64, 64, 3), 0.5), []
    line[30:32] = line[:, 20] = (0.9, 0.1, 0.1)
    for width in (0, 0, 0, 1, 1, 2, 4, 4):
        blob = gaussian_filter(rng.random((64, 64, 3)), (width, width, 0))
        blobs.append(np.clip((blob - 0.5) * 10 + 0.5, 0, 1))
    for picture in (line, *blobs):
        marks = read_picture(picture).marks
        assert all(0 <= getattr(marks, mark) <= 1 for mark in MARKS)


# --- prompts ------------------------------------------------------------------------------------------------


def test_the_facts_of_every_caption_are_those_of_its_scene() -> None:
    for template in (*TEMPLATES, DRAWING_TEMPLATE):
        for subject, colour, background in ALL_TRIPLES:
            for place, words in PLACES.items():
                prompt = template.format(
                    subject=subject, colour=colour, background=BACKGROUNDS[background], place=words
                )
                expected = {"subject": subject, "colour": colour, "background": background}
                assert facts_of(prompt) == expected | ({} if place == "anywhere" else {"place": place})
    assert len({colour for _, colour, _ in ALL_TRIPLES}) == len(HUES) == 6 and len(SUBJECTS) == 6


def test_only_whole_words_are_facts() -> None:
    assert facts_of("a coloured balloon in a boxroom") == {}
    assert facts_of("a ball, what is left of it") == {"subject": "ball"}
    assert facts_of("a star") == {"subject": "star"}


def test_faithfulness_is_the_share_of_named_facts() -> None:
    reading = Reading("ball", "red", "snow", "left", Marks(0, 0, 0, 0, 0, 0))
    for prompt, share in {
        "a red ball in the snow": 1.0,
        "a red ball in the snow on the right": 0.75,
        "a red box at night on the left": 0.5,
        "a blue ball": 0.5,
        "a star": 0.0,
    }.items():
        assert share_of_facts(reading, prompt) == share
    assert shows_all_three(reading, "a red ball in the snow on the right")  # place is left out
    assert not shows_all_three(reading, "a red ball")  # three facts are asked for, not those named
    assert not shows_all_three(reading, "a blue ball in the snow")


@pytest.mark.parametrize("prompt", ["", "a cat on a sofa"])
def test_a_prompt_without_facts_is_an_error_of_one_line(prompt: str) -> None:
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="finds no fact it can check") as error:
        WorldJudge().faithfulness(images, [prompt])
    assert repr(prompt) in str(error.value) and "\n" not in str(error.value)


def test_it_is_a_scorer_of_images(fresh) -> None:
    world, readings = fresh["ordinary"]
    pictures = np.stack([np.asarray(world[index].image) for index in range(8)])
    images, judge = to_images(pictures), WorldJudge()
    prompts = [world.text(index) for index in range(8)]
    assert judge.appeal(images).tolist() == pytest.approx([r.marks.appeal for r in readings[:8]])
    shares = [share_of_facts(*pair) for pair in zip(readings[:8], prompts, strict=True)]
    assert judge.faithfulness(images, prompts).tolist() == shares
    with pytest.raises(ValueError):
        judge.faithfulness(images, prompts[:7])
    # What an autoencoder returns may leave [-1, 1] a little.
    assert judge.appeal(images * 1.2)[0] == pytest.approx(judge.appeal((images * 1.2).clamp(-1, 1))[0])
