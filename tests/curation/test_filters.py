"""Filters: what they keep at bounds and without a value, in which order; how a wrong one is refused."""

from __future__ import annotations

import math
import random

import duckdb
import pyarrow as pa
import pytest

from emu_lightning.curation.filters import (
    BALANCE,
    READABLE,
    Filter,
    Filters,
    Where,
    check,
    leading,
    rejected_by,
)

COLUMNS = pa.schema(
    {
        "uid": pa.string(),
        "width": pa.int32(),
        "error": pa.string(),
        "score": pa.float32(),
        "num_words": pa.int32(),
        "is_duplicate": pa.bool_(),
        "concept": pa.string(),
    }
)
WHOLE = {"width": 64, "error": None, "score": 0.5, "num_words": 3, "is_duplicate": False, "concept": "car"}


def verdicts(filters: Filters, *rows: dict) -> list[str | None]:
    """Of rows that are as `WHOLE` where they say nothing else."""
    pictures = [WHOLE | {"uid": str(number)} | row for number, row in enumerate(rows)]
    with duckdb.connect() as connection:
        connection.register("rows", pa.Table.from_pylist(pictures, COLUMNS))
        return [row[0] for row in connection.sql(f"SELECT {rejected_by(filters)} FROM rows").fetchall()]


def test_a_value_on_the_bound_is_kept_in_the_columns_own_precision() -> None:
    """0.7 as float32 is less than 0.7 as float64: a score of 0.7 must still not be less than 0.7."""
    scores = [{"score": score} for score in (0.7, 0.69999, 0.70001)]
    assert verdicts({"f": Filter("score", minimum=0.7)}, *scores) == [None, "f", None]
    assert verdicts({"f": Filter("score", maximum=0.7)}, *scores) == [None, None, "f"]
    tiny = [{"score": 1e-7}, {"score": 2e-7}]
    assert verdicts({"f": Filter("score", maximum=1e-7)}, *tiny) == [None, "f"]
    words = [{"num_words": num} for num in (2, 3, 4)]
    assert verdicts({"f": Filter("num_words", 3, 3)}, *words) == ["f", None, "f"]
    assert verdicts({"f": Filter("num_words", 2.5)}, *words) == ["f", None, None]


def test_a_bound_on_what_is_computed_of_columns() -> None:
    rows = [{"num_words": num} for num in (15, 16, 17, None)]
    filters = {"f": Filter("width / num_words -- words", minimum=4)}
    assert verdicts(filters, *rows) == [None, None, "f", "f"]
    check(filters, COLUMNS)


@pytest.mark.parametrize(("missing", "verdict"), [("reject", "f"), ("keep", None)])
def test_a_missing_value_goes_where_the_filter_says(missing, verdict) -> None:
    row = {"score": None, "is_duplicate": None}
    assert verdicts({"f": Filter("score", 0, 1, missing=missing)}, row) == [verdict]
    assert verdicts({"f": Where("NOT is_duplicate", missing=missing)}, row) == [verdict]


def test_the_first_filter_that_rejects_is_named_and_order_counts() -> None:
    filters = {'it\'s "sharp"': Filter("score", 0.6), "words": Where("num_words < 3 -- few")}
    rows = [{}, {"score": 0.9}, {"score": 0.9, "num_words": 0}, {"num_words": 0}]
    assert verdicts(filters, *rows) == ['it\'s "sharp"', "words", None, 'it\'s "sharp"']
    turned = dict(reversed(filters.items()))
    assert verdicts(turned, *rows) == ["words", "words", None, 'it\'s "sharp"']


def test_what_cannot_be_read_is_rejected_before_all() -> None:
    rows = [{}, {"error": "truncated"}, {"width": None}, {"error": "damaged", "score": None}]
    assert verdicts({}, *rows) == [None, READABLE, READABLE, READABLE]
    assert verdicts({"f": Filter("score", 0.9)}, *rows) == ["f", READABLE, READABLE, READABLE]


def test_random_filters_agree_with_plain_python() -> None:
    rng = random.Random(0)
    values = [None, 0.0, 0.25, 0.5, 0.75, 1.0]  # exact in any precision

    def kept(rule: Filter, row: dict) -> bool:
        value = row[rule.column]
        if value is None:
            return rule.missing == "keep"
        low, high = rule.minimum, rule.maximum
        return (low is None or value >= low) and (high is None or value <= high)

    for _ in range(20):
        rows = [{"score": rng.choice(values), "num_words": rng.choice([None, 0, 1])} for _ in range(40)]
        filters = {}
        for number in range(3):
            low, high = sorted(rng.sample(values[1:], 2))
            bounds = rng.choice([(low, None), (None, high), (low, high)])
            column, missing = rng.choice(["score", "num_words"]), rng.choice(["reject", "keep"])
            filters[f"f{number}"] = Filter(column, *bounds, missing=missing)
        expected = [
            next((name for name, rule in filters.items() if not kept(rule, WHOLE | row)), None)
            for row in rows
        ]
        assert verdicts(filters, *rows) == expected


def test_leading_filters_end_at_the_first_that_needs_more() -> None:
    filters = {"a": Filter("score", 0), "b": Where("num_words < width"), "c": Filter("width", 1)}
    assert [*leading(filters, COLUMNS)] == ["a", "b", "c"]
    without = pa.schema([column for column in COLUMNS if column.name != "num_words"])
    assert [*leading(filters, without)] == ["a"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Filter("scroe", 1), "did you mean score"),
        (Filter("concept", 1), "filter f names the column concept, which is string: give one of numbers"),
        (Filter("is_duplicate", 1), "which is bool"),
        (Filter("least(width, hieght)", 1), 'Referenced column "hieght" not found'),
        (Where("is_duplicated"), 'Referenced column "is_duplicated" not found'),
        (Where("score >"), "syntax error"),
        (Where("score + 1"), "give a condition"),
        (Where("score > avg(score)"), "WHERE clause cannot contain aggregates"),
        (Where("score > avg(score) OVER ()"), "WHERE clause cannot contain window functions"),
    ],
)
def test_a_filter_that_cannot_be_applied_is_refused_in_one_line(rule: Filter | Where, message: str) -> None:
    with pytest.raises(ValueError, match=r"^filter f") as error:
        check({"f": rule}, COLUMNS)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_good_filters_pass_the_check_and_the_names_of_other_steps_are_taken() -> None:
    check({"a": Filter("score", 1), "b": Where("concept = 'car' AND NOT is_duplicate")}, COLUMNS)
    for name in (READABLE, BALANCE):
        with pytest.raises(ValueError, match=f"{name} is a step of every selection already"):
            check({name: Where("true")}, COLUMNS)


@pytest.mark.parametrize("bounds", [(None, None), (2, 1), (math.nan, None), (None, math.inf)])
def test_bounds_that_bound_nothing_are_refused(bounds) -> None:
    with pytest.raises(ValueError, match="a filter on score"):
        Filter("score", *bounds)
