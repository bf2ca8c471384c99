"""The report: its pieces read back, its promises (one file, no network, nothing unescaped, no NaN)."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu_lightning.evaluation import report
from emu_lightning.evaluation.report import Figure, Html, Section, Series
from emu_lightning.evaluation.votes import WinRate, win_rate

NASTY = "<script>alert('x')</script> & \"it\""


def rate_of(win: int, tie: int, lose: int) -> WinRate:
    return win_rate(["B"] * win + ["Tie"] * tie + ["A"] * lose, of="B")


def some_pictures(num: int, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, side, side, 3), np.uint8)


def whole_page(name: str = "a red ball", pictures: np.ndarray | None = None) -> Html:
    """A page with every piece, and ``name`` wherever a text can stand."""
    rate, pictures = rate_of(80, 10, 10), some_pictures(3) if pictures is None else pictures
    pieces = [
        report.heading(name, name),
        report.key_figures([Figure(name, "84.3 %", name), Figure("memory", "2 GB")]),
        report.win_bar(name, rate, detail=name, names=(name, name), references=[(name, 0.8), (name, 0.3)]),
        report.difference_bar(name, rate, detail=name, margin=0.03),
        report.columns(
            report.line_chart(
                name,
                [Series(name, [0, 1], [0.2, 0.4], ([0.1, 0.3], [0.3, 0.5]))],
                x_label=name,
                detail=name,
                unit="%",
                stop=1,
            )
        ),
        report.figure_grid(
            {name: pictures, "tuned": pictures},
            [name] * len(pictures),
            scores={"tuned": np.arange(len(pictures))},
        ),
        report.table([name, "n"], [[name, 3], ["not run", 0.25]], caption=name),
        report.slice_table({name: {name: rate}}, rate, caption=name),
        report.slice_table({name: {name: rate}}, rate, figure="win_minus_lose"),
        report.settings({name: {name: name}, "seed": 0}),
        report.provenance(name, {name: name}),
    ]
    return report.page(
        name, report.headline(rate, rate, tuned=name), [Section(name, pieces, intro=name)], remark=name
    )


class Outline(HTMLParser):
    """Fails on an element closed out of turn; keeps every address the page refers to."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.ids: set[str] = set()
        self.feed(document)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.add(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href", "srcset", "data")]
        self.ids |= {value for key, value in attributes if key == "id"}
        if tag not in ("img", "meta", "link", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# --- the page --------------------------------------------------------------------------------------------


def test_the_page_is_one_well_formed_file_that_asks_for_nothing() -> None:
    document = whole_page()
    outline = Outline(document)
    assert not outline.tags & {"script", "link", "iframe", "object"}
    assert all(
        address.startswith("data:image/png;base64,") or address[1:] in outline.ids
        for address in outline.addresses
    )
    assert "url(" not in document and "@import" not in document and "http://" not in document
    assert "default-src 'none'" in document


def test_nothing_a_user_wrote_becomes_markup() -> None:
    document = whole_page(NASTY)
    assert "script" not in Outline(document).tags
    assert NASTY not in document and document.count("&lt;script&gt;") > 20


def test_thirty_two_pairs_of_noise_stay_under_three_megabytes(tmp_path: Path) -> None:
    path = report.write_report(tmp_path, {}, whole_page(pictures=some_pictures(32, 64)))
    assert path.stat().st_size < 3_000_000


def test_results_are_written_whole_and_plain(tmp_path: Path) -> None:
    results = {
        "appeal": rate_of(8, 1, 1).to_dict("win_rate"),
        "autoencoder": {"psnr_db": np.float32(29.5)},
        "channels": np.array([4, 8]),
        "folder": Path("runs"),
        "fid": "not computed: too few pictures",
    }
    path = report.write_report(tmp_path / "runs" / "quickstart", results, whole_page())
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.html", "results.json"]
    read = json.loads((path.parent / "results.json").read_text(encoding="utf-8"))
    assert read["appeal"]["win_rate"] == 0.8 and read["autoencoder"]["psnr_db"] == 29.5
    assert read["channels"] == [4, 8] and read["folder"] == "runs"


def test_a_figure_that_is_not_a_number_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    report.write_report(tmp_path, {"seconds": 1}, whole_page())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="'autoencoder.psnr_db' is nan"):
        report.write_report(tmp_path, {"autoencoder": {"psnr_db": np.float64("nan")}}, whole_page())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# --- words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "appeal,faithfulness,says",
    [
        ((90, 0, 10), (40, 40, 20), ["The tuned model’s picture wins", "and follows the prompts better"]),
        ((90, 0, 10), (1, 998, 1), ["The tuned model’s", "and follows the prompts no worse"]),
        ((90, 0, 10), (5, 90, 5), ["The tuned model’s", "but may lose more than 3 points"]),
        ((90, 0, 10), (10, 60, 30), ["The tuned model’s", "but follows the prompts less well"]),
        (
            (50, 4, 46),
            (0, 100, 0),
            ["No clear preference: the tuned model’s", "and may lose more than 3 points"],
        ),
        ((10, 0, 90), (1, 998, 1), ["Tuning made the pictures worse: the tuned model’s", "but follows"]),
    ],
)
def test_the_headline_claims_what_the_intervals_allow(appeal: tuple, faithfulness: tuple, says: list) -> None:
    text = re.sub("<[^>]+>", "", report.headline(rate_of(*appeal), rate_of(*faithfulness)))
    assert all(words in text for words in says), text


