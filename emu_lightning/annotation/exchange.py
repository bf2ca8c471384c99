"""What comes into a batch and what leaves it: items, answers, the log; as files that other tools read.

A row of an exported table is one answer that counts, with the item it is about. The same columns are read
back; a row without an answer is an item that waits for one. Columns of other names stay with the item and are
not shown.
"""

from __future__ import annotations

import csv
import io
import json
import math
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from emu_lightning.annotation import derive
from emu_lightning.annotation.questions import Slot
from emu_lightning.annotation.store import Batch, CountedAnswer, GivenAnswer, NewItem, Store
from emu_lightning.evaluation.prompts import PromptSet, read_prompts
from emu_lightning.files import SUFFIXES, write_whole

Row = dict[str, Any]

OF_ITEMS: dict[str, type] = {
    "item": str,
    "group": str,
    "prompt": str,
    "caption": str,
    "author": str,  # who wrote the caption
    "path_a": str,
    "model_a": str,
    "path_b": str,
    "model_b": str,
    "gold": dict,
    "extra": dict,
}
OF_ANSWERS: dict[str, type] = {
    "kind": str,  # answer, or adjudicate for a lead's decision
    "person": str,
    "role": str,
    "answer": dict,
    "left_slot": str,
    "at": float,  # seconds since 1970
    "times": dict,
    "guideline_version": int,
}
ANSWERS = OF_ITEMS | OF_ANSWERS
EVENTS: dict[str, type] = {
    "id": int,
    "at": float,
    "kind": str,
    "person": str,
    "item": str,
    "assignment_id": int,
    "nonce": str,
    "body": dict,
}
ALIASES = {"uid": "item", "uri": "path_a", "path": "path_a", "image": "path_a", "concept": "group"}


