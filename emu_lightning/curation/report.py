"""What a person reads after a curation: what went, where, why, and what lies on both sides of each threshold.

The pieces are those of :mod:`emu_lightning.evaluation.report`: one file, no script, no network.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from emu_lightning.curation.decode import decode
from emu_lightning.curation.filters import BALANCE, READABLE, Filter, Filters, Where
from emu_lightning.curation.scoring import Reader
from emu_lightning.curation.selection import ScoreTable, Selection, Share, Step
from emu_lightning.evaluation import report
from emu_lightning.evaluation.report import Html, Section, join, percent, tag

NUM_PICTURES = 6  # on each side of a threshold
NUM_NAMES = 100  # of broken files of a kind
THUMBNAIL = 176  # pixels of the longer side
NUM_BINS = 48
TAILS = 0.5  # percent at both ends that share a bin, so that a few strays do not squeeze the rest
SIGNS = {"minimum": "at least", "maximum": "at most"}


@dataclass(frozen=True)
class Edge:
    """The pictures nearest to a bound of a filter, or examples where it has none.

    Attributes:
        title: which bound.
        rejected: rows of the manifest, the nearest first.
        accepted: the same.
        values: of the filter's column, for each row of the manifest; None where there is no column.
    """

    title: str
    rejected: NDArray[np.intp]
    accepted: NDArray[np.intp]
    values: NDArray[np.float64] | None = None


def curation_page(
    title: str,
    manifest: Path,
    pool: Sequence[Path],
    selection: Selection,
    filters: Filters,
    scores: Sequence[ScoreTable],
    settings: Mapping[str, Any],
    *,
    command: str,
    facts: Mapping[str, str],
) -> Html:
    """The whole page.

    Args:
        title: of the page.
        manifest: as :meth:`~emu_lightning.curation.selection.ScoredPool.select` wrote it.
        pool: the pool's Parquet files, which say where pictures lie.
        selection: what it returned.
        filters: of the selection.
        scores: all that the selection was made from.
        settings: everything that was set; folded.
        command: what made this page.
        facts: name and value of what else made it.
    """
    uids = pq.read_table(manifest, columns=["uid"])["uid"]
    reached = {name: _reached(manifest, filters, name) for name in filters}
    edges = {name: find_edges(manifest, rule, *reached[name]) for name, rule in filters.items()}
    shown = {int(row) for each in edges.values() for edge in each for row in (*edge.rejected, *edge.accepted)}
    names = {row: uids[row].as_py() for row in shown}
    pictures = thumbnails(pool, set(names.values()))
    images = {row: pictures[name] for row, name in names.items()}

    def about(name: str, rule: Filter | Where, step: Step) -> list[Html]:
        there = reached[name][1]
        parts = [report.heading(name, f"{describe(rule)}. {_went(step)}")]
        if isinstance(rule, Filter):
            values = _numbers(manifest, rule)
            parts.append(histogram(rule, values[there | reached[name][0]]))
        return [*parts, *(gallery(edge, images, names) for edge in edges[name])]

    steps = {step.name: step for step in selection.funnel}
    num_pool, num_readable = steps[READABLE].num_in, steps[READABLE].num_out
    num_passing, num_selected = steps[BALANCE].num_in, steps[BALANCE].num_out
    cards = [
        report.Figure("in the pool", f"{num_pool:,}"),
        report.Figure("readable", f"{num_readable:,}", _of(num_readable, num_pool)),
        report.Figure("pass all filters", f"{num_passing:,}", _of(num_passing, num_pool)),
        report.Figure("selected", f"{num_selected:,}", _of(num_selected, num_pool)),
    ]
    rules = {name: describe(rule) for name, rule in filters.items()}
    sections = [
        Section("Result", [report.key_figures(cards)]),
        Section(
            "Funnel",
            [funnel(selection.funnel, rules)],
            "Filters apply in this order; each is shown what the one before left.",
        ),
    ]
    if selection.concepts:
        sections.append(Section("Concepts", [concepts(selection.concepts)], CONCEPTS))
    if filters:
        bodies = [part for name, rule in filters.items() for part in about(name, rule, steps[name])]
        sections.append(Section("At the thresholds", bodies, THRESHOLDS))
    sections += [
        Section("Files that could not be read", broken_files(manifest)),
        Section(
            "Scores",
            [score_table(scores)],
            "All that the selection was made from. Another fingerprint "
            "is another scorer: its scores are computed anew.",
        ),
        Section("Settings", [report.settings(settings)]),
        Section("How this was made", [report.provenance(command, facts)]),
    ]
    sentence = join(
        tag("strong", f"{num_selected:,}"),
        f" of {num_pool:,} pictures are selected; {num_passing:,} pass all filters.",
    )
    digest = selection.configuration_sha256[:16]
    return report.page(
        title,
        sentence,
        sections,
        remark=f"Configuration {digest}. Scores are no judgement "
        "of people: look at what lies at the thresholds before you trust them.",
        footer="",
    )


CONCEPTS = "What is there, what passes all filters, and what is selected, as shares of each column."
THRESHOLDS = (
    "Histograms show what reached the filter; the dashed line is its threshold. Beneath, the pictures "
    "nearest to it: where the rejected ones are no worse than the accepted, the threshold is too strict."
)


def describe(rule: Filter | Where) -> str:
    """A filter in words."""
    missing = "kept" if rule.missing == "keep" else "rejected"
    if isinstance(rule, Where):
        return f"{rule.sql}; missing: {missing}"
    bounds = " and ".join(f"{SIGNS[name]} {bound:g}" for name, bound in rule.bounds.items())
    return f"{rule.column} {bounds}; missing: {missing}"


def _went(step: Step) -> str:
    rejected = step.num_in - step.num_out
    return f"{step.num_in:,} reached it, {rejected:,} were rejected ({_of(rejected, step.num_in)})."


def _of(part: int, whole: int) -> str:
    return f"{percent(part / whole)} of {whole:,}" if whole else "of none"


# --- funnel and concepts ----------------------------------------------------------------------------------


def funnel(steps: Sequence[Step], rules: Mapping[str, str]) -> Html:
    """Each step with what came in, what went out, and both as bars of the whole pool."""
    whole = max(1, steps[0].num_in)

    def row(step: Step) -> Html:
        bars = _bars([("tie", step.num_in / whole), ("win", step.num_out / whole)])
        numbers = (f"{step.num_in:,}", f"{step.num_out:,}", percent(_share(step.num_out, step.num_in)))
        return _row(join(step.name, tag("div", rules.get(step.name, ""), css="small muted")), numbers, bars)

    return _table(("", "in", "out", "left", ""), map(row, steps))


def concepts(shares: Sequence[Share]) -> Html:
    """Each concept's part before, after the filters, and in the selection."""
    totals = [max(1, sum(column)) for column in zip(*(_counts(share) for share in shares), strict=True)]
    most = max(count / total for share in shares for count, total in zip(_counts(share), totals, strict=True))

    def row(share: Share) -> Html:
        parts = [count / total for count, total in zip(_counts(share), totals, strict=True)]
        texts = [f"{count:,} ({percent(part)})" for count, part in zip(_counts(share), parts, strict=True)]
        bars = _bars([("tie", parts[0] / (most or 1)), ("win", parts[2] / (most or 1))], is_stacked=False)
        return _row(share.concept or "(none)", texts, bars)

    return _table(("", "readable", "pass all filters", "selected", "readable, selected"), map(row, shares))


