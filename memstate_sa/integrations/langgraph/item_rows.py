"""Items of LangGraph's store as rows: their namespaces, their keys and their expiry."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import (
    Column,
    ColumnElement,
    Index,
    Integer,
    Select,
    String,
    Table,
    Text,
    and_,
    bindparam,
    delete,
    exists,
    func,
    literal_column,
    not_,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Mapped, Session, aliased, mapped_column

from memstate_sa.db.dialects import database_of
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import StoredJson, UTCDateTime, metadata
from memstate_sa.fact import OwnBase

_END = "\x00"  # `item_validation` refuses this character in a namespace
_has_end = text("expires_at IS NOT NULL")


class ItemRow(OwnBase):
    """One row of an item. A fact has one vector, so an item has one row for each text. Row 0 also has the value.

    All rows of an item change together, so an undo affects all of them or none. The primary key is one column, because
    lookups by one column are fastest.
    """

    __tablename__ = "memstate_item"
    __table_args__ = (
        Index("ix_memstate_item_expires_at", "expires_at", postgresql_where=_has_end, sqlite_where=_has_end),
        {"comment": "items of a LangGraph store"},
    )

    id: Mapped[str] = mapped_column(
        String(40), primary_key=True, comment="the id of the item, followed by n in hex if n is not 0"
    )
    item: Mapped[str] = mapped_column(String(32), index=True, comment="a hash of namespace and key")
    n: Mapped[int] = mapped_column(Integer)
    scope: Mapped[str] = mapped_column(
        Text,
        index=True,
        comment="the labels of the namespace in UTF-8, each followed by NUL, in hex; sorts like the labels",
    )
    key: Mapped[str] = mapped_column(Text)
    value: Mapped[dict[str, Any] | None] = mapped_column(StoredJson, comment="the value of the item, in row 0")
    text: Mapped[str | None] = mapped_column(Text, comment="the text for embedding")
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    updated_at: Mapped[datetime] = mapped_column(UTCDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(
        UTCDateTime, comment="the end of the item's life, if no read extends it"
    )

    @property
    def namespace(self) -> tuple[str, ...]:
        return namespace_of(self.scope)

    def __repr__(self) -> str:
        return f"ItemRow(namespace={self.namespace!r}, key={self.key!r}, n={self.n!r})"


kept = Table(
    "memstate_item_kept",
    metadata,
    Column("id", String(32), primary_key=True),
    Column(
        "of",
        UTCDateTime,
        primary_key=True,
        comment="updated_at of the item at the read; a later put begins another life",
    ),
    Column("until", UTCDateTime, nullable=False, index=True),
    comment="items that live longer because they were read, without history and without conflicts for undo",
)

# -- namespaces -------------------------------------------------------------------------------------------------------


def scope_of(namespace: Iterable[str]) -> str:
    """The namespace in hex. Hex has the same order in every collation, so a namespace is a range of the index.

    Raises UnicodeEncodeError for lone surrogates.
    """
    return "".join(part + _END for part in namespace).encode().hex()


def namespace_of(scope: str) -> tuple[str, ...]:
    return tuple(bytes.fromhex(scope).decode().split(_END)[:-1])


def _end_of(scope: str) -> str:
    """The end of the range of *scope* and all scopes below it: the first scope that is greater."""
    return scope[:-2] + "01"


def below(scope: str, row: Any = ItemRow) -> ColumnElement[bool]:
    """Whether a row is in the namespace *scope* or below it."""
    return and_(row.scope >= scope, row.scope < _end_of(scope)) if scope else true()


def row_id(item: str, n: int) -> str:
    return f"{item}{n:08x}" if n else item


def item_id(namespace: Iterable[str], key: str) -> str:
    """A hash of namespace and key. Its length is fixed, because all our tables and the index store it."""
    # No part is empty, so the first double _END is the end of the namespace, even if the key has others.
    whole = _END.join(namespace) + _END + _END + key
    return hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


# -- reading ----------------------------------------------------------------------------------------------------------


def alive(now: Any, row: Any = ItemRow) -> ColumnElement[bool]:
    """Whether a row has not expired. *now* is a time, or a parameter for it."""
    same_item = (kept.c.id == row.item, kept.c.of == row.updated_at)
    is_kept = exists(select(literal_column("1")).where(*same_item, kept.c.until > now))
    return or_(row.expires_at.is_(None), row.expires_at > now, is_kept)


_ids = unnest_strings("ids")
with_ids = ItemRow.id.in_(select(_ids.c.value))
"""Whether a row is row 0 of an item in the parameter ``ids``, a value of `as_array`."""

heads: Select[Any] = select(
    ItemRow.id,
    ItemRow.scope,
    ItemRow.key,
    ItemRow.value,
    ItemRow.created_at,
    ItemRow.updated_at,
    ItemRow.expires_at,
).where(ItemRow.n == 0)

of_ids = heads.where(with_ids)
living_of_ids = of_ids.where(alive(bindparam("now", type_=UTCDateTime())))


def of_heads(criterion: Any) -> ColumnElement[bool]:
    """Whether *criterion* is true for row 0 of a row's item."""
    head = aliased(ItemRow)
    return exists(select(literal_column("1")).where(head.id == ItemRow.item, criterion(head)))


