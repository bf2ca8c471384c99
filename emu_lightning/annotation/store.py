"""What the database knows and how it may change: people, batches, items lent and answered.

Every method is one short transaction. On SQLite the writers of a process stand in line at a lock. On
PostgreSQL whoever changes an item's assignments or counts holds the lock of the item's row; lending passes
over rows that are locked and answering waits for one row, so nobody waits in a circle.

An answer is acknowledged after its event is on disk. What counts is derived from the events: of each
assignment the last answer that was not undone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import secrets
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from PIL import Image, UnidentifiedImageError
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Row,
    Table,
    and_,
    bindparam,
    create_engine,
    func,
    insert,
    make_url,
    or_,
    select,
    update,
)
from sqlalchemy import event as listeners
from sqlalchemy.exc import IntegrityError, ProgrammingError

from emu_lightning.annotation.passwords import hash_password, hash_token, new_token, password_fits
from emu_lightning.annotation.questions import QUESTIONS, Answer, Question, Role, Slot, clean_text
from emu_lightning.annotation.records import (
    Assignment,
    Batch,
    CountedAnswer,
    Event,
    GivenAnswer,
    Item,
    NewItem,
    Person,
    PersonStanding,
    Picture,
    Progress,
    Receipt,
    Refusal,
    Refused,
    Standing,
    sides,
)
from emu_lightning.annotation.schema import (
    assignments,
    batches,
    events,
    guidelines,
    item_pictures,
    items,
    metadata,
    people,
    pictures,
    security_log,
)
from emu_lightning.annotation.tally import PersonTally, Tally

HAS_PLACE = items.c.num_taken < items.c.num_wanted
LENT, DONE, RETURNED = "lent", "done", "returned"
MOST_LENT = 20  # to one person in one batch
INVITATION_SECONDS = 14 * 24 * 3600
PACE_SECONDS, PACE_ANSWERS = 1800, 200  # the recent answers that time left is estimated from
BLOCK = 4  # of these pairs, two have A on the left
DEFAULT_SETTINGS: dict[str, Any] = {
    "lease_seconds": 900,
    "undo_seconds": 600,
    "gold_every": 10,
    "extra_rater": False,
    "keys": {},
}
MEDIA_TYPES = {f"image/{kind}" for kind in ("jpeg", "png", "webp", "gif", "bmp")}  # what every browser shows

T = TypeVar("T")

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Store:
    """One database.

    Args:
        url: as SQLAlchemy reads it: ``sqlite:////data/votes.db``, ``postgresql+psycopg://host/name``. Tables
            that are missing are made.
        clock: seconds since 1970.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        self._engine = _engine(url)
        self._clock = clock
        self._random = random.SystemRandom()
        self._own = threading.local()  # the connection of a thread within at_once
        self._tallies: dict[int, Tally] = {}  # by the id of the batch
        self._tallying = threading.Lock()
        is_sqlite = self._engine.dialect.name == "sqlite"
        self._line: AbstractContextManager[Any] = threading.Lock() if is_sqlite else nullcontext()
        try:
            self._make_tables()
        except (IntegrityError, ProgrammingError):  # another process was making them, and has
            self._make_tables()

    def _make_tables(self) -> None:
        with self._writing() as c:
            metadata.create_all(c)

    def close(self) -> None:
        self._engine.dispose()

    def now(self) -> float:
        """Seconds since 1970, by the clock that leases and invitations go by."""
        return self._clock()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What this thread changes inside becomes one transaction: an error or a kill undoes all of it.

        On SQLite nobody else writes meanwhile: read files before.
        """
        with self._writing() as connection:
            self._own.connection = connection
            try:
                yield
            finally:
                del self._own.connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        if own := getattr(self._own, "connection", None):
            yield own
            return
        with self._line, self._engine.connect() as connection:
            with connection.execution_options(begin="BEGIN IMMEDIATE").begin():
                yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        if own := getattr(self._own, "connection", None):
            yield own
            return
        with self._engine.connect() as connection:
            yield connection

    # People

    def add_person(self, name: str, role: Role, password: str | None = None) -> Person:
        """Someone new, who without a password comes in by an invitation.

        Raises:
            ValueError: the name is taken or is none, the role is not known, or the password is too short.
        """
        values = self._new_person(name, role)
        password_hash = None if password is None else hash_password(password)
        try:
            with self._writing() as c:
                return self._person(c, _insert(c, people, **values, password_hash=password_hash))
        except IntegrityError:
            raise ValueError(f"there is already a person named {values['name']!r}") from None

    def invite(self, name: str, role: Role) -> str:
        """A token for the link that lets this person in, once, within 14 days; kept only as a hash.

        A known person's earlier invitation ends, and accepting the new one replaces the password.

        Raises:
            ValueError: the name is none, or belongs to someone of another role.
        """
        values = self._new_person(name, role)
        token = new_token()
        invitation = {
            "invitation_hash": hash_token(token),
            "invitation_expires": self._clock() + INVITATION_SECONDS,
        }
        with self._writing() as c:
            known = c.execute(select(people).where(people.c.name == values["name"])).first()
            if known is None:
                _insert(c, people, **values, **invitation)
            elif known.role != role:
                raise ValueError(f"{known.name} is a {known.role}: choose another name for a {role}")
            else:
                c.execute(update(people).where(people.c.id == known.id).values(**invitation))
        return token

    def invited(self, token: str) -> Person | None:
        """Whom a link is for; None where it is not known, was used or has expired."""
        with self._reading() as c:
            row = c.execute(select(people.c.id).where(self._holds(token))).first()
            return self._person(c, row.id) if row else None

    def accept_invitation(self, token: str, password: str | None) -> Person:
        """Uses up the invitation and ends the person's other sessions.

        Raises:
            Refused: the invitation is not known, was used, or has expired.
            ValueError: the password is too short; the invitation stays.
        """
        password_hash = None if password is None else hash_password(password)
        with self._writing() as c:
            row = c.execute(select(people.c.id).where(self._holds(token)).with_for_update()).first()
            if row is None:
                raise Refused(404, "this invitation is not known, was used or has expired: ask for a new one")
            c.execute(
                update(people)
                .where(people.c.id == row.id)
                .values(
                    password_hash=password_hash,
                    invitation_hash=None,
                    invitation_expires=None,
                    session_version=people.c.session_version + 1,
                )
            )
            return self._person(c, row.id)

    def check_password(self, name: str, password: str) -> Person | None:
        """The person, or None: after the same time whether the name or the password is wrong."""
        known = clean_text(name)
        with self._reading() as c:
            row = c.execute(select(people).where(people.c.name == (known or ""), people.c.is_active)).first()
        fits = password_fits(password, row.password_hash if row else None)
        return _person(row) if row and fits else None

    def person(self, person_id: int) -> Person | None:
        with self._reading() as c:
            row = c.execute(select(people).where(people.c.id == person_id)).first()
        return _person(row) if row else None

    def people(self) -> list[Person]:
        with self._reading() as c:
            return [_person(row) for row in c.execute(select(people).order_by(people.c.name))]

    def end_sessions(self, person: Person) -> None:
        """Signs the person out everywhere."""
        self._set_person(person, session_version=people.c.session_version + 1)

    def set_active(self, person: Person, is_active: bool) -> None:
        """Someone not active cannot sign in; their answers stay."""
        self._set_person(person, is_active=is_active, session_version=people.c.session_version + 1)

    def _set_person(self, person: Person, **values: Any) -> None:
        with self._writing() as c:
            c.execute(update(people).where(people.c.id == person.id).values(**values))

    def _new_person(self, name: str, role: Role) -> dict[str, Any]:
        text = clean_text(name)
        if not text or len(text) > 80 or not text.isprintable():  # nothing invisible: names must differ
            raise ValueError("a person's name has 1 to 80 visible characters on one line")
        if role not in get_args(Role):
            raise ValueError(f"role {role!r} is not known: use one of {', '.join(get_args(Role))}")
        now = self._clock()
        return {"name": text, "role": role, "is_active": True, "session_version": 1, "created_at": now}

    def _holds(self, token: str) -> ColumnElement[bool]:
        return (
            (people.c.invitation_hash == hash_token(token))
            & (people.c.invitation_expires > self._clock())
            & people.c.is_active
        )

    def _person(self, c: Connection, person_id: int) -> Person:
        return _person(c.execute(select(people).where(people.c.id == person_id)).one())

    # Batches

    def add_batch(
        self,
        question: str,
        title: str,
        num_people: int | None = None,
        settings: Mapping[str, Any] | None = None,
        guideline: str | None = None,
    ) -> Batch:
        """A batch, open, without items.

        Args:
            question: a name in :data:`.questions.QUESTIONS`.
            num_people: how many people answer about one item; the question's own number if None.
            settings: those that differ from :data:`DEFAULT_SETTINGS`.
            guideline: its first version; the question's own text if None.

        Raises:
            ValueError: one of these is not possible.
        """
        if question not in QUESTIONS:
            raise ValueError(f"question {question!r} is not known: use one of {', '.join(QUESTIONS)}")
        asks = QUESTIONS[question]
        num_people = asks.num_people if num_people is None else num_people
        if num_people < 1:
            raise ValueError(f"num_people is {num_people}: at least one person has to answer")
        public_id = secrets.token_hex(6)
        with self._writing() as c:
            batch_id = _insert(
                c,
                batches,
                public_id=public_id,
                question=question,
                title=_clean(title, "title", 200),
                num_people=num_people,
                settings=_settings(settings or {}),
                is_open=True,
                created_at=self._clock(),
            )
            self._add_guideline(c, batch_id, guideline or asks.guideline)
            return self._batch(c, batches.c.public_id == public_id)

    def batches(self) -> list[Batch]:
        with self._reading() as c:
            return [_batch(row) for row in c.execute(select(batches).order_by(batches.c.id))]

    def batch(self, public_id: str) -> Batch:
        """The batch that URLs name so.

        Raises:
            Refused: there is none.
        """
        with self._reading() as c:
            return self._batch(c, batches.c.public_id == _token(public_id))

    def set_open(self, batch: Batch, is_open: bool) -> None:
        with self._writing() as c:
            c.execute(update(batches).where(batches.c.id == batch.id).values(is_open=is_open))

    def add_guideline(self, batch: Batch, text: str) -> int:
        """The number of the new version; answers name the version their person was shown."""
        with self._writing() as c:
            c.execute(select(batches.c.id).where(batches.c.id == batch.id).with_for_update(key_share=True))
            return self._add_guideline(c, batch.id, text)

    def guideline(self, batch: Batch) -> tuple[int, str]:
        """The current version and its text."""
        with self._reading() as c:
            row = c.execute(
                select(guidelines)
                .where(guidelines.c.batch_id == batch.id)
                .order_by(guidelines.c.version.desc())
                .limit(1)
            ).one()
        return row.version, row.text

    def _batch(self, c: Connection, where: ColumnElement[bool]) -> Batch:
        row = c.execute(select(batches).where(where)).first()
        if row is None:
            raise Refused(404, "there is no such batch")
        return _batch(row)

    def _open_batch(self, c: Connection, batch_id: int) -> Batch:
        batch = self._batch(c, batches.c.id == batch_id)
        if not batch.is_open:
            raise Refused(409, f"{batch.title} is closed")
        return batch

    def _guideline_version(self, c: Connection, batch_id: int) -> int:
        latest = select(func.max(guidelines.c.version)).where(guidelines.c.batch_id == batch_id)
        return c.scalar(latest) or 0

    def _add_guideline(self, c: Connection, batch_id: int, text: str) -> int:
        version = self._guideline_version(c, batch_id) + 1
        _insert(
            c,
            guidelines,
            batch_id=batch_id,
            version=version,
            text=_clean(text, "guideline", 20_000),
            created_at=self._clock(),
        )
        return version

    # Items

    def new_pictures(self, batch: Batch, new_items: Iterable[NewItem]) -> PictureFiles:
        """The pictures of those items whose names the batch does not have yet, as :func:`read_pictures`.

        Raises:
            ValueError: an item does not suit the question.
        """
        with self._reading() as c:
            known = self._names(c, batch)
        return read_pictures(item for item in new_items if _item_values(batch, item)["name"] not in known)

    def add_items(self, batch: Batch, new_items: Iterable[NewItem], files: PictureFiles | None = None) -> int:
        """Adds those whose names the batch does not have yet, all or none of them; the number added.

        Args:
            files: of the new ones at least, where their pictures are read already: it takes a while, and
                nobody can answer while :meth:`at_once` holds the database.

        Raises:
            ValueError: an item does not suit the question, or its picture is not one that browsers show or
                has changed since it was first added.
            OSError: a picture cannot be read.
        """
        items_of = list(new_items)
        if files is None:
            files = self.new_pictures(batch, items_of)
        with self._writing() as c:
            c.execute(select(batches.c.id).where(batches.c.id == batch.id).with_for_update(key_share=True))
            known, new = self._names(c, batch), dict[str, tuple[dict[str, Any], NewItem]]()
            for item in items_of:
                row = _item_values(batch, item)
                if row["name"] not in known:
                    new.setdefault(row["name"], (row, item))
            if not new:
                return 0
            author_id = self._author_ids(c)
            rows = [{**row, "author_id": author_id(item.author)} for row, item in new.values()]
            shown = [
                (name, slot, files[path], model)
                for name, (_, item) in new.items()
                for slot, (path, model) in item.pictures.items()
            ]
            picture_ids = self._picture_ids(c, {file["path"]: file for _, _, file, _ in shown})
            c.execute(insert(items), rows)
            ids = select(items.c.name, items.c.id).where(items.c.batch_id == batch.id)
            item_ids = {row.name: row.id for row in c.execute(ids)}
            c.execute(
                insert(item_pictures),
                [
                    {
                        "item_id": item_ids[name],
                        "slot": slot,
                        "picture_id": picture_ids[file["path"]],
                        "model": model,
                    }
                    for name, slot, file, model in shown
                ],
            )
        return len(new)

    def _names(self, c: Connection, batch: Batch) -> set[str]:
        return set(c.scalars(select(items.c.name).where(items.c.batch_id == batch.id)))

    def _author_ids(self, c: Connection) -> Callable[[int | str | None], int | None]:
        """Ids of people named; one who is new becomes a generalist, without a way to sign in."""
        ids = {row.name: row.id for row in c.execute(select(people.c.id, people.c.name))}

        def author_id(author: int | str | None) -> int | None:
            if isinstance(author, str) and author not in ids:
                ids[author] = _insert(c, people, **self._new_person(author, "generalist"))
            return ids[author] if isinstance(author, str) else author

        return author_id

    def _picture_ids(self, c: Connection, files: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """By path."""
        ids: dict[str, int] = {}
        for chunk in _chunks(list(files)):
            there = select(pictures.c.id, pictures.c.path, pictures.c.sha256).where(
                pictures.c.path.in_(chunk)
            )
            for row in c.execute(there):
                if row.sha256 != files[row.path]["sha256"]:
                    raise ValueError(
                        f"{row.path} has changed since it was added: give the new picture a new name"
                    )
                ids[row.path] = row.id
            if new := [files[path] for path in chunk if path not in ids]:
                c.execute(insert(pictures), new)
                ids |= {row.path: row.id for row in c.execute(there)}
        return ids

    def items(self, batch: Batch) -> list[Item]:
        """All items with their models, by name."""
        with self._reading() as c:
            found = self._items(c, items.c.batch_id == batch.id, whole=True)
        return sorted(found.values(), key=lambda item: item.name)

    def item(self, batch: Batch, item_id: int) -> Item:
        """One item without its models.

        Raises:
            Refused: the batch has none of this id.
        """
        with self._reading() as c:
            found = self._items(c, (items.c.batch_id == batch.id) & (items.c.id == item_id))
        if not found:
            raise Refused(404, "there is no such item")
        return found[item_id]

    def groups(self, batch: Batch) -> list[str]:
        with self._reading() as c:
            named = select(items.c.group_name).where(
                items.c.batch_id == batch.id, items.c.group_name.is_not(None)
            )
            return sorted(c.scalars(named.distinct()))

    def sheet(self, batch: Batch, group: str) -> list[Item]:
        """The items of one concept, without their models and known answers."""
        with self._reading() as c:
            found = self._items(c, (items.c.batch_id == batch.id) & (items.c.group_name == clean_text(group)))
        return sorted(found.values(), key=lambda item: item.name)

    def picture(self, person: Person, token: str, side: str) -> Picture:
        """A picture of an assignment that the person holds.

        Raises:
            Refused: there is none; 404, whatever the reason.
        """
        num_pictures = select(func.count()).where(item_pictures.c.item_id == assignments.c.item_id)
        with self._reading() as c:
            row = c.execute(
                select(assignments, num_pictures.scalar_subquery().label("num_pictures")).where(
                    assignments.c.token == _token(token),
                    assignments.c.person_id == person.id,
                    assignments.c.state.in_((LENT, DONE)),
                )
            ).first()
        slots = cast(dict[str, Slot], sides(row.num_pictures, row.left_slot)) if row else {}
        if row is None or side not in slots:
            raise Refused(404, "there is no such picture")
        return self.item_picture(row.item_id, slots[side])

    def item_picture(self, item_id: int, slot: Slot) -> Picture:
        """A picture of an item, whoever asks.

        Raises:
            Refused: there is none.
        """
        with self._reading() as c:
            row = c.execute(
                select(pictures)
                .join(item_pictures)
                .where(item_pictures.c.item_id == item_id, item_pictures.c.slot == slot)
            ).first()
        if row is None:
            raise Refused(404, "there is no such picture")
        return _picture(row)

    def _items(self, c: Connection, where: ColumnElement[bool], *, whole: bool = False) -> dict[int, Item]:
        shown: dict[int, dict[Slot, Picture]] = defaultdict(dict)
        models: dict[int, dict[Slot, str | None]] = defaultdict(dict)
        joined = item_pictures.join(pictures).join(items, items.c.id == item_pictures.c.item_id)
        for row in c.execute(select(pictures, item_pictures).select_from(joined).where(where)):
            shown[row.item_id][row.slot] = _picture(row)
            if whole:
                models[row.item_id][row.slot] = row.model
        return {
            row.id: Item(
                id=row.id,
                batch_id=row.batch_id,
                name=row.name,
                group=row.group_name,
                prompt=row.prompt,
                caption=row.caption,
                author=row.author_id,
                gold=row.gold if whole else None,
                num_wanted=row.num_wanted,
                num_taken=row.num_taken,
                num_done=row.num_done,
                extra=row.extra,
                pictures=dict(sorted(shown[row.id].items())),
                models=models.get(row.id, {}),
            )
            for row in c.execute(select(items).where(where))
        }

    # Lending and answering

    def lend(self, person: Person, batch: Batch, num: int) -> list[Assignment]:
        """Up to ``num`` items for one person: those still lent to them, then new ones.

        Leases that are half over begin anew. A place whose lease has ended is given to someone else once no
        item with a free place is left. Of each four pairs two have A on the left, in an order drawn anew; of
        each ``gold_every`` items one has a known answer, at a place drawn anew.

        Raises:
            Refused: the person's role does not answer this question, or the batch is closed.
        """
        if person.role not in batch.asks.roles:
            raise Refused(403, f"{batch.title} is not for a {person.role}")
        num = max(0, min(num, MOST_LENT))
        for pause in (0.02, 0.1, 0.5):
            lent, is_missed = self._lend(person, batch, num)
            if not is_missed:
                break
            time.sleep(pause)
        return lent

    def _lend(self, person: Person, batch: Batch, num: int) -> tuple[list[Assignment], bool]:
        """What is lent now; and whether it is nothing only because others held the rows at this moment."""
        now = self._clock()
        with self._writing() as c:
            batch = self._open_batch(c, batch.id)
            # One person's requests stand in line: their pages must not draw the same item twice.
            c.execute(select(people.c.id).where(people.c.id == person.id).with_for_update(key_share=True))
            lease = {
                "guideline_version": self._guideline_version(c, batch.id),
                "lease_expires": now + batch.settings["lease_seconds"],
                "state": LENT,
            }
            held = self._held(c, person, batch)
            is_half_over = any(row.lease_expires < (now + lease["lease_expires"]) / 2 for row in held)
            if is_half_over or any(row.guideline_version < lease["guideline_version"] for row in held):
                self._renew(c, person, batch, lease)
                held = [row for row in self._held(c, person, batch) if row.lease_expires > now]
            if len(held) < num:
                self._draw(c, person, batch, num - len(held), now, lease)
                held = [row for row in self._held(c, person, batch) if row.lease_expires > now]
            free = select(items.c.id).where(self._askable(person, batch), HAS_PLACE)
            is_missed = num > 0 and not held and c.scalar(free.limit(1)) is not None
            return self._assignments(c, held[:num], batch), is_missed

    def _held(self, c: Connection, person: Person, batch: Batch) -> list[Row[Any]]:
        mine = select(assignments).where(_of(person, batch), assignments.c.state == LENT)
        return list(c.execute(mine.order_by(assignments.c.id)))

    def _renew(self, c: Connection, person: Person, batch: Batch, lease: Mapping[str, Any]) -> None:
        """Their own ended leases too, as long as nobody has taken the place."""
        mine = (_of(person, batch), assignments.c.state == LENT)
        locked = c.scalars(
            select(items.c.id)
            .join(assignments)
            .where(*mine)
            .with_for_update(of=items, key_share=True, skip_locked=True)
        ).all()
        c.execute(update(assignments).where(*mine, assignments.c.item_id.in_(locked)).values(lease))

    def _draw(
        self, c: Connection, person: Person, batch: Batch, num: int, now: float, lease: Mapping[str, Any]
    ) -> None:
        every = batch.settings["gold_every"]
        latest = c.execute(
            select(assignments.c.left_slot, assignments.c.is_gold, items.c.order_key)
            .join(items, items.c.id == assignments.c.item_id)
            .where(_of(person, batch))
            .order_by(assignments.c.id.desc())
            .limit(max(every, BLOCK))
        ).all()[::-1]
        last = next((row.order_key for row in reversed(latest) if not row.is_gold), "")
        new = self._take_free(c, person, batch, num, now, last)

        # A place this person lost before and that is free again: token and sides stay.
        lost = _of(person, batch) & assignments.c.item_id.in_(new)
        again = c.scalars(select(assignments.c.item_id).where(lost)).all()
        if again:
            c.execute(update(assignments).where(lost).values(lease))
            new = [item_id for item_id in new if item_id not in again]
            num -= len(again)

        known = list(self._known(c, person, batch, num if every else 0))
        num_drawn = _count(c, assignments, _of(person, batch))
        lefts, golds = [row.left_slot for row in latest], [row.is_gold for row in latest]
        rows: list[dict[str, Any]] = []
        for index in range(num_drawn, num_drawn + num):
            is_gold = bool(known) and self._is_gold_due(golds, index, every)
            # Known answers are mixed in, not put at the end, unless the batch has nothing else.
            if not new and not (is_gold and every == 1):
                break
            lefts.append(self._left(lefts, index) if batch.asks.num_pictures == 2 else "A")
            golds.append(is_gold)
            rows.append(
                {
                    **lease,
                    "token": new_token(),
                    "batch_id": batch.id,
                    "item_id": (known if is_gold else new).pop(0),
                    "person_id": person.id,
                    "is_gold": is_gold,
                    "left_slot": lefts[-1],
                }
            )
        if rows:
            c.execute(insert(assignments), rows)
        taken = [*again, *(row["item_id"] for row in rows if not row["is_gold"])]
        if taken:
            c.execute(update(items).where(items.c.id.in_(taken)).values(num_taken=items.c.num_taken + 1))

    def _left(self, lefts: Sequence[Slot], index: int) -> Slot:
        rest = Counter("AB" * (BLOCK // 2)) - Counter(_in_block(lefts, index, BLOCK))
        return cast(Slot, self._random.choice(sorted(rest.elements())))

    def _is_gold_due(self, golds: Sequence[bool], index: int, every: int) -> bool:
        """One of each ``every``, each place in the block as likely as another."""
        if every == 0 or any(_in_block(golds, index, every)):
            return False
        return self._random.randrange(every - index % every) == 0

    def _known(self, c: Connection, person: Person, batch: Batch, num: int) -> Sequence[int]:
        asked = select(assignments.c.id).where(
            assignments.c.item_id == items.c.id, assignments.c.person_id == person.id
        )
        return c.scalars(
            select(items.c.id)
            .where(items.c.batch_id == batch.id, items.c.gold.is_not(None), ~asked.exists())
            .order_by(items.c.order_key)
            .limit(num)
        ).all()

    def _take_free(
        self, c: Connection, person: Person, batch: Batch, num: int, now: float, last: str
    ) -> list[int]:
        """Locks up to ``num`` items with a free place that this person can be asked about.

        On from ``last``, the order of the item drawn last, and around: what is done is not read again.
        """
        found = select(items.c.id).where(self._askable(person, batch)).order_by(items.c.order_key)
        found = found.with_for_update(key_share=True, skip_locked=True)
        ahead = items.c.order_key > last
        free: list[int] = []
        for part in (ahead, ~ahead):
            if len(free) < num:
                free += c.scalars(found.where(HAS_PLACE, part).limit(num - len(free)))
        if len(free) == num:
            return free

        ended = (assignments.c.state == LENT) & (assignments.c.lease_expires <= now)
        overdue = select(assignments.c.item_id).where(assignments.c.batch_id == batch.id, ended)
        full = found.where(~HAS_PLACE, items.c.num_wanted > 0, items.c.id.in_(overdue))
        locked = c.scalars(full.limit(num - len(free))).all()
        c.execute(update(assignments).where(assignments.c.item_id.in_(locked), ended).values(state=RETURNED))
        num_held = select(func.count()).where(
            assignments.c.item_id == items.c.id, assignments.c.state.in_((LENT, DONE))
        )
        c.execute(update(items).where(items.c.id.in_(locked)).values(num_taken=num_held.scalar_subquery()))
        # The rows may have changed between being found and being locked.
        return [*free, *c.scalars(select(items.c.id).where(items.c.id.in_(locked), HAS_PLACE))]

    def _askable(self, person: Person, batch: Batch) -> ColumnElement[bool]:
        """Items not asked of this person, or lost by them, whose caption is not theirs."""
        has = select(assignments.c.id).where(
            assignments.c.item_id == items.c.id,
            assignments.c.person_id == person.id,
            assignments.c.state.in_((LENT, DONE)),
        )
        return and_(
            items.c.batch_id == batch.id,
            ~has.exists(),
            or_(items.c.author_id.is_(None), items.c.author_id != person.id),
        )

    def _assignments(self, c: Connection, rows: Sequence[Row[Any]], batch: Batch) -> list[Assignment]:
        found = self._items(c, items.c.id.in_([row.item_id for row in rows]))
        given = select(events.c.assignment_id, events.c.body).where(
            events.c.assignment_id.in_([row.id for row in rows]), events.c.kind == "answer"
        )
        previous = {row.assignment_id: row.body for row in c.execute(given.order_by(events.c.id))}
        return [
            Assignment(
                id=row.id,
                token=row.token,
                item=found[row.item_id],
                person_id=row.person_id,
                left_slot=row.left_slot,
                guideline_version=row.guideline_version,
                lease_expires=row.lease_expires,
                state=row.state,
                previous=batch.asks.to_sides(previous[row.id]["answer"], row.left_slot)
                if row.id in previous
                else None,
            )
            for row in rows
        ]

    def answer(
        self,
        person: Person,
        token: str,
        answer: Answer,
        nonce: str,
        seen: Mapping[str, bool],
        times: Mapping[str, Any],
        client: Mapping[str, Any] | None = None,
    ) -> Receipt:
        """Commits one answer.

        Args:
            token: of the assignment.
            answer: in sides.
            nonce: chosen anew for each answer; sent again, it changes nothing and brings the same receipt.
            seen: side -> whether the picture is proven to have been loaded.
            times: ``shown_at``, ``loaded_at``, ``first_input_at``, ``submitted_at``, seconds since 1970.
            client: the window's size and the page's version.

        Raises:
            Refused: 404, the person holds no such assignment; 409, the answer was given, the place was lost
                and taken, the batch is closed or the nonce belongs to another answer; 422, the answer is none
                or a picture was not seen.
        """
        now = self._clock()
        if not _TOKEN.fullmatch(nonce):
            raise Refused(422, "the nonce must be 1 to 64 letters, digits, - or _")
        mine = (assignments.c.token == _token(token)) & (assignments.c.person_id == person.id)
        with self._writing() as c:
            item = self._lock_item(c, select(assignments.c.item_id).where(mine))
            held = c.execute(select(assignments).where(mine)).one()
            batch = self._batch(c, batches.c.id == item.batch_id)
            before = c.execute(select(events).where(events.c.nonce == nonce)).first()
            if before is not None:
                if before.assignment_id != held.id:
                    raise Refused(409, "this nonce belongs to another answer")
                return Receipt(before.id, batch, before.at, is_repeat=True)
            if not batch.is_open:
                raise Refused(409, f"{batch.title} is closed")
            if held.state == DONE:
                raise Refused(409, "you have answered this already")
            if held.state == RETURNED and item.num_taken >= item.num_wanted:
                raise Refused(409, "this took so long that someone else was asked instead")
            stored = _stored(batch.asks, answer, held.left_slot)
            shown = sides(batch.asks.num_pictures, held.left_slot)
            if not all(seen.get(side) for side in shown):
                raise Refused(422, "look at every picture in full before you answer")

            body = {
                "answer": stored,
                "left_slot": held.left_slot,
                "times": dict(times),
                "client": dict(client or {}),
                "guideline_version": held.guideline_version,
            }
            try:
                event_id = self._append(c, now, "answer", person.id, item, held.id, body, nonce)
            except IntegrityError:  # sent with two items at the same moment
                raise Refused(409, "this nonce belongs to another answer") from None
            self._set_state(c, held.id, DONE)
            if item.gold is None:
                self._settle(c, batch, [item.id])
        return Receipt(event_id, batch, now, is_repeat=False)

    def undo(self, person: Person, batch: Batch) -> Assignment:
        """Takes back this person's latest answer in the batch; the item is lent to them again.

        Raises:
            Refused: 409, there is none within ``undo_seconds``, or the batch is closed.
        """
        now = self._clock()
        latest = (
            select(assignments.c.id)
            .join(events, events.c.assignment_id == assignments.c.id)
            .where(
                _of(person, batch),
                assignments.c.state == DONE,
                events.c.kind == "answer",
                events.c.at >= now - batch.settings["undo_seconds"],
            )
            .order_by(events.c.id.desc())
            .limit(1)
        )
        nothing = Refused(409, "there is no recent answer to take back")
        with self._writing() as c:
            batch = self._open_batch(c, batch.id)
            assignment_id = c.scalar(latest)
            if assignment_id is None:
                raise nothing
            mine = assignments.c.id == assignment_id
            item = self._lock_item(c, select(assignments.c.item_id).where(mine))
            if c.scalar(select(assignments.c.state).where(mine)) != DONE:
                raise nothing
            self._append(c, now, "undo", person.id, item, assignment_id, {})
            self._set_state(c, assignment_id, LENT, lease_expires=now + batch.settings["lease_seconds"])
            if item.gold is None:
                self._settle(c, batch, [item.id])
            return self._assignments(c, c.execute(select(assignments).where(mine)).all(), batch)[0]

    def adjudicate(self, lead: Person, item: Item, answer: Answer) -> None:
        """A lead's decision on an item whose people disagree; a later one replaces it.

        Raises:
            Refused: 403, not a lead; 409, nobody disagrees; 422, the answer is none.
        """
        if lead.role != "lead":
            raise Refused(403, "only a lead decides")
        with self._writing() as c:
            row = self._lock_item(c, select(items.c.id).where(items.c.id == item.id))
            batch = self._batch(c, batches.c.id == row.batch_id)
            if not batch.asks.needs_lead([body["answer"] for body in self._counted_of(c, row.id)]):
                raise Refused(409, "the answers to this item do not disagree")
            body = {
                "answer": _stored(batch.asks, answer, "A"),
                "left_slot": "A",
                "times": {},
                "client": {},
                "guideline_version": self._guideline_version(c, batch.id),
            }
            self._append(c, self._clock(), "adjudicate", lead.id, row, None, body)

    def import_answers(self, batch: Batch, given: Sequence[GivenAnswer]) -> int:
        """Answers and leads' decisions that were given elsewhere; whoever gave them, and however many did.

        Left out is what would change nothing: an answer of a person who was asked about the item here or has
        answered it, a decision that stands already.

        Returns:
            How many were added: all the others or, after an error, none.

        Raises:
            ValueError: an answer is none, or cannot be kept.
        """
        now = self._clock()
        checked = [(one, *_imported(batch, one, now)) for one in given]
        about = sorted({one.item.id for one in given})
        with self._writing() as c:
            gold = dict[int, bool]()
            for chunk in _chunks(about):  # in order: two imports do not wait for each other in a circle
                locked = select(items).where(items.c.id.in_(chunk)).order_by(items.c.id)
                rows = c.execute(locked.with_for_update(key_share=True))
                gold |= {row.id: row.gold is not None for row in rows}
            version = self._guideline_version(c, batch.id)
            pair = select(assignments.c.item_id, assignments.c.person_id)
            asked = {tuple(row) for row in c.execute(pair.where(assignments.c.batch_id == batch.id))}
            log = c.execute(_log(events.c.batch_id == batch.id, events.c.kind == "adjudicate"))
            decided = {row.item_id: (row.person_id, row.body["answer"]) for row in _adjudicated(log)}
            new_assignments, new_events = list[dict[str, Any]](), list[dict[str, Any]]()
            for one, at, body in checked:
                key, is_answer = (one.item.id, one.person_id), one.kind == "answer"
                if key in asked if is_answer else decided.get(key[0]) == (key[1], body["answer"]):
                    continue
                token = new_token() if is_answer else None
                body["guideline_version"] = one.guideline_version or version
                named = {"batch_id": batch.id, "item_id": one.item.id, "person_id": one.person_id}
                new_events.append({**named, "at": at, "kind": one.kind, "body": body, "token": token})
                if not is_answer:
                    decided[key[0]] = key[1], body["answer"]
                    continue
                asked.add(key)
                new_assignments.append(
                    {
                        **named,
                        "token": token,
                        "is_gold": gold[one.item.id],
                        "left_slot": one.left_slot,
                        "guideline_version": body["guideline_version"],
                        "lease_expires": at,
                        "state": DONE,
                    }
                )
            ids = self._add_assignments(c, new_assignments)
            if new_events:
                c.execute(
                    insert(events),
                    [{**event, "assignment_id": ids.get(event.pop("token"))} for event in new_events],
                )
            self._settle(c, batch, [item_id for item_id in about if not gold[item_id]])
        return len(new_events)

    def _add_assignments(self, c: Connection, rows: Sequence[dict[str, Any]]) -> dict[str, int]:
        """Ids by token."""
        if rows:
            c.execute(insert(assignments), rows)
        return {
            row.token: row.id
            for chunk in _chunks([row["token"] for row in rows])
            for row in c.execute(
                select(assignments.c.token, assignments.c.id).where(assignments.c.token.in_(chunk))
            )
        }

    def _lock_item(self, c: Connection, item_id: Any) -> Row[Any]:
        """The item's row, nobody else's until the end of the transaction."""
        row = c.execute(select(items).where(items.c.id.in_(item_id)).with_for_update(key_share=True)).first()
        if row is None:
            raise Refused(404, "this item was not given to you")
        return row

    def _append(
        self,
        c: Connection,
        at: float,
        kind: str,
        person_id: int,
        item: Row[Any],
        assignment_id: int | None,
        body: Mapping[str, Any],
        nonce: str | None = None,
    ) -> int:
        return _insert(
            c,
            events,
            at=at,
            batch_id=item.batch_id,
            item_id=item.id,
            person_id=person_id,
            assignment_id=assignment_id,
            kind=kind,
            nonce=nonce,
            body=body,
        )

    def _set_state(self, c: Connection, assignment_id: int, state: str, **values: Any) -> None:
        c.execute(update(assignments).where(assignments.c.id == assignment_id).values(state=state, **values))

    def _settle(self, c: Connection, batch: Batch, item_ids: Sequence[int]) -> None:
        """Counts places of items anew. An item never wants fewer people than it has already been given to.

        Args:
            item_ids: locked, and without a known answer: those have no places.
        """
        values = []
        for chunk in _chunks(item_ids):
            states: dict[int, Counter[str]] = defaultdict(Counter)
            held = select(assignments.c.item_id, assignments.c.state).where(assignments.c.item_id.in_(chunk))
            for row in c.execute(held):
                states[row.item_id][row.state] += 1
            answers: dict[int, list[Answer]] = defaultdict(list)
            for given in _counted(c.execute(_log(events.c.item_id.in_(chunk)))):
                answers[given.item_id].append(given.body["answer"])
            for item_id in chunk:
                num_taken = states[item_id][LENT] + states[item_id][DONE]
                wanted = batch.asks.wanted(answers[item_id], batch.num_people, batch.settings["extra_rater"])
                values.append(
                    {
                        "settled": item_id,
                        "num_taken": num_taken,
                        "num_done": states[item_id][DONE],
                        "num_wanted": max(wanted, num_taken),
                    }
                )
        if values:
            c.execute(update(items).where(items.c.id == bindparam("settled")), values)

    def _counted_of(self, c: Connection, item_id: int) -> list[dict[str, Any]]:
        return [row.body for row in _counted(c.execute(_log(events.c.item_id == item_id)))]

    # What came of it

    def progress(self, batch: Batch, person: Person | None = None) -> Progress:
        """Items with a known answer count in ``mine`` alone."""
        now = self._clock()
        recent = (
            select(events.c.at)
            .where(events.c.batch_id == batch.id, events.c.at > now - PACE_SECONDS)
            .where(events.c.kind == "answer")
            .order_by(events.c.at.desc())
            .limit(PACE_ANSWERS)
        )
        sums = select(func.sum(items.c.num_done), func.sum(items.c.num_wanted)).where(
            items.c.batch_id == batch.id
        )
        with self._reading() as c:
            done, total = c.execute(sums).one()
            times = c.scalars(recent).all()
            mine = _count(c, assignments, _of(person, batch), assignments.c.state == DONE) if person else 0
        done, total = int(done or 0), int(total or 0)
        seconds_left = None
        if len(times) >= 5:  # fewer say nothing
            seconds_left = (total - done) * (now - times[-1]) / len(times)
        return Progress(done, total, mine, seconds_left)

    def answers(self, batch: Batch, person: Person | None = None) -> list[CountedAnswer]:
        """Everyone's or one person's answers that count, oldest first; not the leads' decisions."""
        given = [] if person is None else [events.c.person_id == person.id]
        return self._answers(batch, _counted, *given)

    def answers_to(self, batch: Batch, item_id: int) -> list[CountedAnswer]:
        """Everyone's answers about one item that count, oldest first."""
        return self._answers(batch, _counted, events.c.item_id == item_id)

    def adjudications(self, batch: Batch) -> list[CountedAnswer]:
        """The leads' decisions, the latest of each item."""
        return self._answers(batch, _adjudicated, events.c.kind == "adjudicate")

    def _answers(
        self,
        batch: Batch,
        counts: Callable[[Iterable[Row[Any]]], list[Row[Any]]],
        *where: ColumnElement[bool],
    ) -> list[CountedAnswer]:
        about = items.c.batch_id == batch.id
        if where:
            about &= items.c.id.in_(select(events.c.item_id).where(events.c.batch_id == batch.id, *where))
        with self._reading() as c:
            rows = counts(c.execute(_log(events.c.batch_id == batch.id, *where)))
            found = self._items(c, about, whole=True)
            known = {row.id: _person(row) for row in c.execute(select(people))}
        return [
            CountedAnswer(
                item=found[row.item_id],
                person=known[row.person_id],
                answer=row.body["answer"],
                left_slot=row.body["left_slot"],
                at=row.at,
                times=row.body["times"],
                guideline_version=row.body["guideline_version"],
                is_gold=found[row.item_id].gold is not None,
            )
            for row in rows
        ]

    def to_adjudicate(self, batch: Batch) -> list[int]:
        """Ids of the finished items whose people disagree and on which no lead has decided."""
        with self._tally(batch) as tally:
            return sorted(tally.disputed)

    def events(self, batch: Batch) -> list[Event]:
        """The whole log, in the order it was written."""
        named = events.join(people, people.c.id == events.c.person_id).join(
            items, items.c.id == events.c.item_id
        )
        log = select(events, people.c.name.label("person"), items.c.name.label("item")).select_from(named)
        with self._reading() as c:
            return [
                Event(row.id, row.at, row.kind, row.person, row.item, row.assignment_id, row.nonce, row.body)
                for row in c.execute(log.where(events.c.batch_id == batch.id).order_by(events.c.id))
            ]

    def standing(self, batch: Batch) -> Standing:
        """How the batch goes: agreement, what was answered, and each person's work."""
        with self._tally(batch) as tally:
            return Standing(
                num_answers=tally.options.total(),
                raw_agreement=tally.raw_agreement,
                alpha=tally.alpha,
                options=dict(+tally.options),
                people=[
                    _person_standing(person, tally.people[person.id])
                    for person in self.people()
                    if person.id in tally.people
                    and (tally.people[person.id].num_answers or tally.people[person.id].num_gold)
                ],
                num_disputed=len(tally.disputed),
            )

    @contextmanager
    def _tally(self, batch: Batch) -> Iterator[Tally]:
        """The batch's tally with all that is in the log, which no other thread changes meanwhile."""
        with self._tallying:
            tally = self._tallies.pop(batch.id, None) or Tally(batch.asks)
            with self._reading() as c:
                before = events.c.batch_id == batch.id, events.c.id <= tally.last_event
                # Two writers to PostgreSQL may commit in another order than that of their events' ids.
                if _count(c, events, *before) != tally.num_events:
                    tally = Tally(batch.asks)
                self._add_new(c, batch, tally)
            self._tallies[batch.id] = tally  # only whole: one that was stopped midway is made anew
            yield tally

    def _add_new(self, c: Connection, batch: Batch, tally: Tally) -> None:
        new = (
            select(events, items.c.gold, items.c.num_wanted)
            .join(items, items.c.id == events.c.item_id)
            .where(events.c.batch_id == batch.id, events.c.id > tally.last_event)
            .order_by(events.c.id)
        )
        for row in c.execute(new.execution_options(yield_per=1000)):
            tally.last_event, tally.num_events = row.id, tally.num_events + 1
            if row.kind == "adjudicate":
                tally.decide(row.item_id)
                continue
            body, change = (row.body, 1) if row.kind == "answer" else (self._taken_back(c, row), -1)
            tally.count(change, row.item_id, row.person_id, body, row.gold, row.num_wanted)
        tally.settle()

    def _taken_back(self, c: Connection, undo: Row[Any]) -> dict[str, Any]:
        """The body of the answer that this event takes back."""
        answer = (
            select(events.c.body)
            .where(events.c.assignment_id == undo.assignment_id, events.c.id < undo.id)
            .where(events.c.kind == "answer")
            .order_by(events.c.id.desc())
            .limit(1)
        )
        body: dict[str, Any] = c.execute(answer).scalar_one()
        return body

    # Refusals

    def log_refusal(self, person_id: int | None, address: str, what: str, detail: str) -> None:
        """Keeps who was refused what; a password or cookie must not be in ``detail``."""
        with self._writing() as c:
            _insert(
                c,
                security_log,
                at=self._clock(),
                person_id=person_id,
                address=_printable(address),
                what=_printable(what),
                detail=_printable(detail),
            )

    def refusals(self, num: int = 500) -> list[Refusal]:
        """The latest first."""
        rows = (
            select(security_log, people.c.name)
            .select_from(security_log.outerjoin(people))
            .order_by(security_log.c.id.desc())
            .limit(num)
        )
        with self._reading() as c:
            return [Refusal(row.at, row.name, row.address, row.what, row.detail) for row in c.execute(rows)]


