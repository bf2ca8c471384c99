"""A prompt set out of what real users typed, in the manner of the paper's Open User Input, and named as ours.

The paper's second set, OUI, holds 2100 popular prompts of real users, paraphrased by a language model so that
they read like ordinary input. It was not released. What is built here follows that one sentence; which log,
which filter, which concepts and how many of each are choices, and the manifest says them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emu_lightning.evaluation.paraphrase import Rewriter, rewrite_all, why_rejected
from emu_lightning.files import write_whole

NOT_OUI = (
    "Built by emu_lightning from a log of users' prompts. It is not the Open User Input set (OUI) of "
    "arXiv 2309.15807, which was not released; figures on it are not comparable with figures on OUI."
)
OTHER = "other"  # the concept of what belongs to none

_OPTIONS = re.compile(r"(?:^|\s)--[a-z]\w*.*", re.I)  # `--ar 16:9 --v 6`, which close a prompt
_ADAPTERS = re.compile(r"<(?:lora|lyco|hypernet):[^>]*>", re.I)
_QUOTED = re.compile(r"""(["'“”‘’`])([^"“”`]*)(["'“”‘’`])""")
_JOINERS = "\u200c\u200d"  # invisible, and yet part of how some scripts and emoji are written
_WORD = re.compile(r"\w+")
# Addresses, and numbers long enough to be somebody's.
_PERSONAL = re.compile(r"https?://|www\.|[\w.+-]+@[\w-]+\.\w|(?:\d[ ./-]?){7,}")

# MinHash: two prompts of Jaccard similarity s share a band with probability 1 - (1 - s^4)^32, 99.98 % at 0.7.
_NUM_BANDS, _ROWS = 32, 4
_PRIME = np.uint64(2**31 - 1)
_CHUNK = 2000  # prompts hashed at a time
_LEAST_SIMILARITY = 0.5  # below, too many alike share no band

UnsafeScore = Callable[[Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class UserPrompt:
    """A prompt, how often users typed it or something alike, and the concept it belongs to."""

    text: str
    count: int = 1
    concept: str = OTHER


class Concepts(Protocol):
    """Says of each text which concept it belongs to, ``other`` for none; ``settings`` is for the manifest."""

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def __call__(self, texts: Sequence[str]) -> Sequence[str]: ...


# --- the steps ----------------------------------------------------------------------------------------------


def read_log(path: str | Path, column: str = "prompt", count_column: str | None = None) -> list[UserPrompt]:
    """Reads a log of prompts, each text once, the most frequent first.

    Args:
        path: ``.jsonl`` with an object a line, ``.csv`` with a head, or ``.txt`` with a prompt a line.
        column: what the prompt is called, in the first two.
        count_column: how often a row was typed, where rows are counted already.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of the three, or a row lacks a column or has no whole number as its count.
    """
    counts: Counter[str] = Counter()
    for number, row in enumerate(_log_rows(Path(path), column), start=1):
        try:
            count = 1 if count_column is None else int(row[count_column])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}, row {number}, has no whole number under {count_column!r}") from None
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"{path}, row {number}, has no text under {column!r}: name the column of prompts"
            )
        counts[row[column]] += count
    return [UserPrompt(text, count) for text, count in counts.most_common()]


def normalise(text: str) -> str:
    """The text without what only a tool reads: options, adapters, invisible characters, quotes around all."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if c.isspace() or c in _JOINERS or unicodedata.category(c)[0] != "C")
    text = _OPTIONS.sub("", " ".join(_ADAPTERS.sub(" ", text).split())).strip(" ,;")
    quoted = _QUOTED.fullmatch(text)
    return quoted[2].strip() if quoted else text


def merge_equal(prompts: Iterable[UserPrompt]) -> list[UserPrompt]:
    """Normalised, and what has the same words become one; their most frequent form stands for them.

    Prompts without a word are left out.
    """
    merged: dict[str, UserPrompt] = {}
    for prompt in _by_count(replace(prompt, text=normalise(prompt.text)) for prompt in prompts):
        words = _words(prompt.text)
        if words:
            known = merged.get(words, replace(prompt, count=0))
            merged[words] = replace(known, count=known.count + prompt.count)
    return _by_count(merged.values())


