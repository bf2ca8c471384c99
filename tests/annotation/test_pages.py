"""The pages, asked for as a browser does: who sees what, what a form does, and what a lead is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from emu_lightning.annotation import pages
from emu_lightning.annotation.access import Settings
from emu_lightning.annotation.pages import Finding, duration, findings, share, to_look_at
from emu_lightning.annotation.questions import QUESTIONS
from emu_lightning.annotation.server import create_app
from emu_lightning.annotation.store import (
    INVITATION_SECONDS,
    Batch,
    NewItem,
    Person,
    PersonStanding,
    Standing,
    Store,
)

PASSWORD = "correct horse"
PACKAGE = Path(pages.__file__).parent
MARKS = {"composition": 2, "lighting": 2, "colour": 1, "subject": 2, "story": 2}

MakeItems = Callable[..., list[NewItem]]


@pytest.fixture
def visit(sqlite_store: Store, picture_files: list[Path]) -> Callable[..., TestClient]:
    """A browser of its own at each call, signed in where a name is given."""
    app = create_app(sqlite_store, Settings("k" * 40, picture_roots=(picture_files[0].parent,)))

    def visit(name: str | None = None) -> TestClient:
        client = TestClient(app)
        if name is not None:  # by a link: passwords are slow on purpose
            (person,) = (one for one in sqlite_store.people() if one.name == name)
            link = f"/join/{sqlite_store.invite(name, person.role)}"
            assert post(client, link, link).url.path in ("/", "/lead")
        return client

    return visit


@pytest.fixture
def crew(sqlite_store: Store) -> dict[str, Person]:
    return {
        name: sqlite_store.add_person(name, role)
        for name, role in (
            ("Ana", "generalist"),
            ("Sofia", "specialist"),
            ("Tom", "specialist"),
            ("Lena", "lead"),
        )
    }


def post(client: TestClient, page: str, url: str, **fields: str):
    """Fills in the form of a page and sends it."""
    token = re.search(r'name="form_token" value="(\w+)"', client.get(page).text)
    assert token, f"{page} has no form"
    return client.post(url, data={"form_token": token[1], **fields})


def answer(store: Store, person: Person, batch: Batch, num: int, **fields: object) -> None:
    for lent in store.lend(person, batch, num):
        at = store._clock()
        times = {"shown_at": at - 2, "submitted_at": at}
        store.answer(person, lent.token, fields, lent.token, dict.fromkeys(lent.sides, True), times)


class Page(HTMLParser):
    """What a page asks the browser to load or to run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.inline: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.addresses += [given[name] or "" for name in ("href", "src", "action") if name in given]
        self.inline += [f"{tag} {name}" for name in given if name.startswith("on") or name == "style"]
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in given) else []


# --- coming in --------------------------------------------------------------------------------------------


def test_a_visitor_is_sent_to_sign_in_and_then_where_they_wanted(visit, crew, sqlite_store):
    batch = sqlite_store.add_batch("appeal", "Appeal")
    sqlite_store.add_person("Ben", "generalist", PASSWORD)
    client = visit()
    asked = client.get(f"/work/{batch.public_id}")
    assert (asked.url.path, asked.url.params["next"]) == ("/login", f"/work/{batch.public_id}")
    reply = post(
        client, str(asked.url), "/login", name="Ben", password=PASSWORD, next=f"/work/{batch.public_id}"
    )
    assert reply.url.path == f"/work/{batch.public_id}"


def test_a_wrong_password_shows_the_form_again(visit, crew):
    reply = post(visit(), "/login", "/login", name="Ana", password="wrong horse")
    assert reply.status_code == 401
    assert "Name or password is wrong." in reply.text and 'value="Ana"' in reply.text
    assert "wrong horse" not in reply.text


@pytest.mark.parametrize("elsewhere", ["//evil.example", "https://evil.example", "/\\evil.example", "evil"])
def test_signing_in_never_leads_to_another_site(visit, sqlite_store, elsewhere):
    sqlite_store.add_person("Ben", "generalist", PASSWORD)
    client = visit()
    client.follow_redirects = False
    reply = post(client, "/login", "/login", name="Ben", password=PASSWORD, next=elsewhere)
    assert (reply.status_code, reply.headers["location"]) == (303, "/")


