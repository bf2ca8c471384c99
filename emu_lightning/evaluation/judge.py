"""The exact judge of the synthetic world: what a picture shows and how well it is shot, from pixels alone.

It shares no code and no parameter with the renderer. What it knows is what a person would say of such
pictures: the subject is the most colourful thing that stands out from its row of background, a ring has a
hole, a meadow is green below and pale blue above. Exposure and contrast are undone by fitting, for each
kind of background, the gain and contrast that would make it look like this.

Faithfulness is the share of the facts in the prompt (subject, colour, background, and place where it is
named) that the picture shows. Style is not judged. Appeal is the mean of six marks in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

Array = NDArray[np.float64]

# Upper ends of the hue ranges in degrees, going round from red.
_HUE_ENDS = (
    (25, "red"),
    (85, "yellow"),
    (152, "green"),
    (202, "turquoise"),
    (257, "blue"),
    (330, "purple"),
    (360, "red"),
)
# Typical colours at the top and at the bottom of a well-exposed picture.
_BACKGROUNDS = {
    "meadow": ((0.58, 0.74, 0.91), (0.44, 0.59, 0.33)),
    "beach": ((0.65, 0.82, 0.91), (0.80, 0.74, 0.60)),
    "snow": ((0.72, 0.76, 0.81), (0.95, 0.96, 0.97)),
    "night": ((0.05, 0.06, 0.14), (0.08, 0.09, 0.12)),
    "sunset": ((0.58, 0.43, 0.51), (0.29, 0.20, 0.23)),
}
_GAINS = np.exp(np.linspace(np.log(0.45), np.log(1.5), 22))
_CONTRASTS = np.linspace(0.5, 1.1, 13)
_SIDE = 28  # side of the shape templates
_BLURS = (0.0, 0.03, 0.06, 0.09)  # out of focus by so much of the shape's size


def _outline(draw_shape: str) -> Array:
    """The shape, filling a square of eight times the templates' side, in [0, 1]."""
    big = 8 * _SIDE
    canvas = Image.new("L", (big, big))
    draw = ImageDraw.Draw(canvas)
    if draw_shape in ("ball", "ring"):
        draw.ellipse((0, 0, big, big), fill=255)
        if draw_shape == "ring":
            hole = 0.27 * big
            draw.ellipse((hole, hole, big - hole, big - hole), fill=0)
    elif draw_shape == "box":
        draw.rectangle((0, 0, big, big), fill=255)
    elif draw_shape == "cone":
        draw.polygon([(big / 2, 0), (big, big), (0, big)], fill=255)
    elif draw_shape == "star":  # a pentagram: inner radius is 0.38 to 0.42 of the outer one
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2, 0.42, 1.0)
        x, y = radii * np.sin(angles), -radii * np.cos(angles)
        x, y = (x - x.min()) / np.ptp(x) * big, (y - y.min()) / np.ptp(y) * big
        draw.polygon(list(zip(x.tolist(), y.tolist(), strict=True)), fill=255)
    else:  # a heart: two lobes and a point
        draw.pieslice((0, 0, big * 0.54, big * 0.62), 150, 380, fill=255)
        draw.pieslice((big * 0.46, 0, big, big * 0.62), 160, 390, fill=255)
        draw.polygon(
            [
                (big * 0.02, big * 0.40),
                (big * 0.28, big * 0.2),
                (big / 2, big * 0.16),
                (big * 0.72, big * 0.2),
                (big * 0.98, big * 0.40),
                (big * 0.82, big * 0.66),
                (big / 2, big),
                (big * 0.18, big * 0.66),
            ],
            fill=255,
        )
    return np.asarray(canvas, np.float64) / 255


def _fit(soft: Array, mask: NDArray[np.bool_]) -> Array:
    """A soft shape cut to its mask's bounding box, at the templates' size."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = soft[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    return np.asarray(Image.fromarray(cut).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), np.float64)


def _templates(shape: str) -> list[Array]:
    """The shape in and out of focus, each cut where a picture's subject would be cut."""
    sharp = np.pad(_outline(shape), 2 * _SIDE)
    blurred = [ndimage.gaussian_filter(sharp, blur * 8 * _SIDE) for blur in _BLURS]
    return [_fit(soft / soft.max(), soft > 0.5 * soft.max()) for soft in blurred]


_SHAPES = ("ball", "box", "cone", "star", "heart", "ring")
_TEMPLATES = np.asarray([_templates(name) for name in _SHAPES])  # (shapes, blurs, side, side)