def _engine(url: str) -> Engine:
    address = make_url(url)
    if address.get_backend_name() == "sqlite" and address.database:
        # Names and hashes are nobody else's business; what SQLite puts beside the file is as closed as it is.
        os.close(os.open(address.database, os.O_RDWR | os.O_CREAT, 0o600))
    engine = create_engine(
        address,
        pool_size=20,
        max_overflow=20,  # together as many as the server has threads
        pool_pre_ping=True,
        json_serializer=partial(json.dumps, ensure_ascii=False, allow_nan=False),
    )
    if engine.dialect.name == "sqlite":

        @listeners.listens_for(engine, "connect")
        def _prepare(connection: sqlite3.Connection, _: object) -> None:
            connection.isolation_level = None  # transactions begin where SQLAlchemy says so
            connection.execute("PRAGMA busy_timeout = 30000")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # committed is on disk
            connection.execute("PRAGMA foreign_keys = ON")

        @listeners.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


def _insert(c: Connection, table: Table, **values: Any) -> int:
    """The new row's id."""
    key = c.execute(insert(table).values(**values)).inserted_primary_key
    return int(key[0]) if key else 0


def _count(c: Connection, table: Table, *where: ColumnElement[bool]) -> int:
    return c.scalar(select(func.count()).select_from(table).where(*where)) or 0


