"""Prompt sets: what is drawn for an evaluation, with a hash that says exactly which prompts those were."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# PartiPrompts (Apache-2.0) as published, 1632 rows. Not part of this project: point to your copy.
PARTI_SHA256 = "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb"
_PARTI_COLUMNS = ("Prompt", "Category", "Challenge")

# Our stand-in for the paper's stylized subset (sketches, cartoons), whose choice it does not tell.
STYLIZED_CATEGORIES = frozenset(
    {"Illustrations", "Arts"}  # of PartiPrompts
    | {"anime", "concept-art", "paintings"}  # styles of HPSv2
)
STYLIZED_CHALLENGES = frozenset({"Style & Format"})


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order.

    Attributes:
        name: what reports call it.
        prompts: the texts.
        categories: one per prompt, or empty where the set has none.
        challenges: one per prompt, or empty; PartiPrompts' second grouping.
        sha256: of the file, or of the prompts where they come from no file.
        ids: one per prompt, no two alike; the row's number, as in ``00007``, where the file gives none.
    """

    name: str
    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    challenges: tuple[str, ...]
    sha256: str
    ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"prompt set {self.name!r} is empty: give at least one prompt")
        if not self.ids:
            object.__setattr__(self, "ids", tuple(f"{row:05d}" for row in range(len(self.prompts))))
        for field in (self.categories, self.challenges, self.ids):
            if field and len(field) != len(self.prompts):
                raise ValueError(
                    f"prompt set {self.name!r} has {len(self.prompts)} prompts but {len(field)} "
                    "categories, challenges or ids: give one for each prompt, or none"
                )
        if len(set(self.ids)) < len(self.ids):
            twice = next(one for row, one in enumerate(self.ids) if one in self.ids[:row])
            raise ValueError(f"prompt set {self.name!r} has the id {twice!r} twice: ids tell prompts apart")

    @classmethod
    def of(cls, name: str, prompts: Sequence[str], categories: Sequence[str] = ()) -> PromptSet:
        """A set made in memory, hashed over its prompts, one a line."""
        return cls(name, tuple(prompts), tuple(categories), (), _sha256("\n".join(prompts).encode()))

    @property
    def is_stylized(self) -> tuple[bool, ...]:
        """Which prompts belong to our stand-in for the paper's stylized subset; empty without a grouping.

        Category Illustrations or Arts, challenge Style & Format, any style of HPSv2 but photo.
        """
        if not (self.categories or self.challenges):
            return ()
        none = ("",) * len(self)
        return tuple(
            category in STYLIZED_CATEGORIES or challenge in STYLIZED_CHALLENGES
            for category, challenge in zip(self.categories or none, self.challenges or none, strict=True)
        )

    def stylized(self) -> PromptSet:
        """The prompts that :attr:`is_stylized` marks: 328 of PartiPrompts' 1632."""
        rows = [row for row, stylized in enumerate(self.is_stylized) if stylized]
        return self.select(rows, f"{self.name}, stylized (our choice)")

    def select(self, rows: Sequence[int], name: str) -> PromptSet:
        """The prompts in these rows, with the ids they have here."""
        prompts, categories, challenges, ids = (
            tuple(field[row] for row in rows) if field else ()
            for field in (self.prompts, self.categories, self.challenges, self.ids)
        )
        return PromptSet(name, prompts, categories, challenges, _sha256("\n".join(prompts).encode()), ids)

    def __len__(self) -> int:
        return len(self.prompts)


def read_prompts(path: str | Path) -> PromptSet:
    """Reads any prompt set; how is decided by the ending of the name alone, and what does not fit is refused.

    - ``.tsv``: PartiPrompts' columns, see :func:`read_parti`;
    - ``.csv``: a column Prompts or Prompt, and Category or Challenge where there is one: DrawBench's form;
    - ``.json``: a list of texts, or lists by category; a folder of such files: HPSv2's form, see
      :func:`read_styles`;
    - ``.jsonl``: one object a line with ``prompt``, and ``id``, ``category``, ``challenge`` where known;
    - a folder with ``prompts.jsonl``: what :mod:`.prompt_builder` wrote, named as its manifest says;
    - ``.txt``, or no ending: one prompt a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the ending is another, or the content is not what the ending says.
    """
    path = Path(path)
    if (path / "prompts.jsonl").is_file():
        built = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        return replace(read_jsonl(path / "prompts.jsonl"), name=built["name"])
    if path.is_dir():
        return read_styles(path)
    if path.suffix.lower() not in _READERS:
        raise ValueError(
            f"{path} is no prompt set by its ending {path.suffix!r}: give one of .txt (a prompt a line), "
            ".tsv (PartiPrompts), .csv (DrawBench), .json or a folder of them (HPSv2), .jsonl"
        )
    return _READERS[path.suffix.lower()](path)


def read_parti(path: str | Path) -> PromptSet:
    """Reads ``PartiPrompts.tsv`` (columns Prompt, Category, Challenge, Note).

    A file other than the published one is read with a warning: its results are not PartiPrompts results.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing or a row has no prompt.
    """
    data = Path(path).read_bytes()
    # QUOTE_NONE: some prompts hold single quotation marks, which would swallow the rows that follow.
    text = io.StringIO(_text(data, path), newline="")
    rows = list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    missing = [column for column in _PARTI_COLUMNS if not rows or column not in rows[0]]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}: give the tab-separated file PartiPrompts.tsv")
    prompts, categories, challenges = (_column(rows, column) for column in _PARTI_COLUMNS)
    _check_no_blanks(prompts, path)
    sha256 = _sha256(data)
    if sha256 != PARTI_SHA256:
        warnings.warn(
            f"{path} is not PartiPrompts as published (sha256 {sha256[:12]}, expected "
            f"{PARTI_SHA256[:12]}; {len(prompts)} rows, expected 1632)",
            stacklevel=2,
        )
    return PromptSet("PartiPrompts", prompts, categories, challenges, sha256)