def test_the_headline_gives_rate_and_interval_and_tells_pairs_from_prompts() -> None:
    text = re.sub("<[^>]+>", "", report.headline(rate_of(1353, 28, 251), rate_of(599, 690, 343)))
    assert "wins 82.9\u00a0% of 1,632 prompts on appeal (95\u00a0% interval 81.0 to 84.7\u00a0%)" in text
    twice = win_rate(["B", "B", "A", "B"], of="B", prompts=["p", "p", "q", "q"])
    assert "4 pairs for 2 prompts" in report.headline(twice, twice)


def test_the_headline_of_several_counts_only_what_is_preferred_and_says_each_verdict() -> None:
    rates = {
        "oil": (rate_of(90, 0, 10), rate_of(1, 998, 1)),
        "ink": (rate_of(50, 4, 46), rate_of(10, 60, 30)),
        NASTY: (rate_of(10, 0, 90), rate_of(5, 90, 5)),
    }
    html = report.headline_of_several(rates)
    assert "<script" not in html
    text = re.sub("<[^>]+>", "", html)
    assert "for 1 of 3 generators: oil wins 90.0\u00a0% (" in text and ", ink 50.0\u00a0% (" in text
    assert "oil follows the prompts no worse, ink follows the prompts less well, " in text
    assert text.endswith("may lose more than 3 points of faithfulness to the prompts.")


def test_figures_are_written_with_their_signs() -> None:
    assert report.percent(0.8291) == "82.9\u00a0%" and report.percent(-0.0001) == "0.0\u00a0%"
    assert report.points(0.0123) == "+1.2" and report.points(-0.03, 0) == "−3"
    assert report.points(-0.0001) == report.points(0.0) == "0.0"
    assert report.percent_interval((0.81, 0.8465)) == "81.0 to 84.7\u00a0%"
    assert report.points_interval((-0.009, 0.033)) == "−0.9 to +3.3"


# --- bars and charts, read back --------------------------------------------------------------------------


def shares(text: str, pattern: str) -> list[float]:
    return [float(value) / 100 for value in re.findall(pattern, text)]


