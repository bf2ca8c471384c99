"""How a picture is exposed, coloured and focused, and what surrounds or covers it, from its pixels alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from emu_lightning.curation.scorer import Columns, Picture, Scorer, fingerprint

SAMPLE = 96  # pixels a side that tones and colours are counted on
FOCUS_SIDE = 512  # pixels that the shorter side is thought to have when sharpness is measured
PATCH, PATCHES = 48, 3  # pixels a side of a patch at that size; patches a side
CLIPPED = 2  # levels from black or white, of 255, at which tones are lost
PLAIN = 8  # levels by which the pixels of a plain line differ at most from the one in the middle


def sample(image: Image.Image) -> Image.Image:
    """Pixels on a grid over the picture, 96 x 96. None are averaged, so extremes and colours stay."""
    return image.resize((SAMPLE, SAMPLE), Image.Resampling.NEAREST)


def colourfulness(image: Image.Image) -> float:
    """Hasler and Suesstrunk 2003, M3. 0 is grey, 109 extremely colourful."""
    red, green, blue = (np.asarray(image.getchannel(n), np.float32) for n in range(3))
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = math.hypot(red_green.std(), yellow_blue.std())
    return spread + 0.3 * math.hypot(red_green.mean(), yellow_blue.mean())


def border(pixels: NDArray[np.uint8]) -> float:
    """Share of the picture (H, W, 3) that lies in plain bars along its edges.

    A plain background that reaches an edge along its whole length counts as well; a plain picture is all
    border.
    """
    kept = 1.0
    for lines in (pixels, pixels.swapaxes(0, 1)):
        num_plain = _plain_lines(lines) + _plain_lines(lines[::-1])
        kept *= max(0, len(lines) - num_plain) / len(lines)
    return 1.0 - kept


def _plain_lines(lines: NDArray[np.uint8]) -> int:
    """How many lines, from the first on, have its colour."""
    colour = lines[0, len(lines[0]) // 2].astype(np.int16)
    for number, line in enumerate(lines):  # mostly the first is not plain
        if (np.abs(line - colour) > PLAIN).any():
            return number
    return len(lines)


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of grey in [0, 255], mean of the three sharpest of nine patches.

    In patches, since a sharp subject before a blurred background makes no blurred picture. Pictures are
    measured as if their shorter side had 512 pixels, so that sizes compare; smaller ones as they are.
    """
    shorter = min(image.size)
    scale = max(1.0, shorter / FOCUS_SIDE)
    side = min(PATCH, max(3, shorter // PATCHES))  # of a patch as measured,
    reach = min(round(side * scale), *image.size)  # and as it is cut out
    patches = np.empty((PATCHES**2, side, side), np.int16)
    for number in range(PATCHES**2):
        row, column = divmod(number, PATCHES)
        left = _start(column, image.width, reach)
        top = _start(row, image.height, reach)
        patch = image.crop((left, top, left + reach, top + reach)).convert("L")
        if reach != side:
            # Averages, which take away the noise of large pictures; the rest of the way without, for speed.
            patch = patch.reduce(max(1, int(scale))).resize((side, side), Image.Resampling.NEAREST)
        patches[number] = np.asarray(patch)
    vertical = patches[:, :-2, 1:-1] + patches[:, 2:, 1:-1]
    horizontal = patches[:, 1:-1, :-2] + patches[:, 1:-1, 2:]
    laplacian = (vertical + horizontal - 4 * patches[:, 1:-1, 1:-1]).reshape(PATCHES**2, -1)
    variances = laplacian.var(axis=1, dtype=np.float32)
    return float(np.sort(variances)[-PATCHES:].mean())


def _start(number: int, length: int, reach: int) -> int:
    """Where the patch in the middle of the `number`th part begins."""
    middle = (number + 0.5) * length / PATCHES
    return min(max(0, round(middle - reach / 2)), length - reach)


class Photometry(Scorer):
    """Exposure, contrast, colour, focus and borders.

    Columns:
        brightness: mean luma in [0, 1].
        contrast: standard deviation of luma, in [0, 0.5].
        clipped_dark, clipped_bright: shares of pixels that are black or white, up to two levels.
        colourfulness: see :func:`colourfulness`.
        sharpness: see :func:`sharpness`.
        border: see :func:`border`.
    """

    columns = dict.fromkeys(
        (
            "brightness",
            "contrast",
            "clipped_dark",
            "clipped_bright",
            "colourfulness",
            "sharpness",
            "border",
        ),
        pa.float32(),
    )

    def fingerprint(self) -> str:
        return fingerprint("photometry 1")

    def score(self, pictures: Sequence[Picture]) -> Columns:
        rows = [self._measure(picture.image) for picture in pictures]
        return {name: [row[name] for row in rows] for name in self.columns}

    def _measure(self, image: Image.Image) -> dict[str, float]:
        small = sample(image)
        shares = np.array(small.convert("L").histogram()) / SAMPLE**2
        levels = np.arange(256)
        mean = levels @ shares
        return {
            "brightness": float(mean / 255),
            "contrast": math.sqrt((levels - mean) ** 2 @ shares) / 255,
            "clipped_dark": float(shares[: CLIPPED + 1].sum()),
            "clipped_bright": float(shares[-CLIPPED - 1 :].sum()),
            "colourfulness": colourfulness(small),
            "sharpness": sharpness(image),
            "border": border(np.asarray(small)),
        }


MARKED_SIDE = 256  # pixels a side of the grey picture in which repetitions are looked for
DETAIL = 12.0  # levels of 255 at which detail is cut, so that one strong edge does not drown a faint mark
NEAREST_COPY = 16  # pixels, at that size: what repeats nearer is texture


def repetition(image: Image.Image) -> float:
    """How much of the fine detail comes again at one distance: autocorrelation of the Laplacian, in [0, 1].

    A mark that is laid over all of a picture repeats, what was photographed does not; save brick walls,
    fences and the like. Photographs have less than 0.1; a mark at 30 % opacity mostly more.
    """
    size = (MARKED_SIDE, MARKED_SIDE)
    grey = image.convert("L").resize(size, Image.Resampling.BILINEAR, reducing_gap=1.5)
    pixels = np.asarray(grey, np.float32)
    around = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
    detail = np.clip(pixels[1:-1, 1:-1] - around / 4, -DETAIL, DETAIL)
    if not detail.any():
        return 0.0
    side = len(detail)
    spectrum = np.fft.rfft2(detail, (2 * side, 2 * side))  # twice as wide: shifts do not wrap around
    reach = side // 2  # a mark that is there twice
    shifts = np.arange(-reach, reach + 1)
    products = np.fft.irfft2(np.abs(spectrum) ** 2)[np.ix_(shifts, shifts[reach:])]
    overlaps = (side - np.abs(shifts))[:, None] * (side - shifts[reach:])
    means = products / overlaps
    is_copy = np.hypot(shifts[:, None], shifts[reach:]) >= NEAREST_COPY
    return float(min(1.0, max(0.0, means[is_copy].max() / means[reach, 0])))


class Watermark(Scorer):
    """Marks that are repeated over the whole picture, as stock agencies lay them. Single ones are OCR's.

    Column `watermark`: see :func:`repetition`. It takes several times as long as all of `Photometry`.
    """

    columns = {"watermark": pa.float32()}

    def fingerprint(self) -> str:
        return fingerprint("watermark 1")

    def score(self, pictures: Sequence[Picture]) -> Columns:
        return {"watermark": [repetition(picture.image) for picture in pictures]}
