"""What is exported comes back as it was, and other tools' files are read."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emu_lightning.annotation import exchange
from emu_lightning.annotation.exchange import ANSWERS, EVENTS, EXPORTS, FORMATS, TABLES
from emu_lightning.annotation.store import Batch, Person, Store
from emu_lightning.evaluation.votes import read_judgements

SEEN = {"left": True, "right": True, "only": True}
AWKWARD = [
    '=HYPERLINK("http://x")',
    "-1",
    "'quoted",
    "'=1+1",
    'a "b", c\nd',
    "日本 🦊",
    "<script>alert(1)</script>",
]


def give(store: Store, person: Person, batch: Batch, *answers: dict[str, Any]) -> None:
    """Answers in sides, to the items in the order they are lent."""
    for number, answer in enumerate(answers):
        (assignment, *_) = store.lend(person, batch, 1)
        nonce = f"{batch.id}-{person.id}-{assignment.id}-{number}"
        store.answer(person, assignment.token, answer, nonce, SEEN, {"shown_at": 1.5, "submitted_at": 3.25})


def row(**values: Any) -> dict[str, Any]:
    return dict.fromkeys(ANSWERS) | {"extra": {}} | values


@pytest.fixture
def judged(sqlite_store: Store, make_items) -> tuple[Store, Batch]:
    """Three pairs, one with a known answer, judged by two people, one of whom took one answer back."""
    store = sqlite_store
    batch = store.add_batch("faithfulness", "Which one?", num_people=2, settings={"gold_every": 1})
    store.add_items(batch, make_items(batch, 2, group="animals", extra={"seed": 7, "note": AWKWARD[4]}))
    (gold,) = make_items(batch, 1, gold={"choice": "A"})
    store.add_items(batch, [exchange.NewItem("known", gold.pictures, prompt=AWKWARD[0], gold=gold.gold)])
    for name in ("ada", "=bob"):
        person = store.add_person(name, "generalist")
        give(store, person, batch, {"choice": "left"}, {"choice": "both"}, {"choice": "neither"})
    store.undo(person, batch)
    return store, batch


@pytest.mark.parametrize("name", FORMATS)
def test_answers_come_back_from_each_format(judged, name: str) -> None:
    rows = exchange.answer_rows(*judged)
    assert len(rows) == 5 and {r["item"] for r in rows} == {"item-0", "item-1", "known"}
    assert FORMATS[name].read(EXPORTS[name].make(*judged), ANSWERS) == rows


@pytest.mark.parametrize("name", TABLES)
def test_the_log_comes_back_from_each_format(judged, name: str) -> None:
    rows = exchange.event_rows(*judged)
    assert [r["kind"] for r in rows] == ["answer"] * 6 + ["undo"]
    assert TABLES[name].read(EXPORTS[f"log-{name}"].make(*judged), EVENTS) == rows


@pytest.mark.parametrize("name", FORMATS)
def test_awkward_texts_and_missing_values_come_back(name: str) -> None:
    rows = [
        row(
            item=f"{number}",
            prompt=text,
            path_a="/a b/ü.png",
            answer={"text": text},
            person=text,
            extra={"": text},
        )
        for number, text in enumerate(AWKWARD)
    ]
    rows = [
        r | {"kind": "answer", "at": 1e9 + 0.1, "guideline_version": 3, "times": {"x": [1, None]}}
        for r in rows
    ]
    assert FORMATS[name].read(FORMATS[name].write(rows, ANSWERS), ANSWERS) == rows
    assert FORMATS[name].read(FORMATS[name].write([], ANSWERS), ANSWERS) == []


def test_no_cell_becomes_a_formula() -> None:
    written = TABLES["csv"].write([row(item=text) for text in AWKWARD], ANSWERS).decode()
    cells = [cell for line in csv.reader(io.StringIO(written, newline="")) for cell in line]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]


@pytest.mark.parametrize("name", FORMATS)
def test_another_store_holds_the_same_after_an_import(judged, tmp_path: Path, name: str) -> None:
    store, batch = judged
    rows = FORMATS[name].read(EXPORTS[name].make(store, batch), ANSWERS)
    other = Store(f"sqlite:///{tmp_path / 'other.db'}")
    copy = other.add_batch("faithfulness", "copy", num_people=2)
    assert exchange.import_rows(other, copy, rows, [tmp_path, Path("/")]) == (3, 5)
    assert exchange.answer_rows(other, copy) == exchange.answer_rows(store, batch)
    assert exchange.import_rows(other, copy, rows, [tmp_path, Path("/")]) == (0, 0)
    progress = other.progress(copy)
    assert (progress.done, progress.total) == (store.progress(batch).done, store.progress(batch).total)


def held(store: Store, batch: Batch) -> tuple[int, int, int, int]:
    """Items, answers that count, events, people."""
    return tuple(  # type: ignore[return-value]
        map(len, (store.items(batch), store.answers(batch), store.events(batch), store.people()))
    )


def file_of_answers(folder: Path, picture: Path, num: int) -> Path:
    """Items of two answers each; who gave them, and who wrote the captions, is new to any store."""
    rows = [
        row(
            item=f"item {n}",
            path_a=str(picture),
            caption="A fox.",
            author="writer",
            person=person,
            answer={"verdict": "accept"},
        )
        for n in range(num)
        for person in ("ada", "bob")
    ]
    path = folder / "answers.jsonl"
    path.write_bytes(TABLES["jsonl"].write(rows, ANSWERS))
    return path


@pytest.mark.parametrize("at", ["add_items", "import_answers", "_add_assignments", "_settle"])
def test_an_import_that_fails_midway_changes_nothing(
    store: Store, tmp_path: Path, picture_files: list[Path], monkeypatch, at: str
) -> None:
    batch = store.add_batch("verification", "Texts", num_people=2)
    rows = exchange.read_rows(file_of_answers(tmp_path, picture_files[0], 3))
    roots = [picture_files[0].parent]
    before, whole = held(store, batch), getattr(Store, at)

    def fail(*args: Any) -> None:
        whole(*args)
        raise OSError("the disk is full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk is full"):
        patched.setattr(Store, at, fail)
        exchange.import_rows(store, batch, rows, roots)
    assert held(store, batch) == before == (0, 0, 0, 0)
    assert exchange.import_rows(store, batch, rows, roots) == (3, 6)
    assert held(store, batch) == (3, 6, 6, 3)
    assert exchange.import_rows(store, batch, rows, roots) == (0, 0)


KILLED = """
import os, signal, sys
from pathlib import Path
from emu_lightning.annotation import exchange
from emu_lightning.annotation.store import Store