@pytest.mark.parametrize("counts", [(80, 10, 10), (0, 30, 0), (3, 0, 997)])
def test_a_bar_shows_the_shares_and_the_interval(counts: tuple) -> None:
    rate = rate_of(*counts)
    bar = report.win_bar("appeal", rate)
    starts, widths = (shares(bar, rf'<rect [^>]*{key}="([\d.]+)%') for key in ("x", "width"))
    assert widths == pytest.approx([rate.win, rate.tie, rate.lose], abs=1e-4)
    assert starts == pytest.approx([0, rate.win, rate.win + rate.tie], abs=1e-4)
    ends = shares(bar, r'class="whisker" x1="([\d.]+)%') + shares(bar, r'class="whisker"[^>]* x2="([\d.]+)%')
    assert (min(ends), max(ends)) == pytest.approx(rate.ci95, abs=1e-4)


@pytest.mark.parametrize("counts", [(40, 40, 20), (1, 998, 1), (0, 0, 9)])
def test_a_difference_lies_where_its_axis_says(counts: tuple) -> None:
    rate = rate_of(*counts)
    bar = report.difference_bar("faithfulness", rate, margin=0.03)
    axis = {
        float(value.replace("−", "-")) / 100: share
        for share, value in zip(
            shares(bar, r'<text x="([\d.]+)%" y="80"'), re.findall(r'y="80"[^>]*>([^<]+)<', bar), strict=True
        )
    }
    low, high = min(axis), max(axis)
    assert axis[0.0] == 0.5 and axis[low] == 0 and axis[high] == 1
    (dot,) = shares(bar, r'<circle [^>]*cx="([\d.]+)%')
    assert low + dot * (high - low) == pytest.approx(rate.win_minus_lose, abs=2e-4)
    (limit,) = shares(bar, r'class="mark" x1="([\d.]+)%')
    assert low + limit * (high - low) == pytest.approx(-0.03, abs=2e-4)


def test_a_line_runs_through_its_measurements_and_breaks_where_there_is_none() -> None:
    x, y = np.array([0.0, 100, 200, 300, 400]), np.array([0.12, 0.3, np.nan, 0.47, 0.41])
    chart = report.line_chart("loss", [Series("held out", x, y)], x_label="iteration", stop=300)
    (path,) = re.findall(r'class="line"[^>]* d="([^"]+)"', chart)
    assert re.sub(r"[\d. ]+", "", path) == "MLML"
    drawn = np.array(re.findall(r"([\d.]+) ([\d.]+)", path), float)
    ticks = [float(value) for value in re.findall(r'text-anchor="end">([\d.]+)<', chart)]
    seen = np.isfinite(y)
    assert drawn[:, 0] / 1000 * 400 == pytest.approx(x[seen], abs=0.1)
    assert max(ticks) - drawn[:, 1] / 1000 * (max(ticks) - min(ticks)) == pytest.approx(y[seen], abs=1e-3)
    assert shares(chart, r'class="mark" x1="([\d.]+)%') == [0.75] and "chosen stop 300" in chart


def test_a_chart_of_one_measurement_or_of_a_constant_can_be_drawn() -> None:
    for y in ([0.5], [0.0], [3.0, 3.0, 3.0]):
        assert "nan" not in report.line_chart("loss", [Series("a", range(len(y)), y)], x_label="iteration")


@pytest.mark.parametrize(
    "series",
    [[], [Series("a", [0, 1], [1])], [Series("a", [0], [float("nan")])], [Series("a", [0], [1])] * 7],
)
def test_charts_that_cannot_be_drawn_are_refused(series: list) -> None:
    with pytest.raises(ValueError, match="chart 'loss'"):
        report.line_chart("loss", series, x_label="iteration")


def test_ticks_are_few_even_round_and_enclose() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        low = rng.normal() * 10.0 ** rng.integers(-4, 5)
        high = low + rng.random() * 10.0 ** rng.integers(-4, 5)
        ticks = report._ticks(low, high)
        steps = np.diff(ticks)
        assert 3 <= len(ticks) <= 7 and steps == pytest.approx(steps[0])
        assert ticks[0] <= low + 1e-6 * steps[0] and high - 1e-6 * steps[0] <= ticks[-1]
        assert f"{steps[0]:.1e}"[:3] in ("1.0", "2.0", "2.5", "5.0")


