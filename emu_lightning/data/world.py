"""The synthetic world: captioned photographs in miniature, drawn by code.

A :class:`Scene` is *what* is there (subject, colour, background, place, style) and is what the caption says.
A :class:`Hand` is *how* it was shot (placement, size, exposure, contrast, depth of field, clutter, noise,
overlaid text, low resolution) and is never in the caption. A skilled photographer's hand is a narrow range
of good choices, which the ordinary hand makes only by chance. So a pool holds a few pictures that are well
shot and many that are not: quality-tuning has to find and learn that difference.

Nothing here is known to :mod:`emu_lightning.evaluation.judge`, which reads the same facts off the pixels.
"""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from emu_lightning.data.source import Sample, Source

Array = NDArray[np.floating]
Triple = tuple[str, str, str]  # subject, colour, background

HUES = {"red": 0, "yellow": 52, "green": 125, "turquoise": 178, "blue": 225, "purple": 290}  # degrees
BACKGROUNDS = {
    "meadow": "in a meadow",
    "beach": "on a beach",
    "snow": "in the snow",
    "night": "at night",
    "sunset": "at sunset",
}
PLACES = {"anywhere": "", "left": " on the left", "right": " on the right"}
TEMPLATES = (
    "a {colour} {subject} {background}{place}",
    "{background}, a {colour} {subject}{place}",
    "a photo of a {colour} {subject}{place} {background}",
    "one {colour} {subject}{place}, {background}",
)
DRAWING_TEMPLATE = "a drawing of a {colour} {subject} {background}{place}"


@dataclass(frozen=True)
class Scene:
    """What is in the picture; all of it is in the caption."""

    subject: str
    colour: str
    background: str
    place: str
    style: Literal["photo", "drawing"]
    caption: str


@dataclass(frozen=True)
class Hand:
    """How the picture was shot. Lengths are shares of the picture's side, angles degrees."""

    x: float
    y: float
    radius: float
    horizon: float
    gain: float  # 1 is a right exposure
    contrast: float  # 1 is full, towards 0 everything turns mid-grey
    depth: float  # standard deviation of the background's blur
    focus: float  # standard deviation of the whole picture's blur
    num_distractors: int
    noise: float  # standard deviation, values in [0, 1]
    has_text: bool
    is_low_resolution: bool


# --- shapes: signed distance in units of the radius, negative inside; y points down -------------------------


def _polygon(corners: Sequence[tuple[float, float]]) -> Callable[[Array, Array], Array]:
    """Signed distance to a simple polygon (Quilez, "2D distance functions")."""
    points = np.asarray(corners, np.float32)

    def distance(x: Array, y: Array) -> Array:
        nearest = np.full_like(x, np.inf)
        sign = np.ones_like(x)
        for (ax, ay), (bx, by) in zip(points, np.roll(points, 1, axis=0), strict=True):
            ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
            along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
            above, below, left = y >= ay, y < by, ex * wy > ey * wx
            crosses = (above & below & left) | (~above & ~below & ~left)
            sign = np.where(crosses, -sign, sign)
        return sign * np.sqrt(nearest)

    return distance


def _circle_point(degrees: float, radius: float) -> tuple[float, float]:
    return radius * float(np.sin(np.radians(degrees))), -radius * float(np.cos(np.radians(degrees)))


def _heart_outline() -> list[tuple[float, float]]:
    a = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(a) ** 3
    y = -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a))
    return [(float(u) / 15.5, float(v + 1.5) / 15.5) for u, v in zip(x, y, strict=True)]


SUBJECTS: dict[str, Callable[[Array, Array], Array]] = {
    "ball": lambda x, y: np.hypot(x, y) - 0.95,
    "box": _polygon([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]),
    "cone": _polygon([(0.0, -1.0), (0.98, 0.85), (-0.98, 0.85)]),
    "star": _polygon([_circle_point(36 * i, 1.12 if i % 2 == 0 else 0.47) for i in range(10)]),
    "heart": _polygon(_heart_outline()),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.27,
}

ALL_TRIPLES: list[Triple] = [(s, c, b) for s in SUBJECTS for c in HUES for b in BACKGROUNDS]


def is_held_out(triple: Triple) -> bool:
    """One triple of eight is never drawn for training, so that prompts of it test composition."""
    return hashlib.sha256(" ".join(triple).encode()).digest()[0] % 8 == 0


# --- what: drawing scenes and captions ----------------------------------------------------------------------


def draw_scene(rng: np.random.Generator, triples: Sequence[Triple]) -> Scene:
    """A scene with its caption, uniform over ``triples``; one in eight is a drawing."""
    subject, colour, background = triples[int(rng.integers(len(triples)))]
    place = str(rng.choice(list(PLACES), p=[0.5, 0.25, 0.25]))
    is_drawing = rng.random() < 0.125
    template = DRAWING_TEMPLATE if is_drawing else TEMPLATES[rng.integers(len(TEMPLATES))]
    caption = template.format(
        colour=colour, subject=subject, background=BACKGROUNDS[background], place=PLACES[place]
    )
    return Scene(subject, colour, background, place, "drawing" if is_drawing else "photo", caption)


