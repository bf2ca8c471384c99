"""Every picture is read once for all scorers of a pass, and what is known of it is never computed again.

    runs/curation/NAME/pool/00000042.parquet                       rows as ingested
    runs/curation/NAME/scores/blur-0123456789ab/00000042.parquet   uid, file_version, the scorer's columns
    runs/curation/NAME/scores/read-0123456789ab/00000042.parquet   the same of `decode.FACTS`, for every row

A file of scores is its own mark of being done: it is written whole, and carries the fingerprint and the
content that it was made of. It may hold some rows only; the others are not scored yet, or are no pictures.
Rows keep their scores while their `file_version` stays, in whichever shard they come to lie.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emu_lightning.curation.decode import FACTS, VERSION, Facts, decode, failed
from emu_lightning.curation.engine import Engine, Mark, Report, Task
from emu_lightning.curation.ingest import Shard, read_shard, write_parquet
from emu_lightning.curation.scorer import Columns, Derived, Picture, Scorer

MAX_PIXELS = 100_000_000  # of the pictures held at once by a process, so 300 MB
SAVE_SECONDS = 60.0  # between two writings of a shard that takes long: what a kill may cost
OF_PIXELS = f" of pixels {VERSION}"  # end of the fingerprints of scores
KEYS = {"uid": pa.string(), "file_version": pa.string()}


@dataclass(frozen=True)
class Pass:
    """Scorers that share one reading of the pictures.

    Attributes:
        scorers: any number, of different names.
        num_workers: processes, where fewer should hold these scorers than the engine has.
        after: score only what passes all filters over columns that are there before this pass.
    """

    scorers: Sequence[Scorer]
    num_workers: int | None = None
    after: bool = False


@dataclass(frozen=True)
class Scores:
    """What a scorer writes, or is derived of it, or the reading itself; and where.

    Attributes:
        name: of the scorer.
        fingerprint: of all that its scores depend on.
        columns: name and type of what it writes.
        weights: name -> sha256 of the files of weights behind it.
    """

    name: str
    fingerprint: str
    columns: Mapping[str, pa.DataType] = field(compare=False)
    weights: Mapping[str, str] = field(compare=False, default_factory=dict)

    @classmethod
    def of(cls, scorer: Scorer) -> Scores:
        fingerprint = scorer.fingerprint() + OF_PIXELS
        return cls(scorer.name, fingerprint, dict(scorer.columns), scorer.weights_sha256())

    def derived(self, one: Derived) -> Scores:
        """What is derived of these."""
        fingerprint = f"{one.fingerprint()} of {self.fingerprint}"
        return Scores(f"{self.name}-{one.name}", fingerprint, dict(one.columns), one.weights_sha256())

    def folder(self, run: Path) -> Path:
        """Of the scores of all shards."""
        return run / "scores" / f"{self.name}-{hashlib.sha256(self.fingerprint.encode()).hexdigest()[:12]}"

    def file(self, run: Path, shard: str) -> Path:
        """Of one shard's scores."""
        return self.folder(run) / f"{shard}.parquet"

    def files(self, run: Path) -> list[Path]:
        """Of all shards; a shard without a file has no scores yet."""
        return sorted(self.folder(run).glob("*.parquet"))


READ = Scores("read", f"read {VERSION}", FACTS)


def all_scores(scorers: Iterable[Scorer]) -> dict[Scores, dict[Scores, Derived]]:
    """What each scorer writes, and what is derived of it."""
    own = {Scores.of(scorer): scorer for scorer in scorers}
    return {scores: {scores.derived(one): one for one in scorer.derived} for scores, scorer in own.items()}


def plan(
    run: Path, shards: Iterable[Shard], scorers: Sequence[Scorer], uids: Collection[str] | None = None
) -> list[Task]:
    """What is still to be read or scored; the pool has been written.

    Args:
        run: the run's folder.
        shards: of the pool.
        scorers: of a pass.
        uids: the only ones to score; None is all.

    Returns:
        A task for each shard with such rows. Their `num_rows` add up to the pictures at hand.

    Raises:
        ValueError: two scorers have one name, or a column in common.
    """
    _check_scorers(scorers)
    shards, written = list(shards), all_scores(scorers)
    outputs = [READ, *written, *(scores for derived in written.values() for scores in derived)]
    for scores in outputs:
        _keep(run, shards, scores)
    wanted = None if uids is None else set(uids)
    tasks = []
    for shard in shards:
        if wanted is None and all(_is_complete(scores.file(run, shard.id)) for scores in outputs):
            continue
        rows = None
        if wanted is not None:
            rows = tuple(n for n, uid in enumerate(shard.rows["uid"].to_pylist()) if uid in wanted)
        state = _State.of(run, shard, outputs)
        todo = state.to_read(rows).union(*(state.to_score(scores, rows) for scores in outputs[1:]))
        if todo or rows is None:  # a shard without a picture is marked as done, too
            tasks.append(Task(shard.id, len(todo), rows))
    return tasks


