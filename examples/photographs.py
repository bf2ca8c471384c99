"""Writes nine photographs with captions, to try quality-tuning on real pictures at once.

    python examples/photographs.py photographs
    emu fit --config configs/quality_tuning/folder.yaml --data.path photographs

The photographs are those that scikit-image carries in its wheel, so nothing is downloaded; `help` of
`skimage.data.astronaut` and so on says where each comes from. The captions are this project's. Six are in
colour and three in grey, and the sides are 300 to 1000 pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

# name of the file -> (what skimage.data calls it, what it shows)
PHOTOGRAPHS = {
    "astronaut": ("astronaut", "a smiling astronaut in an orange space suit beside a flag"),
    "cameraman": ("camera", "a black and white photo of a man looking through a camera on a tripod"),
    "cat": ("chelsea", "a close-up of the face of a tabby cat"),
    "coffee": ("coffee", "a cup of espresso on a red saucer on a wooden table"),
    "coins": ("coins", "a black and white photo of four rows of old coins"),
    "galaxies": ("hubble_deep_field", "distant galaxies in a black sky"),
    "moon": ("moon", "a black and white photo of craters on the moon"),
    "motorcycle": ("stereo_motorcycle", "a red motorcycle in a garage"),
    "rocket": ("rocket", "a white rocket on its launch pad in the evening"),
}


def write_photographs(folder: str | Path) -> list[Path]:
    """Writes `<name>.jpg` and, beside it, its caption `<name>.txt`.

    Args:
        folder: made where it is missing; files of the same names are written anew.

    Returns:
        The pictures' paths, sorted.
    """
    from skimage import data

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (skimage_name, caption) in PHOTOGRAPHS.items():
        pixels = getattr(data, skimage_name)()
        if isinstance(pixels, tuple):  # a stereo pair and its depth: the left one
            pixels = pixels[0]
        Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=95)
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    return sorted(folder / f"{name}.jpg" for name in PHOTOGRAPHS)


def main(arguments: list[str]) -> None:
    """Writes them into the one folder that is named; ends in one line where that cannot be."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise SystemExit("usage: python examples/photographs.py FOLDER")
    try:
        written = write_photographs(arguments[0])
    except ModuleNotFoundError:
        raise SystemExit("scikit-image carries the photographs: pip install scikit-image") from None
    except OSError as error:
        raise SystemExit(f"the photographs cannot be written: {error}") from None
    print(f"{len(written)} photographs with captions in {arguments[0]}; now tune on them:")
    print(f"emu fit --config configs/quality_tuning/folder.yaml --data.path {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