def _of(person: Person, batch: Batch) -> ColumnElement[bool]:
    return (assignments.c.person_id == person.id) & (assignments.c.batch_id == batch.id)


def _stored(asks: type[Question], answer: Answer, left: Slot) -> Answer:
    try:
        return asks.to_slots(asks.check(answer), left)
    except ValueError as error:
        raise Refused(422, str(error)) from None


def _chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """No longer than what any database takes in one question."""
    return (values[start : start + 500] for start in range(0, len(values), 500))


def _in_block(history: Sequence[Any], index: int, size: int) -> Sequence[Any]:
    """The latest of ``history`` in the same block of ``size`` as ``index``, the place that comes next."""
    return history[len(history) - index % size :]


def _log(*where: ColumnElement[bool]) -> Any:
    return select(events).where(*where).order_by(events.c.id)


def _counted(rows: Iterable[Row[Any]]) -> list[Row[Any]]:
    """Of each assignment the last answer that was not undone, oldest first."""
    counted: dict[int, Row[Any]] = {}
    for row in rows:
        if row.kind in ("answer", "undo"):
            counted.pop(row.assignment_id, None)
        if row.kind == "answer":
            counted[row.assignment_id] = row
    return list(counted.values())


def _adjudicated(rows: Iterable[Row[Any]]) -> list[Row[Any]]:
    return list({row.item_id: row for row in rows}.values())


