"""What the working page asks for: items, pictures, a place for answers. Errors are ``{"error": a line}``."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from emu_lightning.annotation import access
from emu_lightning.annotation.store import MOST_LENT, Assignment, Batch, Person, Picture, Refused

router = APIRouter()

SignedIn = Annotated[Person, Depends(access.signed_in)]
Seconds = Annotated[FiniteFloat, Field(ge=0, le=1e11)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Wish(_Body):
    """How many items the page wants to hold."""

    num: Annotated[int, Field(ge=1, le=MOST_LENT)] = 6


class Times(_Body):
    """By the browser's clock, seconds since 1970."""

    shown_at: Seconds
    loaded_at: Annotated[dict[str, Seconds], Field(max_length=2)]
    first_input_at: Seconds | None = None
    submitted_at: Seconds


class NewAnswer(_Body):
    """An answer in sides, with the proof ``X-Seen`` of each picture by its side."""

    token: Annotated[str, Field(max_length=64)]
    nonce: Annotated[str, Field(max_length=64)]
    answer: dict[str, Any]
    seen: Annotated[dict[str, str], Field(max_length=2)]
    times: Times
    viewport: Annotated[list[Annotated[int, Field(ge=0, le=100_000)]], Field(min_length=2, max_length=2)]
    ui_version: Annotated[str, Field(max_length=40, pattern=r"^[\w.+-]*$")]


@router.post("/api/{batch}/next")
def lend_next(request: Request, person: SignedIn, batch: str, wish: Wish) -> dict[str, Any]:
    store = access.store(request)
    found = store.batch(batch)
    lent = store.lend(person, found, wish.num)
    return {
        "tasks": [_task(found, assignment) for assignment in lent],
        "progress": asdict(store.progress(found, person)),
        "guideline_version": lent[0].guideline_version if lent else store.guideline(found)[0],
    }


@router.post("/api/answer")
def take_answer(request: Request, person: SignedIn, given: NewAnswer) -> dict[str, Any]:
    store, times = access.store(request), given.times
    seen = {
        side: access.is_proof(request, given.token, side, proof)
        and times.loaded_at.get(side, times.submitted_at + 1) <= times.submitted_at
        for side, proof in given.seen.items()
    }
    receipt = store.answer(
        person,
        given.token,
        given.answer,
        given.nonce,
        seen,
        times.model_dump(),
        {"viewport": given.viewport, "ui_version": given.ui_version},
    )
    return {"progress": asdict(store.progress(receipt.batch, person))}


@router.post("/api/{batch}/undo")
def undo(request: Request, person: SignedIn, batch: str) -> dict[str, Any]:
    store = access.store(request)
    found = store.batch(batch)
    return {"task": _task(found, store.undo(person, found))}


@router.get("/pictures/{token}/{side}")
def assigned_picture(request: Request, person: SignedIn, token: str, side: str) -> Response:
    response = _file(access.store(request).picture(person, token, side))
    response.headers["X-Seen"] = access.proof(request, token, side)
    return response


@router.get("/pictures/{ticket}")
def ticketed_picture(request: Request, person: SignedIn, ticket: str) -> Response:
    item_id, slot = access.read_ticket(request, person, ticket)
    return _file(access.store(request).item_picture(item_id, slot))


def _task(batch: Batch, assignment: Assignment) -> dict[str, Any]:
    """What a page may know of an assignment. No slot, no model, no path, no name."""
    item = assignment.item
    return {
        "token": assignment.token,
        "pictures": [
            {
                "side": side,
                "url": f"/pictures/{assignment.token}/{side}",
                "width": item.pictures[slot].width,
                "height": item.pictures[slot].height,
            }
            for side, slot in assignment.sides.items()
        ],
        "prompt": item.prompt if batch.asks.shows_prompt else None,
        "caption": item.caption if batch.asks.shows_caption else None,
        "group": item.group if batch.asks.num_pictures == 1 else None,
        "answer": assignment.previous,
    }


def _file(picture: Picture) -> Response:
    """The file's own bytes, as long as they are those that were added."""
    try:
        content = picture.path.read_bytes()
    except OSError:
        raise Refused(404, "this picture is no longer there") from None
    if hashlib.sha256(content).hexdigest() != picture.sha256:
        raise Refused(410, "this picture is not the one that was added")
    return Response(
        content, media_type=picture.media_type, headers={"Cache-Control": "private, max-age=3600"}
    )