# --- tables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A kind of file for rows of known columns; ``read(write(rows, columns), columns) == rows``.

    A missing value is None; a text is never empty.
    """

    suffix: str
    media_type: str
    write: Callable[[Sequence[Row], Mapping[str, type]], bytes]
    read: Callable[[bytes, Mapping[str, type]], list[Row]]


def _write_parquet(rows: Sequence[Row], columns: Mapping[str, type]) -> bytes:
    types = {str: pa.large_string(), dict: pa.large_string(), float: pa.float64(), int: pa.int64()}
    flat = [{name: _dumped(row[name]) for name in columns} for row in rows]
    table = pa.Table.from_pylist(flat, pa.schema({name: types[kind] for name, kind in columns.items()}))
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def _read_parquet(data: bytes, columns: Mapping[str, type]) -> list[Row]:
    try:
        rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"this is no Parquet file, or damaged: {error}") from None
    return _known(rows, columns)


def _write_csv(rows: Sequence[Row], columns: Mapping[str, type]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(_dumped(row[name])) for name in columns})
    return text.getvalue().encode()


def _read_csv(data: bytes, columns: Mapping[str, type]) -> list[Row]:
    csv.field_size_limit(2**24)
    reader = csv.DictReader(io.StringIO(_text(data), newline=""), strict=True)
    try:
        rows = [{name: _uncelled(cell) for name, cell in row.items() if name is not None} for row in reader]
    except csv.Error as error:
        raise ValueError(f"this is not comma-separated text: {error}") from None
    return _known(rows, columns)


def _write_jsonl(rows: Sequence[Row], columns: Mapping[str, type]) -> bytes:
    return "".join(
        json.dumps({name: row[name] for name in columns}, ensure_ascii=False) + "\n" for row in rows
    ).encode()


def _read_jsonl(data: bytes, columns: Mapping[str, type]) -> list[Row]:
    rows = []
    for number, line in enumerate(_text(data).split("\n"), start=1):
        if line.strip():
            row = _json(line, f"line {number}")
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object: write one row a line")
            rows.append(row)
    return _known(rows, columns)


# A spreadsheet takes a cell that begins so for a formula, and what people typed must not become one.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _uncelled(cell: str | None) -> str | None:
    return cell[1:] if cell and cell[0] == "'" and cell[1:].startswith(_FORMULA) else cell or None


def _dumped(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


def _known(rows: Iterable[Row], columns: Mapping[str, type]) -> list[Row]:
    """Rows with exactly these columns; values of others go into `extra` where there is one."""
    known = []
    for number, given in enumerate(rows, start=1):
        named = {ALIASES.get(name, name) if name not in columns else name: v for name, v in given.items()}
        row = {name: _value(named.get(name), kind, name, number) for name, kind in columns.items()}
        if "extra" in columns:
            others = {name: v for name, v in named.items() if name not in columns and v is not None}
            row["extra"] = (row["extra"] or {}) | others
        known.append(row)
    return known


def _value(value: Any, kind: type, name: str, number: int) -> Any:
    if value is None or value == "":
        return None
    try:
        if kind is dict and isinstance(value, str):
            value = _json(value, name)
        elif kind in (int, float) or (kind is str and isinstance(value, int | float)):
            value = kind(value)
        if isinstance(value, kind) and not (isinstance(value, float) and not math.isfinite(value)):
            return value
    except (ValueError, TypeError, OverflowError):
        pass
    wanted = {str: "a text", dict: "a JSON object", float: "a number", int: "a whole number"}[kind]
    raise ValueError(f"row {number}: {name} is {str(value)[:60]!r}, not {wanted}")


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"this is not UTF-8 text: {error}") from None


def _json(text: str, where: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


# --- Label Studio -------------------------------------------------------------------------------------------
#
# A task holds the item's columns as its data and an annotation for each answer; a field of the answer is a
# result of that name: Choices for what was chosen, Rating for marks, Taxonomy for tags, TextArea for what was
# written. What Label Studio has no place for lies under "emu", which it ignores.

_FILES = "/data/local-files/?d="  # how it names files of its machine; LOCAL_FILES_DOCUMENT_ROOT=/ there
_WRITTEN = ("text", "comment")


def _write_label_studio(rows: Sequence[Row], columns: Mapping[str, type]) -> bytes:
    tasks: dict[str, dict[str, Any]] = {}
    for row in rows:
        data = {name: row[name] for name in OF_ITEMS}
        for name in ("path_a", "path_b"):
            data[name] = data[name] and _FILES + quote(str(data[name]).lstrip("/"))
        task = tasks.setdefault(row["item"], {"data": data, "annotations": []})
        if row["answer"] is not None:
            about = {name: row[name] for name in OF_ANSWERS if name not in ("person", "answer")}
            results = [_result(name, value) for name, value in row["answer"].items()]
            annotation = {"completed_by": {"email": row["person"]}, "result": results, "emu": about}
            task["annotations"].append(annotation)
    return json.dumps(list(tasks.values()), ensure_ascii=False, indent=1).encode() + b"\n"


def _result(name: str, value: Any) -> dict[str, Any]:
    kind, content = _of_label_studio(name, value)
    return {
        "from_name": name,
        "to_name": "path_a",
        "type": "textarea" if kind == "text" else kind,
        "value": {kind: content},
    }


def _of_label_studio(name: str, value: Any) -> tuple[str, Any]:
    if isinstance(value, bool):
        return "choices", ["yes" if value else "no"]
    if isinstance(value, int):
        return "rating", value
    if isinstance(value, list):
        return "taxonomy", [[tag] for tag in value]
    return ("text", [value]) if name in _WRITTEN else ("choices", [value])


def _read_label_studio(data: bytes, columns: Mapping[str, type]) -> list[Row]:
    tasks = _json(_text(data), "the file")
    rows: list[Row] = []
    for number, task in enumerate(tasks if isinstance(tasks, list) else [tasks], start=1):
        try:
            item = dict(task["data"])
            given = [_annotated(one) for one in task.get("annotations") or () if not one.get("was_cancelled")]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"task {number} is not one of Label Studio: {error!r}") from None
        for name in ("path_a", "path_b", "image"):
            if str(item.get(name) or "").startswith(_FILES):
                item[name] = "/" + unquote(item[name].removeprefix(_FILES))
        rows += [item | one for one in given] or [item]
    return _known(rows, columns)


def _annotated(annotation: Mapping[str, Any]) -> Row:
    by = annotation.get("completed_by")
    person = by.get("email") or by["id"] if isinstance(by, dict) else by
    answer = {}
    for result in annotation["result"]:
        ((kind, content),) = result["value"].items()
        answer[result["from_name"]] = _FROM_LABEL_STUDIO[kind](content)
    at = annotation.get("created_at")
    about = {"kind": "answer", "at": at and datetime.fromisoformat(at).timestamp(), "left_slot": "A"}
    return about | dict(annotation.get("emu") or {}) | {"person": str(person), "answer": answer}


_FROM_LABEL_STUDIO: dict[str, Callable[[Any], Any]] = {
    "choices": lambda content: {"yes": True, "no": False}.get(content[0], content[0]),
    "rating": int,
    "taxonomy": lambda content: [path[-1] for path in content],
    "text": lambda content: "\n".join([content] if isinstance(content, str) else content),
    "selected": {"left": "A", "right": "B"}.__getitem__,  # its Pairwise; there the left one is A
}

TABLES: dict[str, Format] = {
    "parquet": Format(".parquet", "application/vnd.apache.parquet", _write_parquet, _read_parquet),
    "csv": Format(".csv", "text/csv; charset=utf-8", _write_csv, _read_csv),
    "jsonl": Format(".jsonl", "application/jsonl; charset=utf-8", _write_jsonl, _read_jsonl),
}
FORMATS: dict[str, Format] = TABLES | {
    "labelstudio": Format(".json", "application/json", _write_label_studio, _read_label_studio),
}


# --- what leaves --------------------------------------------------------------------------------------------


def answer_rows(store: Store, batch: Batch) -> list[Row]:
    """All that counts, a row an answer: by item, the people's in the order they were given, then the lead's.

    It names people and models: for leads alone.
    """
    names = {person.id: person.name for person in store.people()}
    given = [("answer", one) for one in store.answers(batch)]
    given += [("adjudicate", one) for one in store.adjudications(batch)]
    given.sort(key=lambda pair: pair[1].item.name)
    return [_answer_row(kind, one, names) for kind, one in given]


def _answer_row(kind: str, one: CountedAnswer, names: Mapping[int, str]) -> Row:
    item = one.item
    files = {
        f"{column}_{slot.lower()}": value
        for slot in ("A", "B")
        for column, value in (
            ("path", str(item.pictures[slot].path) if slot in item.pictures else None),
            ("model", item.models.get(slot)),
        )
    }
    return {
        "item": item.name,
        "group": item.group,
        "prompt": item.prompt,
        "caption": item.caption,
        "author": item.author and names[item.author],
        **files,
        "gold": item.gold,
        "extra": item.extra,
        "kind": kind,
        "person": one.person.name,
        "role": one.person.role,
        "answer": one.answer,
        "left_slot": one.left_slot,
        "at": one.at,
        "times": one.times,
        "guideline_version": one.guideline_version,
    }


def event_rows(store: Store, batch: Batch) -> list[Row]:
    """The log as it was written: answers, what was taken back, and leads' decisions."""
    return [{name: getattr(event, name) for name in EVENTS} for event in store.events(batch)]


