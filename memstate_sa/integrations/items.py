"""Items of LangGraph's store as rows: where they are, who sees them, and how long."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Delete,
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

from memstate_sa.arrays import as_array, each
from memstate_sa.facts import _Base
from memstate_sa.relay.claims import upsert
from memstate_sa.tables import UTCDateTime, _Json, metadata

_END = "\x00"  # which no label has
_has_end = text("expires_at IS NOT NULL")


class ItemRow(_Base):
    """Row 0 of an item holds its value; each row one text by which the item is found, as a fact has one vector.

    All rows change together, so that whoever undoes one of them undoes, or leaves, all.
    """

    __tablename__ = "memstate_item"
    __table_args__ = (
        Index("ix_memstate_item_expires_at", "expires_at", postgresql_where=_has_end, sqlite_where=_has_end),
        {"comment": "items of a LangGraph store"},
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True, comment="a digest of namespace and key")
    n: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    scope: Mapped[str] = mapped_column(
        Text, index=True, comment="the namespace's labels in UTF-8, each ended by NUL, in hex: sorts as they do"
    )
    key: Mapped[str] = mapped_column(Text)
    value: Mapped[dict[str, Any] | None] = mapped_column(_Json, comment="of row 0")
    text: Mapped[str | None] = mapped_column(Text, comment="what is embedded")
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    updated_at: Mapped[datetime] = mapped_column(UTCDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UTCDateTime, comment="unless it is read before")

    @property
    def namespace(self) -> tuple[str, ...]:
        return namespace_of(self.scope)

    def __repr__(self) -> str:
        return f"ItemRow(namespace={self.namespace!r}, key={self.key!r}, n={self.n!r})"


kept = Table(
    "memstate_item_kept",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("until", UTCDateTime, nullable=False, index=True),
    comment="items that live longer because they were read: no history, and no writer in the way of an undo",
)

# -- namespaces -------------------------------------------------------------------------------------------------------


def scope_of(namespace: Iterable[str]) -> str:
    """Hex, because its order is the same in every collation: the rows below a namespace are a range of the index.

    Raises UnicodeEncodeError for lone surrogates.
    """
    return "".join(label + _END for label in namespace).encode().hex()


def namespace_of(scope: str) -> tuple[str, ...]:
    return tuple(bytes.fromhex(scope).decode().split(_END)[:-1])


def _past(scope: str) -> str:
    """The first scope that is not *scope*, nor below it."""
    return scope[:-2] + "01"


def below(scope: str, row: Any = ItemRow) -> ColumnElement[bool]:
    """Whether a row is in the namespace *scope*, or below."""
    return and_(row.scope >= scope, row.scope < _past(scope)) if scope else true()


def item_id(namespace: Iterable[str], key: str) -> str:
    """Of a fixed length, whatever the key's: it is in every table of ours, and in the index."""
    # No label is empty, so the first two ends are where the namespace ends, whatever a key has in it.
    whole = _END.join(namespace) + _END + _END + key
    return hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


# -- reading ----------------------------------------------------------------------------------------------------------


def alive(now: Any, row: Any = ItemRow) -> ColumnElement[bool]:
    """Whether a row has not expired: *now* is a time, or the parameter for it."""
    read_since = exists(select(literal_column("1")).where(kept.c.id == row.id, kept.c.until > now))
    return or_(row.expires_at.is_(None), row.expires_at > now, read_since)


_ids = each("ids")
with_ids = ItemRow.id.in_(select(_ids.c.value))
"""Rows of the items in the parameter ``ids``, made by `as_array`."""
_kept_with_ids = kept.c.id.in_(select(_ids.c.value))

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
    """What is true of an item's row 0, asked of any of its rows."""
    head = aliased(ItemRow)
    return exists(select(literal_column("1")).where(head.id == ItemRow.id, head.n == 0, criterion(head)))


_PAGE = 100


def scopes(session: Session, within: str, now: datetime | None = None, depth: int | None = None) -> Iterator[str]:
    """The scopes of items (those that are alive *now*), in the order of their namespaces, cut to *depth* labels.

    From each to the next by one look into the index, however many items have it.
    """
    criteria = [ItemRow.n == 0, *([] if now is None else [alive(now)])]
    if within:
        criteria.append(ItemRow.scope < _past(within))
    after = within
    while True:
        first = select(func.min(ItemRow.scope).label("scope")).where(*criteria, ItemRow.scope >= after)
        walk = first.cte("walk", recursive=True)
        following = select(func.min(ItemRow.scope)).where(*criteria, ItemRow.scope > walk.c.scope).scalar_subquery()
        walk = walk.union_all(select(following).where(walk.c.scope.is_not(None)))
        found = session.scalars(select(walk.c.scope).where(walk.c.scope.is_not(None)).limit(_PAGE)).all()
        for scope in found:
            if scope < after:
                continue
            labels = namespace_of(scope)
            if depth is None or len(labels) < depth:
                after = scope + "00"
                yield scope
            else:
                cut = scope_of(labels[:depth])
                after = _past(cut)
                yield cut
        if len(found) < _PAGE:
            return


# -- writing ----------------------------------------------------------------------------------------------------------

all_rows: Select[Any] = (
    select(ItemRow)
    .where(with_ids)
    .order_by(ItemRow.id, ItemRow.n)  # so that two writers cannot wait for each other
    .with_for_update(of=ItemRow)
    .execution_options(populate_existing=True)
)


def expired(connection: Connection, now: datetime, limit: int) -> Sequence[str]:
    """The ids of some items that are over, locked."""
    over = select(ItemRow.id).where(ItemRow.n == 0, ItemRow.expires_at <= now, not_(alive(now)))
    over = over.order_by(ItemRow.expires_at).limit(limit).with_for_update(of=ItemRow, skip_locked=True)
    return connection.scalars(over).all()


def kept_until(connection: Connection, ids: Collection[str]) -> dict[str, datetime]:
    if not ids:
        return {}
    rows = connection.execute(select(kept.c.id, kept.c.until).where(_kept_with_ids), {"ids": as_array(ids)})
    return {row.id: row.until for row in rows}


def forget_kept(connection: Connection, ids: Collection[str], before: datetime | None = None) -> None:
    """Of items that are changed or gone, and of those that are over *before* then."""
    if ids:
        connection.execute(_forget(_kept_with_ids), {"ids": as_array(ids)})
    if before is not None:
        connection.execute(_forget(kept.c.until <= before))


def _forget(criterion: ColumnElement[bool]) -> Delete:
    # In the order in which `keep` locks them.
    gone = select(kept.c.id).where(criterion).order_by(kept.c.id).with_for_update()
    return delete(kept).where(kept.c.id.in_(gone))


def keep(connection: Connection, until: Mapping[str, datetime]) -> None:
    """Items, by id, live until then at least."""
    new = upsert(connection.dialect.name, kept)
    later = new.excluded.until
    new = new.on_conflict_do_update(index_elements=["id"], set_={"until": later}, where=later > kept.c.until)
    connection.execute(new, [{"id": id_, "until": end} for id_, end in sorted(until.items())])
