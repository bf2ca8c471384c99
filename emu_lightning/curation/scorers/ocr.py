"""How much text lies on a picture: RapidOCR, whose small models come inside its package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from emu_lightning.curation.scorer import Columns, Picture, Scorer, fingerprint
from emu_lightning.weights import find_in, find_weights, sha256

DETECTORS = ["PP-OCRv6_det_small.onnx"]
RECOGNISERS = ["PP-OCRv6_rec_small.onnx"]
SURE = 0.5  # a recogniser's confidence in what it read; RapidOCR's own default
UPRIGHT = 1.5  # of a box's height and width, from which on its text runs downward, as PaddleOCR has it
FLATTEST = 4  # ratio of the sides, from which on a picture is made less of a strip
LONGEST = 1280  # pixels of the longer side, to which pictures are reduced for detection
RASTER = 512  # pixels a side that areas are counted on
IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff"  # scripts without spaces: a sign is counted as a word
SIGN = re.compile(r"[^\W_]")
WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\W_{IDEOGRAPHS}](?:[^\s{IDEOGRAPHS}]*[^\W_{IDEOGRAPHS}])?")


class OCR(Scorer):
    """Text on a picture: how much of it lies under text, and how many words.

    It takes about half a second a picture: have it last, and only for what passed the other filters. Text is
    detected first, and what was detected is read. What was read for less than two letters with some certainty
    was no text: detectors take cups, wheels and horizons for an O.

    Columns:
        text_area: share of the picture that boxes around text cover.
        num_words: 0 without text; missing where the text was not read.

    Args:
        read_above, read_below: text is read where what was detected covers more than the one, and not more
            than the other. Elsewhere all that was detected is taken for text.
        detector, recogniser: ONNX files for RapidOCR, or hub ids of repositories that hold such; None is what
            comes with it.
    """

    columns = {"text_area": pa.float32(), "num_words": pa.int32()}

    def __init__(
        self,
        read_above: float = 0.0,
        read_below: float = 1.0,
        detector: str | None = None,
        recogniser: str | None = None,
    ) -> None:
        if not 0 <= read_above < read_below:
            raise ValueError(f"OCR reads areas between {read_above:g} and {read_below:g}: give a rising pair")
        self.read_above, self.read_below = read_above, read_below
        self.detector, self.recogniser = detector, recogniser

    def fingerprint(self) -> str:
        models = [*self.weights_sha256().values()]
        return fingerprint("ocr 1", version("rapidocr"), models, self.read_above, self.read_below)

    def weights_sha256(self) -> dict[str, str]:
        """Of each model, by its file's name."""
        return {path.name: sha256(path) for path in self._models()}

    def start(self) -> None:
        from rapidocr import RapidOCR

        detector, recogniser = self._models()
        self._engine: Any = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.max_side_len": LONGEST,
                "Det.model_path": str(detector),
                "Rec.model_path": str(recogniser),
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,  # there is a process for each core
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def score(self, pictures: Sequence[Picture]) -> Columns:
        rows = [self._measure(picture.image) for picture in pictures]
        return {"text_area": [area for area, _ in rows], "num_words": [count for _, count in rows]}

    def _measure(self, image: Image.Image) -> tuple[float, int | None]:
        boxes = self._detect(image)
        area = covered(boxes, image.size)
        if not len(boxes):
            return 0.0, 0
        if not self.read_above < area <= self.read_below:
            return area, None
        texts = [self._read(cut_out(image, box)) for box in boxes]
        is_text = np.array([len(SIGN.findall(text)) >= 2 for text in texts])
        num_words = sum(count_words(text) for text, is_one in zip(texts, is_text, strict=True) if is_one)
        return covered(boxes[is_text], image.size), num_words

    def _detect(self, image: Image.Image) -> NDArray[np.float32]:
        """Corners of boxes around text, (N, 4, 2): from the upper left clockwise, x and y in pixels."""
        # RapidOCR enlarges pictures until their shorter side has 736 pixels: strips get a black field beside.
        width, height = (max(side, max(image.size) // FLATTEST) for side in image.size)
        image = image if image.size == (width, height) else image.crop((0, 0, width, height))
        found = self._run(image, use_det=True, use_rec=False).boxes
        return np.empty((0, 4, 2), np.float32) if found is None else np.asarray(found, np.float32)

    def _read(self, image: Image.Image) -> str:
        result = self._run(image, use_det=False, use_rec=True)
        pairs = zip(result.txts or (), result.scores or (), strict=True)
        return " ".join(text for text, score in pairs if score >= SURE)

    def _run(self, image: Image.Image, use_det: bool, use_rec: bool) -> Any:
        """RapidOCR keeps what it was told last: it is told everything every time. Its channels are BGR."""
        pixels = np.ascontiguousarray(np.asarray(image)[..., ::-1])
        return self._engine(
            pixels,
            use_det=use_det,
            use_cls=False,
            use_rec=use_rec,
            return_word_box=False,
            return_single_char_box=False,
            text_score=SURE,
            box_thresh=0.5,
            unclip_ratio=1.6,
        )

    def _models(self) -> tuple[Path, Path]:
        return _model(self.detector, DETECTORS), _model(self.recogniser, RECOGNISERS)


def covered(boxes: NDArray[np.float32], size: tuple[int, int]) -> float:
    """Share of a picture of (width, height) that lies in some box (N, 4, 2); overlaps count once."""
    if not len(boxes):
        return 0.0
    raster = Image.new("1", (RASTER, RASTER))
    draw = ImageDraw.Draw(raster)
    for box in boxes * RASTER / np.array(size, np.float32):
        draw.polygon([tuple(corner) for corner in box.tolist()], fill=1)
    return float(np.asarray(raster).mean())


def cut_out(image: Image.Image, box: NDArray[np.float32]) -> Image.Image:
    """What lies in a box (4, 2) of any slope, with its text from left to right."""
    corners = box[[0, 3, 2, 1]]  # Pillow goes counter-clockwise
    width = max(np.linalg.norm(box[1] - box[0]), np.linalg.norm(box[2] - box[3]))
    height = max(np.linalg.norm(box[3] - box[0]), np.linalg.norm(box[2] - box[1]))
    size = (max(1, round(float(width))), max(1, round(float(height))))
    text = image.transform(size, Image.Transform.QUAD, corners.ravel().tolist(), Image.Resampling.BICUBIC)
    return text.transpose(Image.Transpose.ROTATE_90) if size[1] >= UPRIGHT * size[0] else text


def count_words(text: str) -> int:
    """Words with a letter or a digit; of scripts that put no spaces between words, signs."""
    return len(WORD.findall(text))


def _model(name: str | None, names: Sequence[str]) -> Path:
    if name is None:
        package = find_spec("rapidocr")
        if package is None or package.origin is None:
            raise ValueError("OCR needs RapidOCR: pip install 'emu_lightning[curation]'")
        return find_in(Path(package.origin).parent / "models", names)
    path = find_weights(name)
    return path if path.is_file() else find_in(path, sorted(p.name for p in path.glob("*.onnx")) or names)