def test_names_at_the_ends_of_lines_do_not_collide() -> None:
    moved = report._apart([100.0, 101.0, 219.0, 100.5])
    assert np.diff(sorted(moved)).min() >= 17 and max(moved) <= 220
    assert np.argsort(moved).tolist() == [0, 3, 1, 2]
    assert report._apart([10.0, 200.0]) == [10.0, 200.0]


# --- pictures and tables ---------------------------------------------------------------------------------


def test_pictures_are_carried_pixel_by_pixel_base_first() -> None:
    base, tuned = some_pictures(2, seed=1), some_pictures(2, seed=2)
    grid = report.figure_grid(
        {"base": base, "tuned": tuned}, ["a cat", "a dog"], scores={"base": [0.5, 0.7], "tuned": [0.9, 0.6]}
    )
    urls = re.findall(r'src="data:image/png;base64,([^"]+)"', grid)
    read = [np.asarray(Image.open(io.BytesIO(base64.b64decode(url)))) for url in urls]
    assert np.array_equal(read, [base[0], tuned[0], base[1], tuned[1]])
    assert re.findall(r"<b>([\d.]+)</b>", grid) == ["0.90", "0.70"]
    assert re.findall(r'alt="([^"]+)"', grid)[:2] == ["base: a cat", "tuned: a cat"]
    assert "--side:144px" in grid  # 8 pixels, 18 times


def test_large_pictures_are_reduced_for_the_page() -> None:
    grid = report.figure_grid({"base": some_pictures(1, 400)}, ["a cat"])
    (url,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', grid)
    assert Image.open(io.BytesIO(base64.b64decode(url))).size == (256, 256)


def test_models_can_stand_in_several_rows() -> None:
    pictures = {name: some_pictures(1) for name in ("a", "b", "c", "d")}
    assert "--count:4;" in report.figure_grid(pictures, ["a cat"])
    assert "--count:2;" in report.figure_grid(pictures, ["a cat"], num_columns=2)


@pytest.mark.parametrize(
    "pictures", [np.zeros((2, 8, 8, 3)), np.zeros((1, 8, 8, 3), np.uint8), np.zeros((2, 3, 8, 8), np.uint8)]
)
def test_other_arrays_are_not_pictures(pictures: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"give \(2, H, W, 3\) uint8"):
        report.figure_grid({"base": pictures}, ["a cat", "a dog"])


def test_a_table_has_as_many_cells_as_heads_and_numbers_stand_right() -> None:
    drawn = report.table(["channels", "psnr", "fid"], [[4, 28.125, "not run"], [16, -1.5, 3]])
    assert re.findall(r'<td class="number">([^<]+)<', drawn) == ["4", "28.12", "16", "−1.5"]
    assert "<td>not run</td>" in drawn
    with pytest.raises(ValueError, match="2 cells, its head 1"):
        report.table(["a"], [["b", "c"]])


def test_slices_show_their_interval_beside_the_whole() -> None:
    whole, part = rate_of(80, 10, 10), rate_of(9, 0, 1)
    drawn = report.slice_table({"subject": {"ball": part}}, whole)
    dots = shares(drawn, r'<circle [^>]*cx="([\d.]+)%')
    marks = shares(drawn, r'class="mark" x1="([\d.]+)%')
    assert dots == [0.9, 0.8] and marks == [0.8, 0.8]
    assert report.percent_interval(part.ci95) in drawn


def test_settings_show_every_key_in_full() -> None:
    drawn = report.settings({"seed": 3, "tune": {"optimizer": {"lr": 1e-4}, "stops": [1, 2], "path": None}})
    cells = re.findall(r"<th scope=\"row\">([^<]+(?:<wbr>[^<]+)*)</th><td>([^<]*)</td>", drawn)
    assert {key.replace("<wbr>", ""): value for key, value in cells} == {
        "seed": "3",
        "tune.optimizer.lr": "0.0001",
        "tune.stops": "[1, 2]",
        "tune.path": "null",
    }