def read_csv(path: str | Path) -> PromptSet:
    """Reads a comma-separated file in the form of DrawBench: columns ``Prompts`` and ``Category``.

    ``Prompt`` is as good as ``Prompts``, any case; ``Category``, ``Challenge`` and ``id`` may be missing,
    other columns are left aside.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no column of prompts, or two; a row has no prompt, or more cells than the head.
    """
    data = Path(path).read_bytes()
    reader = csv.DictReader(io.StringIO(_text(data, path), newline=""), strict=True)
    try:
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} is not comma-separated text: {error}") from None
    wide = [number for number, row in enumerate(rows, start=1) if None in row]
    if wide:
        raise ValueError(f"{path} has more cells in row {wide[0]} than in its head: quote texts with commas")
    column = [name for name in names if name in ("prompt", "prompts")]
    if len(column) != 1:
        raise ValueError(f"{path} has {len(column)} columns named Prompt or Prompts: its head needs one")
    prompts = _column(rows, column[0])
    _check_no_blanks(prompts, path)
    categories, challenges, ids = (
        _column(rows, name) if name in names else () for name in ("category", "challenge", "id")
    )
    return PromptSet(Path(path).stem, prompts, categories, challenges, _sha256(data), ids)


def read_styles(path: str | Path) -> PromptSet:
    """Reads lists of prompts by style, in the forms in which HPSv2's benchmark lies about.

    Args:
        path: a JSON file with a list of texts, or with an object of such lists by style; or a folder of
            ``anime.json``, ``photo.json`` and so on, each a list, read in the order of their names. The style
            becomes the category.

    Raises:
        FileNotFoundError: there is no such file, or no JSON file in the folder.
        ValueError: a file holds something else.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise FileNotFoundError(f"{path} has no *.json: it needs one list of prompts for each style")
        data = [file.read_bytes() for file in files]
        lists: Mapping[str, Any] = {
            file.stem: _json(each, file) for file, each in zip(files, data, strict=True)
        }
        sha256 = _sha256("".join(_sha256(each) for each in data).encode())
    else:
        whole = path.read_bytes()
        content = _json(whole, path)
        lists = content if isinstance(content, Mapping) else {"": content}
        sha256 = _sha256(whole)
    for style, prompts in lists.items():
        if not isinstance(prompts, list) or not all(isinstance(one, str) and one.strip() for one in prompts):
            where = f"{style!r} of {path}" if style else str(path)
            raise ValueError(f"{where} is not a list of prompts: give a list of texts, or lists by style")
    rows = [(prompt.strip(), style) for style, prompts in lists.items() for prompt in prompts]
    categories = tuple(style for _, style in rows) if any(lists) else ()
    return PromptSet(path.stem, tuple(prompt for prompt, _ in rows), categories, (), sha256)


def read_jsonl(path: str | Path) -> PromptSet:
    """Reads one JSON object a line: ``prompt``, and ``id``, ``category``, ``challenge`` in all or in none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is none, has no prompt, or lacks what others have.
    """
    data = Path(path).read_bytes()
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(_text(data, path).split("\n"), start=1):
        if not line.strip():
            continue
        row = _json(line, f"{path}:{number}")
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(f'{path}:{number} has no text under "prompt": mend or remove the line')
        rows.append(row)
    fields = []
    for name in ("category", "challenge", "id"):
        values = tuple(str(row[name]) for row in rows if row.get(name) is not None)
        if len(values) not in (0, len(rows)):
            raise ValueError(f"{path} has {name!r} in {len(values)} of {len(rows)} lines: give all or none")
        fields.append(values)
    categories, challenges, ids = fields
    prompts = tuple(row["prompt"].strip() for row in rows)
    return PromptSet(Path(path).stem, prompts, categories, challenges, _sha256(data), ids)


def read_lines(path: str | Path) -> PromptSet:
    """Reads a UTF-8 text file with one prompt a line; blank lines are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no prompt, or PartiPrompts' columns.
    """
    data = Path(path).read_bytes()
    prompts = tuple(line.strip() for line in _text(data, path).split("\n") if line.strip())
    if prompts and prompts[0].startswith("\t".join(_PARTI_COLUMNS)):
        raise ValueError(f"{path} is a table of prompts: name it .tsv, or columns would become prompts")
    return PromptSet(Path(path).stem, prompts, (), (), _sha256(data))


_READERS: dict[str, Callable[[Path], PromptSet]] = {
    ".tsv": read_parti,
    ".csv": read_csv,
    ".json": read_styles,
    ".jsonl": read_jsonl,
    ".txt": read_lines,
    "": read_lines,
}


def _column(rows: Iterable[Mapping[str, str | None]], name: str) -> tuple[str, ...]:
    return tuple((row[name] or "").strip() for row in rows)


def _check_no_blanks(prompts: Sequence[str], path: str | Path) -> None:
    if "" in prompts:
        raise ValueError(f"{path} has no prompt in row {prompts.index('') + 1}: mend or remove the row")


def _json(data: bytes | str, where: str | Path) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _text(data: bytes, path: str | Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
