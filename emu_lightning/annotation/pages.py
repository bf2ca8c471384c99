"""The pages people see: signing in, their work, and what a lead watches and decides.

Every page is a template rendered on the server. The working page then talks to the JSON routes of ``api.py``;
all other pages are plain forms. No page and no address names a model outside the lead's export.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, File, Form, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from emu_lightning.annotation import access
from emu_lightning.annotation.questions import LONGEST_CAPTION, LONGEST_COMMENT, QUESTIONS, Answer
from emu_lightning.annotation.store import (
    Batch,
    Item,
    Person,
    PersonStanding,
    Progress,
    Refused,
    Standing,
)

router = APIRouter(default_response_class=HTMLResponse)

SignedIn = Annotated[Person, Depends(access.signed_in)]
Lead = Annotated[Person, Depends(access.lead)]
posted = [Depends(access.form_posted)]  # every form carries its token

# From here on a figure is worth a lead's look. Our choices.
ENOUGH = 20  # answers of one person
ENOUGH_GOLD = 5  # known answers asked of one person
LOW_GOLD = 0.7  # share of them that is right
QUICK = 1 / 3  # of the other people's median time
LOPSIDED = 0.8  # share of one vote, from which on alpha misleads


# --- words ------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """1500 -> about 25 min."""
    if seconds < 90:
        return "about a minute"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} min"
    if seconds < 36 * 3600:
        return f"about {round(seconds / 3600)} h"
    return f"about {round(seconds / 86400)} days"


def share(part: float, whole: float) -> str:
    """Part of a whole in percent, rounded down: only what is complete reads 100 %."""
    return f"{math.floor(100 * part / whole) if whole else 0}\u00a0%"


def seconds(value: float) -> str:
    """2.41 -> 2.4 s, 75.3 -> 75 s."""
    return f"{value:.1f}\u00a0s" if value < 10 else f"{value:.0f}\u00a0s"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def figure(value: float) -> str:
    """-0.041 -> −0.04."""
    return f"{value:.2f}".replace("-", "−")


def percent(value: float) -> str:
    """0.743 -> 74 %."""
    return f"{100 * value:.0f}\u00a0%"


def _plain(value: object) -> str:
    """A field of an answer as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