def _counts(share: Share) -> tuple[int, int, int]:
    return share.num_readable, share.num_passing, share.num_selected


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _bars(parts: Iterable[tuple[str, float]], *, is_stacked: bool = True) -> Html:
    """Bars from the left, over each other or beneath."""
    drawn = [
        tag(
            "rect",
            css=css,
            x=0,
            y=5 if is_stacked else 5 + 10 * i,
            width=f"{100 * share:.2f}%",
            height=20 if is_stacked else 9,
        )
        for i, (css, share) in enumerate(parts)
    ]
    return tag("svg", *drawn, height=30, aria_hidden="true")


def _row(head: str, numbers: Iterable[str], drawing: Html) -> Html:
    cells = (tag("td", number, css="number") for number in numbers)
    return tag("tr", tag("th", head, scope="row"), *cells, tag("td", drawing, css="forest"))


def _table(heads: Sequence[str], rows: Iterable[Html]) -> Html:
    styles = ["", *["number"] * (len(heads) - 2), "forest"]
    head = (tag("th", text, css=css) for text, css in zip(heads, styles, strict=True))
    table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows))
    return tag("div", table, css="scroll")


# --- histograms -------------------------------------------------------------------------------------------


def histogram(rule: Filter, values: NDArray[np.float64]) -> Html:
    """Of the values that reached a filter: what it keeps, what it rejects, and its bounds.

    Args:
        rule: the filter.
        values: NaN where missing.
    """
    known = values[np.isfinite(values)]
    missing = f"{len(values) - len(known):,} without a value"
    if not len(known):
        return tag("p", f"Nothing that reached it has a value ({missing}).")
    bounds = list(rule.bounds.values())
    edges = bin_edges(known, bounds)
    low, high = edges[0], edges[-1]
    scale = np.log if is_skewed(known, bounds) else np.asarray
    inside = np.clip(known, low, high)
    is_kept = np.ones(len(known), bool)
    for name, bound in rule.bounds.items():
        is_kept &= known >= bound if name == "minimum" else known <= bound
    kept, rejected = (np.histogram(inside[mask], edges)[0] for mask in (is_kept, ~is_kept))
    top = max(1, int((kept + rejected).max()))
    height = 140

    def share(x: float) -> float:
        return float((scale(x) - scale(low)) / (scale(high) - scale(low)))

    def at(x: float) -> str:
        return f"{100 * share(x):.2f}%"

    drawing = []
    for i, (left, right) in enumerate(zip(edges, edges[1:], strict=False)):
        base = float(height)
        for css, count in (("win", kept[i]), ("lose", rejected[i])):
            size = height * float(count) / top
            base -= size
            if count:
                tip = tag("title", f"{left:.4g} to {right:.4g}: {kept[i]:,} kept, {rejected[i]:,} rejected")
                width = f"{92 * (share(right) - share(left)):.2f}%"
                drawing.append(
                    tag("rect", tip, css=css, x=at(left), y=f"{base:.1f}", width=width, height=f"{size:.1f}")
                )
    drawing.append(tag("line", css="axis", x1="0", x2="100%", y1=height, y2=height))
    for name, bound in rule.bounds.items():
        drawing.append(tag("line", css="mark", x1=at(bound), x2=at(bound), y1=-4, y2=height))
        anchor = "start" if name == "minimum" else "end"
        text = f"{SIGNS[name]} {bound:g}"
        drawing.append(tag("text", text, css="ink", x=at(bound), y=-8, text_anchor=anchor))
    ends = [f"{low:.4g}", f"{high:.4g}"]
    strays = [
        f"≤ {ends[0]}" if known.min() < low else ends[0],
        f"≥ {ends[1]}" if known.max() > high else ends[1],
    ]
    drawing += [
        tag("text", text.replace("-", "−"), x=x, y=height + 18, text_anchor=anchor)
        for text, x, anchor in zip(strays, ("0", "100%"), ("start", "end"), strict=True)
    ]
    words = f"kept {is_kept.sum():,}", f"rejected {(~is_kept).sum():,}", missing
    legend = [
        tag("span", tag("i", css=css) if css else "", text)
        for css, text in zip(("win", "lose", ""), words, strict=True)
    ]
    svg = tag(
        "svg", *drawing, role="img", aria_label=f"{rule.column}: {', '.join(words)}", height=height + 24
    )
    return tag(
        "figure",
        tag("figcaption", tag("span", rule.column, css="title")),
        tag("p", *legend, css="legend"),
        tag("div", svg, style="padding:1.5rem 0 .5rem"),
    )


