"""`emu annotate`: people screen, review, caption and compare pictures, on pages that this machine serves.

emu annotate                                        serve; the first time with pictures of the miniature
emu annotate add --question appeal --a DIR --b DIR  a batch of pictures to be asked about
emu annotate invite --name ada --role generalist    a link that lets one person in, once
emu annotate batches                                what there is, and how far it is
emu annotate export --batch NAME --format csv       what people answered
emu annotate import --batch NAME --file FILE        items or answers from elsewhere
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emu_lightning.files import write_whole
from emu_lightning.verbs.arguments import call

if TYPE_CHECKING:  # its packages may not be installed; jsonargparse imports it for what has a signature
    from emu_lightning.annotation.store import Batch, NewItem, Store

FOLDER = "runs/annotation"
PORT = 8344
PACKAGES = ("argon2", "fastapi", "itsdangerous", "jinja2", "python_multipart", "sqlalchemy", "uvicorn")
QUICKSTART = Path("runs/quickstart")  # its base and tuned are compared in a new store
NUM_FILLED = 24  # pictures, and pairs, of a new store
SIDE = 256  # of those that are drawn for it, in pixels


def serve(
    store: str = FOLDER,
    database: str | None = None,
    host: str = "127.0.0.1",
    port: int = PORT,
    url: str | None = None,
    roots: list[str] | None = None,
) -> None:
    """Serves the application until Ctrl-C. Further: emu annotate add, invite, batches, export, import.

    A new store is filled with pictures of the miniature, and links for a lead, a generalist and a specialist
    are printed.

    Args:
        store: folder of the database, the key that signs sessions, and copied pictures.
        database: URL of a PostgreSQL database instead, such as postgresql+psycopg://user@host/name.
        host: address to listen on; only this machine can reach the default.
        port: to listen on.
        url: address under which people reach it, such as https://pictures.example.org behind a proxy.
        roots: folders whose pictures a lead may import over the web, besides the store's own.
    """
    from emu_lightning.annotation.access import Settings, read_secret_key
    from emu_lightning.annotation.server import create_app
    from emu_lightning.annotation.server import serve as run

    _check_free(host, port)
    url = (url or f"http://{f'[{host}]' if ':' in host else host}:{port}").rstrip("/")
    is_https = url.startswith("https://")
    if not (is_https or _is_loopback(host)):
        print(
            f"emu: warning: other machines reach {host} without https, so that passwords can be read on the "
            "way: put a proxy in front and give its address, --url https://...",
            file=sys.stderr,
        )
    with _opened(store, database, make=True) as opened:
        if not opened.batches():
            fill(opened, Path(store) / "pictures")
        if not opened.people():
            print("each link lets one person in, once, within 14 days:")
            print(f"  lead        {url}/join/{opened.invite('lead', 'lead')}")
            print(f"  generalist  {url}/join/{opened.invite('generalist', 'generalist')}")
            print(f"  specialist  {url}/join/{opened.invite('specialist', 'specialist')}")
        settings = Settings(
            secret_key=read_secret_key(Path(store) / "secret.key"),
            is_https=is_https,
            picture_roots=tuple(Path(root) for root in [store, *(roots or [])]),
        )
        print(f"serving {url} until Ctrl-C", flush=True)
        run(create_app(opened, settings), host, port)


def add(
    question: str | None = None,
    a: str | None = None,
    b: str | None = None,
    manifest: str | None = None,
    captions: str | None = None,
    file: str | None = None,
    prompts_file: str | None = None,
    keep: str | None = None,
    caption: str = "caption",
    concept: str = "concept",
    title: str | None = None,
    num_people: int | None = None,
    extra_rater: bool = False,
    gold_every: int | None = None,
    guideline: str | None = None,
    batch: str | None = None,
    store: str = FOLDER,
    database: str | None = None,
) -> None:
    """Adds a batch: a question asked of each picture or pair of --a, --manifest, --captions or --file.

    Args:
        question: screening, photography, caption, verification, appeal or faithfulness.
        a: folder of pictures, by `emu sample`, `emu evaluate`, or made elsewhere.
        b: folder of the other model's, for questions about two pictures of one prompt.
        manifest: Parquet file of `emu curate`.
        captions: batch of captions, which a verification asks about.
        file: .csv, .jsonl, .parquet, or Label Studio's .json; each row names a picture.
        prompts_file: what the pictures of --a and --b show, where no manifest.json beside them says it.
        keep: column of the manifest; only rows where it is true.
        caption: column of the manifest.
        concept: column of the manifest; pictures of one concept share a contact sheet.
        title: of the batch, for everyone to read.
        num_people: how many people answer about one item; the question's own number when left out.
        extra_rater: ask further people about a pair without a majority.
        gold_every: one item in so many is one with a known answer.
        guideline: text file, instead of the question's own guideline.
        batch: batch to add to, instead of a new one.
        store: folder of the store.
        database: as for `emu annotate`.
    """
    from emu_lightning.annotation import exchange
    from emu_lightning.annotation.store import read_pictures

    if (question is None) == (batch is None):
        raise ValueError("give --question for a new batch, or --batch to add to one; one of the two")
    if question is not None:
        _check_question(question)
    folders: dict[Any, Any] = {"A": a} if b is None else {"A": a, "B": b}
    sources: dict[str, tuple[str | None, Callable[[str, Store], list[NewItem]]]] = {
        "--a": (a, lambda _, opened: exchange.folder_items(folders, prompts_file)),
        "--manifest": (
            manifest,
            lambda path, opened: exchange.manifest_items(
                path, Path(store) / "unpacked", keep, caption, concept
            ),
        ),
        "--captions": (
            captions,
            lambda name, opened: exchange.caption_items(opened, find_batch(opened, name)),
        ),
        "--file": (
            file,
            lambda path, opened: exchange.row_items(exchange.read_rows(path), _anywhere(path)),
        ),
    }
    given = [(value, read) for value, read in sources.values() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give pictures by one of {', '.join(sources)}")
    ((value, read),) = given
    text = None if guideline is None else Path(guideline).read_text(encoding="utf-8")
    settings = {"extra_rater": extra_rater} | ({} if gold_every is None else {"gold_every": gold_every})
    with _left_as_found(Path(store), database), _opened(store, database, make=True) as opened:
        items = read(value, opened)
        into = None if batch is None else find_batch(opened, batch)
        files = read_pictures(items) if into is None else opened.new_pictures(into, items)
        with opened.at_once():
            into = into or _new_batch(opened, str(question), title, num_people, settings, text)
            num = opened.add_items(into, items, files)
    print(f"items added to {into.title!r} ({into.public_id}): {num:,}; people for each: {into.num_people}")


def invite(
    name: str,
    role: Literal["generalist", "specialist", "lead"],
    url: str = f"http://127.0.0.1:{PORT}",
    store: str = FOLDER,
    database: str | None = None,
) -> None:
    """Prints a link that lets one person in, once, within 14 days; someone known may choose a new password.

    Args:
        name: of the person; leads see it, others do not.
        role: generalists screen, specialists review, both write captions and compare; leads watch and decide.
        url: address under which people reach the server.
        store: folder of the store.
        database: as for `emu annotate`.
    """
    with _opened(store, database) as opened:
        print(f"{url.rstrip('/')}/join/{opened.invite(name, role)}")


def batches(store: str = FOLDER, database: str | None = None) -> None:
    """Prints the batches, and how many of the answers that they want are given.

    Args:
        store: folder of the store.
        database: as for `emu annotate`.
    """
    with _opened(store, database) as opened:
        for batch in opened.batches():
            progress = opened.progress(batch)
            state = "" if batch.is_open else ", closed"
            print(f"{batch.public_id}  {batch.title}: {progress.done:,} of {progress.total:,} answers{state}")


def export(
    batch: str,
    format: str = "csv",
    out: str | None = None,
    store: str = FOLDER,
    database: str | None = None,
) -> None:
    """Writes what people answered.

    Args:
        batch: its name or title.
        format: all answers that count as parquet, csv, jsonl or labelstudio; all that happened as
            log-parquet, log-csv or log-jsonl; votes for `emu evaluate`; decisions for `emu curate`.
        out: file; in the store's folder when left out.
        store: folder of the store.
        database: as for `emu annotate`.
    """
    from emu_lightning.annotation.exchange import EXPORTS

    if format not in EXPORTS:
        raise ValueError(f"format {format!r} is not known{_did_you_mean(format, EXPORTS)}")
    with _opened(store, database) as opened:
        chosen = find_batch(opened, batch)
        content = EXPORTS[format].make(opened, chosen)
    name = f"{chosen.question}-{chosen.public_id}{EXPORTS[format].suffix}"
    print(write_whole(out or Path(store) / "exports" / name, content))


def import_(batch: str, file: str, store: str = FOLDER, database: str | None = None) -> None:
    """Adds items and answers to a batch, those that it does not have.

    Args:
        batch: its name or title.
        file: .csv, .jsonl, .parquet, or Label Studio's .json, as `emu annotate export` writes them.
        store: folder of the store.
        database: as for `emu annotate`.
    """
    from emu_lightning.annotation import exchange

    with _opened(store, database) as opened:
        rows = exchange.read_rows(file)
        num_items, num_answers = exchange.import_rows(
            opened, find_batch(opened, batch), rows, _anywhere(file)
        )
    print(f"items added: {num_items:,}; answers added: {num_answers:,}")


def fill(store: Store, folder: Path) -> None:
    """Batches of each question on pictures of the miniature, so that there is something to see.

    Pairs are those of an earlier `emu quickstart`, or of the synthetic world: each scene as most people shoot
    it, and as a skilled photographer does.
    """
    from emu_lightning.annotation import exchange
    from emu_lightning.annotation.store import NewItem

    pool = folder / "pool"
    pictures = [
        NewItem(f"{row:05d}", {"A": (pool / f"{row:05d}.png", None)}, caption=caption, group=concept)
        for row, (caption, concept) in enumerate(draw_world(pool, seed=1, skilled_fraction=0.3))
    ]
    pair = [QUICKSTART / "base", QUICKSTART / "tuned"]
    if not all((each / "manifest.json").is_file() for each in pair):
        pair = [folder / "ordinary", folder / "skilled"]
        for each, fraction in zip(pair, (0.0, 1.0), strict=True):
            draw_world(each, seed=2, skilled_fraction=fraction)
    pairs = exchange.folder_items({"A": pair[0], "B": pair[1]})[:NUM_FILLED]
    with store.at_once():
        for question, items in {
            "screening": pictures,
            "photography": pictures,
            "caption": pictures,
            "verification": pictures,
            "appeal": pairs,
            "faithfulness": pairs,
        }.items():
            store.add_items(_new_batch(store, question), items)


def draw_world(folder: Path, seed: int, skilled_fraction: float) -> list[tuple[str, str]]:
    """Draws the synthetic world into a folder such as `emu sample` makes; captions and backgrounds."""
    from PIL import Image

    from emu_lightning.data.world import World

    world = World(SIDE, NUM_FILLED, seed, skilled_fraction)
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(len(world)):
        Image.fromarray(world[row].image).save(folder / f"{row:05d}.png")
    scenes = [world.describe(row)[0] for row in range(len(world))]
    prompts = [scene.caption for scene in scenes]
    write_whole(folder / "manifest.json", json.dumps({"prompts": prompts}, indent=1) + "\n")
    return [(scene.caption, scene.background) for scene in scenes]


def find_batch(store: Store, name: str) -> Batch:
    """The batch of this public id or title.

    Raises:
        ValueError: there is none, or more than one.
    """
    batches = store.batches()
    found = [batch for batch in batches if name in (batch.public_id, batch.title)]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(batch.public_id for batch in found)
        raise ValueError(f"{len(found)} batches are named {name!r}: give one of {ids}")
    names = [text for batch in batches for text in (batch.title, batch.public_id)]
    raise ValueError(f"there is no batch {name!r}{_did_you_mean(name, names)}")


def _new_batch(
    store: Store,
    question: str,
    title: str | None = None,
    num_people: int | None = None,
    settings: dict[str, Any] | None = None,
    guideline: str | None = None,
) -> Batch:
    from emu_lightning.annotation.questions import QUESTIONS

    if title is None:
        taken = {batch.title for batch in store.batches()}
        plain = QUESTIONS[question].title
        numbered = (f"{plain} {number}" for number in range(2, len(taken) + 3))
        title = next(name for name in (plain, *numbered) if name not in taken)
    return store.add_batch(question, title, num_people, settings, guideline)


def _check_question(question: str) -> None:
    from emu_lightning.annotation.questions import QUESTIONS

    if question not in QUESTIONS:
        raise ValueError(f"question {question!r} is not known{_did_you_mean(question, QUESTIONS)}")


def _anywhere(file: str) -> list[Path]:
    """Where pictures named in a file of one's own may lie; relative paths start beside it."""
    return [Path(file).parent, Path("/")]


