"""Pictures of every page of the annotation application, on the miniature's pictures.

    python -m benchmarks.annotation_pages --out results/evaluation/screenshots

A new store is filled as `emu annotate` fills it, people made of code answer, and Debian's chromium looks at
the real server. A picture is a palette of up to 256 colours.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.annotation_client import Served
from emu_lightning.annotation.questions import Answer, Photography
from emu_lightning.annotation.store import Assignment, Batch, Person, Store
from emu_lightning.files import write_whole
from emu_lightning.verbs.annotate import fill

CHROMIUM = "/usr/bin/chromium"
WINDOW = {"width": 1440, "height": 900}
LARGEST = 120_000  # bytes of a picture
READY = "body:not(.waits)"
GENERALISTS = ("Ada", "Ben", "Chidi", "Dunya", "Emre")
SPECIALISTS = ("Sofia", "Tom")
PASSWORD = "a long password"


def answered(
    store: Store, batch: Batch, person: Person, num: int, decide: Callable[[Assignment], Answer]
) -> None:
    """The person answers about so many items, a few seconds each."""
    rng = random.Random(f"{batch.question} {person.name}")
    for lent in store.lend(person, batch, num):
        now = time.time()
        times = {"shown_at": now - rng.uniform(2, 7), "submitted_at": now}
        store.answer(person, lent.token, decide(lent), lent.token, dict.fromkeys(lent.sides, True), times)


def fill_with_work(store: Store, folder: Path) -> dict[str, Batch]:
    """Fills the store, and answers some of it as people would who mostly like B more; batches by question."""
    fill(store, folder / "pictures")
    batches = {batch.question: batch for batch in store.batches()}
    rng = random.Random(0)
    generalists = [store.add_person(name, "generalist", PASSWORD) for name in GENERALISTS]
    specialists = [store.add_person(name, "specialist", PASSWORD) for name in SPECIALISTS]

    def of_pair(neither: str) -> Callable[[Assignment], Answer]:
        def decide(lent: Assignment) -> Answer:
            is_odd = random.Random(lent.item.name).random() < 0.25  # all find the other one better here
            better, worse = ("left", "right") if (lent.left_slot == "B") != is_odd else ("right", "left")
            return {"choice": rng.choices((better, neither, worse), (0.84, 0.06, 0.1))[0]}

        return decide

    def review(lent: Assignment) -> Answer:
        marks = {name: rng.choices((0, 1, 2), (1, 2, 3))[0] for name in Photography.criteria}
        accept = sum(marks.values()) > 6
        return {**marks, "accept": accept, "reasons": ["exceptional"] if accept else ["flat light"]}

    def screen(lent: Assignment) -> Answer:
        return {"choice": rng.choices(("keep", "unsure", "reject"), (5, 1, 3))[0]}

    for person in generalists:
        answered(store, batches["appeal"], person, 20, of_pair("tie"))
        answered(store, batches["faithfulness"], person, 8, of_pair("both"))
        answered(store, batches["screening"], person, 6, screen)
    for person in specialists:
        answered(store, batches["photography"], person, 12, review)
    for person in generalists[:3]:
        answered(store, batches["caption"], person, 3, lambda lent: {"text": lent.item.caption or "A shape."})
        answered(store, batches["verification"], person, 4, lambda lent: {"verdict": "accept"})
    store.invite("Farid", "specialist")
    store.log_refusal(generalists[0].id, "127.0.0.1", "403 GET /lead", "only a lead may see this")
    return batches


class Album:
    """Pictures of pages, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, page: Page, name: str, *, whole: bool = True) -> None:
        """Of the window, or of the ``whole`` page."""
        page.wait_for_load_state("networkidle")
        page.evaluate("document.fonts.ready")
        shot = Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB")
        for num_colours in (256, 128, 64, 32):  # noise in a picture takes much room
            small, content = shot.quantize(num_colours, Image.Quantize.MAXCOVERAGE, kmeans=1), io.BytesIO()
            small.save(content, "PNG", optimize=True)
            if len(content.getvalue()) < LARGEST:
                break
        path = write_whole(self._folder / f"{name}.png", content.getvalue())
        print(f"{path}: {num_colours} colours, {len(content.getvalue()) / 1000:.0f} kB", flush=True)


@contextmanager
def signed_in(browser: Browser, url: str, name: str) -> Iterator[Page]:
    context = browser.new_context(viewport=WINDOW)
    page = context.new_page()
    page.goto(f"{url}/login")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    yield page
    context.close()


def work_on(page: Page, url: str, batch: Batch) -> None:
    page.goto(f"{url}/work/{batch.public_id}")
    page.locator("#begin").click()
    page.wait_for_selector(READY)
    page.wait_for_timeout(300)  # what fades in has done so


def take_all(browser: Browser, url: str, store: Store, batches: dict[str, Batch], album: Album) -> None:
    visitor = browser.new_context(viewport=WINDOW).new_page()
    visitor.goto(f"{url}/login")
    album.take(visitor, "login")
    visitor.goto(f"{url}/join/{store.invite('Mo', 'generalist')}")
    album.take(visitor, "invitation")
    with signed_in(browser, url, "Ada") as page:
        album.take(page, "home")
        for name, question in (
            ("stage1", "screening"),
            ("appeal", "appeal"),
            ("faithfulness", "faithfulness"),
        ):
            work_on(page, url, batches[question])
            album.take(page, name, whole=False)
        work_on(page, url, batches["caption"])
        album.take(page, "caption_write", whole=False)
        page.goto(f"{url}/guideline/{batches['appeal'].public_id}")
        album.take(page, "guideline")
    with signed_in(browser, url, "Sofia") as page:
        work_on(page, url, batches["photography"])
        album.take(page, "stage2", whole=False)
        sheet = batches["photography"].public_id
        page.goto(f"{url}/sheet/{sheet}")
        album.take(page, "contact_sheet")
        work_on(page, url, batches["verification"])
        album.take(page, "caption_verify", whole=False)
    with signed_in(browser, url, "Lena") as page:
        album.take(page, "lead")
        for name, question in (("lead_pairs", "appeal"), ("lead_captions", "caption")):
            page.goto(f"{url}/lead/{batches[question].public_id}")
            album.take(page, name)
        page.goto(f"{url}/lead/{batches['photography'].public_id}/adjudicate")
        page.wait_for_timeout(300)
        album.take(page, "lead_decides", whole=False)
        for name in ("people", "security"):
            page.goto(f"{url}/lead/{name}")
            album.take(page, f"lead_{name}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/evaluation/screenshots"), help="folder")
    given = parser.parse_args(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        store = Store(f"sqlite:///{folder}/annotation.db")
        batches = fill_with_work(store, Path(folder))
        store.add_person("Lena", "lead", PASSWORD)
        served = Served(Path(folder))
        with served.running():
            browser = driver.chromium.launch(executable_path=CHROMIUM)
            take_all(browser, served.url, store, batches, Album(given.out))
            browser.close()
        store.close()


if __name__ == "__main__":
    main()
