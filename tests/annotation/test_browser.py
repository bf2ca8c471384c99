"""The working page in a real browser against a real server: by keyboard, by touch, over a bad network."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image

from emu_lightning.annotation.access import Settings
from emu_lightning.annotation.questions import QUESTIONS
from emu_lightning.annotation.server import create_app
from emu_lightning.annotation.store import Batch, NewItem, Store

CHROMIUM = Path("/usr/bin/chromium")
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
MODELS = {"A": "secret-base-model", "B": "secret-tuned-model"}
READY = "body:not(.waits)"

# Shifts of what is on the page, without those that follow an input at once.
WATCH_SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const shift of list.getEntries()) {
    const moved = shift.sources.map(({ node }) => node?.outerHTML?.slice(0, 80));
    if (!shift.hadRecentInput) window.shifts.push([shift.value, ...moved]);
  }
}).observe({ type: "layout-shift", buffered: true });
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of equal shape; the second of each has twice the pixels."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index, (height, width) in enumerate([(160, 240), (200, 200), (240, 160)]):
        for slot, scale in (("A", 1), ("B", 2)):
            noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            noise.resize((scale * width, scale * height)).save(folder / f"{index}{slot}.png")
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Iterator[Site]:
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('store') / 'votes.db'}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(store, Settings("k" * 40, picture_roots=(pictures,)))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Site(store, pictures, f"http://127.0.0.1:{port}")
    server.should_exit = True
    thread.join()
    store.close()


class Site:
    """The server, and what a test puts on it."""

    def __init__(self, store: Store, pictures: Path, url: str) -> None:
        self.store, self.pictures, self.url = store, pictures, url

    def batch(self, question: str, num: int = 4, **settings: object) -> Batch:
        batch = self.store.add_batch(question, f"A batch of {question}", 1, settings)
        asks = batch.asks
        items = [
            NewItem(
                f"item-{index}",
                {
                    slot: (self.pictures / f"{index % 3}{slot}.png", MODELS[slot])
                    for slot in ("A", "B")[: asks.num_pictures]
                },
                prompt="a red fox asleep on a blue sofa" if asks.shows_prompt else None,
                caption="A red fox sleeps." if asks.shows_caption else None,
                group="animal",
            )
            for index in range(num)
        ]
        self.store.add_items(batch, items)
        return batch

    def link(self, role: str = "generalist") -> str:
        """Lets a new person in."""
        return f"{self.url}/join/{self.store.invite(f'person {time.monotonic_ns()}', role)}"

    def choices(self, batch: Batch) -> list[str]:
        """What was answered, in sides, oldest first."""
        return [batch.asks.to_sides(one.answer, one.left_slot)["choice"] for one in self.store.answers(batch)]


Enter = Callable[..., Any]


@pytest.fixture
def enter(browser: Any, site: Site) -> Iterator[Enter]:
    """A new person's page, on the working page of a batch where one is given, its guideline read."""
    contexts = []

    def enter(
        batch: Batch | None = None, role: str = "generalist", viewport: dict[str, int] = DESKTOP
    ) -> Any:
        is_phone = viewport is PHONE
        context = browser.new_context(viewport=viewport, has_touch=is_phone, is_mobile=is_phone)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.add_init_script(WATCH_SHIFTS)
        page.wrong = []
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.goto(site.link(role))
        page.get_by_role("button", name="Begin").click()
        if batch is not None:
            page.goto(f"{site.url}/work/{batch.public_id}")
            page.locator("#begin").click()
        return page

    yield enter
    for context in contexts:
        assert not [wrong for page in context.pages for wrong in page.wrong]
        context.close()


def settled(page: Any, count: Callable[[], Any], number: Any) -> None:
    """Waits until so many answers are on disk, or something else is so."""
    deadline = time.monotonic() + 20
    while count() != number and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    assert count() == number