def _person_standing(person: Person, theirs: PersonTally) -> PersonStanding:
    return PersonStanding(
        person=person,
        num_answers=theirs.num_answers,
        num_sided=theirs.num_left + theirs.num_right,
        share_left=theirs.share_left,
        median_seconds=theirs.median_seconds,
        num_gold=theirs.num_gold,
        num_gold_right=theirs.num_gold_right,
    )


def _person(row: Row[Any]) -> Person:
    return Person(
        row.id,
        row.name,
        row.role,
        row.is_active,
        row.session_version,
        row.created_at,
        row.invitation_expires,
    )


def _batch(row: Row[Any]) -> Batch:
    settings = {**DEFAULT_SETTINGS, **row.settings}
    return Batch(
        row.id, row.public_id, row.question, row.title, row.num_people, settings, row.is_open, row.created_at
    )


def _picture(row: Row[Any]) -> Picture:
    return Picture(row.id, Path(row.path), row.sha256, row.width, row.height, row.media_type)


def _token(text: str) -> str:
    if not _TOKEN.fullmatch(text):
        raise Refused(404, "there is nothing of this name")
    return text


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:500])


def _clean(text: str, what: str, longest: int) -> str:
    cleaned = clean_text(text)
    if not cleaned or len(cleaned) > longest:
        raise ValueError(f"{what} must be 1 to {longest} characters of plain text")
    return cleaned