def ordinary_hand(rng: np.random.Generator, place: str) -> Hand:
    """The everyday snapshot: any placement, any light, things in the way."""
    low, high = {"anywhere": (0.14, 0.86), "left": (0.14, 0.42), "right": (0.58, 0.86)}[place]
    return Hand(
        x=rng.uniform(low, high),
        y=rng.uniform(0.2, 0.84),
        radius=rng.uniform(0.12, 0.22),
        horizon=rng.uniform(0.3, 0.7),
        gain=float(np.exp(rng.uniform(np.log(0.5), np.log(1.3)))),
        contrast=rng.uniform(0.6, 1.0),
        depth=rng.uniform(0, 0.008),
        focus=rng.uniform(0, 0.012),
        num_distractors=int(rng.integers(0, 6)),
        noise=rng.uniform(0, 0.022),
        has_text=rng.random() < 0.06,
        is_low_resolution=rng.random() < 0.08,
    )


def skilled_hand(rng: np.random.Generator, place: str) -> Hand:
    """Rule of thirds, right exposure, full contrast, soft background, nothing in the way."""
    third = {"anywhere": rng.choice([1 / 3, 2 / 3]), "left": 1 / 3, "right": 2 / 3}[place]
    return Hand(
        x=float(third) + rng.uniform(-0.02, 0.02),
        y=rng.uniform(0.58, 0.66),
        radius=rng.uniform(0.2, 0.24),
        horizon=rng.uniform(0.5, 0.56),
        gain=rng.uniform(0.95, 1.0),
        contrast=1.0,
        depth=rng.uniform(0.018, 0.026),
        focus=0.0,
        num_distractors=0,
        noise=0.0,
        has_text=False,
        is_low_resolution=False,
    )


# --- how: rendering -----------------------------------------------------------------------------------------

_SKIES = {  # top and bottom of the sky, near and far ground; RGB in [0, 1]
    "meadow": ((0.55, 0.72, 0.90), (0.82, 0.90, 0.95), (0.40, 0.56, 0.30), (0.58, 0.70, 0.44)),
    "beach": ((0.62, 0.80, 0.90), (0.88, 0.94, 0.96), (0.86, 0.76, 0.58), (0.50, 0.66, 0.74)),
    "snow": ((0.70, 0.74, 0.80), (0.84, 0.86, 0.89), (0.97, 0.97, 0.98), (0.86, 0.89, 0.93)),
    "night": ((0.03, 0.04, 0.12), (0.10, 0.12, 0.24), (0.07, 0.08, 0.11), (0.11, 0.12, 0.17)),
    "sunset": ((0.50, 0.38, 0.52), (0.98, 0.70, 0.45), (0.26, 0.18, 0.22), (0.42, 0.28, 0.28)),
}


def _blend(image: Array, colour: Sequence[float] | Array, alpha: Array) -> None:
    image += alpha[..., None] * (np.asarray(colour, np.float32) - image)


def _background(scene: Scene, hand: Hand, rng: np.random.Generator, x: Array, y: Array) -> Array:
    top, bottom, near, far = (np.asarray(c, np.float32) for c in _SKIES[scene.background])
    size = x.shape[0]
    hills = hand.horizon + 0.02 * np.sin(2 * np.pi * (x * rng.uniform(0.6, 1.4) + rng.random()))
    if scene.style == "drawing":  # flat colours, as from a felt pen
        sky, ground = np.broadcast_to((top + bottom) / 2, (*x.shape, 3)), np.broadcast_to(near, (*x.shape, 3))
    else:
        height = np.clip(y / hand.horizon, 0, 1)[..., None]
        sky = top + (bottom - top) * height
        nearness = np.clip((y - hand.horizon) / (1 - hand.horizon), 0, 1)[..., None] ** 0.7
        ground = far + (near - far) * nearness
    edge = np.clip((y - hills) * size + 0.5, 0, 1)[..., None]
    image = (sky + (ground - sky) * edge).astype(np.float32)
    if scene.background == "night":
        for _ in range(7):
            star_x, star_y = rng.random(), rng.uniform(0, hand.horizon * 0.9)
            _blend(
                image, (0.75, 0.75, 0.8), np.exp(-((x - star_x) ** 2 + (y - star_y) ** 2) * (size / 0.9) ** 2)
            )
    return image


def _shade(scene: Scene, u: Array, v: Array, rng: np.random.Generator) -> Array:
    hue = (HUES[scene.colour] + rng.uniform(-5, 5)) / 360 % 1
    base = np.asarray(colorsys.hsv_to_rgb(hue, rng.uniform(0.84, 0.94), rng.uniform(0.88, 0.96)), np.float32)
    if scene.style == "drawing":
        return np.broadcast_to(base, (*u.shape, 3))
    light = 0.80 + 0.20 * np.clip(1 - np.hypot(u + 0.45, v + 0.5) / 1.6, 0, 1) / 0.6  # lamp at the upper left
    return base * np.clip(light, 0.72, 1.08)[..., None]


