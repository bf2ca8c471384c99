from __future__ import annotations

import pickle

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from emu_lightning.data.world import (
    ALL_TRIPLES,
    BACKGROUNDS,
    HUES,
    SUBJECTS,
    World,
    is_held_out,
    ordinary_hand,
    skilled_hand,
)


def test_a_picture_is_a_function_of_seed_and_index_alone() -> None:
    world = World(32, 20, seed=3, skilled_fraction=0.5)
    backwards = [world[index] for index in reversed(range(20))][::-1]
    for index, sample in enumerate(backwards):
        again = pickle.loads(pickle.dumps(World(32, 500, seed=3, skilled_fraction=0.5)))[index]
        assert np.array_equal(sample.image, again.image)
        assert (sample.text, sample.uid) == (again.text, again.uid)
    other = World(32, 20, seed=4, skilled_fraction=0.5)
    assert not any(np.array_equal(other[index].image, backwards[index].image) for index in range(20))
    assert len({sample.uid for sample in backwards} | set(other.uids())) == 40
    assert len({sample.image.tobytes() for sample in backwards}) == 20


def test_names_and_captions_are_known_without_drawing() -> None:
    world = World(32, 30, seed=5)
    assert len(world) == 30
    for index in range(30):
        sample, (scene, _) = world[index], world.describe(index)
        assert (world.uid(index), world.text(index)) == (sample.uid, sample.text)
        assert sample.text == scene.caption
        assert sample.original_size == (32, 32)


def test_the_caption_says_what_is_there_and_not_how_it_was_shot() -> None:
    world = World(32, 400, seed=6)
    styles, places = set(), set()
    for index in range(len(world)):
        scene, _ = world.describe(index)
        words = scene.caption.replace(",", "").split()
        for names, name in ((SUBJECTS, scene.subject), (HUES, scene.colour), (BACKGROUNDS, scene.background)):
            assert [word for word in words if word in names] == [name]
        assert ("drawing" in words) == (scene.style == "drawing")
        sides = [side for side in ("left", "right") if f"on the {side}" in scene.caption]
        assert sides == ([] if scene.place == "anywhere" else [scene.place])
        styles.add(scene.style)
        places.add(scene.place)
    assert styles == {"photo", "drawing"} and places == {"anywhere", "left", "right"}
    # The same captions belong to pictures of both hands.
    shot = [World(32, 400, seed=6, skilled_fraction=share) for share in (0.0, 1.0)]
    assert [shot[0].text(index) for index in range(400)] == [shot[1].text(index) for index in range(400)]


def test_a_subject_stands_on_the_side_that_the_caption_names() -> None:
    world = World(32, 400, seed=7, skilled_fraction=0.3)
    for scene, hand in map(world.describe, range(len(world))):
        assert scene.place == "anywhere" or (hand.x < 0.5) == (scene.place == "left")


def test_training_never_shows_the_held_out_triples() -> None:
    held_out = {triple for triple in ALL_TRIPLES if is_held_out(triple)}
    assert (len(held_out), len(ALL_TRIPLES)) == (25, 180)
    for part in (0, 1, 2):  # composition is tested, not words: each of them is seen in training
        seen = {triple[part] for triple in ALL_TRIPLES if triple not in held_out}
        assert seen == {triple[part] for triple in ALL_TRIPLES}

    def triples(which: str) -> set[tuple[str, str, str]]:
        world = World(32, 2500, seed=8, triples=which)
        scenes = [world.describe(index)[0] for index in range(len(world))]
        return {(scene.subject, scene.colour, scene.background) for scene in scenes}

    assert triples("held_out") == held_out
    assert triples("train") == set(ALL_TRIPLES) - held_out


def test_the_share_of_skilled_pictures_is_what_was_asked_for() -> None:
    world = World(32, 2000, seed=9, skilled_fraction=0.1)
    hands = [world.describe(index)[1] for index in range(len(world))]
    skilled = sum(hand.contrast == 1 and hand.noise == 0 and hand.focus == 0 for hand in hands)
    assert abs(skilled - 200) < 5 * np.sqrt(2000 * 0.1 * 0.9)