def _plain(value: dict[str, Any], what: str) -> dict[str, Any]:
    """Raises:
    ValueError: it is not what every database keeps as JSON.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be kept as JSON: {error}") from None
    return value


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a batch.

    Raises:
        ValueError: one is not known or not possible.
    """
    unknown = sorted(given.keys() - DEFAULT_SETTINGS.keys())
    if unknown:
        raise ValueError(f"setting {unknown[0]!r} is not known: use {', '.join(DEFAULT_SETTINGS)}")
    settings = {**DEFAULT_SETTINGS, **given}
    for name in ("lease_seconds", "undo_seconds", "gold_every"):
        if isinstance(settings[name], bool) or not isinstance(settings[name], int) or settings[name] < 0:
            raise ValueError(f"setting {name} is {settings[name]!r}: give a whole number, at least 0")
    if settings["lease_seconds"] == 0:
        raise ValueError("setting lease_seconds is 0: nobody could answer in time")
    if not isinstance(settings["extra_rater"], bool):
        raise ValueError(f"setting extra_rater is {settings['extra_rater']!r}: give true or false")
    keys = settings["keys"]
    if not isinstance(keys, dict) or not all(isinstance(part, dict) for part in keys.values()):
        raise ValueError("setting keys must give for each key a part of an answer")
    return settings