def vote_lines(store: Store, batch: Batch) -> bytes:
    """The votes of two models' pictures, as `emu evaluate` and :func:`.votes.read_judgements` read them."""
    return "".join(
        json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in derive.judgements(store, batch)
    ).encode()


def decision_file(store: Store, batch: Batch) -> bytes:
    """What was decided about each picture, as `emu curate --decisions` reads it."""
    buffer = pa.BufferOutputStream()
    pq.write_table(derive.decisions(store, batch), buffer)
    content: bytes = buffer.getvalue().to_pybytes()
    return content


@dataclass(frozen=True)
class Export:
    """A file that is made of a batch; ValueError where the batch's question gives none."""

    suffix: str
    media_type: str
    make: Callable[[Store, Batch], bytes]


def _of_answers(each: Format) -> Export:
    return Export(
        each.suffix, each.media_type, lambda store, batch: each.write(answer_rows(store, batch), ANSWERS)
    )


def _of_log(each: Format) -> Export:
    return Export(
        f".log{each.suffix}",
        each.media_type,
        lambda store, batch: each.write(event_rows(store, batch), EVENTS),
    )


EXPORTS: dict[str, Export] = {
    **{name: _of_answers(each) for name, each in FORMATS.items()},
    "votes": Export(".votes.jsonl", TABLES["jsonl"].media_type, vote_lines),
    "decisions": Export(".decisions.parquet", TABLES["parquet"].media_type, decision_file),
    **{f"log-{name}": _of_log(each) for name, each in TABLES.items()},
}


