"""`FlushCapture`: logs the changes that a flush makes.

A look reads the rows that a flush may change, before the first statement that changes their table. Mapper events note
the new rows. After the flush the database logs the changes itself (`table_log`), for two reasons:

1. The image has the values that the database computed, rounded or filled in as defaults.
2. When a SAVEPOINT is rolled back, exactly its own entries are rolled back with it.

(Earlier designs made images from attributes, or collected entries until the commit. Both failed in most random tests.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import compress
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Table, inspect
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.orm.attributes import set_attribute
from sqlalchemy.orm.base import NO_VALUE
from sqlalchemy.sql import ClauseElement

from memstate_sa.capture.hazards import may_lock
from memstate_sa.capture.looks import RawKey, with_others
from memstate_sa.capture.recorder import Recorder, require_visible
from memstate_sa.capture.transaction import Flush, OpenTransactions
from memstate_sa.db.tables import in_utc
from memstate_sa.errors import UntrackedWrite
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked
from memstate_sa.tracking.validation import to_validation_failed


class FlushCapture:
    """Logs the changes that the flushes of Sessions make."""

    def __init__(self, registry: Registry, recorder: Recorder, transactions: OpenTransactions) -> None:
        self._registry = registry
        self._recorder = recorder
        self._transactions = transactions
        self._flushes: dict[int, Flush] = {}  # the key is Session.hash_key, which each state has
        self.mapper_listeners: dict[str, Callable[..., None]] = {
            "after_insert": self._after_insert,
            "before_update": self._before_update,
            "after_update": self._after_update,
            "before_delete": self._before_delete,
        }
        self.session_listeners: dict[str, Callable[..., None]] = {
            "before_flush": self._before_flush,
            "after_flush": self._after_flush,
        }

    def _before_flush(self, session: Session, context: Any, instances: Any) -> None:
        if self._registry.validates:
            for instance in (*session.new, *session.dirty):
                state: Any = inspect(instance)
                tracked = self._registry.find(state.mapper)
                if tracked is not None and tracked.validate is not None:
                    _validate_instance(tracked, state)
                if tracked is not None and tracked.expires is not None:
                    _check_expiry(tracked.expires, state)
        # This must come last. If this event raises, the flush does not happen, and no other event reports that.
        transaction = self._transactions.of(session)
        flush = Flush(transaction, context, look=self._look, within=transaction.own_writes)
        transaction.flush, transaction.own_writes = flush, 0
        self._flushes[session.hash_key] = flush

    def end(self, session: Session) -> Flush | None:
        """End the flush that *session* is in, if any, and return it."""
        transaction = self._transactions.find(session)
        if transaction is not None and transaction.flush is not None:
            transaction.own_writes = transaction.flush.within
            transaction.flush = None
        return self._flushes.pop(session.hash_key, None)

    # The listeners below run once for every object. They only note it, and leave the work to the end of the flush.

    def _after_insert(self, mapper: Mapper[Any], connection: Connection, state: Any) -> None:
        flush = self._flushes.get(state.session_id)
        if flush is not None:
            flush.inserted.append(state)

    def _before_update(self, mapper: Mapper[Any], connection: Connection, state: Any) -> None:
        flush = self._flushes.get(state.session_id)
        if flush is not None:
            self._before_change(mapper, connection, flush, going=False)
            flush.updated.append(state)

    def _after_update(self, mapper: Mapper[Any], connection: Connection, state: Any) -> None:
        """Note a row switch: an insert that takes over a deleted row fires before_insert and this event."""
        if state.key is None:
            flush = self._flushes.get(state.session_id)
            if flush is not None:
                self._before_change(mapper, connection, flush, going=True)
                flush.updated.append(state)

    def _before_delete(self, mapper: Mapper[Any], connection: Connection, state: Any) -> None:
        flush = self._flushes.get(state.session_id)
        if flush is not None:
            self._before_change(mapper, connection, flush, going=True)

    def _before_change(self, mapper: Mapper[Any], connection: Connection, flush: Flush, *, going: bool) -> None:
        """Lock the first rows of facts of *mapper*, before the unit of work changes or deletes (*going*) them."""
        if not flush.checked:
            self._before_first_change(connection, flush)
        if flush.parts:
            self._lock_first_rows(mapper, connection, flush, going=going)

    def _before_first_change(self, connection: Connection, flush: Flush) -> None:
        """Note the identities of all rows that this flush may update or delete.

        This is too early in before_flush, because SQLAlchemy finds orphans and children of deleted parents only later.
        """
        flush.checked = True
        identities: dict[tuple[Mapper[Any], bool], list[Any]] = {}
        for state, (is_delete, listed_only) in flush.context.states.items():
            if state.key is not None and (is_delete or not listed_only):  # an insert may reuse a deleted row
                identities.setdefault((state.mapper, is_delete), []).append(state.key[1])
        by_mapper = {
            mapper: tracked
            for mapper, _ in identities
            if (tracked := self._registry.find(mapper)) is not None and not tracked.by_trigger
        }
        for (mapper, is_delete), keys in identities.items():
            if mapper not in by_mapper:
                continue
            tracked = by_mapper[mapper]
            flush.unseen.setdefault(tracked, []).extend(keys)
            if len(tracked.tables) > 1:
                flush.parts.setdefault((tracked, is_delete), []).extend(keys)

    def _look(self, connection: Connection, flush: Flush, table: Table) -> None:
        """Look at the rows of *table*, just before the first statement of the flush that may change them."""
        if not flush.checked:
            self._before_first_change(connection, flush)
        for tracked in [tracked for tracked in flush.unseen if table in tracked.tables]:
            raw_keys = map(tracked.columns_for(connection.dialect).raw_key, flush.unseen.pop(tracked))
            keys = list(dict.fromkeys(raw_keys))
            flush.looks[tracked] = self._recorder.look(connection, flush.transaction, tracked, keys)

    def _lock_first_rows(self, mapper: Mapper[Any], connection: Connection, flush: Flush, *, going: bool) -> None:
        """Lock the first rows of facts of *mapper*, in several tables, that this flush changes or deletes (*going*).

        Without the lock, another transaction may change another part of the same fact at the same time. Neither image
        would then show both changes. This runs just before the unit of work's statements, which also begin with the
        first table. So all transactions lock in the same order.

        PostgreSQL lets a role lock rows only if it may update them. If it may only delete, the DELETE locks the rows.
        """
        tracked = self._registry.find(mapper)
        keys = None if tracked is None else flush.parts.pop((tracked, going), None)
        if tracked is not None and keys and (not going or may_lock(connection, tracked.table)):
            columns = tracked.columns_for(connection.dialect).of_table[tracked.table]
            columns.lock(connection, list(map(columns.raw_key, keys)), leaving=going)

    def _after_flush(self, session: Session, context: Any) -> None:
        flush = self.end(session)
        if flush is None:
            return
        if flush.written_on is None:
            self._require_none(flush.inserted)
            return
        connection = flush.written_on
        inserted, updated = self._by_class(flush.inserted), self._by_class(flush.updated)
        # Unique values are taken in a fixed order of classes, because writers wait for each other.
        classes = sorted(dict.fromkeys((*inserted, *flush.looks)), key=_order)
        for tracked in classes:
            self._log(connection, flush, tracked, inserted.get(tracked, []), updated.get(tracked, []))

    def _require_none(self, inserted: Sequence[Any]) -> None:
        """Raise UntrackedWrite if rows were *inserted* by statements that the guard did not see."""
        for tracked in self._by_class(inserted):
            if not tracked.by_trigger:
                raise UntrackedWrite(
                    f"Cannot log rows of {tracked.entity}: this Memory does not see the statements of their "
                    "connection. Call memory.attach() before the transaction begins."
                )

    def _by_class(self, states: Sequence[Any]) -> dict[Tracked, list[Any]]:
        by_class: dict[Tracked, list[Any]] = {}
        mapper: Mapper[Any] | None = None
        for state in states:
            if state.mapper is not mapper:
                mapper = state.mapper
                class_states = by_class.setdefault(self._registry.of(mapper.class_), [])
            class_states.append(state)
        return by_class

    def _log(
        self,
        connection: Connection,
        flush: Flush,
        tracked: Tracked,
        inserted: Sequence[Any],
        updated: Sequence[Any],
    ) -> None:
        """Log the changes of rows of *tracked*: the rows of its look, and the new rows."""
        raw_key = tracked.columns_for(connection.dialect).raw_key
        before = flush.looks.get(tracked, [])
        # Without a look, no statement changed a row. Then there are only new rows.
        states = [*inserted, *updated] if before else inserted
        keys = [raw_key(_primary_key(tracked, state)) for state in states]
        seen = {key for look in before for key in look.keys}
        new = [key for key in keys[: len(inserted)] if key not in seen]
        looks = with_others(before, keys[len(inserted) :]) if before else []
        count = self._recorder.log(connection, flush.transaction, tracked, looks, new)
        if count < len(new) + sum(len(look.keys) for look in looks):
            # An object may be noted twice: by the listeners of its class and of the base class.
            is_written = [n < len(inserted) or _has_changes(state) for n, state in enumerate(states)]
            written = dict.fromkeys(compress(keys, is_written))
            self._require_found(connection, flush, tracked, list(written))

    def _require_found(self, connection: Connection, flush: Flush, tracked: Tracked, written: Sequence[RawKey]) -> None:
        lost = self._recorder.count_lost(connection, flush.transaction, tracked, written)
        if lost > 0:
            require_visible(connection, tracked)
            raise UntrackedWrite(
                f"Cannot log {lost} row(s) of {tracked.entity}: they were written, but are not found under their keys. "
                "Give primary keys in the form in which the database stores them."
            )


def _order(tracked: Tracked) -> str:
    return "" if tracked.unique_values is None else tracked.entity


def _primary_key(tracked: Tracked, state: Any) -> Sequence[Any]:
    """The primary key after the flush. The identity of *state* is still the old one."""
    values = state.dict
    try:
        return [values[name] for name in tracked.key_attributes]
    except KeyError:  # a value is expired
        key: Sequence[Any] = state.mapper.primary_key_from_instance(state.obj())
        return key


def _has_changes(state: Any) -> bool:
    """Whether a column attribute of *state* certainly differs from its loaded value."""
    columns, values = state.mapper.columns, state.dict
    return any(
        before is not NO_VALUE and name in values and _differs(before, values[name])
        for name, before in state.committed_state.items()
        if name in columns
    )


def _differs(before: Any, after: Any) -> bool:
    try:
        return bool(before != after)  # an SQL expression has no truth value, and counts as different
    except Exception:  # noqa: BLE001  # the comparison of a user's type may raise anything
        return True


def _check_expiry(name: str, state: Any) -> None:
    """Refuse a naive time that the application set. A loaded time is not checked: on SQLite it is naive.

    A column without a time zone holds UTC, so a naive time is right there.
    """
    value = state.dict.get(name)
    is_zoned = getattr(state.mapper.columns[name].type, "timezone", True)
    is_set = state.key is None or name in state.committed_state
    if value is None or not is_set or isinstance(value, ClauseElement) or hasattr(value, "__clause_element__"):
        return
    if not is_zoned and isinstance(value, datetime) and value.tzinfo is None:
        return
    time = in_utc(value, name)
    if not is_zoned:
        set_attribute(state.obj(), name, time.replace(tzinfo=None))
    elif value.utcoffset():  # SQLite does not keep the offset
        set_attribute(state.obj(), name, time)


def _validate_instance(tracked: Tracked, state: Any) -> None:
    """Check the known values before any SQL is sent. The other values are checked on the row, after the flush."""
    assert tracked.validate is not None
    values: dict[str, Any] = {}
    unknown: set[str] = set()
    for name, column in state.mapper.columns.items():
        value = state.dict.get(name, NO_VALUE)
        if isinstance(value, ClauseElement) or hasattr(value, "__clause_element__"):
            unknown.add(name)
        elif value is not NO_VALUE:
            values[name] = value
        elif (
            state.key is not None
            or column.primary_key
            or column.default is not None
            or column.server_default is not None
        ):
            unknown.add(name)
        else:
            values[name] = None
    try:
        tracked.validate(values)
    except ValidationError as error:
        failed = to_validation_failed(tracked.model.__name__, error, ignoring=frozenset(unknown))
        if failed is not None:
            raise failed from error