def _item_values(batch: Batch, item: NewItem) -> dict[str, Any]:
    """The row of a new item.

    Raises:
        ValueError: it does not suit the batch's question.
    """
    asks, where = batch.asks, f"item {item.name!r}"
    texts = {"prompt": item.prompt, "caption": item.caption, "group": item.group}
    name = _clean(item.name, f"the name of {where}", 500)
    cleaned = {
        what: None if text is None else _clean(text, f"{what} of {where}", 20_000)
        for what, text in texts.items()
    }
    if set(item.pictures) != set("AB"[: asks.num_pictures]):
        slots = ", ".join(sorted(item.pictures))
        raise ValueError(
            f"{where} has pictures {slots}: {asks.name} needs {' and '.join('AB'[: asks.num_pictures])}"
        )
    for what, is_shown in (("prompt", asks.shows_prompt), ("caption", asks.shows_caption)):
        if is_shown and cleaned[what] is None:
            raise ValueError(f"{where} has no {what}: {asks.name} shows one")
    try:
        gold = None if item.gold is None else asks.check_gold(dict(item.gold))
    except ValueError as error:
        raise ValueError(f"gold of {where}: {error}") from None
    return {
        "batch_id": batch.id,
        "name": name,
        "group_name": cleaned["group"],
        "prompt": cleaned["prompt"],
        "caption": cleaned["caption"],
        # Mixed, and the same each time.
        "order_key": hashlib.sha256(f"{batch.public_id}/{name}".encode()).hexdigest(),
        "gold": gold,
        "num_wanted": batch.num_people if gold is None else 0,
        "num_taken": 0,
        "num_done": 0,
        "extra": _plain(dict(item.extra), f"extra of {where}"),
    }