# --- what comes in ------------------------------------------------------------------------------------------


def manifest_items(
    path: str | Path,
    unpacked: str | Path,
    keep: str | None = None,
    caption: str = "caption",
    concept: str = "concept",
) -> list[NewItem]:
    """The pictures of a manifest of `emu curate`, one an item, named by uid.

    Args:
        path: a Parquet file with `uid` and `uri`.
        unpacked: folder into which pictures that lie in tar shards are copied, since a browser needs files.
        keep: a column of true and false; only rows where it is true.
        caption, concept: columns, taken where they are there; the concept becomes the group.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: it is no manifest, lacks a column, or a picture lies on another machine.
    """
    path = Path(path)
    try:
        table = pq.read_table(path, partitioning=None)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is no Parquet file, or damaged: {error}") from None
    missing = [name for name in ("uid", "uri", keep) if name not in (None, *table.column_names)]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}; it has {', '.join(table.column_names)}")
    columns = [name for name in ("uid", "uri", keep, caption, concept) if name in table.column_names]
    rows = table.select(list(dict.fromkeys(columns))).to_pylist()
    kept = [row for row in rows if keep is None or row[keep]]
    files = _picture_files({row["uid"]: row["uri"] for row in kept}, path.parent, Path(unpacked))
    return [
        NewItem(
            row["uid"],
            {"A": (files[row["uid"]], None)},
            caption=row.get(caption),
            group=row.get(concept),
        )
        for row in kept
    ]


