"""From scores to a selection: DuckDB joins the columns, applies filters, ranks, and fills quotas.

Nothing is scored here, so that a changed threshold costs seconds. The result is a function of the pool, its
scores and the configuration alone: not of the engine that scored, of its interruptions, or of what earlier
configurations had scored besides.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from emu_lightning.curation.filters import (
    BALANCE,
    READABLE,
    Filters,
    check,
    leading,
    quoted,
    rejected_by,
    require,
)
from emu_lightning.curation.ingest import PLACE
from emu_lightning.files import write_whole

if TYPE_CHECKING:
    import duckdb

COLUMNS = {  # those of emu_lightning.data.manifest, whose import would bring torch along
    "uid": pa.large_string(),
    "uri": pa.large_string(),
    "sha256": pa.large_string(),
    "height": pa.int32(),
    "width": pa.int32(),
}
FIRST = (*COLUMNS, "caption", "source", "licence")  # the manifest's columns in front, those that are there
READ = ("width", "error")  # of the read step; without a width, or with an error, there is no picture
UNIQUE = ("uid", "uri", "sha256", "caption", "edited_caption", "error_detail")
NUM_READERS = 4  # threads that read scores
ROWS_PER_GROUP = 100_000  # of the manifest's Parquet file
RESULT = {"rank": pa.float64(), "selected": pa.bool_(), "rejected_by": pa.large_string()}
METADATA = "emu_curation"  # key of the manifest's schema metadata: the configuration, as JSON
EDITED = {"caption": "edited_caption"}  # what a decision says beside the original, not in its place


@dataclass(frozen=True)
class Balance:
    """How many of which concept are selected, and which of them.

    Pictures are ranked within their concept by the weighted mean of percentiles, so that columns of different
    units can be mixed and no concept is favoured for how its pictures score. A percentile is the share of the
    concept's pictures that have a lower value, equal ones counted half.

    Args:
        size: of the selection; fewer where fewer pass the filters. All of them where left out.
        column: of the concept. Where left out, there is only one.
        quotas: concept -> its share of the selection, in any unit; concepts not named get nothing. Where left
            out, all that are there get the same. What a concept cannot fill goes to the others in proportion.
        rank: column -> weight. A column whose value is missing is left out of that picture's mean; a picture
            without any comes last. Equal ranks are ordered by uid.

    Raises:
        ValueError: a size, a share or a weight is not positive, or there are quotas without a column.
    """

    size: int | None = None
    column: str | None = None
    quotas: dict[str, float] | None = None
    rank: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"balance.size is {self.size}: give a positive number, or leave it out")
        if self.quotas is not None and self.column is None:
            raise ValueError("balance.quotas are shares of concepts: name the concepts' balance.column")
        for name, numbers in (("quotas", self.quotas), ("rank", self.rank)):
            for key, value in (numbers or {}).items():
                if not (math.isfinite(value) and value > 0):
                    raise ValueError(f"balance.{name}.{key} is {value:g}: give a positive number")

    def allot(self, available: Mapping[str, int]) -> dict[str, int]:
        """How many of each concept are selected.

        Shares are rounded by largest remainder. Concepts that have fewer than their share give all they have,
        and the shares of the others grow in proportion, until nothing is left over.

        Args:
            available: concept -> how many pass the filters.
        """
        quotas = dict.fromkeys(available, 1.0) if self.quotas is None else self.quotas
        open_ = {name: Fraction(str(quotas[name])) for name in sorted(quotas) if available.get(name)}
        left = sum(available[name] for name in open_)
        left = left if self.size is None else min(left, self.size)
        allotted = dict.fromkeys(quotas, 0)
        while True:
            whole = sum(open_.values())
            shares = {name: left * quota / whole for name, quota in open_.items()}
            full = [name for name, share in shares.items() if share >= available[name]]
            if not full:
                break
            for name in full:
                allotted[name] = available[name]
                left -= available[name]
                del open_[name]
        allotted |= {name: math.floor(share) for name, share in shares.items()}
        left -= sum(math.floor(share) for share in shares.values())
        by_remainder = sorted(shares, key=lambda name: (math.floor(shares[name]) - shares[name], name))
        for name in by_remainder[:left]:
            allotted[name] += 1
        return allotted


@dataclass(frozen=True)
class ScoreTable:
    """Columns about pictures of a pool, from one scorer or from people.

    Args:
        name: for error messages, and in the manifest.
        rows: folder of a Parquet file for each shard, named as the pool's, or a table; a column `uid` and
            `columns`. A uid comes once or not at all, and so does a file.
        columns: name and type. Of lists, such as embeddings, nothing is read.
        fingerprint: of all that they depend on.
        is_late: they are computed only for rows that pass the filters before the first one that needs them.
        weights: name -> sha256 of the files of weights that made them.
    """

    name: str
    rows: Path | pa.Table
    columns: Mapping[str, pa.DataType]
    fingerprint: str
    is_late: bool = False
    weights: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What a filter, or the balance, left."""

    name: str
    num_in: int
    num_out: int