def _imported(batch: Batch, one: GivenAnswer, now: float) -> tuple[float, dict[str, Any]]:
    """When it was given, and the body of its event, still without the guideline's version.

    Raises:
        ValueError: it is no answer, or cannot be kept.
    """
    asks, what = batch.asks, f"the answer to item {one.item.name!r}"
    try:
        stored = asks.to_slots(asks.check(asks.to_sides(one.answer, one.left_slot)), one.left_slot)
    except (KeyError, TypeError):  # no side is called so
        raise ValueError(
            f"{what} is {one.answer!r}: it does not belong to the question {asks.name}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    at = now if one.at is None else one.at
    if one.kind not in ("answer", "adjudicate") or one.left_slot not in ("A", "B") or not math.isfinite(at):
        raise ValueError(
            f"{what} has kind {one.kind!r}, left_slot {one.left_slot!r}, at {at!r}: one is not possible"
        )
    return at, {
        "answer": stored,
        "left_slot": one.left_slot,
        "times": _plain(dict(one.times), f"times of {what}"),
        "client": {"imported": True},
    }


PictureFiles = Mapping[str | Path, Mapping[str, Any]]  # paths as items name them -> rows of pictures


def read_pictures(new_items: Iterable[NewItem]) -> PictureFiles:
    """What has to be known of the items' pictures before they can be added.

    Raises:
        ValueError: one is not a picture that browsers show.
        OSError: one cannot be read.
    """
    paths = {path for item in new_items for path, _ in item.pictures.values()}
    return {path: _read_picture(Path(path).resolve()) for path in sorted(paths, key=str)}


def _read_picture(path: Path) -> dict[str, Any]:
    """The row of a picture.

    Raises:
        ValueError: it is not a picture that browsers show.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        with Image.open(path) as image:
            media_type = image.get_format_mimetype() or ""
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # lies on its side; browsers turn it upright
                width, height = height, width
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{path} is not a picture ({error}): leave it out") from None
    if media_type not in MEDIA_TYPES:
        raise ValueError(
            f"{path} is {media_type or 'of an unknown kind'}, which browsers do not show: make it a PNG"
        )
    return {
        "path": str(path),
        "sha256": hashlib.sha256(content).hexdigest(),
        "width": width,
        "height": height,
        "media_type": media_type,
    }