def test_an_invitation_from_the_lead_to_the_first_page(visit, crew, sqlite_store):
    sqlite_store.add_batch("appeal", "Appeal in June")
    sqlite_store.add_batch("photography", "Not for generalists")
    lead = visit("Lena")
    reply = post(lead, "/lead/people", "/lead/people", name="Mo", role="generalist")
    link = re.search(r'value="(http://testserver/join/[^"]+)"', reply.text)
    assert link and "/join/" not in lead.get("/lead/people").text, "the link is shown once"
    assert lead.get("/lead/people").text.count("not accepted yet") == 1

    mo = visit()
    assert "Welcome, Mo" in mo.get(link[1]).text
    assert "8 to" in post(mo, link[1], link[1], password="short").text
    first = post(mo, link[1], link[1], password="long enough")
    assert (
        first.url.path == "/" and "Appeal in June" in first.text and "Not for generalists" not in first.text
    )
    assert visit().get(link[1]).status_code == 404, "it works once"
    assert "not accepted" not in lead.get("/lead/people").text

    post(mo, "/", "/logout")
    assert mo.get("/").url.path == "/login"


def test_the_first_page_without_work_says_what_happens_next(visit, crew, sqlite_store):
    sqlite_store.set_open(sqlite_store.add_batch("appeal", "Closed one"), False)
    page = visit("Ana").get("/").text
    assert "Nothing to judge yet" in page and "Closed one" not in page


# --- work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_working_page_names_no_model_and_no_file(visit, crew, sqlite_store, make_items: MakeItems, name):
    batch = sqlite_store.add_batch(name, "A batch")
    items = make_items(batch, 3, group="portrait")
    sqlite_store.add_items(batch, items)
    person = "Ana" if "generalist" in batch.asks.roles else "Sofia"
    page = visit(person).get(f"/work/{batch.public_id}").text
    assert batch.asks.sentence in page and all(
        f'data-answer="{option}"' in page for option in pages._keys(batch) if batch.keys
    )
    paths = [str(path) for item in items for path, _ in item.pictures.values()]
    for secret in ("model-A", "model-B", "item-0", *paths):
        assert secret not in page


def test_every_option_shows_a_key_and_none_is_taken_twice():
    taken = {"z", " ", "Enter", "+", "-", "g", "?", "Escape"}  # the working page's own
    for asks in QUESTIONS.values():
        assert not taken & set(asks.keys), asks.name
        assert {asks.option(part) for part in asks.keys.values()} in (set(asks.options), set()), asks.name


def test_people_see_only_pages_of_their_role(visit, crew, sqlite_store):
    batch = sqlite_store.add_batch("photography", "For specialists")
    ana = visit("Ana")
    for url in (f"/work/{batch.public_id}", f"/sheet/{batch.public_id}", f"/guideline/{batch.public_id}"):
        assert ana.get(url).status_code == 403
    for url in (
        "/lead",
        "/lead/people",
        "/lead/security",
        f"/lead/{batch.public_id}",
        f"/lead/{batch.public_id}/export",
    ):
        assert visit("Sofia").get(url, params={"format": "csv"}).status_code == 403
    assert ana.get("/work/unknown").status_code == 404


def test_a_contact_sheet_shows_ones_own_marks_and_nobody_elses(
    visit, crew, sqlite_store, make_items: MakeItems
):
    batch = sqlite_store.add_batch("photography", "Review")
    sqlite_store.add_items(batch, make_items(batch, 2, group="food"))
    answer(sqlite_store, crew["Sofia"], batch, 1, **MARKS, accept=True)
    answer(sqlite_store, crew["Tom"], batch, 2, **MARKS | {"story": 0}, accept=False)
    sheet = visit("Sofia").get(f"/sheet/{batch.public_id}").text
    assert "Contact sheet: food" in sheet and "1 of 2 judged by you" in sheet
    assert sheet.count("Accept<") == 1 and "2 2 1 2 2" in sheet
    assert "Reject" not in sheet and "2 2 1 2 0" not in sheet
    urls = re.findall(r'<img src="(/pictures/[^"]+)"', sheet)
    assert len(urls) == 2 and visit("Sofia").get(urls[0]).headers["content-type"] == "image/png"
    assert visit("Tom").get(urls[0]).status_code == 404, "the address is Sofia's alone"