@dataclass(frozen=True)
class Share:
    """A concept's way through the selection: how many are readable, pass all filters, are selected."""

    concept: str
    num_readable: int
    num_passing: int
    num_selected: int


@dataclass(frozen=True)
class Selection:
    """What was selected, and what was left on the way.

    Attributes:
        uids: sorted.
        configuration_sha256: of filters, balance, and the fingerprints of scores and decisions.
        funnel: from the first filter to the last, then the balance.
        concepts: by falling number of readable pictures; without a concept: "".
    """

    uids: list[str]
    configuration_sha256: str
    funnel: list[Step]
    concepts: list[Share]


def read_decisions(paths: Iterable[str | Path]) -> list[ScoreTable]:
    """What people decided about pictures: Parquet files with a column `uid` and any others.

    A `caption` in them is an edited one, and becomes `edited_caption`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is no Parquet file, has no column `uid`, or a uid is missing or comes twice.
    """
    return [_read_decisions(Path(path)) for path in paths]


def _read_decisions(path: Path) -> ScoreTable:
    if not path.is_file():
        raise FileNotFoundError(f"decisions {path} do not exist")
    try:
        table = pq.read_table(path, partitioning=None)
    except pa.ArrowException as error:
        raise ValueError(f"decisions {path} are no Parquet file, or damaged: {error}") from None
    if "uid" not in table.column_names:
        raise ValueError(f"decisions {path} have no column uid; they have {', '.join(table.column_names)}")
    table = table.rename_columns([EDITED.get(name, name) for name in table.column_names])
    if table["uid"].null_count or len(table["uid"].unique()) < len(table):
        raise ValueError(f"decisions {path} have rows without a uid, or a uid twice: give one row a picture")
    columns = {name: table.schema.field(name).type for name in table.column_names if name != "uid"}
    fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
    return ScoreTable(f"decisions {path.name}", table, columns, fingerprint)


