"""A folder of images with captions: a `.txt` beside each, or `metadata.jsonl` (Hugging Face imagefolder)."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from PIL import ExifTags, Image, ImageFile, ImageOps

from emu_lightning.data.held_out import HeldOutData
from emu_lightning.data.source import BrokenImage, Sample, Source
from emu_lightning.files import SUFFIXES, unread_pictures


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: transparency over white, 16-bit and floating-point grey scaled to 8 bits.

    Grey in `I` and `I;16` is taken as 16-bit; in `F` as [0, 1], or as [0, 255] when a value exceeds 1.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.clip(np.asarray(image), 0, 65535)
        return Image.fromarray((wide / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey = np.nan_to_num(np.asarray(image))
        grey = grey * 255 if grey.max() <= 1 else grey
        return Image.fromarray(np.clip(grey, 0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def decode(file: Path | BinaryIO, name: str) -> Image.Image:
    """The whole picture in RGB, upright by its EXIF orientation; of an animation the first frame.

    Args:
        file: a path, or an open file.
        name: of it, for errors.

    Raises:
        BrokenImage: the file is damaged, truncated, too large (a decompression bomb) or of an unknown kind.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # Pillow's default, but a process-wide switch others may have set
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large photographs, odd EXIF; twice too large raises
            with Image.open(file) as image:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image)
    except Exception as error:  # damaged bytes raise anything: OSError, SyntaxError, struct.error
        raise _broken(name, error) from None


def read_size(file: Path | BinaryIO, name: str) -> tuple[int, int]:
    """Height and width in pixels of the upright picture, from the file's header alone.

    Raises:
        BrokenImage: the header cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
                is_turned &= image.format != "TIFF"  # there Pillow gives the upright size itself
                return image.size if is_turned else (image.height, image.width)
    except Exception as error:  # damaged bytes raise anything
        raise _broken(name, error) from None


def _broken(name: str, error: Exception) -> BrokenImage:
    reason = str(error).partition(" <")[0]  # without the address in memory of an open file
    return BrokenImage(name, f"{type(error).__name__}: {reason}")


def warn_of_unread(names: Sequence[str], where: str) -> None:
    """Says in one line that the pictures `names` are left out, if there are any."""
    if names:
        kinds = ", ".join(sorted({PurePosixPath(name).suffix.lower() for name in names}))
        rank_zero_warn(
            f"{len(names)} pictures in {where} are left out, such as {names[0]}: "
            f"{kinds} cannot be read, convert them to JPEG or PNG"
        )


class Folder(Source):
    """Captioned images below `path`, sorted by name; a uid is the path relative to it.

    Args:
        path: the folder, searched through all levels. Names that begin with a dot are left out.

    Raises:
        FileNotFoundError: no such folder, or it holds no image.
        ValueError: an image has no caption, or metadata.jsonl is wrong; the message says where.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"image folder {self.path} does not exist")
        files = {
            file.relative_to(self.path).as_posix(): file
            for file in sorted(self.path.rglob("*"))
            if file.is_file()
        }
        visible = {
            name: file
            for name, file in files.items()
            if not any(part.startswith(".") for part in PurePosixPath(name).parts)
        }
        names = sorted(name for name, file in visible.items() if file.suffix.lower() in SUFFIXES)
        warn_of_unread(unread_pictures(visible), str(self.path))
        if not names:
            raise FileNotFoundError(f"{self.path} holds no images ({', '.join(sorted(SUFFIXES))})")
        captions = _captions(visible)
        missing = [name for name in names if name not in captions]
        if missing:
            beside = PurePosixPath(missing[0]).with_suffix(".txt")
            raise ValueError(
                f"{len(missing)} of {len(names)} images in {self.path} have no caption, such as "
                f"{missing[0]}: write one into {beside} or into metadata.jsonl"
            )
        self._fingerprint: str | None = None
        self._names, self._texts = names, [captions[name] for name in names]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        name = self._names[index]
        image = decode(self.path / name, name)
        return Sample(
            image=image, text=self._texts[index], uid=name, original_size=(image.height, image.width)
        )

    def uid(self, index: int) -> str:
        return self._names[index]

    def size(self, index: int) -> tuple[int, int]:
        return read_size(self.path / self._names[index], self._names[index])

    def text(self, index: int) -> str:
        return self._texts[index]

    def fingerprint(self) -> str:
        """sha256 over all names and file contents, read once."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256()
        for name in self._names:
            with (self.path / name).open("rb") as file:
                digest.update(f"{name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        self._fingerprint = "folder-1:" + digest.hexdigest()
        return self._fingerprint


def _read_text(name: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text: save it as UTF-8") from None


def _captions(files: dict[str, Path]) -> dict[str, str]:
    """Image name -> caption. metadata.jsonl goes before a .txt; an empty caption counts as none."""
    captions = {}
    texts = {
        str(PurePosixPath(name).with_suffix("")): name
        for name, file in files.items()
        if file.suffix.lower() == ".txt"
    }
    for name, file in files.items():
        stem = str(PurePosixPath(name).with_suffix(""))
        if file.suffix.lower() in SUFFIXES and stem in texts:
            captions[name] = _read_text(texts[stem], files[texts[stem]])
    for name, file in files.items():
        if file.name == "metadata.jsonl":
            captions |= _metadata(name, file, files)
    return {name: " ".join(text.split()) for name, text in captions.items() if text.strip()}


def _metadata(name: str, file: Path, files: dict[str, Path]) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(_read_text(name, file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image, text = entry["file_name"], entry["text"]
            if not isinstance(image, str) or not isinstance(text, str):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f'{name}, line {number}: expected {{"file_name": "...", "text": "..."}}'
            ) from None
        uid = (PurePosixPath(name).parent / image).as_posix()
        if uid not in files:
            raise ValueError(f"{name}, line {number}: there is no file {uid}")
        captions[uid] = text
    return captions


class FolderData(HeldOutData):
    """A folder of captioned images, a share of them held out for validation.

    Args:
        path: folder of images with a `.txt` beside each, or with `metadata.jsonl`.
        kwargs: of :class:`~emu_lightning.data.held_out.HeldOutData`, and of `ImageData`.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = path

    def whole_source(self) -> Source:
        return Folder(self.path)
