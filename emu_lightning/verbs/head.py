"""`emu head`: learns from labels of some pictures what a curation then finds in all of them.

emu head --run runs/curation/NAME --labels stage1.parquet --column keep --out heads/keep.safetensors
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from emu_lightning.curation.head import fit_head, write_head
from emu_lightning.curation.scorers.clip import stored_embeddings
from emu_lightning.curation.scoring import OF_PIXELS, Scores
from emu_lightning.curation.selection import METADATA, read_decisions
from emu_lightning.verbs.arguments import call

EMBEDDINGS = "clip"  # the scorer's name


def head(run: str, labels: str, column: str, out: str, seed: int = 0) -> None:
    """Fits a head to labels and the embeddings that a curation stored, and says how well it does.

    Args:
        run: folder of an `emu curate` whose passes have a Clip.
        labels: Parquet file with `uid` and `column`; rows without a value, or of other pools, do not count.
        column: the labels: true and false, or numbers.
        out: safetensors file, for the `weights` of a LearntHead.
        seed: of the folds of cross-validation.
    """
    made_by, folder = _embeddings(Path(run))
    (decided,) = read_decisions([labels])
    table = decided.rows
    assert isinstance(table, pa.Table)  # as `read_decisions` gives it
    if column not in table.column_names:
        raise ValueError(f"{labels} has no column {column}; it has {', '.join(table.column_names)}")
    table = table.filter(pc.is_valid(table[column]))
    embeddings, values = _labelled(folder, table["uid"], _values(table[column], labels, column))
    print(f"{len(values):,} of {len(table):,} labels are of pictures with an embedding in {run}")
    found = fit_head(embeddings, values, seed)
    write_head(Path(out), found, made_by)
    measure = "area under the ROC curve" if found.is_probability else "R²"
    print(f"{measure} on pictures it was not fitted to: {found.score:.3f} (penalty {found.penalty:g})")
    arguments = json.dumps({"name": column, "weights": out})
    print(f"{out}; among the heads of Clip: {{class_path: LearntHead, init_args: {arguments}}}")


def _embeddings(run: Path) -> tuple[str, Path]:
    """The CLIP's fingerprint, and the folder of what it made for the run's last manifest."""
    manifest = run / "manifest.parquet"
    if not manifest.is_file():
        raise FileNotFoundError(f"{manifest} does not exist: name the folder of a run of `emu curate`")
    told = json.loads((pq.read_schema(manifest).metadata or {}).get(METADATA.encode(), b"{}"))
    of_scores = told.get("scores", {}).get(EMBEDDINGS)
    if of_scores is None:
        raise ValueError(f"{run} has no embeddings: its passes need a Clip")
    return of_scores.removesuffix(OF_PIXELS), Scores(EMBEDDINGS, of_scores, {}).folder(run)


def _values(column: pa.ChunkedArray, labels: str, name: str) -> NDArray[Any]:
    if pa.types.is_boolean(column.type):
        return column.to_numpy()
    try:
        return column.cast(pa.float64()).to_numpy()
    except pa.ArrowException:
        raise ValueError(
            f"column {name} of {labels} is {column.type}: give true and false, or numbers"
        ) from None


def _labelled(
    folder: Path, uids: pa.ChunkedArray, values: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Embeddings (N, D) and labels (N,) of those that have both."""
    embeddings, found = [], []
    wanted = uids.combine_chunks().cast(pa.string())
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path, columns=["uid", "clip_embedding"], partitioning=None)
        places = pc.index_in(table["uid"].cast(pa.string()), value_set=wanted)
        here = pc.is_valid(places)
        if pc.any(here).as_py():
            embeddings.append(stored_embeddings(table.filter(here)).astype(np.float64))
            found.append(places.filter(here).to_numpy())
    if not embeddings:
        raise ValueError("no label is of a picture with an embedding: are they of another pool?")
    return np.concatenate(embeddings), values[np.concatenate(found)]


def main(argv: list[str]) -> None:
    call(head, argv, "emu head")