def merge_alike(prompts: Iterable[UserPrompt], similarity: float = 0.7) -> list[UserPrompt]:
    """What is nearly the same becomes one; the most frequent stands for the others and gets their counts.

    Args:
        prompts: no two with equal words.
        similarity: least Jaccard similarity of their pairs of neighbouring words, first and last word paired
            with the edge; from 0.5 to 1. Candidates are found by MinHash and compared exactly.
    """
    if not _LEAST_SIMILARITY <= similarity <= 1:
        raise ValueError(f"similarity is {similarity}: give {_LEAST_SIMILARITY} to 1")
    ordered = _by_count(prompts)
    kept: list[UserPrompt] = []
    pairs: list[frozenset[int]] = []
    places: dict[tuple[int, bytes], list[int]] = {}
    for prompt, (shingles, bands) in zip(ordered, _sketches(ordered), strict=True):
        keys = list(enumerate(bands))
        candidates = {place for key in keys for place in places.get(key, ())}
        nearest = max(((_jaccard(pairs[place], shingles), -place) for place in candidates), default=(0.0, 0))
        if nearest[0] >= similarity:
            twin = -nearest[1]  # the most frequent of those that are as near
            kept[twin] = replace(kept[twin], count=kept[twin].count + prompt.count)
            continue
        for key in keys:
            places.setdefault(key, []).append(len(kept))
        kept.append(prompt)
        pairs.append(shingles)
    return _by_count(kept)


def is_safe(
    texts: Sequence[str],
    blocked: Collection[str] = (),
    unsafe_score: UnsafeScore | None = None,
    max_unsafe: float = 0.5,
) -> list[bool]:
    """Which texts may be shown to models and people.

    A text with an address (of the web or of mail) or a number of seven digits or more never may: it may be
    somebody's.

    Args:
        texts: N of them.
        blocked: words and phrases; whole words, any case, with or without a plural s.
        unsafe_score: gives N numbers, higher is worse.
        max_unsafe: the highest of them that passes.
    """
    pattern = _phrases(blocked)
    safe = [not _PERSONAL.search(text) and not (pattern and pattern.search(text)) for text in texts]
    left = [row for row, one in enumerate(safe) if one]
    if unsafe_score is not None and left:
        scores = np.asarray(unsafe_score([texts[row] for row in left]), np.float64)
        if scores.shape != (len(left),) or not np.isfinite(scores).all():
            raise ValueError(
                f"the safety scorer gave {scores.shape} for {len(left)} texts: one number for each"
            )
        for row, score in zip(left, scores, strict=True):
            safe[row] = bool(score <= max_unsafe)
    return safe


@dataclass(frozen=True)
class Keywords:
    """The concept with the most of its words in a text; the earlier one where two have as many.

    Args:
        concepts: for each concept its words and phrases; whole words, any case, with or without a plural s.
    """

    concepts: dict[str, list[str]]

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"keywords": self.concepts}

    def __call__(self, texts: Sequence[str]) -> Sequence[str]:
        patterns = {name: _phrases(words) for name, words in self.concepts.items()}
        found = []
        for text in texts:
            hits = {name: len(one.findall(text)) for name, one in patterns.items() if one}
            best = max(hits, key=lambda name: hits[name], default=OTHER)
            found.append(best if hits.get(best) else OTHER)
        return found


class EmbedsText(Protocol):
    """Anything that gives texts vectors (N, D), near ones for texts of near meaning."""

    @property
    def name(self) -> str: ...

    @property
    def weights_sha256(self) -> str: ...

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Nearest:
    """The concept whose description is nearest to a text, by the cosine of their embeddings.

    Args:
        embedder: of texts.
        concepts: for each concept a text that describes it.
        min_similarity: a text that is nearer to none is of no concept.
    """

    embedder: EmbedsText
    concepts: dict[str, str]
    min_similarity: float = 0.0

    @property
    def settings(self) -> Mapping[str, Any]:
        network = {"name": self.embedder.name, "weights_sha256": self.embedder.weights_sha256}
        return {"descriptions": self.concepts, "min_similarity": self.min_similarity, "embedder": network}

    def __call__(self, texts: Sequence[str]) -> Sequence[str]:
        if not texts:
            return []
        names = list(self.concepts)
        similar = (
            _unit(self.embedder.embed_texts(texts))
            @ _unit(self.embedder.embed_texts([*self.concepts.values()])).T
        )
        best = similar.argmax(1)
        near = similar.max(1) >= self.min_similarity
        return [names[place] if one else OTHER for place, one in zip(best, near, strict=True)]


