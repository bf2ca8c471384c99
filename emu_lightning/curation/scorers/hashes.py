"""What a picture looks like in few bits, to find it again resized, recompressed, a little changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from emu_lightning.curation.scorer import Columns, Picture, Scorer, fingerprint

SIDE, KEPT = 32, 8  # of the picture that is transformed; of its lowest frequencies, in both directions
# DCT-II without its factors, which all frequencies share and no comparison with their median depends on.
COSINES = np.cos(np.pi / SIDE * np.arange(KEPT)[:, None] * (np.arange(SIDE) + 0.5))  # (8, 32)


def perceptual_hash(image: Image.Image) -> int | None:
    """pHash: which of the 8 x 8 lowest frequencies of the picture in grey exceed their median.

    That of `imagehash.phash`, bit for bit where no side exceeds 95 pixels. Of larger pictures means are taken
    first, and of more than 256 pixels a side only so many are looked at: the time does not grow with their
    size, and a bit changes now and then.

    Returns:
        64 bits, the first of them the highest; rows are vertical frequencies. None for a plain picture: all
        of them would look alike.
    """
    grey = (
        _thin(image, 8 * SIDE).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    )
    pixels = np.asarray(grey, np.float64)
    if np.ptp(pixels) <= 1:
        return None
    # Rounded, so that sums in another order, on another processor, do not decide whether two are equal.
    frequencies: NDArray[np.float64] = (COSINES @ pixels @ COSINES.T).round(6)
    median = np.sort(frequencies, axis=None)[31:33].mean()
    bits = np.packbits(frequencies > median)
    return int.from_bytes(bits.tobytes(), "big")


def chroma(image: Image.Image) -> int:
    """Mean colour of the four quarters, which pHash does not see: 8 bytes, Cb and Cr of each, row by row.

    Brightness is left out: it is the hash's business, and what retouching changes first.
    """
    quarters = _thin(image, 2 * SIDE).resize((2, 2), Image.Resampling.BOX).convert("YCbCr")
    return int.from_bytes(np.asarray(quarters)[..., 1:].tobytes(), "big")


def _thin(image: Image.Image, side: int) -> Image.Image:
    """At most `side` pixels a side, from a grid: means over them are hardly other ones than over all."""
    size = (min(side, image.width), min(side, image.height))
    return image.resize(size, Image.Resampling.NEAREST)


class Hashes(Scorer):
    """What near-duplicates are found by.

    Columns `phash` and `chroma`, 64 bits each: see :func:`perceptual_hash` and :func:`chroma`. `phash` is
    missing for plain pictures.
    """

    columns = {"phash": pa.uint64(), "chroma": pa.uint64()}

    def fingerprint(self) -> str:
        return fingerprint("hashes 1")

    def score(self, pictures: Sequence[Picture]) -> Columns:
        return {
            "phash": [perceptual_hash(picture.image) for picture in pictures],
            "chroma": [chroma(picture.image) for picture in pictures],
        }
