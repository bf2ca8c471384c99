import hashlib
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from emu_lightning.curation.decode import ERRORS, FACTS, decode
from tests.curation.planted import encoded, pixels


def as_array(content):
    image, facts = decode(content)
    assert image is not None and facts["error"] is None and image.mode == "RGB"
    assert (facts["height"], facts["width"], 3) == np.asarray(image).shape
    return np.asarray(image), facts


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_whole_picture_and_its_facts():
    content = encoded(pixels(0))
    image, facts = as_array(content)
    assert (image == pixels(0)).all()
    assert list(facts) == list(FACTS)
    assert facts["sha256"] == hashlib.sha256(content).hexdigest() and facts["num_bytes"] == len(content)
    assert (facts["format"], facts["mode"], facts["num_frames"]) == ("PNG", "RGB", 1)
    assert facts["orientation"] is None


@pytest.mark.parametrize(
    "format, options",
    [("jpeg", {}), ("jpeg", {"progressive": True}), ("png", {}), ("webp", {}), ("gif", {}), ("bmp", {})],
)
def test_half_a_file_is_truncated(format, options):
    content = encoded(pixels(0, 80, 60), format, **options)
    image, facts = decode(content[: len(content) // 2])
    assert image is None and facts["error"] == "truncated" and facts["error_detail"]


def test_half_a_tiff_is_no_picture():
    content = encoded(pixels(0, 80, 60), "tiff", compression="tiff_lzw")
    image, facts = decode(content[: len(content) // 2])
    assert image is None and facts["error"] in ("truncated", "damaged")


@pytest.mark.parametrize(
    "content, error",
    [
        (b"", "empty"),
        (b"What a nice picture.\n" * 50, "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        (b"RIFF\x24\0\0\0WAVEfmt " + bytes(24), "not_an_image"),
    ],
)
def test_what_is_no_picture(content, error):
    image, facts = decode(content)
    assert image is None and facts["error"] == error and facts["width"] is None
    assert facts["sha256"] == hashlib.sha256(content).hexdigest()


def test_the_facts_of_a_truncated_picture_are_upright():
    exif = Image.Exif()
    exif[274] = 6
    content = encoded(pixels(0, 80, 60), "jpeg", exif=exif)
    _, facts = decode(content[:-500])
    assert facts["error"] == "truncated"
    assert (facts["width"], facts["height"], facts["orientation"]) == (60, 80, 6)


STORED = {  # EXIF 2.3, Orientation: which side of the picture the 0th row and the 0th column are
    1: lambda up: up,  # top, left
    2: lambda up: up[:, ::-1],  # top, right
    3: lambda up: up[::-1, ::-1],  # bottom, right
    4: lambda up: up[::-1],  # bottom, left
    5: lambda up: up.swapaxes(0, 1),  # left, top
    6: lambda up: up[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda up: up[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda up: up[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("format", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation, format):
    upright, exif = pixels(1), Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    image, facts = as_array(encoded(stored, format, exif=exif))
    assert (image == upright).all() and facts["orientation"] == orientation


def test_inks():
    inks = {(0, 0, 0, 0): (255, 255, 255), (0, 0, 0, 255): (0, 0, 0), (255, 0, 0, 0): (0, 255, 255)}
    inks |= {(0, 255, 0, 0): (255, 0, 255), (0, 0, 255, 0): (255, 255, 0)}
    for ink, colour in inks.items():
        image, facts = as_array(encoded(Image.new("CMYK", (16, 16), ink), "tiff"))
        assert (image == colour).all() and facts["mode"] == "CMYK"
        image, facts = as_array(encoded(Image.new("CMYK", (16, 16), ink), "jpeg", quality=95))
        assert np.abs(image.astype(int) - colour).max() <= 3 and facts["mode"] == "CMYK"


def test_sixteen_bits():
    grey = np.linspace(0, 65535, 60 * 20).astype(np.uint16).reshape(20, 60)
    image, facts = as_array(encoded(Image.fromarray(grey)))
    assert (image == np.round(grey / 257).astype(np.uint8)[..., None]).all()
    assert facts["mode"] == "I;16"


def test_transparency_lies_over_white():
    rgba = np.concatenate([pixels(2), pixels(3)[..., :1]], 2)
    image, _ = as_array(encoded(rgba))
    alpha = rgba[..., 3:] / 255
    assert np.abs(image - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    image, facts = as_array(encoded(palette, transparency=1))
    assert image.tolist() == [[[10, 20, 30], [255] * 3], [[255] * 3, [10, 20, 30]]]
    assert facts["mode"] == "P"


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(pixels(seed)) for seed in range(3)]
    content = encoded(frames[0], "webp", save_all=True, append_images=frames[1:], lossless=True)
    image, facts = as_array(content)
    assert (image == pixels(0)).all() and facts["num_frames"] == 3
    _, facts = as_array(encoded(frames[0], "gif", save_all=True, append_images=frames[1:]))
    assert facts["num_frames"] == 3


def test_a_long_strip():
    image, facts = as_array(encoded(Image.new("L", (30000, 10), 7)))
    assert (image == 7).all() and (facts["width"], facts["height"]) == (30000, 10)


def test_a_bomb_is_refused_from_its_header():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)  # 10.8 GB, were it decoded
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    image, facts = decode(content + chunk(b"IEND", b""))
    assert image is None and facts["error"] == "too_large" and "3600000000" in facts["error_detail"]


def mutated(content, rng):
    """The bytes with some flipped, some cut out, or some put in."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 3, 20])):
        at = rng.randrange(len(content))
        until = min(len(content), at + rng.choice([1, 4, 64]))
        new = rng.randbytes(until - at)
        content[at:until] = rng.choice([new, b"", new + content[at:until]])
        content = content or bytearray(1)
    return bytes(content)


def test_mutated_pictures_are_rows():
    rng = random.Random(0)
    whole = [encoded(pixels(seed, 40, 30), kind) for seed, kind in enumerate(("jpeg", "png", "webp", "gif"))]
    whole.append(encoded(pixels(9, 40, 30), "tiff", compression="tiff_lzw"))
    num_broken = 0
    for number in range(60):
        image, facts = decode(mutated(whole[number % len(whole)], rng))
        assert (image is None) == (facts["error"] in ERRORS) and list(facts) == list(FACTS)
        assert image is None or (image.mode, image.width) == ("RGB", facts["width"])
        num_broken += image is None
    assert 10 < num_broken < 60