_FACTS = {
    "subject": {name: rf"\b{name}\b" for name in _SHAPES},
    "colour": {name: rf"\b{name}\b" for _, name in _HUE_ENDS},
    "background": {name: rf"\b{name}\b" for name in _BACKGROUNDS},
    "place": {"left": r"\bon the left\b", "right": r"\bon the right\b"},
}


@dataclass(frozen=True)
class Marks:
    """How well a picture is shot; each mark is in [0, 1], 1 is best."""

    composition: float
    exposure: float
    contrast: float
    clutter: float
    noise: float
    sharpness: float

    @property
    def appeal(self) -> float:
        return float(np.mean([getattr(self, field.name) for field in fields(self)]))


@dataclass(frozen=True)
class Reading:
    """What the judge sees in one picture. ``subject`` and ``colour`` are empty where nothing stands out."""

    subject: str
    colour: str
    background: str
    place: str
    marks: Marks


def facts_of(prompt: str) -> dict[str, str]:
    """The judgeable facts a prompt states, e.g. ``{"subject": "star", "colour": "red"}``."""
    return {
        fact: name
        for fact, names in _FACTS.items()
        for name, pattern in names.items()
        if re.search(pattern, prompt)
    }


def _opponent(rgb: Array) -> Array:
    """Red-green and yellow-blue differences; grey is (0, 0)."""
    return np.stack([rgb[..., 0] - rgb[..., 1], (rgb[..., 0] + rgb[..., 1]) / 2 - rgb[..., 2]], -1)