@contextmanager
def _left_as_found(folder: Path, database: str | None) -> Iterator[None]:
    """A store that was not there, and its folder, are gone again where what would have filled it fails."""
    from emu_lightning.annotation.store import Store

    file = folder / "annotation.db"
    is_new = database is None and not file.exists()
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        if is_new and file.exists():
            made = Store(f"sqlite:///{file}")
            is_empty = not (made.batches() or made.people())  # nobody else has filled it meanwhile
            made.close()
            if is_empty:
                for suffix in ("", "-wal", "-shm"):
                    Path(f"{file}{suffix}").unlink(missing_ok=True)
        if missing and not file.exists():
            shutil.rmtree(folder, ignore_errors=True)
            for each in missing[1:]:
                with suppress(OSError):
                    each.rmdir()
        raise


@contextmanager
def _opened(folder: str, database: str | None, make: bool = False) -> Iterator[Store]:
    """The store of a folder or database.

    Raises:
        ValueError: the database cannot be reached, or refuses.
        FileNotFoundError: there is none, and none is to be made.
    """
    from sqlalchemy.exc import SQLAlchemyError

    from emu_lightning.annotation.store import Store

    file = Path(folder) / "annotation.db"
    if database is None and not make and not file.is_file():
        raise FileNotFoundError(f"{folder} holds no store: make one by `emu annotate`, or name its --store")
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        store = Store(database or f"sqlite:///{file}")
        try:
            yield store
        finally:
            store.close()
    except (SQLAlchemyError, ModuleNotFoundError) as error:
        # Not the URL, in which there may be a password.
        named = "the database" if database else f"the database {file}"
        raise ValueError(f"{named} cannot be used: {str(error).splitlines()[0]}") from None


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot listen on port {port} of {host} ({reason}): is another `emu annotate` running? "
            f"give another --port"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f": there is {', '.join(names) or 'none yet'}"


COMMANDS: dict[str, Callable[..., None]] = {
    "add": add,
    "invite": invite,
    "batches": batches,
    "export": export,
    "import": import_,
}


def main(argv: list[str]) -> None:
    if any(find_spec(package) is None for package in PACKAGES):
        raise ValueError("annotation needs further packages: pip install 'emu_lightning[annotation]'")
    if not argv or argv[0].startswith("-"):
        call(serve, argv, "emu annotate")
        return
    command, *rest = argv
    if command not in COMMANDS:
        raise ValueError(f"{command!r} is no command of emu annotate{_did_you_mean(command, COMMANDS)}")
    call(COMMANDS[command], rest, f"emu annotate {command}")