def centre_of_colour(picture: np.ndarray) -> tuple[float, float]:
    """Where the pixels lie that are more colourful than their row; (x, y) in shares of the side."""
    colourful = np.ptp(picture.astype(float), axis=-1)
    above = colourful - np.median(colourful, axis=1, keepdims=True)
    y, x = np.nonzero(above > 0.5 * above.max())
    return (x.mean() + 0.5) / len(picture), (y.mean() + 0.5) / len(picture)


def statistics(picture: np.ndarray) -> dict[str, float]:
    """Less is better; from pixels, and of no use to the judge."""
    grey = picture.astype(float).mean(-1) / 255
    x, y = centre_of_colour(picture)
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    rows = np.abs(grey - np.median(grey, axis=1, keepdims=True))
    return {
        "off the thirds": min(np.hypot(x - third, y - 0.62) for third in (1 / 3, 2 / 3)),
        "grain": float(np.median(np.abs(laplacian))),
        "darkness": float(1 - np.quantile(picture.max(-1) / 255, 0.98)),
        "things away from the subject": float((rows > 0.1)[np.abs(_columns(grey) - x) > 0.3].mean()),
        "blur of the subject": -float(np.quantile(np.abs(grey - gaussian_filter(grey, 1)), 0.99)),
    }


def _columns(grey: np.ndarray) -> np.ndarray:
    return np.broadcast_to((np.arange(len(grey)) + 0.5) / len(grey), grey.shape)


def test_the_skilled_hand_shoots_better_pictures() -> None:
    """By statistics that neither the renderer nor the judge knows, in the median over the same scenes."""
    medians = []
    for share in (0.0, 1.0):
        world = World(64, 150, seed=10, skilled_fraction=share)
        measured = [statistics(np.asarray(world[index].image)) for index in range(len(world))]
        medians.append({name: np.median([each[name] for each in measured]) for name in measured[0]})
    ordinary, skilled = medians
    for name in ordinary:
        assert skilled[name] < ordinary[name], name
    assert skilled["off the thirds"] < 0.5 * ordinary["off the thirds"]
    assert skilled["grain"] < 0.5 * ordinary["grain"]


def test_the_skilled_hand_varies_less() -> None:
    rng = np.random.default_rng(0)
    for field in ("x", "y", "radius", "horizon", "gain", "contrast", "focus", "num_distractors", "noise"):
        ordinary, skilled = (
            np.std([getattr(hand(rng, "left"), field) for _ in range(200)])
            for hand in (ordinary_hand, skilled_hand)
        )
        assert skilled < ordinary, field


@pytest.mark.parametrize("size", [32, 64, 128])
def test_every_size_shows_the_same_scene(size: int) -> None:
    world = World(size, 12, seed=11, skilled_fraction=1.0)
    for index in range(12):
        image = np.asarray(world[index].image)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert world.text(index) == World(64, 12, seed=11, skilled_fraction=1.0).text(index)
        _, hand = world.describe(index)
        x, y = centre_of_colour(image)
        assert abs(x - hand.x) < 0.1 and abs(y - hand.y) < 0.15
        assert image.std() > 10


def test_the_fingerprint_changes_with_every_argument() -> None:
    """Cached latents are keyed by it."""
    arguments = {"size": 32, "num_images": 10, "seed": 1, "skilled_fraction": 0.2, "triples": "train"}
    changed = {"size": 64, "num_images": 11, "seed": 2, "skilled_fraction": 0.3, "triples": "held_out"}
    worlds = [World(**arguments), *(World(**{**arguments, name: changed[name]}) for name in arguments)]
    assert len({world.fingerprint() for world in worlds}) == 6
    assert World(**arguments).fingerprint() == worlds[0].fingerprint()


def test_an_odd_size_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^World size must be even, got 33$"):
        World(33)