url, file = sys.argv[1:]
settle = Store._settle

def killed(*args):
    settle(*args)
    os.kill(os.getpid(), signal.SIGKILL)

Store._settle = killed
store = Store(url)
exchange.import_rows(store, store.batches()[0], exchange.read_rows(file), [Path("/")])
"""


def test_an_import_that_is_killed_midway_changes_nothing(
    sqlite_store: Store, tmp_path: Path, picture_files: list[Path]
) -> None:
    """Killed when all is written and nothing is committed; others can write at once."""
    batch = sqlite_store.add_batch("verification", "Texts", num_people=2)
    file = file_of_answers(tmp_path, picture_files[0].resolve(), 300)
    url = f"sqlite:///{tmp_path / 'votes.db'}"
    ended = subprocess.run([sys.executable, "-c", KILLED, url, str(file)])
    assert ended.returncode == -9 and held(sqlite_store, batch) == (0, 0, 0, 0)
    rows = exchange.read_rows(file)
    assert exchange.import_rows(sqlite_store, batch, rows, [Path("/")]) == (300, 600)


def test_a_row_that_is_wrong_keeps_all_others_out(
    sqlite_store: Store, tmp_path: Path, picture_files: list[Path]
) -> None:
    batch = sqlite_store.add_batch("verification", "Texts", num_people=2)
    rows = exchange.read_rows(file_of_answers(tmp_path, picture_files[0], 3))
    rows[-1]["answer"] = {"verdict": "perhaps"}
    with pytest.raises(ValueError, match="item 2"):
        exchange.import_rows(sqlite_store, batch, rows, [picture_files[0].parent])
    assert held(sqlite_store, batch) == (0, 0, 0, 0)


def test_an_import_is_refused_in_one_line(sqlite_store: Store, picture_files: list[Path]) -> None:
    batch = sqlite_store.add_batch("screening", "s")
    inside = [picture_files[0].parent]
    good = row(item="a", path_a=str(picture_files[0]), person="ada", answer={"choice": "keep"})
    for change, said in [
        ({"path_a": "../../etc/passwd"}, "outside of the folders"),
        ({"path_a": "/etc/passwd"}, "outside of the folders"),
        ({"path_a": None, "item": None}, "names no picture"),
        ({"person": None}, "nobody"),
        ({"answer": {"choice": "maybe"}}, "choice is 'maybe'"),
        ({"person": "eve", "role": "king"}, "role 'king'"),
    ]:
        with pytest.raises(ValueError, match=said) as caught:
            exchange.import_rows(sqlite_store, batch, [good | change], inside)
        assert "\n" not in str(caught.value)
    outward = inside[0] / "link.png"
    outward.symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="outside of the folders"):
        exchange.import_rows(sqlite_store, batch, [good | {"path_a": "link.png"}], inside)
    assert exchange.answer_rows(sqlite_store, batch) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("csv", b"item,at\na,soon\n", "row 1: at is 'soon', not a number"),
        ("csv", b'item\n"a\n', "not comma-separated"),
        ("jsonl", b'{"item": "a"}\n[]\n', "line 2 is no JSON object"),
        ("jsonl", b'{"at": NaN}\n', "line 1 is not JSON"),
        ("jsonl", b"\xff\n", "not UTF-8"),
        ("jsonl", b'{"answer": "keep"}\n', "row 1: answer is 'keep', not a JSON object"),
        ("jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("parquet", b"PAR1", "no Parquet file"),
        ("labelstudio", b'[{"annotations": []}]', "task 1 is not one of Label Studio"),
        (
            "labelstudio",
            b'[{"data": {}, "annotations": [{"result": 3}]}]',
            "task 1 is not one of Label Studio",
        ),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(name: str, content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        FORMATS[name].read(content, ANSWERS)
    assert said in str(caught.value)


def test_tables_of_others_are_read() -> None:
    """Their own column names, numbers for texts, and what we do not know."""
    (read,) = TABLES["csv"].read("\ufeffuid,image,concept,score\n17,a.png,cats,0.5\n".encode(), ANSWERS)
    assert (read["item"], read["path_a"], read["group"], read["extra"]) == (
        "17",
        "a.png",
        "cats",
        {"score": "0.5"},
    )
    (read,) = TABLES["jsonl"].read(b'{"item": 17, "path": "a.png", "score": 0.5, "none": null}', ANSWERS)
    assert (read["item"], read["path_a"], read["extra"]) == ("17", "a.png", {"score": 0.5})


def test_label_studios_own_export_is_read() -> None:
    """As its documentation shows an export: a pairwise choice, people by e-mail or number, a skipped task."""
    task = {
        "id": 1,
        "data": {"item": "p1", "path_a": "/data/local-files/?d=data/my%20pairs/a.png", "path_b": "/b.png"},
        "annotations": [
            {
                "id": 5,
                "completed_by": {"id": 1, "email": "ada@example.org"},
                "created_at": "2026-01-02T03:04:05.000000Z",
                "lead_time": 2.5,
                "result": [
                    {
                        "from_name": "choice",
                        "to_name": "path_a,path_b",
                        "type": "pairwise",
                        "value": {"selected": "right"},
                    }
                ],
            },
            {"completed_by": 4, "was_cancelled": True, "result": []},
            {
                "completed_by": 2,
                "result": [
                    {
                        "from_name": "text",
                        "to_name": "path_a",
                        "type": "textarea",
                        "value": {"text": ["one", "two"]},
                    }
                ],
            },
        ],
    }
    first, second = FORMATS["labelstudio"].read(json.dumps([task]).encode(), ANSWERS)
    assert first["path_a"] == "/data/my pairs/a.png"
    assert (first["person"], first["answer"]) == ("ada@example.org", {"choice": "B"})
    assert first["at"] == 1767323045.0  # date -u -d 2026-01-02T03:04:05 +%s
    assert (second["person"], second["answer"], second["at"]) == ("2", {"text": "one\ntwo"}, None)


def test_label_studio_gets_results_of_its_own_kinds() -> None:
    answer = {"accept": True, "story": 2, "reasons": ["too dark", "not sharp"], "comment": "c"}
    written = FORMATS["labelstudio"].write(
        [row(item="1", path_a="/p/1.png", person="a", answer=answer)], ANSWERS
    )
    (task,) = json.loads(written)
    assert task["data"]["path_a"] == "/data/local-files/?d=p/1.png"
    values = {one["from_name"]: (one["type"], one["value"]) for one in task["annotations"][0]["result"]}
    assert values == {
        "accept": ("choices", {"choices": ["yes"]}),
        "story": ("rating", {"rating": 2}),
        "reasons": ("taxonomy", {"taxonomy": [["too dark"], ["not sharp"]]}),
        "comment": ("textarea", {"text": ["c"]}),
    }


def test_votes_are_read_by_the_evaluation(judged, tmp_path: Path) -> None:
    (tmp_path / "votes.jsonl").write_bytes(EXPORTS["votes"].make(*judged))
    judgements = read_judgements(tmp_path / "votes.jsonl")
    assert len({j.rater for j in judgements}) == 2 and {j.rater_kind for j in judgements} == {"person"}
    assert "ada" not in (tmp_path / "votes.jsonl").read_text()


# --- items --------------------------------------------------------------------------------------------------


def write_manifest(path: Path, **columns: list) -> None:
    pq.write_table(pa.table(columns), path)


def test_a_manifest_of_loose_and_packed_pictures(tmp_path: Path, picture_files: list[Path]) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for folder, file in zip("ab", picture_files, strict=False):
            tar.add(file, f"{folder}/same.png")
    write_manifest(
        tmp_path / "manifest.parquet",
        uid=["w", "x", "y", "z"],
        uri=[str(picture_files[2]), "0.tar#a/same.png", "0.tar#b/same.png", "elsewhere.png"],
        caption=["W", "X", None, "Z"],
        concept=["cats", "dogs", None, "cats"],
        selected=[True, True, True, False],
    )
    items = exchange.manifest_items(tmp_path / "manifest.parquet", tmp_path / "unpacked", keep="selected")
    assert [(i.name, i.caption, i.group) for i in items] == [
        ("w", "W", "cats"),
        ("x", "X", "dogs"),
        ("y", None, None),
    ]
    found = [Path(i.pictures["A"][0]).read_bytes() for i in items]
    assert found == [picture_files[n].read_bytes() for n in (2, 0, 1)]


@pytest.mark.parametrize(
    ("uri", "said"), [("s3://bucket/1.png", "not on this machine"), ("0.tar#no.png", "has no picture no.png")]
)
def test_a_manifest_of_pictures_that_are_not_here(tmp_path: Path, uri: str, said: str) -> None:
    tarfile.open(tmp_path / "0.tar", "w").close()
    write_manifest(tmp_path / "m.parquet", uid=["a"], uri=[uri])
    with pytest.raises(ValueError, match=said):
        exchange.manifest_items(tmp_path / "m.parquet", tmp_path)


def test_a_manifest_without_a_column(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.parquet", uid=["a"])
    with pytest.raises(ValueError, match="has no column uri; it has uid"):
        exchange.manifest_items(tmp_path / "m.parquet", tmp_path)


def write_folder(folder: Path, names: list[str], prompts: list[str] | None = None, **manifest: Any) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.png").write_bytes(b"picture")
    if prompts is not None:
        (folder / "manifest.json").write_text(json.dumps({"prompts": prompts, **manifest}))
    return folder


def test_two_folders_of_one_evaluation(tmp_path: Path) -> None:
    names, prompts = ["00000", "00001"], ["a fox", "a hare"]
    a = write_folder(tmp_path / "base", [*names, "grid"], prompts, seeds=[4, 5])
    b = write_folder(tmp_path / "tuned", names, prompts, seeds=[4, 5])
    items = exchange.folder_items({"A": a, "B": b})
    assert [(i.name, i.prompt, i.extra) for i in items] == [
        ("00000", "a fox", {"seed": 4}),
        ("00001", "a hare", {"seed": 5}),
    ]
    assert items[1].pictures == {"A": (a / "00001.png", "base"), "B": (b / "00001.png", "tuned")}


def test_folders_of_real_generation_are_read(tmp_path: Path) -> None:
    """What the evaluation writes is what is read here, without torch."""
    script = """
