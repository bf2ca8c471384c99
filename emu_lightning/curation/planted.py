"""A pool of the synthetic world with planted defects: the truth that filters are measured against.

Pictures are of 256 pixels and stored as photographs are: JPEG files, and what is said of them in one list.
Most are everyday snapshots without fault, a few are photogenic, and each of the others has one defect. What
is planted is written to `truth.parquet` beside the folder, where no part of curation looks.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from emu_lightning.data.manifest import write_table
from emu_lightning.data.world import (
    ALL_TRIPLES,
    Scene,
    draw_scene,
    is_held_out,
    ordinary_hand,
    render,
    skilled_hand,
)
from emu_lightning.files import write_whole

SIDE = 256
TRUTH = "truth.parquet"
SHARES = {  # of the pool; what remains are everyday snapshots without fault
    "photogenic": 0.08,
    "text": 0.06,
    "low_resolution": 0.05,
    "extreme_aspect": 0.05,
    "wrong_caption": 0.06,
    "duplicate": 0.06,
    "offensive": 0.05,
    "blur": 0.06,
    "corrupt": 0.04,
}
CROPS = [*4 * ["nothing"], "text", "low_resolution", "extreme_aspect", "duplicate", "blur", "corrupt"]
WORDS = "SALE NOW ONLY TODAY BEST PRICE CALL SHOP HERE OPEN NEW FREE WINTER SUMMER OFFER".split()
SOURCES = {"flickr": 30.0, "portfolio": 400.0}  # median likes of a picture of a year's age


def write_planted_pool(
    folder: str | Path, num: int, seed: int = 0, photographs: Sequence[Image.Image] = ()
) -> Path:
    """Writes `num` pictures of the world and ten of each photograph, and the truth about them beside it.

    Args:
        folder: made; its files are `NNNNNN.jpg`, and `metadata.jsonl` with text, source, likes, posted_at
            and licence of each.
        num: pictures of the world.
        seed: of everything.
        photographs: real ones; ten crops of each, six of them with a defect, and none with a caption.

    Returns:
        The table of truth: `uid`, `planted` (a key of `SHARES`, or "nothing"), `original` (uid of what a
        duplicate is of), `subject` (of the world's), `is_photograph`.
    """
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    counts = {name: round(share * num) for name, share in SHARES.items()}
    kinds = [name for name, count in counts.items() for _ in range(count)]
    kinds += ["nothing"] * (num - len(kinds))
    order = rng.permutation(num)
    rows: list[dict[str, Any]] = []
    said: list[dict[str, Any]] = []

    def add(content: bytes, caption: str | None, **truth: Any) -> str:
        name = f"{len(rows):06d}.jpg"
        write_whole(folder / name, content)
        text = {} if caption is None else {"text": caption}
        own = np.random.default_rng((seed, len(rows), 1))
        said.append({"file_name": name, **text, **_popularity(truth["planted"], own)})
        rows.append({"uid": name, **truth})
        return name

    whole: list[tuple[str, Image.Image, Scene]] = []  # what duplicates are made of
    for index, kind in enumerate(sorted((kinds[i] for i in order), key=lambda kind: kind == "duplicate")):
        own = np.random.default_rng((seed, index))
        original = None
        if kind == "duplicate":
            original, image, scene = whole[int(own.integers(len(whole)))]
        else:
            scene = _scene(own)
            image = _photograph(scene, kind == "photogenic", own)
        caption = _other_caption(scene, own) if kind == "wrong_caption" else scene.caption
        truth = {"planted": kind, "original": original, "subject": scene.subject, "is_photograph": False}
        name = add(_planted(kind, image, own), caption, **truth)
        if kind == "nothing":
            whole.append((name, image, scene))
    for number, photograph in enumerate(photographs):
        own = np.random.default_rng((seed, num, number))
        first: tuple[str, Image.Image] | None = None
        for kind in CROPS:
            image = _crop(photograph, own)
            original = None
            if kind == "duplicate" and first is not None:
                original, image = first
            truth = {"planted": kind, "original": original, "subject": None, "is_photograph": True}
            name = add(_planted(kind, image, own), None, **truth)
            first = first or (name, image)
    write_whole(folder / "metadata.jsonl", "".join(json.dumps(each) + "\n" for each in said))
    write_table(pa.Table.from_pylist(rows), folder.parent / TRUTH)
    return folder.parent / TRUTH


def _scene(rng: np.random.Generator) -> Scene:
    scene = draw_scene(rng, [triple for triple in ALL_TRIPLES if not is_held_out(triple)])
    return dataclasses.replace(scene, style="photo", caption=scene.caption.replace("a drawing of ", ""))


def _photograph(scene: Scene, is_photogenic: bool, rng: np.random.Generator) -> Image.Image:
    """A picture without any of the defects below."""
    hand = (skilled_hand if is_photogenic else ordinary_hand)(rng, scene.place)
    hand = dataclasses.replace(hand, focus=0.0, has_text=False, is_low_resolution=False, noise=0.01)
    return Image.fromarray(render(scene, hand, SIDE, rng))


def _crop(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square part of it, of at least half its shorter side."""
    shorter = min(photograph.size)
    side = int(rng.integers(shorter // 2, shorter + 1))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
    part = photograph.convert("RGB").crop((left, top, left + side, top + side))
    return part.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _planted(kind: str, image: Image.Image, rng: np.random.Generator) -> bytes:
    """The file with its defect."""
    if kind == "corrupt":
        return _corrupt(_jpeg(image), rng)
    change = DEFECTS.get(kind)
    return _jpeg(image if change is None else change(image, rng))


def _other_caption(scene: Scene, rng: np.random.Generator) -> str:
    """That of a scene that shares nothing with this one."""
    while True:
        other = _scene(rng)
        if not {other.subject, other.colour, other.background} & {
            scene.subject,
            scene.colour,
            scene.background,
        }:
            return other.caption


def _text(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Two to four lines of words over the picture."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for line in range(int(rng.integers(2, 5))):
        words = " ".join(rng.choice(WORDS, int(rng.integers(2, 4))))
        place = (int(rng.integers(4, 30)), int(20 + 55 * line + rng.integers(0, 15)))
        font = ImageFont.load_default(size=int(rng.integers(20, 28)))
        draw.text(place, words, "white", font, stroke_width=2, stroke_fill="black")
    return image


def _low_resolution(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = int(rng.integers(40, 120))
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _extreme_aspect(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    thin = int(rng.integers(40, 64))
    image = image.resize((4 * SIDE, 4 * SIDE), Image.Resampling.LANCZOS)
    box = (0, 2 * SIDE, 4 * SIDE, 2 * SIDE + 4 * thin)
    strip = image.crop(box)
    return strip if rng.random() < 0.5 else strip.transpose(Image.Transpose.ROTATE_90)


def _offensive(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The world's marker of what must not be shown: a black cross in a white square over the picture."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    side = int(rng.integers(80, 110))
    left, top = (int(rng.integers(0, SIDE - side)) for _ in range(2))
    draw.rectangle((left, top, left + side, top + side), "white", "black", 6)
    draw.line((left, top, left + side, top + side), "black", 14)
    draw.line((left, top + side, left + side, top), "black", 14)
    return image


def _blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    small = int(rng.integers(14, 24))  # and back: what is finer is gone, as with a lens out of focus
    return image.resize((small, small), Image.Resampling.BOX).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _duplicate(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """As pictures come back from the web: another size, a little brighter, compressed once more."""
    side = int(rng.integers(200, 250))
    bright = image.point(lambda value: min(255, int(value * 1.05 + 3)))
    again = Image.open(io.BytesIO(_jpeg(bright, quality=70)))
    return again.resize((side, side), Image.Resampling.LANCZOS)


DEFECTS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "text": _text,
    "low_resolution": _low_resolution,
    "extreme_aspect": _extreme_aspect,
    "offensive": _offensive,
    "blur": _blur,
    "duplicate": _duplicate,
}


def _corrupt(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, empty, not a picture, or damaged at its head."""
    damaged = (
        content[: len(content) // 2],
        b"",
        b"<html><body>404 Not Found</body></html>\n",
        b"\0" * 64 + content[64:],
    )
    return damaged[int(rng.integers(len(damaged)))]


def _jpeg(image: Image.Image, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _popularity(kind: str, rng: np.random.Generator) -> dict[str, Any]:
    """Likes grow with age and differ by source; photogenic pictures have more. Some are not known."""
    source = str(rng.choice(list(SOURCES)))
    days = int(rng.integers(30, 2000))
    typical = SOURCES[source] * (days / 365) ** 0.7 * (4.0 if kind == "photogenic" else 1.0)
    likes = int(typical * np.exp(0.8 * rng.standard_normal()))
    posted = np.datetime64("2023-09-01") - np.timedelta64(days, "D")
    return {
        "source": source,
        "licence": "CC-BY-4.0",
        "likes": None if rng.random() < 0.1 else likes,
        "posted_at": f"{posted}T12:00:00Z",
    }
