"""The statements of `TableLog`: the database itself writes images of rows to the log, and keys to the outbox."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import (
    Boolean,
    ColumnElement,
    CompoundSelect,
    FromClause,
    Select,
    SmallInteger,
    Text,
    and_,
    bindparam,
    case,
    false,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    true,
    union_all,
)

from memstate_sa.db.dialects import Database
from memstate_sa.db.json_params import row_value, typed, unnest_rows, unnest_strings
from memstate_sa.db.tables import StoredJson, log, outbox, statement_snapshot
from memstate_sa.log.positions import SLOTS

_entity = bindparam("entity", type_=Text())
_tx, _at = bindparam("tx", type_=log.c.tx.type), bindparam("at", type_=log.c.at.type)
_version, _step = bindparam("version", type_=SmallInteger()), bindparam("step", type_=Boolean())
ROW = "t"
"""The alias of a row's first table in the SELECTs that `log_rows` and `look_at` take."""

_LOG_COLUMNS = ("tx", "at", "version", "entity", "snapshot", "key", "op", "image", "step")
_OUTBOX_COLUMNS = ("tx", "created_at", "entity", "slot", "key")
_before, _baselines = unnest_strings("before"), unnest_rows("baselines")


def look_at(here: FromClause) -> Select[Any]:
    """The keys of the rows, each with its image if the log has no entry of it."""
    entry: Select[Any] = select(literal_column("1")).where(log.c.entity == _entity, log.c.key == here.c.key).limit(1)
    return select(here.c.key, case((entry.scalar_subquery().is_(None), here.c.image)))


class Kind(NamedTuple):
    """The kind of a statement that logs rows."""

    new: bool  # the transaction has inserted all rows
    baselines: bool  # some of the rows need a baseline first
    remembered: bool  # the log should have an entry of each row; the statement violates NOT NULL if one is missing


def log_rows(database: Database, rows: Select[Any], kind: Kind, *, returns: bool) -> Any:
    """A statement that logs the changes of *rows*. On PostgreSQL it also adds their keys to the outbox.

    With *returns*, it also returns the new entries. (On SQLite, `reading_logged` does that.)
    """
    changing = _inserted(database, rows) if kind.new else _changed(database, rows, kind)
    # On SQLite the statement must begin with INSERT, or the driver does not count its rows.
    changed: FromClause = changing.cte("changed") if database.has_writing_ctes else changing.subquery("changed")
    entry: list[Any] = [changed.c.key, changed.c.op, typed(changed.c.image, StoredJson), _step]
    shared = [_tx, _at, _version, _entity, statement_snapshot()]
    order = [func.length(changed.c.key), changed.c.key]  # this puts numeric keys in numeric order
    entries = select(*shared, *entry).order_by(*order)
    if kind.baselines:
        part = _PARTS.alias("part")
        is_first = part.c.n == 1
        op: ColumnElement[Any] = case((is_first, "baseline"), else_=changed.c.op)
        image = typed(case((is_first, changed.c.first), else_=changed.c.image), StoredJson)
        entry = [changed.c.key, op, image, case((is_first, false()), else_=_step)]
        is_there = or_(~is_first, changed.c.first.is_not(None))
        entries = select(*shared, *entry).select_from(changed.join(part, is_there)).order_by(part.c.n, *order)
    entering = insert(log).from_select(_LOG_COLUMNS, entries)
    if not database.has_writing_ctes:
        return entering
    marks = select(_tx, _at, _entity, _slot(changed.c.key), changed.c.key).order_by(*order)
    marking = insert(outbox).from_select(_OUTBOX_COLUMNS, marks)
    if not returns:
        return marking.add_cte(entering.cte("logging"))
    logged = entering.returning(log.c.key, log.c.op, log.c.image).cte("logging")
    return select(logged).where(logged.c.op != "baseline").add_cte(marking.cte("marking"))


_PARTS: CompoundSelect[Any] = union_all(select(literal_column("1").label("n")), select(literal_column("2").label("n")))
"""A baseline, and the change after it."""

_changes = and_(log.c.id.between(bindparam("first"), bindparam("last")), log.c.op != "baseline")
_marks = select(log.c.tx, log.c.at, log.c.entity, literal_column("0"), log.c.key).where(_changes).order_by(log.c.id)

marking_logged = insert(outbox).from_select(_OUTBOX_COLUMNS, _marks).execution_options(preserve_rowcount=True)
"""On SQLite: mark dirty the keys of the entries from id ``first`` to ``last``, baselines left out."""