# --- the lead ---------------------------------------------------------------------------------------------


def test_a_lead_makes_a_batch_opens_and_closes_it(visit, crew, sqlite_store):
    lead = visit("Lena")
    assert "There is no batch yet" in lead.get("/").text, "a lead's first page is the list of batches"
    fields = {"question": "appeal", "title": "June", "num_people": "3", "extra_rater": "yes"}
    page = post(lead, "/lead", "/lead/batches", **fields)
    (batch,) = sqlite_store.batches()
    assert page.url.path == f"/lead/{batch.public_id}" and "This batch has no items yet" in page.text
    assert (batch.num_people, batch.settings["extra_rater"], batch.is_open) == (3, True, True)
    post(lead, page.url.path, f"{page.url.path}/open", is_open="no")
    assert not sqlite_store.batches()[0].is_open
    refused = post(lead, "/lead", "/lead/batches", question="appeal", title="", num_people="0")
    assert refused.status_code == 422 and 'role="alert"' in refused.text


def test_a_new_guideline_version(visit, crew, sqlite_store):
    batch = sqlite_store.add_batch("appeal", "June")
    url = f"/lead/{batch.public_id}"
    post(visit("Lena"), url, f"{url}/guideline", text="Look closely.\n\nThen choose.")
    assert sqlite_store.guideline(batch) == (2, "Look closely.\n\nThen choose.")
    page = visit("Ana").get(f"/guideline/{batch.public_id}").text
    assert "<p>Look closely.</p><p>Then choose.</p>" in page and "version 2" in page


def test_deciding_what_two_specialists_disagree_on(visit, crew, sqlite_store, make_items: MakeItems):
    batch = sqlite_store.add_batch("photography", "Review")
    sqlite_store.add_items(batch, make_items(batch, 1))
    answer(sqlite_store, crew["Sofia"], batch, 1, **MARKS, accept=True)
    answer(sqlite_store, crew["Tom"], batch, 1, **MARKS | {"story": 0}, accept=False, reasons=["seen better"])
    lead, url = visit("Lena"), f"/lead/{batch.public_id}/adjudicate"
    page = lead.get(url).text
    assert "Sofia" in page and "Tom" in page and "seen better" in page
    item = re.search(r'name="item" value="(\d+)"', page)
    assert item
    reply = post(lead, url, url, item=item[1], option="accept")
    assert "Nothing to decide" in reply.text
    (decision,) = sqlite_store.adjudications(batch)
    assert decision.answer["accept"] is True and decision.answer["story"] == 2, "the marks of who said so"
    token = re.search(r'name="form_token" value="(\w+)"', lead.get("/lead").text)
    again = lead.post(url, data={"form_token": token and token[1], "item": item[1], "option": "reject"})
    assert again.status_code == 409


def test_what_is_taken_out_can_be_brought_in_elsewhere(visit, crew, sqlite_store, make_items: MakeItems):
    batch, other = (sqlite_store.add_batch("appeal", title) for title in ("June", "Copy"))
    sqlite_store.add_items(batch, make_items(batch, 2))
    answer(sqlite_store, crew["Ana"], batch, 2, choice="left")
    lead = visit("Lena")
    for name, suffix in (
        ("csv", ".csv"),
        ("parquet", ".parquet"),
        ("jsonl", ".jsonl"),
        ("labelstudio", ".json"),
    ):
        reply = lead.get(f"/lead/{batch.public_id}/export", params={"format": name})
        assert reply.status_code == 200 and reply.headers["content-disposition"].endswith(f'{suffix}"')
        assert b"model-A" in reply.content
    for name, status in (("votes", 200), ("decisions", 422), ("log-csv", 200), ("exe", 404)):
        assert lead.get(f"/lead/{batch.public_id}/export", params={"format": name}).status_code == status

    csv = lead.get(f"/lead/{batch.public_id}/export", params={"format": "csv"}).content
    url = f"/lead/{other.public_id}"

    def bring(content: bytes, name: str = "answers.csv"):
        token = re.search(r'name="form_token" value="(\w+)"', lead.get(url).text)
        return lead.post(
            f"{url}/import", data={"form_token": token and token[1]}, files={"file": (name, content)}
        )

    assert "Added 2 items and 2 answers." in bring(csv).text
    assert "Added 0 items and 0 answers." in bring(csv).text
    there, here = (
        {one.item.name: one.answer for one in sqlite_store.answers(each)} for each in (other, batch)
    )
    assert there == here
    outside = bring(b"item,path_a,path_b\nx,/etc/passwd,/etc/passwd\n")
    assert outside.status_code == 422 and 'role="alert"' in outside.text and "root:" not in outside.text
    assert sqlite_store.refusals()[0].what == f"422 POST {url}/import"
    assert bring(csv, "answers.exe").status_code == 422