def render(scene: Scene, hand: Hand, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture as (size, size, 3) uint8."""
    y, x = (np.mgrid[0:size, 0:size].astype(np.float32) + 0.5) / size
    image = _background(scene, hand, rng, x, y)
    for _ in range(hand.num_distractors):  # grey and brown pebbles: never the subject's colours
        cx, cy, r = rng.random(), rng.uniform(0.1, 0.95), rng.uniform(0.025, 0.05)
        grey = rng.uniform(0.15, 0.6)
        far_away = np.hypot(cx - hand.x, cy - hand.y) > hand.radius * 1.3 + r
        if far_away:
            _blend(
                image,
                (grey * 1.1, grey, grey * 0.88),
                np.clip((r - np.hypot(x - cx, y - cy)) * size + 0.5, 0, 1),
            )
    if hand.depth > 0:
        image = gaussian_filter(image, (hand.depth * size, hand.depth * size, 0), mode="nearest")
    u, v = (x - hand.x) / hand.radius, (y - hand.y) / hand.radius
    if scene.style == "photo":  # a soft shadow on the ground
        shadow = np.exp(-((u - 0.15) ** 2 / 0.7 + (v - 1.0) ** 2 / 0.06)) * (y > hand.horizon)
        _blend(image, (0.05, 0.05, 0.07), 0.35 * shadow.astype(np.float32))
    distance = SUBJECTS[scene.subject](u, v) * hand.radius * size  # in pixels
    if scene.style == "drawing":
        _blend(image, (0.05, 0.05, 0.06), np.clip(1.9 - distance, 0, 1))
    _blend(image, _shade(scene, u, v, rng), np.clip(0.5 - distance, 0, 1))
    if hand.has_text:
        row = rng.uniform(0.05, 0.9)
        letters = np.repeat(rng.random(size // 2 + 1) < 0.7, 2)[:size]
        _blend(image, (0.96, 0.96, 0.96), ((np.abs(y - row) < 0.032) & letters[None, :]).astype(np.float32))
    image = (image - 0.5) * hand.contrast + 0.5
    image = image * hand.gain
    if hand.is_low_resolution:
        image = image.reshape(size // 2, 2, size // 2, 2, 3).mean((1, 3)).repeat(2, 0).repeat(2, 1)
    if hand.focus > 0:
        image = gaussian_filter(image, (hand.focus * size, hand.focus * size, 0), mode="nearest")
    image = image + hand.noise * rng.standard_normal(image.shape, np.float32)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


class World(Source):
    """``num_images`` captioned pictures of (size, size, 3), each a pure function of (seed, index).

    Args:
        size: side in pixels, even.
        num_images: length.
        seed: another seed is another pool.
        skilled_fraction: share of pictures a skilled photographer shot.
        triples: ``train`` draws (subject, colour, background) triples that training may see, ``held_out`` the
            others; one triple of eight is held out.
    """

    def __init__(
        self,
        size: int = 64,
        num_images: int = 4096,
        seed: int = 0,
        skilled_fraction: float = 0.1,
        triples: Literal["train", "held_out"] = "train",
    ) -> None:
        if size % 2:
            raise ValueError(f"World size must be even, got {size}")
        self.side, self.num_images, self.seed = size, num_images, seed
        self.skilled_fraction, self.triples = skilled_fraction, triples
        self._triples = [t for t in ALL_TRIPLES if is_held_out(t) == (triples == "held_out")]

    def __len__(self) -> int:
        return self.num_images

    def fingerprint(self) -> str:
        return f"world-1:{self.side}:{self.num_images}:{self.seed}:{self.skilled_fraction}:{self.triples}"

    def _draw(self, index: int) -> tuple[Scene, Hand, np.random.Generator]:
        rng = np.random.default_rng((self.seed, index))
        scene = draw_scene(rng, self._triples)
        hand = (skilled_hand if rng.random() < self.skilled_fraction else ordinary_hand)(rng, scene.place)
        return scene, hand, rng

    def describe(self, index: int) -> tuple[Scene, Hand]:
        """The truth about picture ``index``, for tests and reports."""
        scene, hand, _ = self._draw(index)
        return scene, hand

    def uid(self, index: int) -> str:
        return f"world-{self.seed}-{self.triples}-{index:07d}"

    def text(self, index: int) -> str:
        return self._draw(index)[0].caption

    def size(self, index: int) -> tuple[int, int]:
        return self.side, self.side

    def __getitem__(self, index: int) -> Sample:
        scene, hand, rng = self._draw(index)
        return Sample(
            image=render(scene, hand, self.side, rng),
            text=scene.caption,
            uid=f"world-{self.seed}-{self.triples}-{index:07d}",
            original_size=self.size(index),
        )
