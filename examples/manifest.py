"""Writes a manifest of a folder of captioned pictures, to which scores and decisions can be added.

    python examples/manifest.py photographs photographs/manifest.parquet

The pictures stay where they are and are named relative to the manifest.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from emu_lightning.data.folder import Folder


def write_manifest(folder: str | Path, path: str | Path) -> None:
    """Writes the columns that :class:`emu_lightning.data.Manifest` needs, a row for each picture.

    Args:
        folder: as :class:`~emu_lightning.data.folder.Folder` reads it.
        path: of the Parquet file.
    """
    source, folder, path = Folder(folder), Path(folder), Path(path)
    rows = []
    for index, uid in enumerate(source.uids()):
        height, width = source.size(index)
        rows.append(
            {
                "uid": uid,
                "uri": os.path.relpath(folder / uid, path.parent),
                "sha256": hashlib.sha256((folder / uid).read_bytes()).hexdigest(),
                "height": height,
                "width": width,
                "caption": source.text(index),
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python examples/manifest.py FOLDER MANIFEST.parquet")
    write_manifest(*sys.argv[1:])