def score(
    run: Path,
    tasks: Sequence[Task],
    scorers: Sequence[Scorer],
    engine: Engine,
    num_workers: int | None = None,
) -> Iterator[Report]:
    """Reads and scores what is to be; what a report was given for is on disk.

    Args:
        run: the run's folder.
        tasks: of :func:`plan`, for the same scorers.
        scorers: of a pass.
        engine: spreads the tasks.
        num_workers: processes; the engine's own number when None.

    Raises:
        Exception: what a scorer raised, such as a FileNotFoundError of its weights.
    """
    yield from engine.map(ScoreShard(run, scorers), tasks, num_workers)


def _check_scorers(scorers: Sequence[Scorer]) -> None:
    _refuse_twice("name", [READ.name, *(scorer.name for scorer in scorers)])
    own = [scorer.columns for scorer in scorers]
    derived = [one.columns for scorer in scorers for one in scorer.derived]
    _refuse_twice("column", [name for columns in (KEYS, FACTS, *own, *derived) for name in columns])


def _refuse_twice(kind: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two scorers have the {kind} {name}: leave one out, or name it otherwise")


class ScoreShard:
    """The work of a pass on one shard.

    Args:
        run: the run's folder.
        scorers: of the pass; started in the process that works.
    """

    def __init__(self, run: Path, scorers: Sequence[Scorer]) -> None:
        self.run, self.scorers = run, list(scorers)
        self.outputs = all_scores(self.scorers)  # here, once: weights are hashed for it
        self.size = max([scorer.batch_size for scorer in self.scorers], default=1)
        self._is_started = False

    def __call__(self, task: Task, mark: Mark) -> Report:
        since = saved = time.monotonic()
        if not self._is_started:
            for scorer in self.scorers:
                scorer.start()
            self._is_started = True
        shard = read_shard(self.run, task.shard)
        derived = [scores for each in self.outputs.values() for scores in each]
        state = _State.of(self.run, shard, [READ, *self.outputs, *derived])
        to_read = state.to_read(task.rows)
        todo = {scores: state.to_score(scores, task.rows) for scores in self.outputs}
        for number, why in task.refused.items():
            state.learn(number, failed("damaged", why))
        seen = shard.rows.select(["uid", "uri", "caption"]).to_pylist()
        place = shard.rows.select(["uri", "file_offset", "file_size"]).to_pylist()
        reader, held = Reader(), dict[int, Picture]()

        def score_held() -> None:
            for scorer, scores in zip(self.scorers, self.outputs, strict=True):
                of_it = [number for number in held if number in todo[scores]]
                for first in range(0, len(of_it), scorer.batch_size):
                    numbers = of_it[first : first + scorer.batch_size]
                    mark(numbers[0], numbers[-1])
                    state.add(scores, numbers, scorer.score([held[number] for number in numbers]))
            held.clear()

        for number in sorted(to_read.union(*todo.values()) - task.refused.keys()):
            is_alone = number in task.suspects
            num_pixels = sum(picture.image.width * picture.image.height for picture in held.values())
            if is_alone or len(held) == self.size or num_pixels > MAX_PIXELS:
                score_held()
            if time.monotonic() - saved > SAVE_SECONDS:
                state.write(self.run)
                saved = time.monotonic()
            mark(next(iter(held), number), number)
            content, facts = reader.read(**place[number])
            image = None
            if content is not None:
                image, facts = decode(content)
            if number in to_read or image is None:
                state.learn(number, facts)
            if image is not None and content is not None:
                held[number] = Picture(content, image, seen[number])
            if is_alone:
                score_held()
        score_held()
        for own, of_it in self.outputs.items():
            for scores, one in of_it.items():
                numbers, table = state.stored(own, state.to_score(scores, task.rows))
                if numbers:
                    state.add(scores, numbers, one.derive(table))
        state.write(self.run)
        num_bad = sum(state.facts[number]["error"] is not None for number in to_read)
        return Report(task.shard, task.num_rows, num_bad, time.monotonic() - since)


class _State:
    """What is known of a shard's rows, by their numbers.

    Args:
        shard: the rows.
        stored: for each scorer the rows that have scores, and these in the same order.
    """

    def __init__(self, shard: Shard, stored: Mapping[Scores, tuple[list[int], pa.Table]]) -> None:
        self.shard, self._stored = shard, dict(stored)
        self._made = {scores: _Made(scores) for scores in stored}
        numbers, table = stored[READ]
        self.facts: dict[int, Facts] = dict(zip(numbers, table.to_pylist(), strict=True))
        self._is_changed = False

    @classmethod
    def of(cls, run: Path, shard: Shard, outputs: Sequence[Scores]) -> _State:
        """As it is on disk."""
        place = {key: number for number, key in enumerate(_keys(shard.rows))}
        stored = {}
        for scores in outputs:
            table = _read_scores(scores.file(run, shard.id), scores)
            found = [(place[key], row) for row, key in enumerate(_keys(table)) if key in place]
            kept = table.select(list(scores.columns)).take(pa.array([row for _, row in found], pa.int64()))
            stored[scores] = ([number for number, _ in found], kept)
        return cls(shard, stored)

    def _all(self, rows: Collection[int] | None) -> set[int]:
        return set(range(len(self.shard.rows)) if rows is None else rows)

    def to_read(self, rows: Collection[int] | None) -> set[int]:
        """Those of `rows` without facts, and missing ones, which may have come by now."""
        return {n for n in self._all(rows) if n not in self.facts or self.facts[n]["error"] == "missing"}

    def to_score(self, scores: Scores, rows: Collection[int] | None) -> set[int]:
        """Those of `rows` that are pictures, as far as is known, and have no scores."""
        no_pictures = {n for n, facts in self.facts.items() if facts["error"] not in (None, "missing")}
        return self._all(rows) - no_pictures - set(self._stored[scores][0])

    def learn(self, number: int, facts: Facts) -> None:
        """Facts about a row, in place of those that there were."""
        self.facts[number], self._is_changed = facts, True

    def add(self, scores: Scores, numbers: Sequence[int], columns: Columns) -> None:
        """Scores of some rows that had none."""
        self._made[scores].add(numbers, columns)

    def stored(self, scores: Scores, rows: Collection[int]) -> tuple[list[int], pa.Table]:
        """Those of `rows` that have scores, and these."""
        numbers, table = self._merged(scores)
        places = [place for place, number in enumerate(numbers) if number in rows]
        return [numbers[place] for place in places], table.take(pa.array(places, pa.int64()))

    def write(self, run: Path) -> None:
        """Writes what has changed, each file whole."""
        is_read = not self.to_read(None)
        if self._is_changed or _is_complete(READ.file(run, self.shard.id)) != is_read:
            numbers = list(self.facts)
            columns = {name: [self.facts[n][name] for n in numbers] for name in FACTS}
            self._write(run, READ, numbers, _table(FACTS, columns), is_read)
            self._is_changed = False
        pictures = {n for n, facts in self.facts.items() if facts["error"] is None}
        for scores, made in self._made.items():
            if scores == READ:
                continue
            numbers, table = self._merged(scores)
            is_complete = is_read and pictures.issubset(numbers)
            if made.numbers or _is_complete(scores.file(run, self.shard.id)) != is_complete:
                self._write(run, scores, numbers, table, is_complete)
                self._stored[scores], self._made[scores] = (numbers, table), _Made(scores)

    def _merged(self, scores: Scores) -> tuple[list[int], pa.Table]:
        """Rows and their scores, those of the files and those made since."""
        (numbers, table), made = self._stored[scores], self._made[scores]
        if not made.numbers:
            return numbers, table
        return numbers + made.numbers, pa.concat_tables([table, made.table()])

    def _write(
        self, run: Path, scores: Scores, numbers: Sequence[int], table: pa.Table, is_complete: bool
    ) -> None:
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        keys = self.shard.rows.select(list(KEYS)).take(pa.array(sorted(numbers), pa.int64()))
        table = table.take(pa.array(order, pa.int64()))
        columns = dict(zip([*KEYS, *scores.columns], [*keys.columns, *table.columns], strict=True))
        _write_scores(run, self.shard, scores, pa.table(columns), is_complete)


def _keys(table: pa.Table) -> list[tuple[str, str]]:
    """What scores belong to: a row of this name with this picture and caption."""
    return list(zip(*(table[name].to_pylist() for name in KEYS), strict=True))


class _Made:
    """Scores as they come, of any rows in any order."""

    def __init__(self, scores: Scores) -> None:
        self.scores, self.numbers = scores, list[int]()
        self._values: dict[str, list[Any]] = {name: [] for name in scores.columns}

    def add(self, numbers: Sequence[int], columns: Columns) -> None:
        """Scores of some rows.

        Raises:
            ValueError: they are not what the scorer says that it writes.
        """
        lengths = {name: len(values) for name, values in columns.items()}
        if lengths != dict.fromkeys(self._values, len(numbers)):
            raise ValueError(
                f"scorer {self.scores.name} gave {lengths} values for {len(numbers)} pictures, "
                f"where one each of {', '.join(self._values)} was expected"
            )
        self.numbers += numbers
        for name, values in columns.items():
            self._values[name] += list(values)

    def table(self) -> pa.Table:
        return _table(self.scores.columns, self._values)


def _table(types: Mapping[str, pa.DataType], columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    return pa.table({name: pa.array(columns[name], type_) for name, type_ in types.items()})


# --- files of scores ----------------------------------------------------------------------------------------


def _metadata(path: Path) -> Mapping[bytes, bytes]:
    """Empty where there is no file, or a damaged one."""
    try:
        return pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return {}


def _is_complete(path: Path) -> bool:
    """Whether it has scores of all pictures of its shard."""
    return _metadata(path).get(b"complete") == b"true"


def _read_scores(path: Path, scores: Scores) -> pa.Table:
    """Without rows where there is no file, or a damaged one."""
    columns = KEYS | dict(scores.columns)
    try:
        return pq.read_table(path, columns=list(columns), partitioning=None).cast(pa.schema(columns))
    except (OSError, ValueError, pa.ArrowException):
        return pa.schema(columns).empty_table()


def _write_scores(run: Path, shard: Shard, scores: Scores, table: pa.Table, is_complete: bool) -> None:
    metadata = {
        "fingerprint": scores.fingerprint,
        "content": shard.content,
        "complete": "true" if is_complete else "false",
    }
    write_parquet(table.replace_schema_metadata(metadata), scores.file(run, shard.id))


def _keep(run: Path, shards: Sequence[Shard], scores: Scores) -> None:
    """Lets scores follow their rows into other shards, where the pool has changed; those of others go."""
    folder = scores.folder(run)
    for path in folder.glob("*.partial"):  # of a process that was killed
        path.unlink()
    contents = {shard.id: shard.content.encode() for shard in shards}
    stale = {
        path
        for path in sorted(folder.glob("*.parquet"))
        if _metadata(path).get(b"content") != contents.get(path.stem)
    }
    if not stale:
        return
    table = pa.concat_tables([_read_scores(path, scores) for path in sorted(stale)])
    place = {key: row for row, key in enumerate(_keys(table))}
    for shard in shards:
        path = scores.file(run, shard.id)
        if path.exists() and path not in stale:
            continue
        rows = [place[key] for key in _keys(shard.rows) if key in place]
        if rows:
            _write_scores(run, shard, scores, table.take(pa.array(rows)), is_complete=False)
            stale.discard(path)
    for path in stale:
        path.unlink()


# --- reading ------------------------------------------------------------------------------------------------


class Reader:
    """Reads pictures where they lie; the tar read last stays open, since neighbours lie in one."""

    def __init__(self) -> None:
        self._name = ""
        self._file: Any = None

    def read(self, uri: str, file_offset: int | None, file_size: int | None) -> tuple[bytes | None, Facts]:
        """The bytes of a picture, or the facts about why there are none.

        Args:
            uri: absolute path, URL, or `shard.tar#member`.
            file_offset: of a member; None where the file is the picture.
            file_size: of a member.
        """
        try:
            if file_offset is None:
                return _read_loose(uri), {}
            content = self._read_part(uri.rpartition(".tar#")[0] + ".tar", file_offset, file_size or 0)
        except Exception as error:  # stores raise what they like
            return None, failed("missing", f"{type(error).__name__}: {error}")
        if len(content) != file_size:
            return None, failed("missing", f"{self._name} has become shorter")
        return content, {}

    def _read_part(self, tar: str, offset: int, size: int) -> bytes:
        if tar != self._name:
            if self._file is not None:
                self._file.close()
            self._file, self._name = _open(tar), tar
        self._file.seek(offset)
        content: bytes = self._file.read(size)
        return content


def _open(name: str) -> Any:
    if "://" not in name:
        return open(name, "rb")
    import fsspec

    store, path = fsspec.core.url_to_fs(name)
    return store.open(path, "rb")  # reads ahead


def _read_loose(name: str) -> bytes:
    if "://" not in name:
        if not os.path.isfile(name) and os.stat(name):  # which says that it is missing, where it is
            raise OSError("no regular file")  # a folder, or a device without end
        with open(name, "rb") as file:
            return file.read()
    import fsspec

    store, path = fsspec.core.url_to_fs(name)
    content: bytes = store.cat_file(path)
    return content