import sys
from emu_lightning.annotation.exchange import folder_items
print([(i.name, i.prompt) for i in folder_items({"A": sys.argv[1]})], "torch" in sys.modules)
"""
    torch = pytest.importorskip("torch")
    from emu_lightning.evaluation.generation import generate_folder

    class Grey:
        def generate(self, prompts, seeds, **_):
            return torch.zeros(len(prompts), 3, 8, 8)

    generate_folder(Grey(), ["a fox", "a hare"], [0, 1], tmp_path / "grey", settings={})
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "grey")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[('00000', 'a fox'), ('00001', 'a hare')] False"


def test_pictures_made_elsewhere_and_a_file_of_prompts(tmp_path: Path) -> None:
    a, b = (
        write_folder(tmp_path / "x" / "out", ["fox", "hare"]),
        write_folder(tmp_path / "y" / "out", ["fox", "hare"]),
    )
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"id": "hare", "prompt": "a hare", "category": "game"},
        {"id": "fox", "prompt": "a fox", "category": "red"},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = exchange.folder_items({"A": a, "B": b}, prompts)
    assert [(i.name, i.prompt, i.group) for i in items] == [
        ("hare", "a hare", "game"),
        ("fox", "a fox", "red"),
    ]
    assert items[0].pictures["B"] == (b / "hare.png", str(b))  # equal names tell no models apart


def test_without_prompts_equal_names_are_pairs(tmp_path: Path) -> None:
    a, b = write_folder(tmp_path / "a", ["fox", "hare"]), write_folder(tmp_path / "b", ["fox", "hare"])
    assert [(i.name, i.prompt) for i in exchange.folder_items({"A": a, "B": b})] == [
        ("fox", None),
        ("hare", None),
    ]
    (b / "extra.png").write_bytes(b"picture")
    with pytest.raises(ValueError, match="only one of them has extra"):
        exchange.folder_items({"A": a, "B": b})


def test_other_prompts_are_no_pair(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a", ["00000"], ["a fox"])
    b = write_folder(tmp_path / "b", ["00000"], ["a hare"])
    with pytest.raises(ValueError, match="different prompts"):
        exchange.folder_items({"A": a, "B": b})
    with pytest.raises(FileNotFoundError, match="lacks 1 of 1 pictures, such as 00000.png"):
        exchange.folder_items({"A": write_folder(tmp_path / "c", ["other"], ["a fox"])})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        exchange.folder_items({"A": tmp_path / "nowhere"})


def test_captions_become_items_that_their_writers_do_not_verify(sqlite_store: Store, make_items) -> None:
    store = sqlite_store
    batch = store.add_batch("caption", "write")
    store.add_items(batch, make_items(batch, 1, group="cats"))
    ada, bob = store.add_person("ada", "generalist"), store.add_person("bob", "generalist")
    give(store, ada, batch, {"text": "A fox."})
    (item,) = exchange.caption_items(store, batch)
    assert (item.caption, item.author, item.group) == ("A fox.", ada.id, "cats")
    check = store.add_batch("verification", "check")
    store.add_items(check, [item])
    assert store.lend(ada, check, 1) == [] and len(store.lend(bob, check, 1)) == 1
    with pytest.raises(ValueError, match="holds no captions"):
        exchange.caption_items(store, check)