def is_skewed(values: NDArray[np.float64], bounds: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows more: all above 0, and the most of them over two powers of ten."""
    if values.min() <= 0 or min(bounds) <= 0:
        return False
    low, high = np.percentile(values, [TAILS, 100 - TAILS])
    return bool(high >= 100 * low)


def bin_edges(values: NDArray[np.float64], bounds: Sequence[float]) -> NDArray[np.float64]:
    """Edges of equal bins that hold the bounds and all but the tails of `values`.

    A few whole numbers get a bin each; bins of a skewed column are equal in its logarithm.
    """
    low, high = np.percentile(values, [TAILS, 100 - TAILS])
    low, high = min(low, *bounds), max(high, *bounds)
    if np.array_equal(values, np.round(values)) and high - low < NUM_BINS:
        return np.arange(np.floor(low), np.ceil(high) + 2) - 0.5
    if is_skewed(values, bounds):
        edges: NDArray[np.float64] = np.geomspace(low / 1.05, high * 1.05, NUM_BINS + 1)
        return edges
    margin = 0.02 * (high - low) or 0.05 * abs(high) or 1.0
    return np.linspace(low - margin, high + margin, NUM_BINS + 1)


# --- what lies at a threshold -----------------------------------------------------------------------------


def _reached(manifest: Path, filters: Filters, name: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows a filter rejected, and which it kept; the others did not reach it."""
    verdicts = pq.read_table(manifest, columns=["rejected_by"])["rejected_by"]
    order = [READABLE, *filters]
    place = pc.index_in(verdicts, value_set=pa.array(order, verdicts.type)).to_numpy()
    return place == order.index(name), ~(place <= order.index(name))  # NaN: rejected by none


def _numbers(manifest: Path, rule: Filter) -> NDArray[np.float64]:
    """What a filter bounds, for each row of the manifest, NaN where missing."""
    import duckdb

    with duckdb.connect() as connection:
        connection.read_parquet(str(manifest)).create_view("manifest")
        query = f"SELECT coalesce({rule.number()}::DOUBLE, 'nan') AS number FROM manifest"
        values: NDArray[np.float64] = connection.sql(query).fetchnumpy()["number"]
    return np.asarray(values, np.float64)


def find_edges(
    manifest: Path, rule: Filter | Where, rejected: NDArray[np.bool_], kept: NDArray[np.bool_]
) -> list[Edge]:
    """The rows nearest to each bound, on both sides.

    Args:
        manifest: Parquet file.
        rule: the filter.
        rejected: which rows it rejected.
        kept: which it kept.
    """
    if isinstance(rule, Where):
        return [Edge("examples", _evenly(np.flatnonzero(rejected)), _evenly(np.flatnonzero(kept)))]
    values = _numbers(manifest, rule)
    edges = []
    for name, bound in rule.bounds.items():
        beyond = values < bound if name == "minimum" else values > bound
        # What the other bound rejected, or what a column of lower precision put on the bound, is not shown.
        sides = [np.flatnonzero(rejected & beyond), np.flatnonzero(kept & np.isfinite(values))]
        nearest = [
            rows[np.argsort(np.abs(values[rows] - bound), kind="stable")[:NUM_PICTURES]] for rows in sides
        ]
        edges.append(Edge(f"{rule.column} {SIGNS[name]} {bound:g}", nearest[0], nearest[1], values))
    return edges


def _evenly(rows: NDArray[np.intp]) -> NDArray[np.intp]:
    num = min(len(rows), NUM_PICTURES)
    return rows[np.linspace(0, len(rows) - 1, num).astype(np.intp)] if num else rows


def thumbnails(pool: Iterable[Path], uids: set[str]) -> dict[str, str]:
    """Small JPEGs as data URLs, empty where a picture can no longer be read; the originals stay as they are.

    Args:
        pool: Parquet files with `uid`, `uri`, `file_offset`, `file_size`.
        uids: of the pictures.
    """
    reader, made = Reader(), {}
    wanted = pa.array(sorted(uids), pa.string())
    for path in pool:
        table = pq.read_table(path, columns=["uid", "uri", "file_offset", "file_size"], partitioning=None)
        for row in table.filter(pc.is_in(table["uid"], value_set=wanted.cast(table["uid"].type))).to_pylist():
            content, _ = reader.read(row["uri"], row["file_offset"], row["file_size"])
            image = None if content is None else decode(content)[0]
            made[row["uid"]] = "" if image is None else _data_url(image)
    return made


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(file, "jpeg", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def gallery(edge: Edge, images: Mapping[int, str], names: Mapping[int, str]) -> Html:
    """Rejected pictures on the left, accepted ones on the right; those nearest to the threshold meet.

    Args:
        edge: which rows.
        images: row -> address of its thumbnail.
        names: row -> uid.
    """

    def cell(row: int) -> Html:
        value = "" if edge.values is None else f"{edge.values[row]:.4g}".replace("-", "−")
        frame = "width:100%;aspect-ratio:1;object-fit:contain;image-rendering:auto;background:var(--soft)"
        url = images.get(row, "")
        picture = tag("img", alt=names[row], src=url, style=frame) if url else tag("span", "cannot be read")
        return tag("div", picture, tag("span", tag("b", value)), title=names[row])

    def side(title: str, rows: Sequence[int]) -> Html:
        if not rows:
            return tag("figure", tag("figcaption", tag("span", f"{title}: none")))
        return tag(
            "figure",
            tag("div", *map(cell, rows)),
            tag("figcaption", title),
            css="pictures",
            style=f"--count:{NUM_PICTURES // 2};--side:11rem",
        )

    rejected = [int(row) for row in edge.rejected[::-1]]
    accepted = [int(row) for row in edge.accepted]
    return tag(
        "div",
        side(f"rejected, {edge.title}", rejected),
        side(f"accepted, {edge.title}", accepted),
        css="columns",
        style="margin-top:1.25rem",
    )


# --- broken files and scores ------------------------------------------------------------------------------


def broken_files(manifest: Path) -> list[Html]:
    """Files by kind of error, with their names and what is wrong."""
    table = pq.read_table(manifest, columns=["uid", "error", "error_detail"])
    table = table.filter(pc.is_valid(table["error"]))
    if not len(table):
        return [tag("p", "None.")]
    counts = sorted(
        table["error"].value_counts().to_pylist(), key=lambda row: (-row["counts"], row["values"])
    )
    pieces = [report.table(["kind", "files"], [[row["values"], row["counts"]] for row in counts])]
    for row in counts:
        of_kind = table.filter(pc.equal(table["error"], row["values"])).slice(0, NUM_NAMES).to_pylist()
        rows = [[_visible(each["uid"]), each["error_detail"] or ""] for each in of_kind]
        shown = f"{row['counts']:,}" if row["counts"] == len(rows) else f"{len(rows):,} of {row['counts']:,}"
        summary = tag("summary", f"{row['values']} ", tag("small", shown))
        pieces.append(tag("details", summary, report.table(["file", "what is wrong"], rows)))
    return pieces


def _visible(name: str) -> str:
    """A name in one line; what cannot be seen is written as Python writes it."""
    return name if name.isprintable() else repr(name)


def score_table(scores: Sequence[ScoreTable]) -> Html:
    """Scorers, decisions and what else gave columns, with their fingerprints."""
    rows = [[one.name, ", ".join(one.columns), one.fingerprint] for one in scores]
    return report.table(["name", "columns", "fingerprint"], rows)
