"""`emu curate`: from a pool of pictures to the few worth a person's eye, and a page that says why.

    emu curate --config configs/curation/folder.yaml --pool.path DIR

What has been scored is not scored again: after a kill the same command goes on, and with another threshold it
selects anew in seconds.
"""

from __future__ import annotations

import os
import platform
import shlex
import time
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from emu_lightning.curation import scoring
from emu_lightning.curation.engine import Daft, Engine
from emu_lightning.curation.filters import Filter, Filters, Where
from emu_lightning.curation.ingest import Pool, Shard, pool_file, write_pool
from emu_lightning.curation.pool_columns import PoolColumns
from emu_lightning.curation.report import curation_page
from emu_lightning.curation.scoring import Pass
from emu_lightning.curation.selection import (
    Balance,
    ScoredPool,
    ScoreTable,
    Selection,
    check_selection,
    read_decisions,
)
from emu_lightning.evaluation.report import write_report
from emu_lightning.files import write_whole
from emu_lightning.verbs.arguments import PARSER_SETTINGS, one_line, use_shipped_configs


def curate(
    pool: Pool,
    out: str,
    settings: Mapping[str, Any],
    command: str,
    passes: list[Pass] | None = None,
    columns: list[PoolColumns] | None = None,
    filters: dict[str, Filter | Where] | None = None,
    balance: Balance | None = None,
    decisions: list[str] | str | None = None,
    engine: Engine | None = None,
    rows_per_shard: PositiveInt = 1000,
) -> Selection:
    """Scores what is not scored yet, filters, balances, selects, and writes a report.

    Args:
        pool: where the pictures lie.
        out: folder of the run; scores in it are used again.
        settings: the resolved configuration, for `config.yaml` and the page.
        command: that was given, for the page.
        passes: scorers that share one reading of the pictures; late ones (`after`) come last.
        columns: what is computed of all rows together, such as popularity and near-duplicates.
        filters: name -> filter, applied in this order. Those over late scores come last.
        balance: how many of which concept, and which; all that pass where left out.
        decisions: Parquet files of what people decided: `uid`, and columns that filters can name.
        engine: what spreads the work; Daft on this machine where left out.
        rows_per_shard: of the pool's shards; 10,000 for millions of pictures.
    """
    run, begun = Path(out), time.monotonic()
    filters, balance = filters or {}, balance or Balance()
    shards = pool.shards(rows_per_shard)
    write_pool(run, shards)
    write_whole(run / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
    job = _Job(run, shards, engine or Daft(), passes or [], columns or [])
    decided = read_decisions([decisions] if isinstance(decisions, str) else decisions or [])
    _check_decisions(decided, shards)
    check_selection(filters, balance, ScoredPool(job.pool, job.promised() + decided).columns)
    scores = job.score(filters, decided)
    scored = time.monotonic()
    selection = ScoredPool(job.pool, scores).select(filters, balance, run)
    selected = time.monotonic()
    seconds = {"score": scored - begun, "select": selected - scored}
    page = curation_page(
        f"Curation: {run.name}",
        run / "manifest.parquet",
        job.pool,
        selection,
        filters,
        scores,
        settings,
        command=command,
        facts=_facts(seconds),
    )
    results = {
        "configuration_sha256": selection.configuration_sha256,
        "funnel": {step.name: {"in": step.num_in, "out": step.num_out} for step in selection.funnel},
        "concepts": {
            share.concept: {
                "readable": share.num_readable,
                "passing": share.num_passing,
                "selected": share.num_selected,
            }
            for share in selection.concepts
        },
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
    write_report(run, results, page)
    _print(selection, run)
    return selection


class _Job:
    """What is to be known of a pool, in the order in which it can be.

    Early passes score all that can be read; then comes what is computed of all rows together; then late
    passes, each of what passes the filters that can be applied by then.
    """

    def __init__(
        self,
        run: Path,
        shards: Sequence[Shard],
        engine: Engine,
        passes: Sequence[Pass],
        columns: Sequence[PoolColumns],
    ) -> None:
        self.run, self.shards, self.engine, self.columns = run, shards, engine, columns
        self.early = [one for one in passes if not one.after] or [Pass([])]  # all pictures are read once
        self.late = [one for one in passes if one.after]
        self.pool = [pool_file(run, shard.id) for shard in shards]

    def promised(self) -> list[ScoreTable]:
        """All columns to come, without their rows."""
        whole = [ScoreTable(one.name, _no_rows(one), one.columns, one.fingerprint()) for one in self.columns]
        return [self._read(), *self._tables(self.early), *whole, *self._tables(self.late)]

    def score(self, filters: Filters, decided: list[ScoreTable]) -> list[ScoreTable]:
        """Computes all that is not there, and says where it is."""
        known = [self._read(), *decided]
        for one in self.early:
            self._run(one, None)
            known += self._tables([one])
        for column in self.columns:
            pool = ScoredPool(self.pool, known)
            made = column.compute(pool.table(["uid", *(n for n in column.needs if n in pool.columns.names)]))
            known.append(ScoreTable(column.name, made, column.columns, column.fingerprint()))
        for one in self.late:
            self._run(one, ScoredPool(self.pool, known).passing(filters)["uid"].to_pylist())
            known += self._tables([one])
        return known

    def _read(self) -> ScoreTable:
        return self._table(scoring.READ, False)

    def _tables(self, passes: Sequence[Pass]) -> list[ScoreTable]:
        written = [(scoring.all_scores(one.scorers), one.after) for one in passes]
        return [
            self._table(scores, is_late)
            for each, is_late in written
            for own, derived in each.items()
            for scores in (own, *derived)
        ]

    def _table(self, scores: scoring.Scores, is_late: bool) -> ScoreTable:
        folder = scores.folder(self.run)
        return ScoreTable(scores.name, folder, scores.columns, scores.fingerprint, is_late, scores.weights)

    def _run(self, one: Pass, uids: list[str] | None) -> None:
        tasks = scoring.plan(self.run, self.shards, one.scorers, uids)
        names = ", ".join(["read", *(scorer.name for scorer in one.scorers)])
        num_bad = 0
        with tqdm(total=sum(task.num_rows for task in tasks), desc=names, unit="image") as bar:
            for report in scoring.score(self.run, tasks, one.scorers, self.engine, one.num_workers):
                num_bad += report.num_bad
                bar.set_postfix(bad=num_bad, refresh=False)
                bar.update(report.num_rows)


def _check_decisions(decided: Sequence[ScoreTable], shards: Sequence[Shard]) -> None:
    """Says how many decisions are about other pictures.

    Raises:
        ValueError: all of a file's are.
    """
    uids = pa.concat_arrays([shard.rows["uid"].combine_chunks() for shard in shards])
    for one in decided:
        assert isinstance(one.rows, pa.Table)  # as `read_decisions` gives it
        theirs = one.rows["uid"].cast(uids.type)
        num_others = len(theirs) - pc.sum(pc.is_in(theirs, value_set=uids), min_count=0).as_py()
        if len(theirs) and num_others == len(theirs):
            raise ValueError(f"{one.name} has no picture of the pool: {theirs[0]} is none, for one")
        if num_others:
            print(f"{one.name}: {num_others:,} of {len(theirs):,} are about pictures that the pool lacks")


def _no_rows(column: PoolColumns) -> pa.Table:
    return pa.schema({"uid": pa.string(), **column.columns}).empty_table()


def _facts(seconds: Mapping[str, float]) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ", ".join(f"{name} {version(name)}" for name in ("pillow", "pyarrow", "duckdb"))
    return {
        "machine": f"{platform.machine()}, {cores} cores, {platform.system()}",
        "date": date.today().isoformat(),
        "versions": f"python {platform.python_version()}, {packages}",
        **{f"seconds to {name}": f"{value:,.1f}" for name, value in seconds.items()},
    }


def _print(selection: Selection, run: Path) -> None:
    width = max(len(step.name) for step in selection.funnel)
    for step in selection.funnel:
        print(f"{step.name:<{width}}  {step.num_in:>11,} -> {step.num_out:>11,}")
    for share in selection.concepts:
        print(f"  {share.concept or '(none)'}: {share.num_selected:,} of {share.num_passing:,} that pass")
    print(f"{run}/manifest.parquet, {run}/selection.json, {run}/report.html")


def main(argv: list[str]) -> None:
    if find_spec("duckdb") is None:
        raise ValueError("curation needs further packages: pip install 'emu_lightning[curation]'")
    parser = ArgumentParser(prog="emu curate", **PARSER_SETTINGS)
    parser.add_argument("--config", action="config", help="Path to a configuration file.")
    given: set[str | int] = {"settings", "command"}
    keys = parser.add_function_arguments(curate, skip=given, fail_untyped=True)
    try:
        parsed = parser.parse_args(use_shipped_configs(argv))
    except ArgumentError as error:
        raise ValueError(one_line(str(error), argv, keys)) from error
    settings = yaml.safe_load(parser.dump(parsed, skip_unset=False))
    arguments = parser.instantiate(parsed)
    arguments.pop("config")
    curate(**arguments, settings=settings, command=shlex.join(["emu", "curate", *argv]))