def test_an_invitation_that_nobody_took_is_told(visit, crew, sqlite_store, clock):
    lead = visit("Lena")
    sqlite_store.invite("Mo", "generalist")
    clock.now += INVITATION_SECONDS + 1
    assert "not accepted, expired" in lead.get("/lead/people").text


@pytest.mark.parametrize("question, num_people", [("caption", None), ("caption", 3), ("verification", None)])
def test_nothing_is_said_of_agreement_where_there_is_none(
    visit, crew, sqlite_store, make_items, question, num_people
):
    batch = sqlite_store.add_batch(question, "Texts", num_people)
    sqlite_store.add_items(batch, make_items(batch, 2))
    page = visit("Lena").get(f"/lead/{batch.public_id}").text
    assert "agree" not in page.split('id="guideline"')[0] and "alpha" not in page
    assert ("nown answer" in page) == (question == "verification")  # a text is no known answer


def test_a_lead_locks_someone_out_but_never_themselves(visit, crew, sqlite_store):
    ana, lead = visit("Ana"), visit("Lena")
    post(lead, "/lead/people", f"/lead/people/{crew['Ana'].id}/active", is_active="no")
    assert ana.get("/").url.path == "/login"
    own = post(lead, "/lead/people", f"/lead/people/{crew['Lena'].id}/active", is_active="no")
    assert own.status_code == 404 and lead.get("/lead").status_code == 200


def test_refusals_are_listed_for_the_lead(visit, crew):
    visit("Ana").get("/lead")
    assert "403 GET /lead" in visit("Lena").get("/lead/security").text


def test_a_form_without_its_token_is_refused(visit, crew, sqlite_store):
    lead = visit("Lena")
    assert lead.post("/lead/people", data={"name": "Mallory", "role": "lead"}).status_code == 403
    assert "Mallory" not in [person.name for person in sqlite_store.people()]


# --- every page -------------------------------------------------------------------------------------------


def test_pages_run_nothing_inline_and_load_only_what_is_here(
    visit, crew, sqlite_store, make_items: MakeItems
):
    """The Content-Security-Policy lets neither script nor style stand in a page; nor does any page try."""
    batches = [sqlite_store.add_batch(name, "<script>alert(1)</script>") for name in QUESTIONS]
    for batch in batches:
        sqlite_store.add_items(batch, make_items(batch, 1, group="<b>food</b>"))
    mallory = sqlite_store.add_person("<i>Mallory</i>", "specialist")
    photography = next(batch for batch in batches if batch.question == "photography")
    answer(sqlite_store, crew["Sofia"], photography, 1, **MARKS, accept=True, comment="<img src=x onerror=y>")
    answer(sqlite_store, mallory, photography, 1, **MARKS, accept=False)
    urls = {
        "Lena": ["/lead", "/lead/people", "/lead/security", f"/lead/{photography.public_id}/adjudicate"]
        + [f"/lead/{batch.public_id}" for batch in batches],
        "Sofia": ["/", f"/sheet/{photography.public_id}"]
        + [f"/{page}/{batch.public_id}" for batch in batches[1:] for page in ("work", "guideline")],
        "Ana": [f"/work/{batches[0].public_id}", "/nowhere"],
        None: ["/login", "/join/unknown"],
    }
    for name, theirs in urls.items():
        client = visit(name)
        for url in theirs:
            page = Page(client.get(url).text)
            assert not page.inline, url
            for address in page.addresses:
                assert address.startswith(("/", "?")) and not address.startswith("//"), (url, address)
                if address.startswith("/static/"):
                    assert (PACKAGE / address.removeprefix("/")).is_file(), (url, address)


def test_modules_import_only_modules_that_are_here():
    for module in (PACKAGE / "static").glob("*.js"):
        for name in re.findall(r'from "([^"]+)"', module.read_text()):
            assert (module.parent / name).is_file(), f"{module.name} imports {name}"


