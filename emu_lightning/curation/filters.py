"""Filters are predicates over columns. They have an order and names, and take away; they compute no score.

A value is missing where it is null; scores that are not a number are read as null (:mod:`.selection`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

if TYPE_CHECKING:
    import duckdb

READABLE = "readable"  # the filter that every pool passes first: what cannot be decoded is not selected
BALANCE = "balance"  # the last step of a funnel, after all filters

Missing = Literal["reject", "keep"]


@dataclass(frozen=True)
class Filter:
    """Keeps the rows whose number is within bounds.

    Args:
        column: its name; or what DuckDB computes of columns, such as `least(width, height)`.
        minimum: what is less is rejected; compared in the column's own precision.
        maximum: what is greater is rejected.
        missing: what becomes of rows without a value.

    Raises:
        ValueError: it has no bound, or none that a number could be within.
    """

    column: str
    minimum: float | None = None
    maximum: float | None = None
    missing: Missing = "reject"

    def __post_init__(self) -> None:
        if not self.bounds:
            raise ValueError(f"a filter on {self.column} has no bound: give minimum, maximum or both")
        for name, bound in self.bounds.items():
            if not math.isfinite(bound):
                raise ValueError(f"a filter on {self.column} has the {name} {bound}: leave it out")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(
                f"a filter on {self.column} keeps nothing: its minimum {self.minimum:g} is above its "
                f"maximum {self.maximum:g}"
            )

    @property
    def bounds(self) -> dict[str, float]:
        """Those that are set, by their names."""
        both = {"minimum": self.minimum, "maximum": self.maximum}
        return {name: bound for name, bound in both.items() if bound is not None}

    def predicate(self) -> str:
        """As SQL: true where a row is kept, null where the value is missing."""
        signs = {"minimum": ">=", "maximum": "<="}
        number = self.number()
        return " AND ".join(
            f"{number} {signs[name]} {_literal(bound)}" for name, bound in self.bounds.items()
        )

    def number(self) -> str:
        """What is bounded, as SQL."""
        return quoted(self.column) if self.column.isidentifier() else f"({self.column}\n)"


@dataclass(frozen=True)
class Where:
    """Keeps the rows for which a condition holds.

    Args:
        sql: a condition over columns as DuckDB understands it, such as `NOT is_duplicate` or
            `greatest(width, height) <= 3 * least(width, height)`.
        missing: what becomes of rows for which it is null, as `x > 1` is where x is missing.
    """

    sql: str
    missing: Missing = "reject"

    def predicate(self) -> str:
        """As SQL: true where a row is kept, null where values are missing."""
        return self.sql


Filters = Mapping[str, Filter | Where]


def quoted(name: str) -> str:
    """A name as SQL has it."""
    return '"' + name.replace('"', '""') + '"'


def _literal(value: float) -> str:
    """A number as a decimal: DuckDB then compares in the type of the column, not in double precision."""
    return format(Decimal(repr(float(value))), "f")


def rejected_by(filters: Filters) -> str:
    """SQL for the name of the first filter that rejects a row, null where all keep it.

    The columns `error` and `width` are those of the read step.
    """
    cases = [f"WHEN error IS NOT NULL OR width IS NULL THEN '{READABLE}'"]
    for name, rule in filters.items():
        otherwise = "true" if rule.missing == "keep" else "false"
        # The line break ends a comment that a condition may end with.
        text = name.replace("'", "''")
        cases.append(f"WHEN NOT coalesce(({rule.predicate()}\n), {otherwise}) THEN '{text}'")
    return f"CASE {' '.join(cases)} END"


def leading(filters: Filters, columns: pa.Schema) -> dict[str, Filter | Where]:
    """The filters before the first one that needs a column which is not there yet."""
    import duckdb

    known: dict[str, Filter | Where] = {}
    with duckdb.connect() as connection:
        connection.register("columns", columns.empty_table())
        for name, rule in filters.items():
            try:
                _bind(connection, rule)
            except duckdb.BinderException:
                break
            known[name] = rule
    return known


def check(filters: Filters, columns: pa.Schema) -> None:
    """Whether the filters can be applied to these columns; asked before any score is computed.

    Raises:
        ValueError: a filter names a column that is not there or no number, or its condition is wrong.
    """
    import duckdb

    for name in (READABLE, BALANCE):
        if name in filters:
            raise ValueError(f"{name} is a step of every selection already: give your filter another name")
    with duckdb.connect() as connection:
        connection.register("columns", columns.empty_table())
        for name, rule in filters.items():
            if isinstance(rule, Filter) and rule.column.isidentifier():
                require(rule.column, columns, f"filter {name}")
            try:
                type_ = _bind(connection, rule)
            except duckdb.Error as error:
                what = f"filter {name}, {' '.join(rule.predicate().split())}"
                raise ValueError(f"{what}: {' '.join(str(error).split())}") from None
            if type_ != "BOOLEAN":
                raise ValueError(f"filter {name}, {rule.predicate()}, is {type_}: give a condition")


def require(column: str, columns: pa.Schema, whose: str) -> None:
    """Checks that a column is there and holds numbers.

    Raises:
        ValueError: it does not; the message begins with `whose` it is.
    """
    if column not in columns.names:
        close = difflib.get_close_matches(column, columns.names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(columns.names)}"
        raise ValueError(f"{whose} names the column {column}, which neither pool nor scorers have: {hint}")
    type_ = columns.field(column).type
    if not (pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_)):
        raise ValueError(f"{whose} names the column {column}, which is {type_}: give one of numbers")


def _bind(connection: duckdb.DuckDBPyConnection, rule: Filter | Where) -> str:
    """The type of a condition. A WHERE refuses aggregates and windows, which would look at other rows."""
    connection.sql(f"SELECT uid FROM columns WHERE ({rule.predicate()}\n)")
    return str(connection.sql(f"SELECT ({rule.predicate()}\n) FROM columns").types[0])
