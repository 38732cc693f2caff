"""Reading the log: changes, a fact at a moment, and the differences between two moments."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Text,
    and_,
    bindparam,
    cast,
    false,
    func,
    literal_column,
    or_,
    select,
    type_coerce,
)
from sqlalchemy.engine import Connection, Row
from sqlalchemy.exc import DataError, DBAPIError, ProgrammingError

from memstate_sa.db.codec import Image, decode_image, decode_key, decoded
from memstate_sa.db.dialects import database_of
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.key_values import tolerate_refusal
from memstate_sa.db.raw_values import RAW
from memstate_sa.db.rows import TableColumns
from memstate_sa.db.statements import batches
from memstate_sa.db.tables import log, transaction
from memstate_sa.errors import HistoryMissing, MemstateError, NotFound
from memstate_sa.log.changes import REDACTED, Change, Op
from memstate_sa.log.outbox import unknown_keys
from memstate_sa.log.positions import Snapshot
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked

Moment: TypeAlias = "datetime | str"
"""A time (aware), or a transaction: the moment after it."""

_keys = unnest_strings("keys")
_earlier, previous = log.alias("earlier"), log.alias("previous")
_previous_id = (
    select(func.max(_earlier.c.id))
    .where(_earlier.c.entity == log.c.entity, _earlier.c.key == log.c.key, _earlier.c.id < log.c.id)
    .scalar_subquery()
)
with_previous = log.outerjoin(previous, previous.c.id == _previous_id)
"""Entries of the log, each joined with the previous entry of the same fact."""

_changes = (
    select(
        log,
        previous.c.image.label("before"),
        previous.c.version.label("before_version"),
        transaction.c.actor,
        transaction.c.reason,
        transaction.c.session_id,
    )
    .select_from(with_previous.outerjoin(transaction, transaction.c.tx == log.c.tx))
    .order_by(log.c.id)
)


def read_changes(connection: Connection, registry: Registry, *criteria: ColumnElement[bool]) -> list[Change]:
    """The log entries that satisfy *criteria*, oldest first."""
    rows = connection.execute(_changes.where(*criteria))
    return [_change(row, registry, connection) for row in rows if not _is_repeated_baseline(row)]


def _is_repeated_baseline(row: Row[Any]) -> bool:
    """Whether the entry is a baseline with the same image as the entry before it.

    A transaction writes such an entry when its snapshot (REPEATABLE READ, SERIALIZABLE) is older than the backfill of
    the row. A unique index could prevent it, but would abort the transaction.
    """
    return bool(row.op == "baseline" and row.before is not None and row.before == row.image)


class LastEntry(NamedTuple):
    """The last entry of a key, with its image in today's shape."""

    id: int
    op: str
    image: Image | None


_newest = (
    select(func.max(log.c.id))
    .where(log.c.entity == bindparam("entity"), log.c.key == _keys.c.value)
    .correlate(_keys)
    .scalar_subquery()
)
_last = select(log.c.key, log.c.id, log.c.op, log.c.image, log.c.version).where(
    log.c.id.in_(select(_newest).select_from(_keys))
)


def last_entries(connection: Connection, tracked: Tracked, keys: Sequence[str]) -> dict[str, LastEntry]:
    """The last entries of *keys*, without keys that have none."""
    return {
        row.key: LastEntry(
            row.id, row.op, None if row.image is None else tracked.upcast(row.image, row.version, connection.dialect)
        )
        for batch in batches(keys)
        for row in connection.execute(_last, {"entity": tracked.entity, "keys": as_array(batch)}).all()
    }


def find_changes(
    connection: Connection,
    registry: Registry,
    *,
    entity: str | None = None,
    key: str | None = None,
    actor: str | None = None,
    session_id: str | None = None,
    limit: int | None = None,
) -> list[Change]:
    """The last *limit* changes that match all arguments that are not None, oldest first."""
    columns = ((log.c.entity, entity), (log.c.key, key))
    criteria = [column == value for column, value in columns if value is not None]
    labels = ((transaction.c.actor, actor), (transaction.c.session_id, session_id))
    labelled = [column == value for column, value in labels if value is not None]
    if labelled:
        criteria.append(log.c.tx.in_(select(transaction.c.tx).where(*labelled)))
    if limit is not None:
        last = select(log.c.id).where(*criteria).order_by(log.c.id.desc()).limit(limit)
        criteria.append(log.c.id.in_(last))
    return read_changes(connection, registry, *criteria)