def _luminance(colour: str) -> float:
    """WCAG 2's relative luminance of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(scheme):
    css = (PACKAGE / "static/app.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", blocks[scheme]))
    for text, ground in [
        *((text, ground) for text in ("ink", "muted", "win", "warn") for ground in ("paper", "soft")),
        ("on-win", "win"),
    ]:
        light, dark = sorted((_luminance(colours[text]), _luminance(colours[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text} on {ground}"


# --- what a lead is told ----------------------------------------------------------------------------------


PAIRS = Batch(1, "0", "appeal", "Pairs", 5, {}, True, 0.0)


def _one(name: str, **values: object) -> PersonStanding:
    person = Person(hash(name), name, "generalist", True, 1, 0.0)
    usual = dict(
        num_answers=100, share_left=0.5, median_seconds=3.0, num_gold=10, num_gold_right=9, num_sided=100
    )
    return PersonStanding(person, **{**usual, **values})


def _standing(
    people: list[PersonStanding], alpha: float | None = 0.7, raw: float | None = 0.8, **options: int
) -> Standing:
    options = options or {"A": 40, "B": 60}
    return Standing(sum(options.values()), raw, alpha, options, people)


def test_someone_careful_is_not_pointed_at():
    people = [_one("Ana"), _one("Ben", share_left=0.58, median_seconds=1.8), _one("Cy", num_gold_right=7)]
    assert [to_look_at(one, _standing(people)) for one in people] == [[], [], []]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"median_seconds": 0.6}, "0.6\u00a0s an answer, others take 3.0\u00a0s"),
        ({"share_left": 0.7}, "70\u00a0% left"),  # 4 standard deviations of a fair coin thrown 100 times
        ({"share_left": 0.3}, "30\u00a0% left"),
        ({"num_gold_right": 6}, "6 of 10 known answers right"),
    ],
)
def test_why_someone_is_pointed_at(values, why):
    odd = _one("Odd", **values)
    standing = _standing([_one("Ana"), _one("Ben"), odd])
    assert to_look_at(odd, standing) == [why]
    assert Finding("look", f"Worth a look: Odd ({why}).") in findings(PAIRS, standing)


def test_few_answers_point_at_nobody():
    new = _one(
        "New", num_answers=5, num_sided=5, share_left=1.0, median_seconds=0.5, num_gold=2, num_gold_right=0
    )
    assert to_look_at(new, _standing([_one("Ana"), new])) == []


@pytest.mark.parametrize(
    ("alpha", "kind", "words"),
    [
        (0.85, "sound", "alike"),
        (0.7, "sound", "careful conclusions"),
        (0.5, "sound", "taste"),
        (0.3, "look", "little"),
        (0.05, "look", "chance"),
        (-0.4, "look", "chance"),
        (None, "wait", "Agreement shows"),
    ],
)
def test_agreement_in_words(alpha, kind, words):
    first = findings(PAIRS, _standing([_one("Ana")], alpha))[0]
    assert first.kind == kind and words in first.line


def test_a_low_alpha_of_a_lopsided_batch_is_explained_rather_than_blamed():
    first = findings(PAIRS, _standing([_one("Ana")], alpha=0.3, raw=0.83, A=90, B=10))[0]
    assert first.kind == "sound" and "90\u00a0%" in first.line and "83\u00a0%" in first.line


def test_known_answers_are_summed_over_people():
    people = [_one("Ana", num_gold=10, num_gold_right=9), _one("Ben", num_gold=10, num_gold_right=3)]
    assert findings(PAIRS, _standing(people))[1] == Finding(
        "look", "12 of 20 known answers are right (60\u00a0%)."
    )
    assert findings(PAIRS, _standing([_one("Ana", num_gold=0, num_gold_right=0)]))[1].kind == "wait"


def test_figures_in_words():
    assert [duration(seconds) for seconds in (20, 1500, 3 * 3600, 3 * 86400)] == [
        "about a minute",
        "about 25 min",
        "about 3 h",
        "about 3 days",
    ]
    assert share(999, 1000) == "99\u00a0%" and share(0, 0) == "0\u00a0%" and share(5, 5) == "100\u00a0%"
