"""OCR on text that was drawn: as many words, over as much area, as there are."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from emu_lightning.curation.scorer import Picture
from emu_lightning.curation.scorers import OCR
from emu_lightning.curation.scorers.ocr import count_words, covered, cut_out

pytest.importorskip("rapidocr")

WORDS = "SALE Open Today Winter Music Garden Street Paper".split()


@pytest.fixture(scope="module")
def ocr() -> OCR:
    ocr = OCR()
    ocr.start()
    return ocr


def drawn(num_words: int, angle: float = 0) -> tuple[Image.Image, float]:
    """Words on a slope of grey, and the share of the picture in their boxes."""
    slope = np.linspace(60, 140, 480)[None, :, None].repeat(360, 0).repeat(3, 2)
    image, area = Image.fromarray(slope.astype(np.uint8)), 0
    font = ImageFont.load_default(32)
    for n, word in enumerate(WORDS[:num_words]):
        place = (30 + (n % 2) * 230, 20 + (n // 2) * 85)
        left, top, right, bottom = ImageDraw.Draw(image).textbbox(place, word, font)
        area += (right - left) * (bottom - top)
        ImageDraw.Draw(image).text(place, word, "white", font)
    return image.rotate(angle, Image.Resampling.BICUBIC), area / (480 * 360)


def score(ocr: OCR, *images: Image.Image) -> list[tuple[float, int | None]]:
    columns = ocr.score([Picture(b"", image, {}) for image in images])
    return list(zip(columns["text_area"], columns["num_words"], strict=True))


@pytest.mark.parametrize("num_words", [0, 1, 4, 8])
def test_words_are_counted(ocr, num_words):
    image, area = drawn(num_words)
    ((found, counted),) = score(ocr, image)
    assert counted == num_words
    assert area <= found <= 2.5 * area  # detectors leave a margin


def test_text_may_be_turned(ocr):
    assert score(ocr, drawn(4, angle=15)[0])[0][1] == 4


def test_flags_do_not_stick(ocr):
    """RapidOCR keeps the flags of the last call: a second picture is read like the first."""
    image, _ = drawn(1)
    assert len(set(score(ocr, image, image))) == 1


def test_text_is_read_within_bounds_only(ocr, monkeypatch):
    image, area = drawn(4)
    for bounds in ({"read_above": 3 * area}, {"read_below": area / 2}):
        bounded = OCR(**bounds)
        bounded._engine = ocr._engine
        monkeypatch.setattr(bounded, "_read", lambda _: pytest.fail("it was read"))
        ((found, counted),) = score(bounded, image)
        assert found >= area and counted is None


def test_what_is_no_text_is_not_counted(ocr):
    """A cup seen from above is read as an O."""
    image = Image.new("RGB", (320, 240), "#555")
    ImageDraw.Draw(image).ellipse((60, 20, 260, 220), outline="white", width=14)
    assert score(ocr, image) == [(0.0, 0)]


def test_strips_are_looked_at(ocr):
    assert score(ocr, Image.new("RGB", (1500, 3), "white")) == [(0.0, 0)]


def test_area_is_that_of_the_union():
    boxes = np.array(
        [[(0, 0), (50, 0), (50, 50), (0, 50)], [(25, 0), (75, 0), (75, 50), (25, 50)]], np.float32
    )
    assert covered(boxes, (100, 200)) == pytest.approx(75 * 50 / (100 * 200), abs=0.005)
    assert covered(boxes[:0], (100, 200)) == 0


@pytest.mark.parametrize("angle", [0, 20, -35])
def test_a_box_of_any_slope_is_cut_out_upright(angle):
    """The inverse: what is turned and cut out is what was there."""
    inside = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 12, 3), dtype=np.uint8))
    inside = inside.resize((120, 40), Image.Resampling.BICUBIC)
    image = Image.new("RGB", (300, 300))
    image.paste(inside, (90, 130))
    turned = image.rotate(angle, Image.Resampling.BICUBIC)  # counter-clockwise about the middle
    corners = np.array([(90, 130), (210, 130), (210, 170), (90, 170)], np.float32) - 150
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    box = corners @ np.array([(c, -s), (s, c)], np.float32) + 150
    made = cut_out(turned, box.astype(np.float32))
    assert made.size == (120, 40)
    difference = np.abs(np.asarray(made, int) - np.asarray(inside, int))[3:-3, 3:-3]
    assert difference.mean() < 8


@pytest.mark.parametrize(
    ("text", "num"),
    [
        ("", 0),
        ("  -- *", 0),
        ("50% OFF!", 2),
        ("don't stop-and-go", 2),
        ("\u65e5\u672c 2024", 3),
        ("\u00c9t\u00e9 \u00fcber", 2),
    ],
)
def test_words(text, num):
    assert count_words(text) == num


def test_models_are_files_and_are_hashed(tmp_path):
    base = OCR()
    assert base.fingerprint() == OCR().fingerprint() != OCR(read_above=0.1).fingerprint()
    copy = tmp_path / "detector.onnx"
    copy.write_bytes(base._models()[0].read_bytes())
    assert OCR(detector=str(copy)).fingerprint() == base.fingerprint()
    copy.write_bytes(b"another")
    assert OCR(detector=str(tmp_path)).fingerprint() != base.fingerprint()
    with pytest.raises(FileNotFoundError, match="hf download"):
        OCR(detector="/no/such/model.onnx").fingerprint()


def test_bounds_rise():
    with pytest.raises(ValueError, match="rising pair"):
        OCR(read_above=0.5, read_below=0.2)