class ScoredPool:
    """All rows of a pool with all columns that are known of them.

    Where pool and a scorer have a column of one name, the scorer's is taken: what is measured goes before
    what is told. Scores that are not a number are read as missing.

    Args:
        pool: a Parquet file for each shard; columns `uid`, `uri` and any others, the same in all.
        scores: the read step's, with `sha256`, `width`, `height`, `error`; then any others.

    Raises:
        ValueError: two of the scores have one name, or a column of one name.
    """

    def __init__(self, pool: Sequence[Path], scores: Sequence[ScoreTable]) -> None:
        self._shards, self._scores = pool, scores
        names = [one.name for one in scores]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is there twice: leave one out, or name it otherwise")
        owners: dict[str, str] = dict.fromkeys(RESULT, "the selection itself")
        for one in scores:
            for name in one.columns:
                if name in owners:
                    raise ValueError(f"{owners[name]} and {one.name} both have a column {name}: rename one")
                owners[name] = one.name
        told = {column.name: column.type for column in pq.read_schema(pool[0])}
        self._told = {name: type_ for name, type_ in _scalars(told).items() if name not in {*owners, *PLACE}}

    @cached_property
    def columns(self) -> pa.Schema:
        """What filters and balance can name."""
        return pa.schema(
            self._told | _scalars({k: v for one in self._scores for k, v in one.columns.items()})
        )

    def table(self, columns: Iterable[str]) -> pa.Table:
        """Some columns of all rows, in the pool's order."""
        return pa.concat_tables(self._parts({"uid", *columns})).select(list(columns))

    def passing(self, filters: Filters) -> pa.Table:
        """The uids of rows that pass the filters before the first one that needs a column not there yet."""
        known = leading(filters, self.columns)
        with _connect() as connection:
            _judge(connection, self.table(self._needed(known)), known, Balance())
            return connection.sql("SELECT uid FROM judged WHERE rejected_by IS NULL").to_arrow_table()

    def select(self, filters: Filters, balance: Balance, folder: str | Path) -> Selection:
        """Writes `manifest.parquet` and `selection.json` into `folder`.

        The manifest has every row of the pool, in its order: the columns of a manifest, those of the pool, of
        the scores, then `rank` (null for what a filter rejected), `selected`, and `rejected_by`, the first
        filter that rejected it. Late scores are there for rows that needed them only. The configuration is in
        the schema's metadata.

        Raises:
            ValueError: a filter or the balance does not fit the columns, or the pool has a uid twice.
        """
        check_selection(filters, balance, self.columns)
        configuration = {
            "filters": [{"name": name, **asdict(rule)} for name, rule in filters.items()],
            "balance": asdict(balance),
            "scores": {one.name: one.fingerprint for one in self._scores},
        }
        digest = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()
        with _connect() as connection:
            _judge(connection, self.table(self._needed(filters, balance)), filters, balance)
            _rank(connection, balance)
            uids = connection.sql("SELECT uid FROM selected ORDER BY uid").to_arrow_table()["uid"].to_pylist()
            funnel = _funnel(connection, filters, len(uids))
            concepts = [] if balance.column is None else _concepts(connection)
            verdicts = connection.sql(
                "SELECT rank, selected.row IS NOT NULL AS selected, rejected_by FROM judged "
                "LEFT JOIN ranked USING (row) LEFT JOIN selected USING (row) ORDER BY judged.row"
            ).to_arrow_table()
        weights = {file: sha256 for one in self._scores for file, sha256 in one.weights.items()}
        about = {"configuration_sha256": digest, "weights": weights, **configuration}
        metadata = {METADATA: json.dumps(about, sort_keys=True)}
        self._write_manifest(Path(folder) / "manifest.parquet", verdicts, filters, metadata)
        chosen = {"configuration_sha256": digest, "configuration": configuration, "num": len(uids)}
        write_whole(
            Path(folder) / "selection.json",
            json.dumps(chosen | {"uids": uids}, indent=1, ensure_ascii=False) + "\n",
        )
        return Selection(uids, digest, funnel, concepts)

    def _needed(self, filters: Filters, balance: Balance | None = None) -> list[str]:
        """The columns to judge by; of a condition all whose name is in its text."""
        named = {"uid", *READ, *(balance.rank if balance else ()), balance.column if balance else None}
        texts = [rule.predicate().lower() for rule in filters.values()]
        named |= {name for name in self.columns.names if any(name.lower() in text for text in texts)}
        return [name for name in self.columns.names if name in named]

    @cached_property
    def _whole(self) -> dict[str, pa.Table]:
        """Scores that lie in one table, in the order of the pool."""
        tables = {one.name: one for one in self._scores if isinstance(one.rows, pa.Table)}
        if not tables:
            return {}
        uids = pa.concat_tables([_read(path, ["uid"]) for path in self._shards])["uid"]
        return {name: _aligned(one.rows, uids, _scalars(one.columns)) for name, one in tables.items()}

    def _parts(self, columns: Collection[str]) -> Iterator[pa.Table]:
        """Some columns of each shard; threads read ahead."""
        _ = self._whole  # before threads ask for it
        start, ahead = 0, deque[Future[pa.Table]]()
        with ThreadPoolExecutor(NUM_READERS) as threads:
            for path in self._shards:
                ahead.append(threads.submit(self._part, path, start, columns))
                start += pq.read_metadata(path).num_rows
                if len(ahead) > 2 * NUM_READERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _part(self, path: Path, start: int, columns: Collection[str]) -> pa.Table:
        """Some columns of one shard, whose first row is the pool's number `start`."""
        told = {name: type_ for name, type_ in self._told.items() if name in columns}
        part = _aligned(_read(path, told), None, told)
        uids, num = part["uid"], len(part)
        for one in self._scores:
            wanted = {name: type_ for name, type_ in _scalars(one.columns).items() if name in columns}
            if not wanted:
                continue
            if isinstance(one.rows, pa.Table):
                scored = self._whole[one.name].slice(start, num).select(list(wanted))
            elif (file := one.rows / path.name).is_file():
                scored = _aligned(_read(file, ["uid", *wanted]), uids, wanted)
            else:  # all of its pictures were rejected before
                scored = pa.table({name: pa.nulls(num, type_) for name, type_ in wanted.items()})
            for name in wanted:
                part = part.append_column(name, _without_nan(scored[name]))
        return part

    def _write_manifest(
        self, path: Path, verdicts: pa.Table, filters: Filters, metadata: Mapping[str, str]
    ) -> None:
        needed_before: dict[str, pa.Array] = {}  # late column -> filters that a row has to pass for it
        known = self._told
        for one in self._scores:
            if one.is_late:
                before = pa.array([READABLE, *leading(filters, pa.schema(known))], pa.large_string())
                needed_before |= dict.fromkeys(_scalars(one.columns), before)
            known = known | _scalars(one.columns)
        types = {column.name: column.type for column in self.columns} | COLUMNS | RESULT
        front = [name for name in FIRST if name in types]
        schema = pa.schema(
            {name: types[name] for name in [*front, *(name for name in types if name not in front)]}
        )
        start = 0

        def with_verdict(part: pa.Table) -> pa.Table:
            nonlocal start
            verdict = verdicts.slice(start, len(part))
            start += len(part)
            for name, before in needed_before.items():
                is_spared = pc.is_in(verdict["rejected_by"].cast(before.type), value_set=before)
                masked = pc.if_else(is_spared, pa.scalar(None, types[name]), part[name])
                part = part.set_column(part.column_names.index(name), name, masked)
            columns = {name: part[name] for name in part.column_names} | dict(
                zip(RESULT, verdict, strict=True)
            )
            return pa.table({name: columns[name].cast(types[name]) for name in schema.names})

        parts = map(with_verdict, self._parts(self.columns.names))
        _write_parquet(path, parts, schema.with_metadata(metadata))