def _find_subject(image: Array, row: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Soft membership in [0, 1] of each pixel, and the mask of the largest colourful thing."""
    stands_out = np.linalg.norm(_opponent(image) - _opponent(row)[:, None], axis=-1)
    signal = ndimage.gaussian_filter(np.minimum(stands_out, np.ptp(image, axis=-1)), 0.5)
    level = np.percentile(signal, 99)
    soft = np.clip(signal / max(level, 1e-6), 0, 1)
    if level < 0.04:  # fainter than any named colour
        return soft, np.zeros(soft.shape, bool)
    labels, count = ndimage.label(ndimage.binary_closing(soft > 0.5) | (soft > 0.5))
    if count == 0:
        return soft, np.zeros(soft.shape, bool)
    sizes = ndimage.sum_labels(np.ones_like(soft), labels, range(1, count + 1))
    return soft, labels == 1 + int(np.argmax(sizes))


def _shape(soft: Array, mask: NDArray[np.bool_]) -> str:
    seen = _fit(soft * ndimage.binary_dilation(mask), mask)
    overlap = np.minimum(seen, _TEMPLATES).sum((-1, -2)) / np.maximum(seen, _TEMPLATES).sum((-1, -2))
    return _SHAPES[int(np.argmax(overlap.max(1)))]


def _colour(rgb: Array) -> str:
    red, green, blue = rgb
    hue = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    return next(name for end, name in _HUE_ENDS if hue <= end)


def _background(image: Array, outside: NDArray[np.bool_]) -> str:
    """The background whose top and bottom colours, under the best gain and contrast, are nearest."""
    height = image.shape[0]
    bands = (slice(0, height // 6), slice(height - height // 6, height))
    seen = np.stack(
        [
            np.median(image[band][outside[band]], axis=0)
            if outside[band].any()
            else np.median(image[band], axis=(0, 1))
            for band in bands
        ]
    )
    typical = np.asarray(list(_BACKGROUNDS.values()))  # (K, 2, 3)
    contrasted = (typical[:, None] - 0.5) * _CONTRASTS[None, :, None, None] + 0.5
    shot = np.clip(contrasted[:, :, None] * _GAINS[:, None, None], 0, 1)  # (K, contrasts, gains, 2, 3)
    error = ((shot - seen) ** 2).sum((-1, -2)).min((1, 2))
    return list(_BACKGROUNDS)[int(np.argmin(error))]


def _marks(image: Array, row: Array, mask: NDArray[np.bool_], soft: Array) -> Marks:
    size = image.shape[0]
    core = ndimage.binary_erosion(mask)
    inside = core if mask.sum() > 60 and core.any() else mask  # a line has no core
    ys, xs = np.nonzero(mask)
    x, y = (xs.mean() + 0.5) / size, (ys.mean() + 0.5) / image.shape[1]
    extent = max(np.ptp(xs), np.ptp(ys)) / size
    thirds = np.exp(-((min(abs(x - 1 / 3), abs(x - 2 / 3)) / 0.09) ** 2))
    low = np.exp(-(((y - 0.63) / 0.16) ** 2))  # the lower third, standing on the ground
    fills = np.exp(-(((extent - 0.42) / 0.12) ** 2))
    composition = (thirds * low * fills) ** (1 / 3)

    body = image[inside]
    brightness = np.percentile(body.max(-1), 75)
    around = ~ndimage.binary_dilation(mask, iterations=3)
    burnt = (image[around] > 0.995).all(-1).sum() / max(around.sum(), 1)  # 0 where the mask covers all
    exposure = np.clip((brightness - 0.5) / 0.35, 0, 1) * np.exp(-burnt / 0.15)

    saturation = np.median(np.ptp(body, axis=-1) / np.maximum(body.max(-1), 1e-3))
    contrast = np.clip((saturation - 0.55) / 0.25, 0, 1)

    below = ndimage.binary_dilation(mask, iterations=3)  # the shadow belongs to the subject
    shade = np.zeros_like(below)
    shade[size // 16 :] = below[: -(size // 16)]
    free = around & ~shade
    grey, grey_row = image.mean(-1), row.mean(-1)
    shifts = [np.abs(grey - np.roll(grey_row, k)[:, None]) for k in range(-2, 3)]  # hills are not clutter
    stray = ndimage.median_filter(np.min(shifts, axis=0), 3) > 0.07 * max(brightness, 0.3)
    clutter = np.exp(-(stray & free).sum() / max(free.sum(), 1) / 0.012)

    grain = image - ndimage.median_filter(image, (3, 3, 1))
    sigma = 1.4826 * np.median(np.abs(grain[free])) if free.any() else 1.0
    noise = np.exp(-((sigma / 0.012) ** 2))

    slope = np.hypot(*np.gradient(soft))[ndimage.binary_dilation(mask, iterations=2)]
    sharpness = np.clip((np.percentile(slope, 90) - 0.24) / 0.14, 0, 1)
    return Marks(*(float(m) for m in (composition, exposure, contrast, clutter, noise, sharpness)))


def read_picture(image: Array) -> Reading:
    """Reads one picture, (H, W, 3) in [0, 1]."""
    row = np.median(image, axis=1)  # a subject fills less than half of any row
    soft, mask = _find_subject(image, row)
    background = _background(image, ~ndimage.binary_dilation(mask, iterations=2))
    if mask.sum() < 12:
        return Reading("", "", background, "", Marks(0, 0, 0, 0, 0, 0))
    core = ndimage.binary_erosion(mask)
    colour = _colour(np.median(image[core if core.sum() > 8 else mask], axis=0))
    place = "left" if np.nonzero(mask)[1].mean() + 0.5 < image.shape[1] / 2 else "right"
    return Reading(_shape(soft, mask), colour, background, place, _marks(image, row, mask, soft))


def shows_all_three(reading: Reading, prompt: str) -> bool:
    """Whether subject, colour and background are all as the prompt says; place is left out."""
    facts = facts_of(prompt)
    return all(getattr(reading, fact) == facts.get(fact) for fact in ("subject", "colour", "background"))


class WorldJudge:
    """Scorer of synthetic-world pictures; see the module's docstring."""

    def read(self, images: torch.Tensor) -> list[Reading]:
        """Reads ``images`` (B, 3, H, W) in [-1, 1]."""
        pictures = ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).double().cpu().numpy()
        return [read_picture(picture) for picture in pictures]

    def appeal(self, images: torch.Tensor) -> Array:
        """(B,) in [0, 1]; the prompt is not seen."""
        return np.asarray([reading.marks.appeal for reading in self.read(images)])

    def faithfulness(self, images: torch.Tensor, prompts: Sequence[str]) -> Array:
        """(B,) share in [0, 1] of each prompt's facts that its picture shows."""
        return np.asarray(
            [
                share_of_facts(reading, prompt)
                for reading, prompt in zip(self.read(images), prompts, strict=True)
            ]
        )


def share_of_facts(reading: Reading, prompt: str) -> float:
    """Share in [0, 1] of the prompt's facts that hold; a prompt without judgeable facts is an error."""
    facts = facts_of(prompt)
    if not facts:
        raise ValueError(
            f"the world's judge finds no fact it can check in the prompt {prompt!r}: "
            "name a subject, a colour or a background of the synthetic world"
        )
    return float(np.mean([getattr(reading, fact) == name for fact, name in facts.items()]))
