"""`emu annotate`: from pictures to a served application, and from its answers to files."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emu_lightning import cli
from emu_lightning.annotation import access
from emu_lightning.annotation import server as servers
from emu_lightning.annotation.questions import QUESTIONS
from emu_lightning.annotation.store import Store
from emu_lightning.verbs import annotate

SEEN = {"left": True, "right": True, "only": True}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, in_tmp_path: Path) -> None:
    """An empty working directory, and few and small pictures in a new store."""
    monkeypatch.setattr(annotate, "NUM_FILLED", 2)
    monkeypatch.setattr(annotate, "SIDE", 16)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list:
    """What would be served, instead of serving it."""
    calls: list = []
    monkeypatch.setattr(servers, "serve", lambda app, host, port: calls.append((app, host, port)))
    return calls


def emu(*argv: str) -> None:
    cli.main(["annotate", *argv])


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a refusal."""
    with pytest.raises(SystemExit) as ended:
        emu(*argv)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("emu: error: ")


def opened() -> Store:
    return Store("sqlite:///runs/annotation/annotation.db")


def write_folder(folder: str, colours: list[str], prompts: list[str] | None = None) -> str:
    Path(folder).mkdir(parents=True)
    for row, colour in enumerate(colours):
        Image.new("RGB", (8, 8), colour).save(f"{folder}/{row:05d}.png")
    if prompts:
        Path(folder, "manifest.json").write_text(json.dumps({"prompts": prompts}))
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# --- serving ------------------------------------------------------------------------------------------------


def test_a_new_store_asks_every_question_of_the_miniatures_pictures(served, capsys) -> None:
    port = free_port()
    emu("--port", str(port))
    ((app, host, listening),) = served
    assert (host, listening) == ("127.0.0.1", port)
    store = opened()
    assert [batch.question for batch in store.batches()] == list(QUESTIONS)
    assert [store.progress(batch).total for batch in store.batches()] == [4, 4, 2, 2, 10, 6]
    pair = store.items(store.batches()[4])[0]
    assert pair.models == {"A": "ordinary", "B": "skilled"} and pair.prompt
    links = dict(re.findall(rf"(\w+) +http://127.0.0.1:{port}/join/(\S+)", capsys.readouterr().out))
    assert links.keys() == {"lead", "generalist", "specialist"}
    for role, token in links.items():
        assert store.accept_invitation(token, None).role == role
    assert oct(Path("runs/annotation/secret.key").stat().st_mode & 0o777) == "0o600"
    assert app.state.settings.secret_key == access.read_secret_key("runs/annotation/secret.key")

    emu("--port", str(port))  # what is there stays as it is, and no link is printed again
    assert len(opened().batches()) == 6 and "/join/" not in capsys.readouterr().out


def test_pairs_of_an_earlier_quickstart_come_first(served) -> None:
    for name in ("base", "tuned"):
        write_folder(f"runs/quickstart/{name}", ["red", "blue"], ["a fox", "a hare"])
    emu("--port", str(free_port()))
    store = opened()
    assert [item.prompt for item in store.items(store.batches()[4])] == ["a fox", "a hare"]
    assert store.items(store.batches()[4])[0].models == {"A": "base", "B": "tuned"}