def _as_stored(columns: TableColumns, column: Column[Any], value: Any) -> ColumnElement[Any]:
    bound = columns.raw_bind(column, value)
    if columns.database.has_dynamic_types:
        return type_coerce(cast(cast(bound, Text), column.type), RAW)  # a plain cast would leave a number as it is
    return type_coerce(cast(bound, Text) if columns.travels_as_text(column) else bound, RAW)


def stored_key(connection: Connection, tracked: Tracked, key: Any) -> str:
    """The canonical key of *key* (an ORM primary key), in the form in which the database stores it.

    The database pads CHAR, and may store 1.5 as 1.50. So the key is searched in the log first, and then in the table.
    Otherwise the database converts it.
    """
    columns = tracked.columns_for(connection.dialect)
    canonical = columns.canonical(key)
    if not connection.scalars(unknown_keys, {"entity": tracked.entity, "keys": as_array([canonical])}).all():
        return canonical
    values = decode_key(canonical)
    try:
        with tolerate_refusal(connection):
            rows = columns.read(connection, [values])
            forms = (_as_stored(columns, *item) for item in zip(tracked.key_columns, values, strict=True))
            return next(iter(rows), None) or columns.encode_key(connection.execute(select(*forms)).one())
    except (DataError, ProgrammingError, OverflowError, UnicodeError):
        return canonical  # no row can have this key
    except DBAPIError as error:
        if type(error) is not DBAPIError:
            raise
        raise MemstateError(  # asyncpg takes only values of the column's type, and SQLAlchemy has no type for its error
            f"Cannot use key={key!r}: the driver refused it for {', '.join(columns.key_names)} of {tracked.entity}. "
            "Give a value of the column's type."
        ) from error


def _change(row: Row[Any], registry: Registry, connection: Connection) -> Change:
    tracked = registry.by_entity.get(row.entity)
    columns = None if tracked is None else tracked.columns_for(connection.dialect)
    key = decoded(row.key) or (row.key,) if columns is None else columns.identity(row.key)
    return Change(
        id=row.id,
        tx=row.tx,
        entity=row.entity,
        key=key[0] if len(key) == 1 else key,
        op=row.op,
        before=loaded_image(connection, tracked, row.before, row.before_version),
        after=loaded_image(connection, tracked, row.image, row.version),
        at=row.at,
        actor=row.actor,
        reason=row.reason,
        session_id=row.session_id,
        reverts=row.reverts,
    )


def loaded_image(
    connection: Connection, tracked: Tracked | None, image: Image | None, version: int | None
) -> Image | None:
    """The values that the ORM would load from a logged image, in today's shape of the class."""
    if image is None or version is None:
        return None
    if tracked is None:
        return decode_image(image)
    columns = tracked.columns_for(connection.dialect)
    return columns.past_values(dict(tracked.upcast(image, version, connection.dialect)))


# -- moments -----------------------------------------------------------------------------------------------------------


class LogAtMoment(NamedTuple):
    """The condition for entries that existed at a moment, and the snapshot of its transaction, if known."""

    criterion: ColumnElement[bool]
    snapshot: Snapshot | None = None


def log_at(connection: Connection, at: Moment) -> LogAtMoment:
    """The log at a moment.

    Transactions do not commit in the order of their ids. So the moment of a transaction includes the entries that it
    saw, and its own. Entries of transactions that were still open are later, even if they were written before. So the
    answer never changes. (If the moment is a time, the writing time of each entry counts.)
    """
    if isinstance(at, datetime):
        if at.utcoffset() is None:
            raise MemstateError(
                f"The time {at!r} has no time zone. Give an aware datetime, for example datetime.now(UTC)."
            )
        return LogAtMoment(log.c.at <= at)
    if not isinstance(at, str):
        raise MemstateError(f"{at!r} is not a moment. Give an aware datetime or a transaction (Change.tx).")
    tx, _, shown = at.partition(SNAPSHOT_MARK)
    last = connection.execute(select(func.max(log.c.id)).where(log.c.tx == tx)).scalar_one()
    if last is None:
        raise NotFound(f"The log has no transaction {tx!r}. Give the tx of a Change.")
    if database_of(connection).has_one_writer:
        return LogAtMoment(log.c.id <= last)
    entries = select(log.c.xid, log.c.snapshot, _is_of_another_cluster)
    entries = entries.where(log.c.tx == tx, log.c.snapshot.is_not(None))
    own = connection.execute(entries.order_by(log.c.id.desc()).limit(1)).one_or_none()
    if own is None:  # the entries are older than the column
        return LogAtMoment(log.c.id <= last)
    snapshot = Snapshot.parse(shown or own.snapshot)
    seen = or_(
        log.c.xid.is_(None),
        log.c.xid < snapshot.xmin,
        log.c.xid == own.xid,
        and_(log.c.xid < snapshot.xmax, log.c.xid.not_in(snapshot.running)),
        # Entries from before a restore have xids of another cluster, which cannot be compared. They are older.
        false() if own[2] else _is_of_another_cluster,
    )
    return LogAtMoment(and_(log.c.id <= last, seen), snapshot)