def test_a_batch_of_pairs_by_keyboard_alone(enter: Enter, site: Site) -> None:
    batch = site.batch("appeal", 5)
    page = enter()
    asked: list[str] = []
    told: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    replies: list[Any] = []
    page.on("response", lambda reply: replies.append(reply))
    page.locator(f'a[href="/work/{batch.public_id}"]').focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#guideline:modal")
    page.keyboard.press("Enter")
    pressed = ["ArrowLeft", "ArrowRight", "ArrowDown", "b", "t"]
    for number, key in enumerate(pressed, start=1):
        page.wait_for_selector(READY)
        told.append(page.content())
        page.keyboard.press(key)
        settled(page, lambda: len(site.choices(batch)), number)
    page.get_by_text("Nothing is left for you here").wait_for()
    assert site.choices(batch) == ["left", "right", "tie", "right", "tie"]
    for one in site.store.answers(batch):
        times = one.times
        assert (
            max(times["loaded_at"].values())
            <= times["shown_at"]
            <= times["first_input_at"]
            <= times["submitted_at"]
        )
    told += [reply.text() for reply in replies if "/api/" in reply.url]
    assert len(told) >= 11  # pages, tasks, replies
    for text in (*asked, *told):
        for secret in (*MODELS.values(), "item-", "fox", str(site.pictures)):
            assert secret not in text


def test_undo_brings_the_last_answer_back_to_be_changed(enter: Enter, site: Site) -> None:
    batch = site.batch("appeal")
    page = enter(batch)
    page.wait_for_selector(READY)
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(READY)
    page.keyboard.press("z")
    page.get_by_text("Your last answer is marked").wait_for()
    assert page.locator("button.last").inner_text().startswith("Left")
    page.wait_for_selector(READY)
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(READY)
    page.keyboard.press("ArrowDown")
    settled(page, lambda: len(site.store.events(batch)), 4)
    assert [event.kind for event in site.store.events(batch)] == ["answer", "undo", "answer", "answer"]
    assert site.choices(batch) == ["right", "tie"]


def test_no_answer_before_both_pictures_are_shown(enter: Enter, site: Site) -> None:
    batch = site.batch("appeal")
    page = enter()
    held: list[Any] = []
    page.route("**/pictures/*/right", lambda route: held.append(route))
    page.goto(f"{site.url}/work/{batch.public_id}")
    page.locator("#begin").click()
    settled(page, lambda: page.evaluate("document.querySelectorAll('.pane').length"), 2)
    while not held:
        page.wait_for_timeout(20)
    page.keyboard.press("ArrowLeft")
    page.get_by_text("an answer counts once both pictures are shown").wait_for()
    page.get_by_role("button", name="Right").click()
    page.wait_for_timeout(100)
    assert site.store.events(batch) == []
    while page.locator(READY).count() == 0:
        for route in held:
            route.continue_()
        held.clear()
        page.wait_for_timeout(20)
    page.keyboard.press("ArrowLeft")
    settled(page, lambda: len(site.choices(batch)), 1)


# The part of each picture that its pane shows: left, top, right, bottom as shares of the picture.
REGIONS = """() => [...document.querySelectorAll(".pane")].map((pane) => {
  const [room, shown] = [pane, pane.querySelector("img")].map((one) => one.getBoundingClientRect());
  return [room.left - shown.left, room.top - shown.top, room.right - shown.left, room.bottom - shown.top]
    .map((distance, i) => distance / (i % 2 ? shown.height : shown.width));
})"""