def _connect() -> duckdb.DuckDBPyConnection:
    import duckdb

    connection = duckdb.connect()
    connection.execute("SET enable_progress_bar = false")
    return connection


def _read(path: Path, columns: Iterable[str]) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read(columns=list(columns), use_threads=False)  # there is a thread for each file


def _aligned(table: pa.Table, uids: pa.ChunkedArray | None, types: Mapping[str, pa.DataType]) -> pa.Table:
    """Columns of `table` in the order of `uids`, null where it lacks one; as it is where `uids` is None."""
    if uids is not None and not table["uid"].equals(uids):
        table = table.take(pc.index_in(uids, value_set=table["uid"].combine_chunks().cast(uids.type)))
    return pa.table({name: table[name].cast(type_) for name, type_ in types.items()})


def _without_nan(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)


def _write_parquet(path: Path, parts: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Writes a table that never is in memory as a whole; whole or not at all, and always cut alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    # A dictionary of what differs from row to row costs time, and is thrown away in the end.
    few = [c.name for c in schema if pa.types.is_large_string(c.type) or pa.types.is_string(c.type)]
    few = [name for name in few if name not in UNIQUE]
    with pq.ParquetWriter(partial, schema, use_dictionary=few) as writer:
        waiting: list[pa.Table] = []
        for part in parts:
            waiting.append(part)
            if sum(map(len, waiting)) >= ROWS_PER_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    os.replace(partial, path)


def check_selection(filters: Filters, balance: Balance, columns: pa.Schema) -> None:
    """Whether filters and balance fit these columns; asked before any score is computed.

    Raises:
        ValueError: they do not; the message names the column.
    """
    check(filters, columns)
    for name in balance.rank:
        require(name, columns, f"balance.rank.{name}")
    if balance.column is not None and balance.column not in columns.names:
        raise ValueError(
            f"balance.column {balance.column} is a column that neither pool nor scorers have: "
            f"there are {', '.join(columns.names)}"
        )


def _scalars(columns: Mapping[str, pa.DataType]) -> dict[str, pa.DataType]:
    return {name: type_ for name, type_ in columns.items() if not pa.types.is_nested(type_)}


def _rows(connection: duckdb.DuckDBPyConnection, query: str) -> list[Any]:
    return connection.sql(query).fetchall()


def _judge(
    connection: duckdb.DuckDBPyConnection, table: pa.Table, filters: Filters, balance: Balance
) -> None:
    """Makes the table `judged` of a pool's: row from 0, uid, rejected_by, concept, and values to rank by."""
    if pc.count_distinct(table["uid"]).as_py() < len(table):
        counts = pc.value_counts(table["uid"])
        uid = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
        raise ValueError(f"the pool has more than one row of uid {uid}: give each picture its own")
    connection.register("scored", table.append_column("row", [np.arange(len(table))]))
    concept = "'all'" if balance.column is None else f"{quoted(balance.column)}::VARCHAR"
    ranked = "".join(f", {quoted(name)} AS value_{number}" for number, name in enumerate(balance.rank))
    connection.execute(
        f"CREATE TEMP TABLE judged AS "
        f"SELECT row, uid, {rejected_by(filters)} AS rejected_by, {concept} AS concept{ranked} FROM scored"
    )


def _rank(connection: duckdb.DuckDBPyConnection, balance: Balance) -> None:
    """Makes the table `ranked` of what passed, and `selected` of it.

    Both have row and uid; `ranked` also concept, rank in (0, 1), and place from 1 in the concept.
    """
    percentiles, sums, weights = [], ["0"], ["0"]
    for number, weight in enumerate(balance.rank.values()):
        value = f"value_{number}"
        equal = f"count(*) OVER (PARTITION BY concept, {value})"
        lower = f"rank() OVER (PARTITION BY concept ORDER BY {value} NULLS LAST) - 1"
        known = f"count({value}) OVER (PARTITION BY concept)"
        percentile = f"CASE WHEN {value} IS NOT NULL THEN ({lower} + {equal} / 2) / {known} END"
        percentiles.append(f", {percentile} AS percentile_{number}")
        sums.append(f"coalesce({weight!r}::DOUBLE * percentile_{number}, 0)")
        weights.append(f"if(percentile_{number} IS NULL, 0, {weight!r}::DOUBLE)")
    connection.execute(
        f"""CREATE TEMP TABLE ranked AS
        SELECT *, row_number() OVER (PARTITION BY concept ORDER BY rank DESC NULLS LAST, uid) AS place
        FROM (SELECT row, uid, concept, ({" + ".join(sums)}) / nullif({" + ".join(weights)}, 0) AS rank
              FROM (SELECT row, uid, concept{"".join(percentiles)} FROM judged WHERE rejected_by IS NULL))"""
    )
    available = _rows(
        connection, "SELECT concept, count(*) FROM ranked WHERE concept IS NOT NULL GROUP BY ALL"
    )
    allotted = balance.allot(dict(available))
    nums = pa.array(allotted.values(), pa.int64())
    connection.register("allotted", pa.table({"concept": pa.array(allotted, pa.string()), "num": nums}))
    connection.execute(
        "CREATE TEMP TABLE selected AS "
        "SELECT row, uid FROM ranked JOIN allotted USING (concept) WHERE place <= num"
    )


def _funnel(connection: duckdb.DuckDBPyConnection, filters: Filters, num_selected: int) -> list[Step]:
    rejected = dict(_rows(connection, "SELECT rejected_by, count(*) FROM judged GROUP BY rejected_by"))
    left = sum(rejected.values())
    steps = []
    for name in (READABLE, *filters):
        steps.append(Step(name, left, left - rejected.get(name, 0)))
        left = steps[-1].num_out
    return [*steps, Step(BALANCE, left, num_selected)]


def _concepts(connection: duckdb.DuckDBPyConnection) -> list[Share]:
    rows = _rows(
        connection,
        f"""SELECT coalesce(judged.concept, ''), count(*) FILTER (rejected_by IS DISTINCT FROM '{READABLE}'),
            count(*) FILTER (rejected_by IS NULL), count(selected.row)
        FROM judged LEFT JOIN selected USING (row) GROUP BY judged.concept ORDER BY 2 DESC, 1""",
    )
    return [Share(*row) for row in rows if row[1]]
