"""The tables. Times are seconds since 1970 (UTC); ``events`` and ``guidelines`` are only ever appended to.

An item's ``num_taken`` counts its places given away: assignments that are lent or done. It never exceeds
``num_wanted``. Items with a known answer (``gold``) are asked of everyone and are not counted.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData()

people = Table(
    "people",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(80), nullable=False, unique=True),
    Column("role", String(20), nullable=False),
    Column("password_hash", Text),
    Column("invitation_hash", String(64), unique=True),
    Column("invitation_expires", Float),
    Column("is_active", Boolean, nullable=False),
    Column("session_version", Integer, nullable=False),  # counted up to end every session
    Column("created_at", Float, nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("public_id", String(40), nullable=False, unique=True),
    Column("question", String(20), nullable=False),
    Column("title", String(200), nullable=False),
    Column("num_people", Integer, nullable=False),
    Column("settings", JSON, nullable=False),
    Column("is_open", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
)

guidelines = Table(
    "guidelines",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("batch_id", ForeignKey("batches.id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("text", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("batch_id", "version"),
)

pictures = Table(
    "pictures",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("path", Text, nullable=False, unique=True),
    Column("sha256", String(64), nullable=False),
    Column("width", Integer, nullable=False),  # as shown, after the orientation in the file's EXIF
    Column("height", Integer, nullable=False),
    Column("media_type", String(40), nullable=False),
)

items = Table(
    "items",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("batch_id", ForeignKey("batches.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("group_name", Text),
    Column("prompt", Text),
    Column("caption", Text),
    Column("author_id", ForeignKey("people.id")),  # who wrote the caption: never asked about it
    Column("order_key", String(64), nullable=False),
    Column("gold", JSON(none_as_null=True)),
    Column("num_wanted", Integer, nullable=False),
    Column("num_taken", Integer, nullable=False),
    Column("num_done", Integer, nullable=False),
    Column("extra", JSON, nullable=False),
    UniqueConstraint("batch_id", "name"),
    CheckConstraint("num_taken <= num_wanted"),
    CheckConstraint("num_done <= num_taken"),
    # Lending looks for open items only, so that a nearly finished batch is not read through each time.
    Index(
        "open_items",
        "batch_id",
        "order_key",
        sqlite_where=text("num_taken < num_wanted"),
        postgresql_where=text("num_taken < num_wanted"),
    ),
    Index(
        "known_items",
        "batch_id",
        "order_key",
        sqlite_where=text("gold IS NOT NULL"),
        postgresql_where=text("gold IS NOT NULL"),
    ),
    Index("progress", "batch_id", "num_done", "num_wanted"),  # summed without reading the items
)

item_pictures = Table(
    "item_pictures",
    metadata,
    Column("item_id", ForeignKey("items.id"), primary_key=True),
    Column("slot", String(1), primary_key=True),
    Column("picture_id", ForeignKey("pictures.id"), nullable=False),
    Column("model", Text),
)

assignments = Table(
    "assignments",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("token", String(40), nullable=False, unique=True),
    Column("batch_id", ForeignKey("batches.id"), nullable=False),
    Column("item_id", ForeignKey("items.id"), nullable=False),
    Column("person_id", ForeignKey("people.id"), nullable=False),
    Column("is_gold", Boolean, nullable=False),
    Column("left_slot", String(1), nullable=False),
    Column("guideline_version", Integer, nullable=False),
    Column("lease_expires", Float, nullable=False),
    Column("state", String(10), nullable=False),  # lent, done, returned
    UniqueConstraint("item_id", "person_id"),
    Index("assignments_of_a_person", "person_id", "batch_id", "id"),
    Index("states_of_a_person", "person_id", "batch_id", "state"),
    Index("leases", "batch_id", "state", "lease_expires"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("batch_id", ForeignKey("batches.id"), nullable=False),
    Column("item_id", ForeignKey("items.id"), nullable=False),
    Column("person_id", ForeignKey("people.id"), nullable=False),
    Column("assignment_id", ForeignKey("assignments.id")),  # none for a lead's decision
    Column("kind", String(20), nullable=False),  # answer, undo, adjudicate
    Column("nonce", String(64), unique=True),
    Column("body", JSON, nullable=False),
    Index("events_of_a_batch", "batch_id", "at"),
    Index("events_of_an_item", "item_id"),
    Index("events_of_an_assignment", "assignment_id"),
)

security_log = Table(
    "security_log",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("person_id", ForeignKey("people.id")),
    Column("address", Text, nullable=False),
    Column("what", Text, nullable=False),
    Column("detail", Text, nullable=False),
)