def test_zoom_shows_the_same_region_on_both_sides(enter: Enter, site: Site) -> None:
    page = enter(site.batch("appeal"))
    page.emulate_media(reduced_motion="reduce")
    page.wait_for_selector(READY)
    whole = page.evaluate(REGIONS)
    page.keyboard.press(" ")
    full = page.evaluate(REGIONS)
    assert full != whole

    box = page.locator(".pane").first.bounding_box()
    x, y = 0.3, 0.6  # of the pane
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    under = [left + x * (right - left) for left, _, right, _ in full]
    page.mouse.wheel(0, -240)
    page.wait_for_timeout(50)
    closer = page.evaluate(REGIONS)
    assert closer[0][2] - closer[0][0] < 0.9 * (full[0][2] - full[0][0])
    assert [left + x * (right - left) for left, _, right, _ in closer] == pytest.approx(under, abs=0.005)

    page.mouse.down()
    page.mouse.move(box["x"] + x * box["width"] - 60, box["y"] + y * box["height"] - 30, steps=3)
    page.mouse.up()
    moved = page.evaluate(REGIONS)
    width = moved[0][2] - moved[0][0]
    assert moved[0][0] - closer[0][0] == pytest.approx(60 / box["width"] * width, rel=0.05)
    for left, right in (full, closer, moved):
        assert left == pytest.approx(right, abs=0.005)

    page.mouse.click(box["x"] + 10, box["y"] + 10)
    assert page.evaluate(REGIONS) == [pytest.approx(one, abs=0.005) for one in whole]


def test_a_lost_reply_is_asked_for_again_and_counts_once(enter: Enter, site: Site) -> None:
    batch = site.batch("appeal")
    page = enter(batch)
    page.wait_for_selector(READY)
    nonces: list[str] = []

    def answer(route: Any) -> None:
        nonces.append(route.request.post_data_json["nonce"])
        if len(nonces) == 1:
            route.fetch()  # it arrives, its reply does not
        if len(nonces) <= 2:
            route.abort()
        else:
            route.continue_()

    page.route("**/api/answer", answer)
    page.keyboard.press("ArrowLeft")
    page.get_by_text("Your answer is kept on this device").wait_for()
    page.wait_for_selector(READY)
    page.keyboard.press("ArrowRight")  # nobody waits for the network
    page.get_by_text("2 answers are kept on this device").wait_for()
    while len(nonces) < 4:
        page.evaluate("dispatchEvent(new Event('online'))")
        page.wait_for_timeout(50)
    settled(page, lambda: len(site.choices(batch)), 2)
    assert nonces[0] == nonces[1] == nonces[2] != nonces[3]
    assert site.choices(batch) == ["left", "right"]
    warned = "document.querySelector('#note').classList.contains('warn')"
    settled(page, lambda: page.evaluate(warned), False)
    kept = "Object.keys(localStorage).filter((key) => key.includes('.answer.'))"
    settled(page, lambda: page.evaluate(kept), [])


def test_an_answer_outlives_the_page_and_the_session(enter: Enter, site: Site) -> None:
    batch = site.batch("appeal")
    page = enter(batch)
    page.wait_for_selector(READY)
    page.route("**/api/answer", lambda route: route.abort())
    page.keyboard.press("ArrowLeft")
    page.get_by_text("Your answer is kept on this device").wait_for()
    page.unroute("**/api/answer")
    page.reload()
    settled(page, lambda: len(site.choices(batch)), 1)
    page.wait_for_selector(READY)

    (person,) = {one.person for one in site.store.answers(batch)}
    site.store.end_sessions(person)
    page.keyboard.press("ArrowLeft")
    page.get_by_role("link", name="Sign in").wait_for()
    assert "your answer is kept" in page.locator("#note").inner_text()
    page.context.pages[0].goto(f"{site.url}/join/{site.store.invite(person.name, person.role)}")
    page.get_by_role("button", name="Begin").click()
    page.goto(f"{site.url}/work/{batch.public_id}")
    settled(page, lambda: len(site.choices(batch)), 2)


def test_a_refused_answer_is_told_in_one_line_and_work_goes_on(enter: Enter, site: Site) -> None:
    batch = site.batch("appeal")
    page = enter(batch)
    page.wait_for_selector(READY)
    (token,) = [
        url.split("/")[-2]
        for url in page.evaluate("performance.getEntriesByType('resource').map(({ name }) => name)")
        if url.endswith("/left")
    ][:1]
    person = next(one for one in site.store.people()[::-1] if _holds(site, one, token))
    site.store.answer(
        person, token, {"choice": "tie"}, "from-another-window", {"left": True, "right": True}, {}
    )
    page.keyboard.press("ArrowLeft")
    page.get_by_text("Your last answer was not taken: you have answered this already.").wait_for()
    page.wait_for_selector(READY)
    page.keyboard.press("ArrowRight")
    settled(page, lambda: len(site.choices(batch)), 2)
    assert site.choices(batch) == ["tie", "right"]