reading_logged = select(log.c.key, log.c.op, log.c.image).where(_changes).order_by(log.c.id)
"""On SQLite: read the same entries."""


def _slot(key: ColumnElement[str]) -> ColumnElement[int]:
    """`positions.slot_of`, in SQL."""
    digest = func.sha256(func.convert_to(_entity.concat(key), "UTF8"))
    return func.mod(func.get_byte(digest, 0), literal_column(str(SLOTS)))


def _current(database: Database, rows: Select[Any]) -> FromClause:
    """One row for each key, the newest of *rows*.

    An old snapshot may show two: a row that others have deleted since, and a row that this transaction inserted.
    """
    if database.has_one_writer:
        return rows.subquery("here")
    key = next(iter(rows.selected_columns))
    is_newest = func.row_number().over(partition_by=key, order_by=func.age(literal_column(f"{ROW}.xmin"))).label("n")
    numbered = rows.add_columns(is_newest).subquery("numbered")
    return select(numbered.c.key, numbered.c.image).where(numbered.c.n == 1).subquery("here")


def _inserted(database: Database, rows: Select[Any]) -> Select[Any]:
    here = _current(database, rows)
    return select(here.c.key, literal_column("'insert'", Text()).label("op"), here.c.image)


def _with_last_entries(database: Database, touched: FromClause) -> tuple[FromClause, FromClause, FromClause]:
    """The join of *touched* keys with the last entry of each, if there is one. Then the keys and the entries in it."""
    is_entry = and_(log.c.entity == _entity, log.c.key == touched.c.key)
    if database.has_laterals:  # one index lookup for each key; a plain join may read the whole log
        entries = select(log.c.op, log.c.image).where(is_entry).order_by(log.c.id.desc())
        last: FromClause = entries.limit(1).lateral("last")
        return touched.outerjoin(last, true()), touched, last
    newest = select(func.max(log.c.id)).where(is_entry).scalar_subquery()
    known = select(touched.c.key, touched.c.image, newest.label("id")).subquery("known")
    last = log.alias("last")
    return known.outerjoin(last, last.c.id == known.c.id), known, last


def _changed(database: Database, rows: Select[Any], kind: Kind) -> Select[Any]:
    """The keys whose last entry differs from their row, with the change to log."""
    here = _current(database, rows)
    there = select(here.c.key, here.c.image, literal_column("0").label("seen"))
    before = select(_before.c.value, literal_column("NULL", Text()), literal_column("1"))
    rows_and_looks = union_all(there, before).subquery("rows_and_looks")
    image_now = func.max(rows_and_looks.c.image).label("image")
    seen_before = func.max(rows_and_looks.c.seen).label("seen")
    key = rows_and_looks.c.key
    touched = select(key, image_now, seen_before).group_by(key).subquery("touched")
    source, known, last = _with_last_entries(database, touched)
    op: ColumnElement[Any] = last.c.op
    image: ColumnElement[Any] = last.c.image
    columns = []
    if kind.baselines:
        seen = select(row_value(_baselines, 0, Text()).label("key"), row_value(_baselines, 1, Text()).label("image"))
        first = seen.subquery("first")
        source = source.outerjoin(first, and_(first.c.key == known.c.key, last.c.op.is_(None)))
        op = case((first.c.key.is_not(None), "baseline"), else_=op)
        image = case((first.c.key.is_not(None), typed(first.c.image, StoredJson)), else_=image)
        columns = [first.c.image.label("first")]
    is_gone, was_gone = known.c.image.is_(None), func.coalesce(op, "delete") == "delete"
    differs = typed(known.c.image, StoredJson).is_distinct_from(image)
    became: ColumnElement[Any] = case((is_gone, "delete"), (was_gone, "insert"), else_="update")
    has_changed: ColumnElement[Any] = case((is_gone, ~was_gone), else_=or_(was_gone, differs))
    if not database.has_one_writer:
        # The key had no row at the look, so its row is new. An old snapshot may hide entries of others. So log the row
        # even if it equals the last entry that the snapshot shows.
        is_old_snapshot = func.current_setting("transaction_isolation") != "read committed"
        has_changed = or_(has_changed, and_(known.c.seen == 0, is_old_snapshot))
    if kind.remembered:
        is_lost = and_(op.is_(None), known.c.image.is_not(None))
        became, has_changed = case((is_lost, null()), else_=became), or_(is_lost, has_changed)
    return select(known.c.key, became.label("op"), known.c.image, *columns).select_from(source).where(has_changed)