def test_a_taken_port(served, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused(capsys, "--port", str(port))
    assert str(port) in line and "--port" in line
    assert "cannot listen on port 99999" in refused(capsys, "--port", "99999")
    assert not served and not Path("runs").exists()


@pytest.mark.parametrize(
    ("argv", "warns", "is_https"),
    [
        (["--host", "0.0.0.0"], True, False),
        (["--host", "0.0.0.0", "--url", "https://pictures.example.org/"], False, True),
        (["--host", "127.0.0.1"], False, False),
        (["--host", "localhost"], False, False),
    ],
)
def test_other_machines_without_https_are_warned_of(
    served, capsys, argv, warns: bool, is_https: bool
) -> None:
    annotate.main(["add", "--question", "screening", "--a", write_folder("p", ["red"])])
    emu("--port", str(free_port()), *argv)
    told = capsys.readouterr()
    assert ("without https" in told.err) == warns
    ((app, _, _),) = served
    assert app.state.settings.is_https == is_https
    if is_https:
        assert "https://pictures.example.org/join/" in told.out


@pytest.mark.smoke
def test_a_server_of_what_is_there_does_without_torch(answered: Store) -> None:
    """It would take hundreds of megabytes, and seconds at each start."""
    script = """
import sys
from emu_lightning.annotation import server
from emu_lightning.verbs import annotate
server.serve = lambda app, host, port: None
annotate.main(["--port", sys.argv[1]])
print("torch" in sys.modules)
"""
    command = [sys.executable, "-c", script, str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(annotate, "find_spec", lambda name: None if name == "fastapi" else object())
    assert "pip install 'emu_lightning[annotation]'" in refused(capsys)


def test_a_database_that_cannot_be_used(capsys) -> None:
    line = refused(capsys, "batches", "--database", "postgresql+psycopg://me:secret@127.0.0.1:1/votes")
    assert "cannot be used" in line and "127.0.0.1" in line and "secret" not in line
    assert "cannot be used" in refused(capsys, "batches", "--database", "nonsense")
    Path("runs/annotation").mkdir(parents=True, exist_ok=True)
    Path("runs/annotation/annotation.db").write_bytes(b"no database" * 100)
    assert "cannot be used" in refused(capsys, "batches")


# --- batches ------------------------------------------------------------------------------------------------


def test_two_folders_become_a_batch_of_pairs(capsys) -> None:
    a = write_folder("runs/a", ["red", "blue"], ["a fox", "a hare"])
    b = write_folder("runs/b", ["green", "black"], ["a fox", "a hare"])
    emu(
        "add",
        "--question",
        "appeal",
        "--a",
        a,
        "--b",
        b,
        "--num_people",
        "3",
        "--extra-rater",
        "--gold_every",
        "5",
    )
    assert re.search(r"'Visual appeal' \(\w+\): 2; people for each: 3", capsys.readouterr().out)
    emu("add", "--question", "appeal", "--a", a, "--b", b)
    first, second = opened().batches()
    assert (first.num_people, second.num_people) == (3, 5)
    assert (first.settings["extra_rater"], first.settings["gold_every"]) == (True, 5)
    assert second.title == "Visual appeal 2"
    assert "runs/a" not in first.title  # people read it, and may not know the models


def test_a_manifest_becomes_a_batch_and_may_be_added_to(capsys) -> None:
    write_folder("pictures", ["red", "blue", "green"])
    columns = {"uid": ["x", "y", "z"], "uri": [f"pictures/{row:05d}.png" for row in range(3)]}
    pq.write_table(pa.table(columns | {"selected": [True, False, True]}), "manifest.parquet")
    emu(
        "add",
        "--question",
        "screening",
        "--manifest",
        "manifest.parquet",
        "--keep",
        "selected",
        "--title",
        "Stage 1",
    )
    assert [item.name for item in opened().items(opened().batches()[0])] == ["x", "z"]
    emu("add", "--batch", "Stage 1", "--manifest", "manifest.parquet")
    (batch,) = opened().batches()
    assert [item.name for item in opened().items(batch)] == ["x", "y", "z"]
    assert "): 1; people" in capsys.readouterr().out.splitlines()[-1]


def test_captions_are_verified_in_a_batch_of_their_own() -> None:
    emu("add", "--question", "caption", "--a", write_folder("p", ["red"]))
    store = opened()
    (batch,) = store.batches()
    ada = store.add_person("ada", "generalist")
    (assignment,) = store.lend(ada, batch, 1)
    store.answer(ada, assignment.token, {"text": "Plain red."}, "n", SEEN, {})
    emu("add", "--question", "verification", "--captions", "Captions")
    (item,) = store.items(store.batches()[1])
    assert (item.caption, item.author) == ("Plain red.", ada.id)


def test_rows_of_a_file_name_pictures_beside_it() -> None:
    write_folder("set/pictures", ["red", "blue"])
    Path("set/items.csv").write_text(
        "uid,path,concept\nfox,pictures/00000.png,game\nhare,pictures/00001.png,\n"
    )
    emu("add", "--question", "screening", "--file", "set/items.csv")
    (batch,) = opened().batches()
    assert [(item.name, item.group) for item in opened().items(batch)] == [("fox", "game"), ("hare", None)]


def test_what_add_refuses(capsys) -> None:
    a = write_folder("a", ["red"])
    assert "did you mean 'appeal'" in refused(capsys, "add", "--question", "apeal", "--a", a)
    assert "one of --a, --manifest" in refused(capsys, "add", "--question", "screening")
    assert "one of --a, --manifest" in refused(
        capsys, "add", "--question", "screening", "--a", a, "--file", "x.csv"
    )
    assert "--question for a new batch, or --batch" in refused(capsys, "add", "--a", a)
    assert "nowhere" in refused(capsys, "add", "--question", "screening", "--a", "nowhere")
    assert "did you mean 'num_people'" in refused(
        capsys, "add", "--question", "screening", "--num_peple", "3"
    )
    Path("a/00000.png").write_bytes(b"no picture")
    refused(capsys, "add", "--question", "screening", "--a", a)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "argv, said",
    [
        (("--question", "appeal", "--a", "a"), "needs A and B"),
        (("--question", "screening", "--a", "a", "--num_people", "0"), "num_people is 0"),
        (("--question", "verification", "--a", "a"), "has no caption"),
        (("--question", "verification", "--captions", "Captions"), "no batch 'Captions'"),
        (("--batch", "Screening", "--a", "a"), "no batch 'Screening'"),
    ],
)
def test_an_add_that_fails_leaves_nothing(capsys, argv: tuple[str, ...], said: str) -> None:
    write_folder("a", ["red", "blue"])
    assert said in refused(capsys, "add", *argv)
    assert not Path("runs").exists()
    Path("runs/annotation/exports").mkdir(parents=True)
    refused(capsys, "add", *argv)
    assert [path.name for path in Path("runs/annotation").iterdir()] == ["exports"]
    emu("add", "--question", "screening", "--title", "There already", "--a", "a")
    refused(capsys, "add", *argv)
    assert [batch.title for batch in opened().batches()] == ["There already"]


# --- people and answers -------------------------------------------------------------------------------------


@pytest.fixture
def answered() -> Store:
    """A screening of two pictures, one of them answered by ada."""
    emu("add", "--question", "screening", "--a", write_folder("p", ["red", "blue"]))
    store = opened()
    (batch,) = store.batches()
    ada = store.add_person("ada", "generalist")
    (assignment,) = store.lend(ada, batch, 1)
    store.answer(ada, assignment.token, {"choice": "keep"}, "n", SEEN, {})
    return store


def test_an_invitation_is_a_link(answered: Store, capsys) -> None:
    capsys.readouterr()
    emu("invite", "--name", "bob", "--role", "specialist", "--url", "https://pictures.example.org/")
    link = capsys.readouterr().out.strip()
    token = link.removeprefix("https://pictures.example.org/join/")
    assert answered.accept_invitation(token, "a long password").name == "bob"
    assert "role" in refused(capsys, "invite", "--name", "eve", "--role", "king")
    assert "ada is a generalist" in refused(capsys, "invite", "--name", "ada", "--role", "lead")


def test_batches_are_listed(answered: Store, capsys) -> None:
    answered.set_open(answered.batches()[0], False)
    capsys.readouterr()
    emu("batches")
    (batch,) = answered.batches()
    assert capsys.readouterr().out == f"{batch.public_id}  Screening: 1 of 4 answers, closed\n"


def test_answers_leave_and_come_back(answered: Store, capsys) -> None:
    (batch,) = answered.batches()
    capsys.readouterr()
    emu("export", "--batch", "Screening", "--format", "jsonl", "--out", "answers.jsonl")
    assert capsys.readouterr().out == "answers.jsonl\n"
    (row,) = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert (row["person"], row["answer"]) == ("ada", {"choice": "keep"})
    emu("add", "--question", "screening", "--file", "answers.jsonl", "--title", "Copy")
    emu("import", "--batch", "Copy", "--file", "answers.jsonl")
    assert capsys.readouterr().out.splitlines()[-1] == "items added: 0; answers added: 1"
    assert [one.answer for one in answered.answers(answered.batches()[1])] == [{"choice": "keep"}]
    emu("export", "--batch", batch.public_id, "--format", "log-csv")
    out = Path(capsys.readouterr().out.strip())
    assert out.parent == Path("runs/annotation/exports") and "keep" in out.read_text()


def test_what_export_and_import_refuse(answered: Store, capsys) -> None:
    assert "did you mean 'Screening'" in refused(capsys, "export", "--batch", "Screning")
    assert "did you mean 'decisions'" in refused(
        capsys, "export", "--batch", "Screening", "--format", "decision"
    )
    assert "export its decisions" in refused(capsys, "export", "--batch", "Screening", "--format", "votes")
    assert "say" in refused(capsys, "import", "--batch", "Screening", "--file", "answers.txt")
    assert "answers.csv" in refused(capsys, "import", "--batch", "Screening", "--file", "answers.csv")
    answered.add_batch("screening", "Screening")
    assert "2 batches are named 'Screening': give one of" in refused(capsys, "export", "--batch", "Screening")
    assert "holds no store" in refused(capsys, "export", "--batch", "Screening", "--store", "elsewhere")
    assert not Path("elsewhere").exists()
    assert "'exprt' is no command of emu annotate; did you mean 'export'?" in refused(capsys, "exprt")