def _holds(site: Site, person: Any, token: str) -> bool:
    try:
        site.store.picture(person, token, "left")
    except Exception:
        return False
    return True


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_moves_while_pictures_load(enter: Enter, site: Site, viewport: dict[str, int]) -> None:
    batch = site.batch("faithfulness")
    page = enter(viewport=viewport)
    held: list[Any] = []
    page.route("**/pictures/**", lambda route: held.append(route))
    page.goto(f"{site.url}/work/{batch.public_id}")
    page.locator("#begin").click()
    for number in range(1, 4):
        while len(held) < 2:
            page.wait_for_timeout(20)
        page.wait_for_timeout(600)  # the browser forgives what follows an input within half a second
        boxes = [frame.bounding_box() for frame in page.locator(".frame").all()]
        arrived, held[:] = held[:], []
        for route in arrived:
            route.continue_()
        page.wait_for_selector(READY)
        for box, image in zip(boxes, page.locator(".frame img").all(), strict=True):
            assert image.bounding_box() == pytest.approx(box)
        page.wait_for_timeout(100)
        page.keyboard.press("ArrowDown")
        settled(page, lambda: len(site.choices(batch)), number)
    page.wait_for_timeout(600)
    shifts = page.evaluate("window.shifts")
    assert sum(value for value, *_ in shifts) < 0.02, shifts


def test_every_page_fits_a_phone(enter: Enter, site: Site) -> None:
    batches = {name: site.batch(name, 2) for name in QUESTIONS}
    wide = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    page = enter(role="specialist", viewport=PHONE)
    urls = ["/", f"/sheet/{batches['photography'].public_id}", f"/guideline/{batches['appeal'].public_id}"]
    for url in urls:
        page.goto(site.url + url)
        assert page.evaluate(wide) == 0, url
    for name in ("photography", "caption", "appeal", "faithfulness"):
        page.goto(f"{site.url}/work/{batches[name].public_id}")
        page.locator("#begin").click()
        page.wait_for_selector(READY)
        assert page.evaluate(wide) == 0, name
        for button in page.locator(".answers button").all():
            box = button.bounding_box()
            assert box["height"] >= 44 and box["y"] + box["height"] <= PHONE["height"], name
        if batches[name].asks.num_pictures == 2:
            for pane in page.locator(".frame").all():
                box = pane.bounding_box()
                assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844
    page.get_by_role("button", name=re.compile("Upper|Left")).tap()
    settled(page, lambda: len(site.choices(batches["faithfulness"])), 1)
    lead = enter(role="lead", viewport=PHONE)
    for url in (
        "/lead",
        "/lead/people",
        "/lead/security",
        *(f"/lead/{one.public_id}" for one in batches.values()),
    ):
        lead.goto(site.url + url)
        assert lead.evaluate(wide) == 0, url


def test_photography_in_five_marks_and_a_verdict(enter: Enter, site: Site) -> None:
    batch = site.batch("photography")
    page = enter(batch, role="specialist")
    page.wait_for_selector(READY)
    for key in "llk":
        page.keyboard.press(key)
    page.keyboard.press("ArrowRight")
    page.get_by_text("Not yet: subject and background has no mark.").wait_for()
    page.keyboard.press("j")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("k")  # mends the subject
    page.keyboard.press("l")
    page.get_by_role("button", name="seen better").click()
    page.keyboard.press("c")
    page.keyboard.type("Flat, nearly.")
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    settled(page, lambda: len(site.store.answers(batch)), 1)
    assert site.store.answers(batch)[0].answer == {
        **{"composition": 2, "lighting": 2, "colour": 1, "subject": 1, "story": 2},
        **{"accept": True, "reasons": ["seen better"], "comment": "Flat, nearly."},
    }
    page.wait_for_selector(READY)
    assert page.locator("[aria-pressed=true]").count() == 0, "the next picture begins without marks"


