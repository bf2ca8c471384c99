"""The page: what lies at a threshold, what the bins hold, and that nothing of a user's becomes markup."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emu_lightning.curation.decode import FACTS
from emu_lightning.curation.filters import Filter, Filters, Where
from emu_lightning.curation.ingest import PLACE
from emu_lightning.curation.report import NUM_PICTURES, bin_edges, curation_page, find_edges, histogram
from emu_lightning.curation.report import _reached as reached
from emu_lightning.curation.selection import Balance, ScoredPool, ScoreTable

NASTY = "<script>alert('x')</script> & \"it\"\n.png"


def write_run(folder: Path, num: int = 30) -> tuple[list[Path], list[ScoreTable]]:
    """Pictures whose grey is their score in percent; one has another name, the last is broken."""
    names = [f"{number:02d}.png" for number in range(num)]
    names[5] = NASTY.replace("/", "")
    rows, facts, scores = [], [], []
    for number, name in enumerate(names):
        Image.new("RGB", (40 + number, 40), (number, number, number)).save(folder / f"{number}.png")
        place = {"uri": str(folder / f"{number}.png"), "caption": "a picture"}
        rows.append({"uid": name, **place, **dict.fromkeys(PLACE)})
        error = "truncated" if number == num - 1 else None
        facts.append({"uid": name, "width": 40 + number, "height": 40, "error": error, "error_detail": NASTY})
        scores.append({"uid": name, "score": number / 100, "concept": NASTY if number % 2 else "car"})
    types = {"uid": pa.string(), "uri": pa.string(), "caption": pa.string(), **PLACE}
    tables = {"pool": (rows, types), "read": (facts, {"uid": pa.string(), **FACTS})}
    columns = {"score": pa.float32(), "concept": pa.string()}
    tables["scores"] = (scores, {"uid": pa.string(), **columns})
    for name, (table, schema) in tables.items():
        (folder / name).mkdir()
        pq.write_table(pa.Table.from_pylist(table, pa.schema(schema)), folder / name / "00000000.parquet")
    made = [
        ScoreTable("read", folder / "read", FACTS, "1"),
        ScoreTable(NASTY, folder / "scores", columns, NASTY),
    ]
    return [folder / "pool" / "00000000.parquet"], made


FILTERS: Filters = {
    "dark": Filter("score", 0.1, 0.2),
    NASTY: Where(f"caption <> '{NASTY.replace(chr(39), chr(39) * 2)}'"),
    "none": Filter("width + height", 1000),
}


def make_page(folder: Path) -> str:
    pool, scores = write_run(folder)
    selection = ScoredPool(pool, scores).select(FILTERS, Balance(5, "concept", rank={"score": 1}), folder)
    settings = {"filters": {NASTY: NASTY}}
    return curation_page(
        NASTY,
        folder / "manifest.parquet",
        pool,
        selection,
        FILTERS,
        scores,
        settings,
        command=NASTY,
        facts={NASTY: NASTY},
    )


class Outline(HTMLParser):
    """Fails on an element closed out of turn; keeps tags and addresses."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(document)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.add(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href")]
        if tag not in ("img", "meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_well_formed_file_and_nothing_a_user_wrote_becomes_markup(tmp_path: Path) -> None:
    document = make_page(tmp_path)
    outline = Outline(document)
    assert not outline.tags & {"script", "link", "iframe", "object"}
    pictures = [address for address in outline.addresses if not address.startswith("#")]
    assert pictures and all(address.startswith("data:image/jpeg;base64,") for address in pictures)
    assert "<script" not in document and document.count("&lt;script&gt;") > 8
    assert "default-src 'none'" in document and "nan" not in document.lower().replace("finance", "")


def test_the_gallery_shows_the_pictures_nearest_to_each_bound(tmp_path: Path) -> None:
    """Their grey is read back from the page: 10 and 20 percent are the bounds, and themselves accepted."""
    document = make_page(tmp_path)
    shown = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', document)
    greys = [np.asarray(Image.open(io.BytesIO(base64.b64decode(url)))).mean().round() for url in shown]
    above, below = greys[: 2 * NUM_PICTURES], greys[2 * NUM_PICTURES : 4 * NUM_PICTURES]
    assert above == [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert below == [26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15]


def test_what_the_other_bound_rejected_is_not_shown_at_this_one(tmp_path: Path) -> None:
    make_page(tmp_path)
    sides = reached(tmp_path / "manifest.parquet", FILTERS, "dark")
    at_minimum, at_maximum = find_edges(tmp_path / "manifest.parquet", FILTERS["dark"], *sides)
    assert max(at_minimum.rejected) == 9 and min(at_maximum.rejected) == 21
    assert 29 not in at_maximum.rejected  # broken, and so never there
    nothing = find_edges(
        tmp_path / "manifest.parquet",
        FILTERS["none"],
        *reached(tmp_path / "manifest.parquet", FILTERS, "none"),
    )
    assert len(nothing[0].accepted) == 0 and len(nothing[0].rejected) == NUM_PICTURES
    assert nothing[0].rejected[0] == 20  # the widest of those that came so far


@pytest.mark.parametrize("kind", ["normal", "skewed", "counts", "constant"])
def test_bins_hold_every_value_and_every_bound(kind: str) -> None:
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.normal(0, 1, 500),
        "skewed": np.exp(rng.normal(3, 2, 500)),
        "counts": rng.poisson(3, 500).astype(float),
        "constant": np.full(10, 0.5),
    }[kind]
    rule = Filter("x", minimum=float(np.quantile(values, 0.3)))
    edges = bin_edges(values, [rule.minimum or 0.0])
    assert (np.diff(edges) > 0).all() and edges[0] <= (rule.minimum or 0.0) <= edges[-1]
    inside = (values >= edges[0]) & (values <= edges[-1])
    assert inside.mean() >= 0.98
    drawn = histogram(rule, np.append(values, np.nan))
    told = re.findall(r"<title>[^:]*: ([\d,]+) kept, ([\d,]+) rejected", drawn)
    pairs = {pair for pair in zip(told, re.findall(r'<rect class="\w+" x="([^"]+)"', drawn), strict=True)}
    kept, rejected = (sum(int(pair[0][side].replace(",", "")) for pair in pairs) for side in (0, 1))
    assert kept == (values >= (rule.minimum or 0.0)).sum() and kept + rejected == len(values)
    assert "1 without a value" in drawn


def test_a_picture_that_has_gone_since_is_said_to_be(tmp_path: Path) -> None:
    pool, scores = write_run(tmp_path)
    selection = ScoredPool(pool, scores).select({"f": Filter("score", 0.1)}, Balance(), tmp_path)
    (tmp_path / "10.png").unlink()
    page = curation_page(
        "t",
        tmp_path / "manifest.parquet",
        pool,
        selection,
        {"f": Filter("score", 0.1)},
        scores,
        {},
        command="",
        facts={},
    )
    assert page.count("cannot be read") == 1