_templates = Environment(
    loader=PackageLoader("emu_lightning.annotation"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {
    "duration": duration,
    "share": share,
    "percent": percent,
    "seconds": seconds,
    "figure": figure,
    "plain": _plain,
    "thousands": lambda number: f"{number:,}",
    "when": lambda at: datetime.fromtimestamp(at).strftime("%d %b %Y, %H:%M"),
}


def _page(
    request: Request, template: str, person: Person | None, status: int = 200, /, **values: Any
) -> HTMLResponse:
    """A template with what every page needs."""
    text = _templates.get_template(template).render(
        {"at": None, "person": person, "token": access.form_token(request), **values}
    )
    return HTMLResponse(text, status)


def _see(url: str) -> RedirectResponse:
    """After a form: the page to load, so that loading it again does not send the form again."""
    return RedirectResponse(url, 303)


def refusal(request: Request, error: Refused) -> Response:
    """What a person sees instead of a page they may not have: the way to sign in, or one line."""
    if error.status == 401 and request.method == "GET":
        return _see(f"/login?next={quote(request.url.path)}")
    titles = {
        401: "You are signed out",
        403: "Not for you",
        404: "Nothing here",
        409: "Too late",
        413: "Too large",
    }
    return _page(
        request,
        "error.html",
        None,
        error.status,
        title=titles.get(error.status, "That did not work"),
        message=_sentence(error.message),
    )


def _sentence(line: str) -> str:
    return f"{line[:1].upper()}{line[1:]}." if line else ""


# --- coming in and going ----------------------------------------------------------------------------------


@router.get("/login")
def login_page(request: Request, next: str = "/") -> HTMLResponse:
    return _page(request, "login.html", None, message="", name="", next=next)


@router.post("/login", dependencies=posted)
def login(
    request: Request,
    name: Annotated[str, Form()] = "",
    password: Annotated[str, Form()] = "",
    next: Annotated[str, Form()] = "/",
) -> Response:
    try:
        person = access.login(request, name, password)
    except Refused as error:
        values = {"message": _sentence(error.message), "name": name, "next": next}
        return _page(request, "login.html", None, error.status, **values)
    # Only ever back into this site: `//elsewhere` and `/\elsewhere` are other sites to a browser.
    is_here = next.startswith("/") and not next.startswith(("//", "/\\"))
    response = _see(next if is_here else "/")
    access.sign_in(request, response, person)
    return response


@router.get("/join/{token}")
def join_page(request: Request, token: str) -> HTMLResponse:
    invited = access.store(request).invited(token)
    if invited is None:
        raise Refused(404, "this invitation was used or has expired: ask your lead for a new one")
    return _page(request, "join.html", None, name=invited.name, message="")


@router.post("/join/{token}", dependencies=posted)
def join(request: Request, token: str, password: Annotated[str, Form()] = "") -> Response:
    store = access.store(request)
    invited = store.invited(token)
    try:
        person = store.accept_invitation(token, password or None)
    except ValueError as error:
        name = invited.name if invited else ""
        return _page(request, "join.html", None, 422, name=name, message=_sentence(str(error)))
    response = _see("/")
    access.sign_in(request, response, person)
    return response


@router.post("/logout", dependencies=posted)
def logout(request: Request) -> Response:
    response = _see("/login")
    access.sign_out(request, response)
    return response


# --- work -------------------------------------------------------------------------------------------------


@router.get("/")
def home(request: Request, person: SignedIn) -> Response:
    if person.role == "lead":
        return _see("/lead")
    store = access.store(request)
    batches = [
        (batch, store.progress(batch, person))
        for batch in store.batches()
        if batch.is_open and person.role in batch.asks.roles
    ]
    return _page(request, "home.html", person, batches=batches)


@router.get("/work/{public_id}")
def work(request: Request, public_id: str, person: SignedIn) -> HTMLResponse:
    store, batch = access.store(request), _readable(request, public_id, person)
    version, guideline = store.guideline(batch)
    return _page(
        request,
        batch.asks.template,
        person,
        batch=batch,
        asks=batch.asks,
        keys=_keys(batch),
        progress=store.progress(batch, person),
        version=version,
        guideline=guideline,
        longest_caption=LONGEST_CAPTION,
        longest_comment=LONGEST_COMMENT,
        ui_version=access.settings(request).ui_version,
    )


@router.get("/guideline/{public_id}")
def guideline(request: Request, public_id: str, person: SignedIn) -> HTMLResponse:
    batch = _readable(request, public_id, person)
    version, text = access.store(request).guideline(batch)
    return _page(request, "guideline.html", person, batch=batch, version=version, guideline=text)


@router.get("/sheet/{public_id}")
def sheet(request: Request, public_id: str, person: SignedIn, group: str | None = None) -> HTMLResponse:
    """The pictures of one concept side by side, each with the person's own answer and nobody else's."""
    store, batch = access.store(request), _readable(request, public_id, person)
    if batch.asks.num_pictures > 1:
        raise Refused(404, "pairs have no contact sheet")
    groups = store.groups(batch)
    group = group if group in groups else next(iter(groups), None)
    own = {one.item.id: one.answer for one in store.answers(batch, person)}
    pictures = [
        _thumb(request, person, batch, item, own.get(item.id))
        for item in (store.sheet(batch, group) if group else [])
    ]
    return _page(request, "sheet.html", person, batch=batch, groups=groups, group=group, pictures=pictures)


def _thumb(
    request: Request, person: Person, batch: Batch, item: Item, answer: Answer | None
) -> dict[str, Any]:
    picture = item.pictures["A"]
    return {
        "url": access.picture_url(request, person, item, "A"),
        "width": picture.width,
        "height": picture.height,
        "option": answer and batch.asks.option(answer),
        "verdict": batch.asks.options[batch.asks.option(answer)] if answer else "",
        "marks": " ".join(str(value) for value in answer.values() if type(value) is int) if answer else "",
    }


def _readable(request: Request, public_id: str, person: Person) -> Batch:
    """Raises:
    Refused: there is no such batch, or it is not for people of this role.
    """
    batch = access.store(request).batch(public_id)
    if person.role != "lead" and person.role not in batch.asks.roles:
        raise Refused(403, f"{batch.title} is not for a {person.role}")
    return batch


def _keys(batch: Batch) -> dict[str, list[str]]:
    """The keys of each option, the one to show first."""
    keys: dict[str, list[str]] = {option: [] for option in batch.asks.options}
    for key, part in batch.keys.items():
        keys[batch.asks.option(part)].append(key)
    return keys


# --- the lead ---------------------------------------------------------------------------------------------


@router.get("/lead")
def lead_page(request: Request, person: Lead) -> HTMLResponse:
    return _lead_page(request, person)


def _lead_page(request: Request, person: Person, status: int = 200, *, message: str = "") -> HTMLResponse:
    store = access.store(request)
    batches = [(batch, store.progress(batch)) for batch in reversed(store.batches())]
    values = {"batches": batches, "questions": QUESTIONS.values(), "message": message}
    return _page(request, "lead.html", person, status, at="lead", **values)


@router.post("/lead/batches", dependencies=posted)
def add_batch(
    request: Request,
    person: Lead,
    question: Annotated[str, Form()],
    title: Annotated[str, Form()] = "",
    num_people: Annotated[str, Form()] = "",
    extra_rater: Annotated[bool, Form()] = False,
) -> Response:
    try:
        batch = access.store(request).add_batch(
            question, title, int(num_people) if num_people else None, {"extra_rater": extra_rater}
        )
    except ValueError as error:
        return _lead_page(request, person, 422, message=_sentence(str(error)))
    return _see(f"/lead/{batch.public_id}")


@router.get("/lead/people")
def people_page(request: Request, person: Lead) -> HTMLResponse:
    return _people(request, person)


@router.post("/lead/people", dependencies=posted)
def invite(
    request: Request, person: Lead, name: Annotated[str, Form()] = "", role: Annotated[str, Form()] = ""
) -> HTMLResponse:
    """The answer to the form is the page with the link, which is shown nowhere else and never again."""
    try:
        token = access.store(request).invite(name, role)  # type: ignore[arg-type]  # an unknown role is refused
    except ValueError as error:
        return _people(request, person, 422, message=_sentence(str(error)))
    return _people(request, person, link=str(request.base_url.replace(path=f"/join/{token}")), invited=name)


@router.post("/lead/people/{person_id}/active", dependencies=posted)
def set_active(
    request: Request, person: Lead, person_id: int, is_active: Annotated[bool, Form()]
) -> Response:
    store = access.store(request)
    other = store.person(person_id)
    if other is None or other.id == person.id:  # a lead who locks themselves out could not come back
        raise Refused(404, "there is no such other person")
    store.set_active(other, is_active)
    return _see("/lead/people")


def _people(
    request: Request,
    person: Person,
    status: int = 200,
    *,
    link: str = "",
    invited: str = "",
    message: str = "",
) -> HTMLResponse:
    store = access.store(request)
    values = {
        "people": store.people(),
        "now": store.now(),
        "link": link,
        "invited": invited,
        "message": message,
    }
    return _page(request, "people.html", person, status, at="people", **values)


@router.get("/lead/security")
def security(request: Request, person: Lead) -> HTMLResponse:
    return _page(request, "security.html", person, at="security", refusals=access.store(request).refusals())


@router.get("/lead/{public_id}")
def batch_page(request: Request, public_id: str, person: Lead) -> HTMLResponse:
    return _batch_page(request, person, access.store(request).batch(public_id))


@router.post("/lead/{public_id}/open", dependencies=posted)
def set_open(request: Request, public_id: str, person: Lead, is_open: Annotated[bool, Form()]) -> Response:
    store = access.store(request)
    store.set_open(store.batch(public_id), is_open)
    return _see(f"/lead/{public_id}")


@router.post("/lead/{public_id}/guideline", dependencies=posted)
def add_guideline(
    request: Request, public_id: str, person: Lead, text: Annotated[str, Form()] = ""
) -> Response:
    store = access.store(request)
    batch = store.batch(public_id)
    try:
        store.add_guideline(batch, text)
    except ValueError as error:
        return _batch_page(request, person, batch, 422, message=_sentence(str(error)))
    return _see(f"/lead/{public_id}#guideline")


@router.get("/lead/{public_id}/export")
def export(request: Request, public_id: str, person: Lead, format: str) -> Response:
    from emu_lightning.annotation import exchange  # brings pyarrow

    store = access.store(request)
    batch = store.batch(public_id)
    if format not in exchange.EXPORTS:
        raise Refused(404, f"format {format!r} is not known: use one of {', '.join(exchange.EXPORTS)}")
    chosen = exchange.EXPORTS[format]
    try:
        content = chosen.make(store, batch)
    except ValueError as error:  # votes of single pictures, decisions of pairs
        raise Refused(422, str(error)) from None
    return Response(
        content,
        media_type=chosen.media_type,
        headers={
            "Content-Disposition": f'attachment; filename="{batch.question}-{public_id}{chosen.suffix}"'
        },
    )


@router.post("/lead/{public_id}/import", dependencies=posted)
def import_file(
    request: Request, public_id: str, person: Lead, file: Annotated[UploadFile, File()]
) -> Response:
    from emu_lightning.annotation import exchange

    store = access.store(request)
    batch = store.batch(public_id)
    roots = access.settings(request).picture_roots
    try:
        suffix = Path(file.filename or "").suffix.lower()
        read = next((each.read for each in exchange.FORMATS.values() if each.suffix == suffix), None)
        if read is None:
            raise ValueError(f"{suffix or 'this'} is no known ending: give .parquet, .csv, .jsonl or .json")
        if not roots:
            raise ValueError("this server was started without a folder to import from: start it with one")
        rows = read(file.file.read(), exchange.ANSWERS)
        num_items, num_answers = exchange.import_rows(store, batch, rows, roots)
    except (ValueError, OSError) as error:
        # Logged: it may have named another file than it was allowed to.
        store.log_refusal(person.id, access.address(request), f"422 POST {request.url.path}", str(error))
        return _batch_page(request, person, batch, 422, message=_sentence(str(error)))
    said = f"Added {_count(num_items, 'item')} and {_count(num_answers, 'answer')}."
    return _batch_page(request, person, batch, said=said)  # loading it again adds nothing


@router.get("/lead/{public_id}/adjudicate")
def adjudicate_page(request: Request, public_id: str, person: Lead, after: int = 0) -> HTMLResponse:
    """The next item that people disagree on; ``after`` an item's id passes over those up to it."""
    store = access.store(request)
    batch = store.batch(public_id)
    disputes = store.to_adjudicate(batch)
    item_id = next((one for one in disputes if one > after), disputes[0] if disputes else None)
    opinions = [] if item_id is None else store.answers_to(batch, item_id)
    item = opinions[0].item if opinions else None
    return _page(
        request,
        "adjudicate.html",
        person,
        batch=batch,
        keys=_keys(batch),
        num_left=len(disputes),
        item=item,
        pictures=[
            {"url": access.picture_url(request, person, item, slot), "picture": picture}
            for slot, picture in item.pictures.items()
        ]
        if item
        else [],
        opinions=opinions,
        fields=list(opinions[0].answer) if opinions else [],
    )


@router.post("/lead/{public_id}/adjudicate", dependencies=posted)
def adjudicate(
    request: Request,
    public_id: str,
    person: Lead,
    item: Annotated[int, Form()],
    option: Annotated[str, Form()],
) -> Response:
    """The lead sides with those who gave this answer; the marks are those of the latest of them."""
    store = access.store(request)
    batch = store.batch(public_id)
    opinions = store.answers_to(batch, item) if item in store.to_adjudicate(batch) else []
    sided = [one for one in opinions if batch.asks.option(one.answer) == option]
    if not sided:
        raise Refused(409, "this was decided in the meantime")
    store.adjudicate(person, sided[-1].item, sided[-1].answer)
    return _see(f"/lead/{public_id}/adjudicate?after={item}")


def _batch_page(
    request: Request, person: Person, batch: Batch, status: int = 200, *, said: str = "", message: str = ""
) -> HTMLResponse:
    store = access.store(request)
    standing, progress = store.standing(batch), store.progress(batch)
    version, guideline = store.guideline(batch)
    return _page(
        request,
        "batch.html",
        person,
        status,
        at="lead",
        batch=batch,
        progress=progress,
        standing=standing,
        headline=headline(standing, progress),
        findings=findings(batch, standing),
        shows_agreement=_shows_agreement(batch, standing),
        looks={one.person.id: to_look_at(one, standing) for one in standing.people},
        num_disputes=standing.num_disputed,
        version=version,
        guideline=guideline,
        said=said,
        message=message,
    )


# --- is the work sound? -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One line on whether the work is sound, worth a look, or cannot be told yet."""

    kind: Literal["sound", "look", "wait"]
    line: str


def headline(standing: Standing, progress: Progress) -> str:
    """Where the batch is, in a sentence or two."""
    if progress.done >= progress.total:
        line = f"All {progress.total:,} answers are in."
    else:
        left = "" if progress.seconds_left is None else f", {duration(progress.seconds_left)} left"
        line = f"{progress.done:,} of {progress.total:,} answers are in{left}."
    if standing.raw_agreement is not None:
        line += f" Two people agree {percent(standing.raw_agreement)} of the time."
    return line


def findings(batch: Batch, standing: Standing) -> list[Finding]:
    """What a lead should know first: do people agree, are the known answers right, is anyone off?"""
    flagged = [(one, look) for one in standing.people if (look := to_look_at(one, standing))]
    lines = [_agreement(standing)] if _shows_agreement(batch, standing) else []
    lines += _gold(standing) if batch.asks.has_votes else []
    if flagged:
        named = "; ".join(f"{one.person.name} ({', '.join(look)})" for one, look in flagged)
        lines.append(Finding("look", f"Worth a look: {named}."))
    elif any(one.num_answers >= ENOUGH for one in standing.people):
        lines.append(
            Finding("sound", "Nobody stands out by speed, by a leaning to one side or by known answers.")
        )
    else:
        lines.append(
            Finding("wait", f"A person’s work is compared with the others’ from {ENOUGH} answers on.")
        )
    return lines


def _shows_agreement(batch: Batch, standing: Standing) -> bool:
    """Not where it never can be told: captions, and items that one person is asked about."""
    return batch.is_compared or standing.raw_agreement is not None


# Krippendorff's bounds are 0.8 and 0.667; those below are ours.
_ALPHA: tuple[tuple[float, Literal["sound", "look"], str], ...] = (
    (0.8, "sound", "People answer alike."),
    (0.667, "sound", "Enough for careful conclusions."),
    (0.4, "sound", "Usual for a matter of taste; it takes many items to see a difference."),
    (0.2, "look", "That is little: talk through some items, and make the guideline clearer."),
    (-math.inf, "look", "Hardly more than chance: stop, and see whether everybody reads the question alike."),
)


def _agreement(standing: Standing) -> Finding:
    """Alpha in words."""
    if standing.raw_agreement is None or standing.alpha is None:
        return Finding(
            "wait", "Agreement shows once several people have answered the same items, and not all alike."
        )
    most = max(standing.options.values()) / max(1, standing.num_answers)
    if most >= LOPSIDED and standing.alpha < 0.667:
        return Finding(
            "sound",
            f"{percent(most)} of the answers are the same one. Alpha ({figure(standing.alpha)}) is then low "
            "even where everybody is careful: go by how often two people agree "
            f"({percent(standing.raw_agreement)}).",
        )
    kind, words = next((kind, words) for bound, kind, words in _ALPHA if standing.alpha >= bound)
    return Finding(kind, f"Agreement beyond chance, alpha, is {figure(standing.alpha)}. {words}")


def _gold(standing: Standing) -> list[Finding]:
    asked, right = (
        sum(getattr(one, name) for one in standing.people) for name in ("num_gold", "num_gold_right")
    )
    if not asked:
        return [
            Finding("wait", "No item with a known answer has been asked: mix some in to see who is careful.")
        ]
    kind: Literal["sound", "look"] = "sound" if right >= LOW_GOLD * asked else "look"
    return [Finding(kind, f"{right:,} of {asked:,} known answers are right ({percent(right / asked)}).")]


def to_look_at(one: PersonStanding, standing: Standing) -> list[str]:
    """Why a lead should look at this person's work, in a few words each; empty where nothing stands out."""
    looks = []
    others = [
        other.median_seconds
        for other in standing.people
        if other.person != one.person and other.median_seconds is not None
    ]
    if one.num_answers >= ENOUGH and one.median_seconds is not None and others:
        usual = statistics.median(others)
        if one.median_seconds < QUICK * usual:
            looks.append(f"{seconds(one.median_seconds)} an answer, others take {seconds(usual)}")
    if one.share_left is not None and one.num_sided >= ENOUGH:
        # A fair coin stays within three standard deviations in 997 of 1000 cases.
        if abs(one.share_left - 0.5) > 3 * math.sqrt(0.25 / one.num_sided):
            looks.append(f"{percent(one.share_left)} left")
    if one.num_gold >= ENOUGH_GOLD and one.num_gold_right < LOW_GOLD * one.num_gold:
        looks.append(f"{one.num_gold_right} of {one.num_gold} known answers right")
    return looks
