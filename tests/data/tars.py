"""Shards as img2dataset writes them, for tests."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 24, height: int = 16, orientation: int | None = None) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    if orientation is not None:
        exif[274] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", exif=exif)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, seed: int, caption: str | None = None, **size: int) -> dict[str, bytes]:
    """The three members of a picture."""
    image = picture(seed, **size)
    caption = f"picture {seed}" if caption is None else caption
    about = {
        "caption": caption,
        "long": f"a long caption of {seed}",
        "key": key,
        "status": "success",
        "width": 1,  # of some other stage: not to be believed
        "height": 1,
        "sha256": hashlib.sha256(image).hexdigest(),
    }
    return {f"{key}.jpg": image, f"{key}.json": json.dumps(about).encode(), f"{key}.txt": caption.encode()}


def write_shard(path: Path, num: int, first: int = 0) -> Path:
    """`num` pictures from number `first` on; sizes vary."""
    members: dict[str, bytes] = {}
    for seed in range(first, first + num):
        members |= sample(f"{seed:09d}", seed, width=20 + seed % 3, height=16 + seed % 2)
    return write_tar(path, members)