def _picture_files(uris: Mapping[str, str], folder: Path, unpacked: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    members: dict[Path, dict[str, str]] = defaultdict(dict)  # of each shard: member -> uid
    for uid, uri in uris.items():
        uri = uri.removeprefix("file://")
        if "://" in uri:
            raise ValueError(f"{uid} lies at {uri}, not on this machine: copy the pictures here first")
        shard, is_member, member = uri.rpartition(".tar#")
        if is_member:
            members[folder / f"{shard}.tar"][member] = uid
        else:
            files[uid] = folder / uri
    for path, wanted in members.items():
        with tarfile.open(path) as tar:
            for info in tar:
                if info.isfile() and info.name in wanted:
                    content = tar.extractfile(info)
                    assert content is not None  # it is a file
                    copy = unpacked / path.stem / quote(info.name, safe="")
                    files[wanted.pop(info.name)] = write_whole(copy, content.read())
        if wanted:
            raise ValueError(f"{path} has no picture {min(wanted)}")
    return files


def folder_items(folders: Mapping[Slot, str | Path], prompts_file: str | Path | None = None) -> list[NewItem]:
    """Pictures of one prompt each, from one folder or side by side from two.

    What is drawn is read from the `manifest.json` that `emu sample` and `emu evaluate` write, or from a file
    of prompts; the pictures are then named by the prompts' ids or by their rows, `00000.png` and so on.
    Without either, pictures of equal names belong together and there is no prompt.

    Raises:
        FileNotFoundError: a folder or a picture is missing.
        ValueError: the folders are not about the same prompts.
    """
    found = {slot: Path(folder) for slot, folder in folders.items()}
    manifests = {slot: _manifest(folder) for slot, folder in found.items()}
    told = [PromptSet.of(str(found[slot]), m["prompts"]) for slot, m in manifests.items() if m is not None]
    if prompts_file is not None:
        told.append(read_prompts(prompts_file))
    if told and any(one.prompts != told[0].prompts for one in told):
        raise ValueError(f"{told[0].name} and {told[-1].name} have different prompts: pair equal ones only")
    by_name = {slot: _pictures(folder) for slot, folder in found.items()}
    models = {slot: folder.name for slot, folder in found.items()}
    if len(set(models.values())) < len(models):
        models = {slot: str(folder) for slot, folder in found.items()}
    if not told:
        (first, names), *others = by_name.items()
        for slot, pictures in others:
            if names.keys() != pictures.keys():
                odd = min(names.keys() ^ pictures.keys())
                raise ValueError(f"{found[first]} and {found[slot]} differ: only one of them has {odd}")
        return [
            NewItem(name, {slot: (pictures[name], models[slot]) for slot, pictures in by_name.items()})
            for name in names
        ]
    prompts = told[-1]  # of the file, where there is one: it may have ids and categories
    files = {slot: _in_order(found[slot], pictures, prompts) for slot, pictures in by_name.items()}
    seeds = next((m["seeds"] for m in manifests.values() if m is not None and "seeds" in m), ())
    return [
        NewItem(
            name,
            {slot: (of_slot[row], models[slot]) for slot, of_slot in files.items()},
            prompt=prompt,
            group=prompts.categories[row] or None if prompts.categories else None,
            extra={
                key: values[row]
                for key, values in {"seed": seeds, "challenge": prompts.challenges}.items()
                if values
            },
        )
        for row, (name, prompt) in enumerate(zip(prompts.ids, prompts.prompts, strict=True))
    ]


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    manifest = _json(_text(path.read_bytes()), str(path))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("prompts"), list):
        raise ValueError(f"{path} names no prompts: is it of `emu sample`?")
    return manifest