def test_a_caption_survives_a_reload_and_is_then_read_by_another(enter: Enter, site: Site) -> None:
    batch = site.batch("caption", 1)
    page = enter(batch)
    page.wait_for_selector(READY)
    page.keyboard.type("A fox on a sofa,")
    assert page.locator("#length").inner_text() == "5 words · 16 of 2000 characters"
    page.reload()
    page.wait_for_selector(READY)
    page.locator("#text").press("End")
    page.keyboard.type(" asleep.")
    page.keyboard.press("Control+Enter")
    settled(page, lambda: len(site.store.answers(batch)), 1)
    assert site.store.answers(batch)[0].answer == {"text": "A fox on a sofa, asleep."}

    batch = site.batch("verification", 3)
    page = enter(batch)
    page.wait_for_selector(READY)
    page.keyboard.press("a")
    page.wait_for_selector(READY)
    page.keyboard.press("e")
    page.locator("#text").press("End")
    page.keyboard.type(" Snow falls.")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(READY)
    page.keyboard.press("r")
    settled(page, lambda: len(site.store.answers(batch)), 3)
    assert [one.answer for one in site.store.answers(batch)] == [
        {"verdict": "accept"},
        {"verdict": "edit", "text": "A red fox sleeps. Snow falls."},
        {"verdict": "reject"},
    ]


def test_keys_can_be_changed_and_stay_changed(enter: Enter, site: Site) -> None:
    batch = site.batch("screening")
    page = enter(batch)
    page.wait_for_selector(READY)
    page.keyboard.press("?")
    page.get_by_role("button", name="Keep: →. Press to change.").click()
    page.keyboard.press("z")
    page.get_by_text("“Undo” had this key; it now has →.").wait_for()
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector(READY)
    assert page.locator("[data-action=keep] kbd").inner_text() == "Z"
    page.keyboard.press("z")
    settled(page, lambda: len(site.choices(batch)), 1)
    assert site.choices(batch) == ["keep"]


def test_a_new_guideline_is_read_before_the_next_answer(enter: Enter, site: Site) -> None:
    batch = site.batch("screening", 8)
    page = enter(batch)
    page.wait_for_selector(READY)
    site.store.add_guideline(batch, "Keep only foxes.")
    for number in range(1, 4):
        page.wait_for_selector(READY)
        page.keyboard.press("k")
        settled(page, lambda: len(site.choices(batch)), number)
    page.locator("#guideline:modal").get_by_text("Keep only foxes.").wait_for()
    page.keyboard.press("k")
    page.wait_for_timeout(100)
    assert len(site.choices(batch)) == 3
    page.keyboard.press("Enter")
    page.keyboard.press("k")
    settled(page, lambda: len(site.choices(batch)), 4)


def test_a_lead_decides_by_keyboard(enter: Enter, site: Site) -> None:
    batch = site.store.add_batch("photography", "Disputed", 2)
    site.store.add_items(batch, [NewItem("fox", {"A": (site.pictures / "0A.png", None)})])
    for index, accept in enumerate((True, False)):
        person = site.store.add_person(f"judge {time.monotonic_ns()}", "specialist")
        (lent,) = site.store.lend(person, batch, 1)
        marks = dict.fromkeys(batch.asks.criteria, index)
        site.store.answer(person, lent.token, {**marks, "accept": accept}, lent.token, {"only": True}, {})
    page = enter(role="lead")
    page.goto(f"{site.url}/lead/{batch.public_id}/adjudicate")
    page.wait_for_load_state()
    page.keyboard.press("y")
    page.get_by_text("Nothing to decide").wait_for()
    assert [one.answer["accept"] for one in site.store.adjudications(batch)] == [True]
