"""Scorers of pixels against reference libraries, formulas, and pictures made to have what is measured."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from skimage import data

from emu_lightning.curation.scorer import Picture
from emu_lightning.curation.scorers import Hashes, Photometry, Watermark
from emu_lightning.curation.scorers.hashes import chroma, perceptual_hash
from emu_lightning.curation.scorers.photometry import border, colourfulness, repetition, sharpness
from emu_lightning.weights import find_weights

PHOTOGRAPHS = ["astronaut", "camera", "chelsea", "coffee", "coins", "rocket"]


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)()).convert("RGB")


def score(scorer, *images: Image.Image) -> dict:
    scorer.start()
    columns = scorer.score([Picture(b"", image, {}) for image in images])
    assert list(columns) == list(scorer.columns)
    assert {len(values) for values in columns.values()} == {len(images)}
    return columns


def bits(one: int | None, other: int | None) -> int:
    assert one is not None and other is not None
    return (one ^ other).bit_count()


# --- hashes -------------------------------------------------------------------------------------------------


def phash_by_formula(image: Image.Image) -> int:
    """Buchner's `imagehash.phash`: scipy's DCT of the whole 32 x 32 picture, its 8 x 8 corner, the median."""
    from scipy.fft import dct

    pixels = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    low = dct(dct(pixels, axis=0), axis=1)[:8, :8]
    return int("".join("01"[bit] for bit in (low > np.median(low)).ravel().astype(int)), 2)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_phash_is_that_of_imagehash(name):
    image = photograph(name)
    assert bits(perceptual_hash(image), phash_by_formula(image)) <= 2
    small = image.resize((90, 70))
    assert perceptual_hash(small) == phash_by_formula(small)


def test_phash_is_bit_for_bit_that_of_the_package():
    imagehash = pytest.importorskip("imagehash")
    for name in PHOTOGRAPHS:
        small = photograph(name).resize((64, 64))
        assert perceptual_hash(small) == int(str(imagehash.phash(small)), 16)


def test_a_changed_copy_is_near_and_another_picture_is_far():
    hashes = {}
    for name in PHOTOGRAPHS:
        image = photograph(name)
        hashes[name] = perceptual_hash(image)
        smaller = image.resize((image.width // 3, image.height // 3), Image.Resampling.LANCZOS)
        assert bits(hashes[name], perceptual_hash(smaller)) <= 2
        assert bits(hashes[name], perceptual_hash(image.point(lambda level: level * 0.8))) <= 4
        pairs = zip(*(chroma(one).to_bytes(8, "big") for one in (image, smaller)), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 2
    distances = [bits(a, b) for a in hashes.values() for b in hashes.values() if a != b]
    assert min(distances) > 12


def test_chroma_tells_colours_that_the_hash_does_not_see():
    red, green = Image.new("RGB", (80, 60), "#ff0000"), Image.new("RGB", (80, 60), "#008200")
    assert red.convert("L").getpixel((0, 0)) == green.convert("L").getpixel((0, 0))
    made = np.frombuffer(chroma(red).to_bytes(8, "big"), np.uint8).astype(int)
    assert np.abs(made - [85, 255] * 4).max() <= 1  # ITU-R BT.601, rounded as Pillow does
    assert chroma(green) != chroma(red)


def test_plain_pictures_have_no_hash():
    images = [Image.new("RGB", (50, 40), colour) for colour in ("white", "black", "#123456")]
    assert score(Hashes(), *images)["phash"] == [None, None, None]


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (3, 2), (30_000, 10), (31, 33)])
def test_odd_sizes_are_measured(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for scorer in (Hashes(), Photometry(), Watermark()):
        for name, (value,) in score(scorer, image).items():
            assert value is None and name == "phash" or np.isfinite(value), (name, value)


# --- photometry ---------------------------------------------------------------------------------------------


def test_tones_are_those_of_the_formulas():
    for name in PHOTOGRAPHS:
        image = photograph(name)
        made = {key: value[0] for key, value in score(Photometry(), image).items()}
        luma = np.asarray(image.convert("L"), float)
        assert made["brightness"] == pytest.approx(luma.mean() / 255, abs=0.01)
        assert made["contrast"] == pytest.approx(luma.std() / 255, abs=0.01)
        assert made["clipped_dark"] == pytest.approx((luma <= 2).mean(), abs=0.02)
        assert made["clipped_bright"] == pytest.approx((luma >= 253).mean(), abs=0.02)


def test_clipped_shares_are_counted():
    image = Image.new("RGB", (960, 960), "grey")
    image.paste("black", (0, 0, 960, 240))
    image.paste("white", (0, 240, 480, 480))
    made = score(Photometry(), image)
    assert made["clipped_dark"] == [0.25] and made["clipped_bright"] == [0.125]


def test_colourfulness_is_hasler_and_suesstrunk():
    pixels = np.asarray(photograph("coffee"), float).reshape(-1, 3)
    red_green = pixels[:, 0] - pixels[:, 1]
    yellow_blue = pixels[:, :2].mean(1) - pixels[:, 2]
    expected = np.sqrt(red_green.var() + yellow_blue.var()) + 0.3 * np.sqrt(
        red_green.mean() ** 2 + yellow_blue.mean() ** 2
    )
    assert colourfulness(photograph("coffee")) == pytest.approx(expected, rel=1e-4)
    assert colourfulness(photograph("camera")) == 0


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_blur_takes_sharpness_away(name):
    image = photograph(name)
    radii = [sharpness(image.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 4)]
    assert radii == sorted(radii, reverse=True) and radii[3] < 0.05 * radii[0]


def test_sharpness_is_the_variance_of_the_laplacian():
    """One patch of noise on grey, where the sharpest three of nine patches hold it alone."""
    rng = np.random.default_rng(0)
    pixels = np.full((144, 144), 128, np.uint8)
    patch = rng.integers(0, 256, (48, 48))
    pixels[48:96, 48:96] = patch
    inner = patch[1:-1, 1:-1]
    around = patch[:-2, 1:-1] + patch[2:, 1:-1] + patch[1:-1, :-2] + patch[1:-1, 2:]
    expected = (around - 4 * inner).var() / 3
    assert sharpness(Image.fromarray(pixels).convert("RGB")) == pytest.approx(expected, rel=1e-4)


def test_sharpness_of_a_larger_copy_is_about_the_same():
    image = photograph("astronaut")
    larger = image.resize((1024, 1024), Image.Resampling.NEAREST)
    assert sharpness(larger) == pytest.approx(sharpness(image), rel=0.25)  # blocks are cut


def test_a_sharp_subject_before_a_blurred_background_is_sharp():
    image = photograph("astronaut")
    blurred = image.filter(ImageFilter.GaussianBlur(6))
    with_subject = blurred.copy()
    with_subject.paste(image.crop((150, 0, 362, 512)), (150, 0))
    assert sharpness(with_subject) > 20 * sharpness(blurred)


def test_border_is_the_share_of_plain_bars():
    inside = photograph("chelsea").resize((200, 120))
    framed = Image.new("RGB", (240, 200), "black")
    framed.paste(inside, (20, 40))
    assert border(np.asarray(framed)) == pytest.approx(1 - 200 * 120 / (240 * 200))
    assert border(np.asarray(inside)) == 0
    assert border(np.asarray(Image.new("RGB", (20, 30), "white"))) == 1
    # found on the grid that the scorer looks at, to a line
    assert score(Photometry(), framed)["border"][0] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_repeated_mark_is_found(name):
    image = photograph(name).convert("RGBA")
    layer = Image.new("RGBA", image.size)
    for top in range(10, image.height, 90):
        for left in range(5, image.width, 110):
            ImageDraw.Draw(layer).text((left, top), "STOCK", (255, 255, 255, 128), ImageFont.load_default(28))
    marked = Image.alpha_composite(image, layer).convert("RGB")
    assert repetition(image.convert("RGB")) < 0.1 < repetition(marked)


def test_repetition_is_the_autocorrelation():
    """Against the sum over pixels at one shift, for a pattern whose period is known."""
    tile = np.random.default_rng(0).integers(120, 136, (32, 64))
    pixels = np.tile(tile, (8, 4)).astype(np.uint8)
    assert repetition(Image.fromarray(pixels).convert("RGB")) == pytest.approx(1, abs=0.05)
    noise = np.random.default_rng(1).integers(120, 136, (256, 256)).astype(np.uint8)
    assert repetition(Image.fromarray(noise).convert("RGB")) < 0.1


# --- weights, imports ---------------------------------------------------------------------------------------


def test_weights_are_not_downloaded(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    for name in ("timm/resnet18.not_here", "/no/such/file.safetensors"):
        with pytest.raises(FileNotFoundError, match="hf download"):
            find_weights(name)


def test_scorers_of_pixels_do_not_import_torch():
    program = (
        "import sys; from emu_lightning.curation.scorers import Hashes, Photometry, OCR, Clip; "
        "import emu_lightning.curation.pool_columns; "
        "Hashes().start(); sys.exit(any(name in sys.modules for name in ('torch', 'open_clip', 'timm')))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0