_PAGE = 100


def scopes(session: Session, root: str, now: datetime | None = None, depth: int | None = None) -> Iterator[str]:
    """The scopes that have items, in *root* and below it, sorted. Each scope is cut to *depth* parts, and occurs once.

    With *now*, items that have expired do not count. The database finds each scope by one index lookup, even if many
    items share it.
    """
    criteria = [ItemRow.n == 0, *([] if now is None else [alive(now)])]
    if root:
        criteria.append(ItemRow.scope < _end_of(root))
    after = root
    while True:
        first = select(func.min(ItemRow.scope).label("scope")).where(*criteria, ItemRow.scope >= after)
        walk = first.cte("walk", recursive=True)
        following = select(func.min(ItemRow.scope)).where(*criteria, ItemRow.scope > walk.c.scope).scalar_subquery()
        walk = walk.union_all(select(following).where(walk.c.scope.is_not(None)))
        page = session.scalars(select(walk.c.scope).where(walk.c.scope.is_not(None)).limit(_PAGE)).all()
        for scope in page:
            if scope < after:
                continue
            parts = namespace_of(scope)
            if depth is None or len(parts) < depth:
                after = scope + "00"
                yield scope
            else:
                cut = scope_of(parts[:depth])
                after = _end_of(cut)
                yield cut
        if len(page) < _PAGE:
            return


# -- writing ----------------------------------------------------------------------------------------------------------

all_rows: Select[Any] = (
    select(ItemRow)
    .where(ItemRow.item.in_(select(_ids.c.value)))
    .order_by(ItemRow.id)  # one order for all writers prevents deadlocks
    .with_for_update(of=ItemRow, key_share=True)  # readers that keep an item do not wait for a writer
    .execution_options(populate_existing=True)
)


def expired(connection: Connection, now: datetime, limit: int) -> Sequence[str]:
    """The ids of up to *limit* expired items. Their rows are locked."""
    over = select(ItemRow.id).where(ItemRow.n == 0, ItemRow.expires_at <= now, not_(alive(now)))
    over = over.order_by(ItemRow.expires_at).limit(limit).with_for_update(of=ItemRow, skip_locked=True)
    ids = connection.scalars(over).all()
    # A reader may have kept an item after the statement began, and before the statement locked the row.
    kept_since = living(connection, ids, now) if ids else set()
    return [id_ for id_ in ids if id_ not in kept_since]


def living(connection: Connection, ids: Iterable[str], now: datetime) -> set[str]:
    """The ids among *ids* whose items have not expired."""
    return {row.id for row in connection.execute(living_of_ids, {"ids": as_array(ids), "now": now})}


class KeptItem(NamedTuple):
    """An item that was put at the time *of*, and lives at least until the time *until*."""

    id: str
    of: datetime
    until: datetime


class ItemSwept(Exception):
    """Items were deleted between reading and keeping them. Read them again."""


_present_ids = select(ItemRow.id).where(with_ids).order_by(ItemRow.id)
_locked_ids = _present_ids.with_for_update(read=True, key_share=True)
_lockable_ids = _present_ids.with_for_update(read=True, key_share=True, skip_locked=True)


def keep(connection: Connection, items: Collection[KeptItem]) -> None:
    """Let *items* live longer. If one does not exist any more, keep none and raise ItemSwept."""
    if items:
        take_write_lock(connection)
        params = {"ids": as_array({item.id for item in items})}
        _keep(connection, items, set(connection.scalars(_locked_ids, params)))


def keep_without_waiting(connection: Connection, items: Collection[KeptItem]) -> None:
    """Do the same as `keep`, in a transaction that has written. Do not wait: a deleter may wait for the caller."""
    if items:
        params = {"ids": as_array({item.id for item in items})}
        locked_ids = set(connection.scalars(_lockable_ids, params))
        _keep(connection, items, locked_ids | set(connection.scalars(_present_ids, params)))


def _keep(connection: Connection, items: Collection[KeptItem], present_ids: set[str]) -> None:
    if any(item.id not in present_ids for item in items):
        raise ItemSwept
    new = database_of(connection).upsert(kept)
    later = new.excluded.until
    new = new.on_conflict_do_update(index_elements=["id", "of"], set_={"until": later}, where=later > kept.c.until)
    # One order for all readers prevents deadlocks.
    connection.execute(new, [item._asdict() for item in sorted(items)])


_delete_kept = delete(kept).where(kept.c.id == bindparam("the_id"), kept.c.of == bindparam("the_of"))


def delete_kept(connection: Connection, until: datetime) -> None:
    """Delete the rows of `kept` whose time has passed at *until*."""
    over = select(kept.c.id, kept.c.of).where(kept.c.until <= until).with_for_update(skip_locked=True)
    keys = [{"the_id": id_, "the_of": of} for id_, of in connection.execute(over)]
    if keys:
        connection.execute(_delete_kept, keys)