# --- all of them --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """What the paper leaves open; the manifest has all of it.

    Attributes:
        name: what reports call the set.
        num_prompts: how many, the most frequent; all where left out, or where ``quotas`` say how many.
        quotas: concept -> how many of it, the most frequent; ``other`` is what belongs to none.
        min_count: users' prompts, alike ones together, that make one worth having.
        similarity: see :func:`merge_alike`.
        blocked: see :func:`is_safe`.
        max_unsafe: see :func:`is_safe`.
    """

    name: str = "users' prompts (ours)"
    num_prompts: int | None = None
    quotas: dict[str, int] | None = None
    min_count: int = 1
    similarity: float = 0.7
    blocked: tuple[str, ...] = ()
    max_unsafe: float = 0.5

    def __post_init__(self) -> None:
        if re.search(r"\bOUI\b|open\W*user\W*input", self.name, re.I):
            raise ValueError(
                f"{self.name!r} is the name of the paper's set, which this is not: choose another"
            )
        if self.quotas is not None and self.num_prompts is not None:
            raise ValueError("give num_prompts or quotas: quotas already say how many")


def build_prompts(
    log: Sequence[UserPrompt],
    out: str | Path,
    choices: Choices = Choices(),
    *,
    concepts: Concepts | None = None,
    unsafe_score: UnsafeScore | None = None,
    rewriter: Rewriter | None = None,
    source: str = "",
) -> Mapping[str, Any]:
    """Normalises, merges, filters, balances, paraphrases; writes ``prompts.jsonl`` and ``manifest.json``.

    A paraphrase that cannot stand for its original (see :func:`.paraphrase.why_rejected`), or that the safety
    filter stops, is left out and its original kept; the file says which and why, beside every original. The
    set is read by :func:`.prompts.read_prompts`, by its folder.

    Args:
        log: see :func:`read_log`.
        out: folder; answers of the rewriter are kept there, too, and not asked for again.
        choices: see :class:`Choices`.
        concepts: says what belongs together; needed with quotas.
        unsafe_score: see :func:`is_safe`.
        rewriter: says prompts in other words; they stay as typed where left out.
        source: what the log is, for the manifest.

    Returns:
        The manifest: name, settings and their hash, what each step left, what concepts got.

    Raises:
        ValueError: nothing is left, or there are quotas without concepts.
    """
    if choices.quotas is not None and concepts is None:
        raise ValueError("quotas need concepts: give the words or the descriptions by which they are known")
    out = Path(out)
    funnel: list[dict[str, Any]] = []

    def follow(step: str, prompts: Sequence[UserPrompt]) -> list[UserPrompt]:
        typed = sum(prompt.count for prompt in prompts)
        funnel.append({"step": step, "num_prompts": len(prompts), "num_typed": typed})
        return list(prompts)

    def passes(texts: Sequence[str]) -> list[bool]:
        return is_safe(texts, choices.blocked, unsafe_score, choices.max_unsafe)

    prompts = follow("equal ones merged", merge_equal(follow("log", log)))
    prompts = follow("safe", list(compress(prompts, passes(_texts(prompts)))))
    prompts = follow("alike ones merged", merge_alike(prompts, choices.similarity))
    prompts = follow("frequent", [prompt for prompt in prompts if prompt.count >= choices.min_count])
    if concepts is not None:
        names = concepts(_texts(prompts))
        prompts = [replace(prompt, concept=name) for prompt, name in zip(prompts, names, strict=True)]
    candidates = Counter(prompt.concept for prompt in prompts)
    prompts = follow("chosen", _chosen(prompts, choices))
    rewrites = {} if rewriter is None else rewrite_all(_texts(prompts), rewriter, out / "rewrites.jsonl")
    rows = _rows(prompts, rewrites, passes)
    follow("distinct in the end", [UserPrompt(row["prompt"], row["count"]) for row in rows])
    if not rows:
        left = ", ".join(f"{step['step']} {step['num_prompts']:,}" for step in funnel)
        raise ValueError(f"no prompt of the log is left: {left}")

    settings = {
        **vars(choices),
        "blocked": {"number": len(choices.blocked), "sha256": _sha256("\n".join(sorted(choices.blocked)))},
        "concepts": None if concepts is None else dict(concepts.settings),
        "unsafe_score": None if unsafe_score is None else _name_of(unsafe_score),
        "rewriter": None if rewriter is None else dict(rewriter.settings),
        "source": source,
        "log_sha256": _sha256("".join(f"{prompt.count}\t{prompt.text}\n" for prompt in log)),
    }
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    wanted, taken = choices.quotas or {}, Counter(row["category"] for row in rows)
    manifest = {
        "name": choices.name,
        "what_it_is": NOT_OUI,
        "settings": settings,
        "settings_sha256": _sha256(json.dumps(settings, sort_keys=True)),
        "prompts_sha256": _sha256(text),
        "funnel": funnel,
        "concepts": {
            name: {"candidates": candidates[name], "wanted": wanted.get(name), "taken": taken[name]}
            for name in sorted({*candidates, *wanted})
        },
        "rewrites_left_out": Counter(row["rejected"] for row in rows if row.get("rejected")),
    }
    write_whole(out / "prompts.jsonl", text)
    write_whole(out / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def _rows(
    prompts: Sequence[UserPrompt],
    rewrites: Mapping[str, str],
    passes: Callable[[Sequence[str]], Sequence[bool]],
) -> list[dict[str, Any]]:
    """What is written of each prompt; where two end with equal words, of the first."""
    new = {original: normalise(rewrite) for original, rewrite in rewrites.items()}
    safe = dict(zip(new, passes(list(new.values())), strict=True))
    rows: dict[str, dict[str, Any]] = {}
    for prompt in prompts:
        original = prompt.text
        row: dict[str, Any] = {"id": _sha256(original)[:12], "prompt": original, "category": prompt.concept}
        row |= {"original": original, "count": prompt.count}
        if original in rewrites:
            reason = why_rejected(original, rewrites[original]) or ("" if safe[original] else "unsafe")
            row["prompt"] = original if reason else new[original]
            row |= {"rewrite": rewrites[original], "rejected": reason}
        rows.setdefault(_words(row["prompt"]), row)
    return list(rows.values())


def _chosen(prompts: list[UserPrompt], choices: Choices) -> list[UserPrompt]:
    if choices.quotas is None:
        return prompts[: choices.num_prompts]
    left = Counter(choices.quotas)
    chosen = []
    for prompt in prompts:
        if left[prompt.concept] > 0:
            left[prompt.concept] -= 1
            chosen.append(prompt)
    return chosen


# --- small things -------------------------------------------------------------------------------------------


def _log_rows(path: Path, column: str) -> Iterator[Mapping[str, Any]]:
    ending = path.suffix.lower()
    if ending not in (".jsonl", ".csv", ".txt"):
        raise ValueError(f"{path} is no log by its ending {ending!r}: give .jsonl, .csv or .txt")
    with path.open(encoding="utf-8-sig", newline="") as file:
        if ending == ".csv":
            yield from csv.DictReader(file)
        for line in file:  # nothing is left of a table
            yield _object(line) if ending == ".jsonl" else {column: line}


def _object(line: str) -> Mapping[str, Any]:
    with suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict):
            return row
    return {}


def _by_count(prompts: Iterable[UserPrompt]) -> list[UserPrompt]:
    return sorted(prompts, key=lambda prompt: -prompt.count)  # stable: equal counts stay in their order


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold()))


def _sketches(prompts: Sequence[UserPrompt]) -> Iterator[tuple[frozenset[int], list[bytes]]]:
    """Of each prompt the hashes of its pairs of neighbouring words, and its MinHash, a key for each band."""
    rng = np.random.default_rng(0)
    factors, offsets = rng.integers(1, _PRIME, (2, _NUM_BANDS * _ROWS), np.uint64)[..., None]
    for start in range(0, len(prompts), _CHUNK):
        shingles = [_shingles(prompt.text) for prompt in prompts[start : start + _CHUNK]]
        hashes = np.array([one for each in shingles for one in each], np.uint64)
        starts = np.cumsum([0, *map(len, shingles)])[:-1]
        least = np.minimum.reduceat((factors * hashes + offsets) % _PRIME, starts, axis=1)
        bands = least.T.reshape(len(shingles), _NUM_BANDS, _ROWS).astype(np.uint32)
        for each, keys in zip(shingles, bands, strict=True):
            yield each, [key.tobytes() for key in keys]


def _shingles(text: str) -> frozenset[int]:
    words = ["", *_words(text).split(), ""]
    pairs = zip(words, words[1:], strict=False)
    return frozenset(zlib.crc32(" ".join(pair).encode()) & 0x7FFFFFFF for pair in pairs)


def _jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / len(a | b)


def _phrases(words: Collection[str]) -> re.Pattern[str] | None:
    """Matches any of them as whole words; None where there are none."""
    found = [re.escape(one) for one in sorted({word.strip().casefold() for word in words}) if one]
    return re.compile(rf"(?<!\w)(?:{'|'.join(found)})(?:e?s)?(?!\w)", re.I) if found else None


def _unit(vectors: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(vectors, np.float64)
    unit: NDArray[np.float64] = array / np.linalg.norm(array, axis=1, keepdims=True)
    return unit


def _texts(prompts: Iterable[UserPrompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def _name_of(function: Callable[..., Any]) -> str:
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