SNAPSHOT_MARK = "@"
"""Separates a transaction and a later snapshot, in a moment that lies after the transaction."""

# An entry's xid is not larger than the row's own xmin (32 bits), unless the row was restored from a dump.
_xmin = cast(cast(literal_column("memstate_log.xmin"), Text), BigInteger)
_is_of_another_cluster = (_xmin - log.c.xid).bitwise_and(0xFFFFFFFF) >= 2**31


def image_at(connection: Connection, tracked: Tracked, key: str, at: Moment) -> Image | None:
    """The image of a fact at a moment, in today's shape. None when the fact did not exist.

    Before its baseline, a row has the values of the baseline. A row without entries has its current values.
    """
    is_of_fact = (log.c.entity == tracked.entity, log.c.key == key)
    entry = select(log.c.op, log.c.image, log.c.version).where(*is_of_fact)
    row = connection.execute(
        entry.where(log_at(connection, at).criterion).order_by(log.c.id.desc()).limit(1)
    ).one_or_none()
    if row is None:
        row = connection.execute(entry.order_by(log.c.id).limit(1)).one_or_none()
        if row is None:
            return tracked.columns_for(connection.dialect).find_rows(connection, [key]).get(key)
        if row.op != "baseline":
            return None
    if row.version == REDACTED:
        raise HistoryMissing(
            f"Cannot show {tracked.entity} {key} at that moment: the fact was erased, and its values are gone. "
            "Choose another moment."
        )
    return None if row.image is None else tracked.upcast(row.image, row.version, connection.dialect)


def images_at(
    connection: Connection, tracked: Tracked, at: Moment, keys: Collection[str] | None = None
) -> Iterator[tuple[str, Image]]:
    """The images of the class' facts in the log, or of *keys*, at a moment: see `image_at`.

    Erased facts are left out.
    """
    is_of_facts, reached = [log.c.entity == tracked.entity], log_at(connection, at).criterion
    if keys is not None:
        is_of_facts.append(log.c.key.in_(select(_keys.c.value)))
    parameters = {} if keys is None else {"keys": as_array(keys)}
    newest = select(func.max(log.c.id)).where(*is_of_facts, reached).group_by(log.c.key)
    oldest = select(func.min(log.c.id)).where(*is_of_facts).group_by(log.c.key)
    entries = select(log.c.key, log.c.op, log.c.image, log.c.version)
    before_its_baseline = entries.where(log.c.id.in_(oldest), log.c.op == "baseline", ~reached)
    for statement in (entries.where(log.c.id.in_(newest)), before_its_baseline):
        for row in connection.execute(statement, parameters, execution_options={"yield_per": 1000}):
            if row.image is not None and row.version != REDACTED:
                yield row.key, tracked.upcast(row.image, row.version, connection.dialect)


def differences(
    connection: Connection, registry: Registry, entities: Sequence[str], a: Moment, b: Moment
) -> list[Change]:
    """The difference of each fact between two moments, as one change. Facts that are equal at both are left out."""
    changes = []
    earlier, later = (log_at(connection, moment).criterion for moment in (a, b))
    between = or_(and_(later, ~earlier), and_(earlier, ~later))  # concurrent transactions did not see each other
    for entity in entities:
        tracked = registry.by_entity[entity]
        columns = tracked.columns_for(connection.dialect)
        newest = select(func.max(log.c.id)).where(log.c.entity == entity, between).group_by(log.c.key)
        rows = connection.execute(select(log.c.key, log.c.id).where(log.c.id.in_(newest))).all()
        last: dict[str, int] = {row.key: row.id for row in rows}
        before, after = (dict(images_at(connection, tracked, at, list(last))) for at in (a, b))
        differing = {id_: key for key, id_ in last.items() if before.get(key) != after.get(key)}
        for change in read_changes(connection, registry, log.c.id.in_(newest)):
            if change.id in differing:
                images = [images.get(differing[change.id]) for images in (before, after)]
                was, is_ = (None if image is None else columns.past_values(dict(image)) for image in images)
                op: Op = "insert" if was is None else "delete" if is_ is None else "update"
                changes.append(replace(change, op=op, before=was, after=is_))
    return sorted(changes, key=lambda change: change.id)
