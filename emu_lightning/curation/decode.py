"""From bytes to an upright RGB picture and the facts about it, or to the reason why there is none.

Half a JPEG passes in OpenCV, in Daft, and under Pillow's own `verify()`; only loading every pixel tells. So
here a picture is loaded whole, once, and what that says is a row like any other. What Pillow does not mind,
such as a JPEG that was cut and then closed by an end marker, is taken for whole.

Imports no torch: processes that score pixels start at once and stay small.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # no others: Pillow runs Ghostscript for an EPS
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
STILL = ("JPEG", "MPO", "BMP")  # further pictures in them (gain maps, stereo) are no frames
ERRORS = ("missing", "empty", "not_an_image", "truncated", "too_large", "damaged")
NUM_DETAIL = 200  # characters

FACTS = {
    "sha256": pa.string(),  # of the file's bytes; null: it could not be read
    "num_bytes": pa.int64(),
    "format": pa.string(),  # as Pillow names it; null, as all below: the header could not be read
    "mode": pa.string(),  # Pillow's, before the conversion to RGB: `CMYK`, `I;16`, `P`, ...
    "width": pa.int32(),  # of the upright picture, pixels
    "height": pa.int32(),
    "num_frames": pa.int32(),  # more than one: an animation, or pages, of which the first is the picture
    "orientation": pa.int8(),  # 1-8 as EXIF has it; null: it says nothing
    "error": pa.string(),  # one of ERRORS; null: the picture is whole
    "error_detail": pa.string(),  # one line
}
VERSION = "1"  # of the facts and pixels below: another one has all pictures read again

Facts = dict[str, Any]


def failed(kind: str, detail: object, content: bytes | None = None) -> Facts:
    """The facts about a file that is no picture; `content` None where there is not even a file."""
    facts: Facts = dict.fromkeys(FACTS)
    if content is not None:
        facts |= {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
    line = " ".join(str(detail).split())[:NUM_DETAIL]
    return facts | {"error": kind, "error_detail": line.encode(errors="replace").decode()}


def decode(content: bytes) -> tuple[Image.Image | None, Facts]:
    """The whole picture, upright, RGB, of an animation the first frame; None where it cannot be had.

    Too large is what Pillow refuses as a decompression bomb, from the header: more than 179 million pixels.

    Returns:
        The picture and a value for each of `FACTS`.
    """
    if not content:
        return None, failed("empty", "0 bytes", content)
    facts: Facts = dict.fromkeys(FACTS)
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # Pillow's default, but a process-wide switch others may have set
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large photographs, odd EXIF
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                facts |= _header(image)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                picture = to_rgb(image)
    except Exception as error:  # damaged bytes raise anything: OSError, SyntaxError, struct.error
        kind = _kind(error, content)
        unknown = f"none of {', '.join(FORMATS)}" if kind == "not_an_image" else "its header cannot be read"
        detail = unknown if isinstance(error, UnidentifiedImageError) else str(error)  # it names an address
        known = {name: value for name, value in facts.items() if value is not None}
        return None, failed(kind, detail or type(error).__name__, content) | known
    facts |= {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
    return picture, facts | {"width": picture.width, "height": picture.height}


def _header(image: ImageFile.ImageFile) -> Mapping[str, Any]:
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    orientation = orientation if orientation in range(1, 9) else None
    is_turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # there Pillow gives the upright size
    width, height = reversed(image.size) if is_turned else image.size
    return {
        "format": "JPEG" if image.format == "MPO" else image.format,
        "mode": image.mode,
        "width": width,
        "height": height,
        "num_frames": 1 if image.format in STILL else getattr(image, "n_frames", 1),
        "orientation": orientation,
    }


def _kind(error: Exception, content: bytes) -> str:
    if isinstance(error, Image.DecompressionBombError | MemoryError):
        return "too_large"
    is_webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    if isinstance(error, UnidentifiedImageError) and not (is_webp or content.startswith(SIGNATURES)):
        return "not_an_image"
    ends_early = (
        "truncated" in str(error).lower()
        or (content.startswith(b"\xff\xd8") and b"\xff\xd9" not in content)
        or (content.startswith(b"\x89PNG") and b"IEND" not in content)
        or (is_webp and int.from_bytes(content[4:8], "little") + 8 > len(content))
    )
    return "truncated" if ends_early else "damaged"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: transparency over white, 16-bit and floating-point grey scaled to 8 bits.

    The same as what training sees (:func:`emu_lightning.data.folder.to_rgb`), without its imports.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.clip(np.asarray(image), 0, 65535)
        return Image.fromarray((wide / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey = np.nan_to_num(np.asarray(image))
        grey = grey * 255 if grey.max() <= 1 else grey
        return Image.fromarray(np.clip(grey, 0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