def _pictures(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: name a folder of pictures")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    by_name = {file.stem: file for file in files}
    if len(by_name) < len(files):
        twice = next(file for file in files if by_name[file.stem] != file)
        raise ValueError(f"{folder} has two pictures named {twice.stem}: remove one of them")
    if not by_name:
        raise FileNotFoundError(f"{folder} holds no picture")
    return by_name


def _in_order(folder: Path, pictures: Mapping[str, Path], prompts: PromptSet) -> list[Path]:
    for names in (prompts.ids, [f"{row:05d}" for row in range(len(prompts))]):
        if pictures.keys() >= set(names):
            return [pictures[name] for name in names]
    missing = [name for name in prompts.ids if name not in pictures]
    raise FileNotFoundError(
        f"{folder} lacks {len(missing)} of {len(prompts)} pictures, such as {missing[0]}.png: "
        "name them by their prompts' ids, or by their rows, from 00000 on"
    )


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a file of items or answers, by its ending: .parquet, .csv, .jsonl, or .json for Label Studio.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the ending is another, or a row is wrong; the message names the file.
    """
    path = Path(path)
    for each in FORMATS.values():
        if path.suffix.lower() == each.suffix:
            try:
                return each.read(path.read_bytes(), ANSWERS)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    raise ValueError(
        f"{path}: its ending says nothing: give one of .parquet, .csv, .jsonl, .json (Label Studio)"
    )


def caption_items(store: Store, batch: Batch) -> list[NewItem]:
    """The captions written in a batch, as items for a verification, which is never asked of their writers.

    Raises:
        ValueError: the batch holds no captions.
    """
    written = {one.item.id: one for one in store.answers(batch) if "text" in one.answer and not one.is_gold}
    if not written:
        raise ValueError(f"{batch.title} holds no captions")
    return [
        NewItem(
            one.item.name,
            {slot: (picture.path, one.item.models.get(slot)) for slot, picture in one.item.pictures.items()},
            caption=one.answer["text"],
            group=one.item.group,
            author=one.person.id,
            extra=one.item.extra,
        )
        for one in written.values()
    ]


def row_items(rows: Sequence[Row], roots: Sequence[Path]) -> list[NewItem]:
    """The items that rows are about, each once.

    Args:
        rows: as a :class:`Format` reads them, with :data:`ANSWERS` as columns.
        roots: pictures may lie in these folders only; relative paths start from the first.

    Raises:
        ValueError: a row names no picture, or one that lies elsewhere.
    """
    new: dict[str, NewItem] = {}
    for number, row in enumerate(rows, start=1):
        if _name(row) is None:
            raise ValueError(f"row {number} names no picture: give it a path")
        if (name := str(_name(row))) not in new:
            new[name] = NewItem(
                name,
                _paths(row, number, roots),
                prompt=row["prompt"],
                caption=row["caption"],
                group=row["group"],
                gold=row["gold"],
                author=row["author"],
                extra=row["extra"] or {},
            )
    return list(new.values())


def import_rows(store: Store, batch: Batch, rows: Sequence[Row], roots: Sequence[Path]) -> tuple[int, int]:
    """Adds what the batch does not have: items by their names, answers by item and person.

    All of it or, after an error or a kill, nothing.

    Answers were given elsewhere: to another store, or in Label Studio. Their people are known by name; one
    who is new here is added without a way to sign in.

    Args:
        rows, roots: as for :func:`row_items`.

    Returns:
        How many items, and how many answers, were added.

    Raises:
        ValueError: a row is not an item of this question, an answer is none, or a picture lies elsewhere.
        OSError: a picture cannot be read.
    """
    answered = [(number, row) for number, row in enumerate(rows, start=1) if row["answer"] is not None]
    for number, row in answered:
        if row["person"] is None:
            raise ValueError(f"row {number} has an answer of nobody: give the person")
    new = row_items(rows, roots)
    files = store.new_pictures(batch, new)
    with store.at_once():
        num_items = store.add_items(batch, new, files)
        items, person_id = {item.name: item for item in store.items(batch)}, _people(store)
        given = [
            GivenAnswer(
                items[str(_name(row))],
                person_id(row["person"], row["role"] or batch.asks.roles[0]),
                row["answer"],
                kind=row["kind"] or "answer",
                left_slot=row["left_slot"] or "A",
                at=row["at"],
                times=row["times"] or {},
                guideline_version=row["guideline_version"],
            )
            for _, row in answered
        ]
        num_answers = store.import_answers(batch, given)
    return num_items, num_answers


def _name(row: Row) -> str | None:
    """A picture without a name of its own is named as its file is."""
    return row["item"] or (row["path_a"] and Path(row["path_a"]).stem)


def _people(store: Store) -> Callable[[str, Any], int]:
    """Names and, for those who are new, roles to ids."""
    ids = {person.name: person.id for person in store.people()}

    def person_id(name: str, role: Any) -> int:
        if name not in ids:
            ids[name] = store.add_person(name, role).id
        return ids[name]

    return person_id


def _paths(row: Row, number: int, roots: Sequence[Path]) -> dict[Slot, tuple[Path, str | None]]:
    paths: dict[Slot, tuple[Path, str | None]] = {}
    slots: tuple[Slot, ...] = ("A", "B")
    for slot in slots:
        if named := row[f"path_{slot.lower()}"]:
            path = (roots[0] / named).resolve()
            if not any(path.is_relative_to(root.resolve()) for root in roots):
                raise ValueError(f"row {number}: {named} lies outside of the folders that may be read here")
            paths[slot] = (path, row[f"model_{slot.lower()}"])
    return paths
