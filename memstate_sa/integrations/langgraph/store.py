"""LangGraph's long-term memory (BaseStore) as facts: items have a history, undo and semantic search.

``pip install 'memstate-sa[langgraph]'``. `setup` creates the tables, or use Alembic.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Literal, Self

from sqlalchemy import ColumnElement, Row, Select, inspect, select
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.orm.attributes import flag_modified

from memstate_sa.db import json_filter, sqlite
from memstate_sa.db.codec import is_text
from memstate_sa.db.dialects import database_of
from memstate_sa.db.joined_session import current_session
from memstate_sa.db.json_params import as_array
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import utcnow
from memstate_sa.errors import ConflictError, MemstateError, MissingExtra, NotFound
from memstate_sa.integrations.langgraph import item_rows
from memstate_sa.integrations.langgraph.gathering import Gathering
from memstate_sa.integrations.langgraph.item_rows import ItemRow, ItemSwept, KeptItem
from memstate_sa.integrations.langgraph.sync_engines import sync_engine
from memstate_sa.integrations.langgraph.thread_ids import as_text, configured
from memstate_sa.integrations.langgraph.ttl_sweeper import TtlSweeper
from memstate_sa.log.changes import Change
from memstate_sa.log.history import Moment
from memstate_sa.maintenance.expiry import EXPIRED
from memstate_sa.memory import Memory
from memstate_sa.store import AsyncMemoryStore, MemoryStore

try:
    from langgraph.store.base import (
        BaseStore,
        GetOp,
        IndexConfig,
        Item,
        ListNamespacesOp,
        Op,
        PutOp,
        Result,
        SearchItem,
        SearchOp,
        TTLConfig,
        validate_op_namespace,
    )

    from memstate_sa.integrations.langgraph.item_validation import (
        InvalidItem,
        ItemPut,
        end_of,
        fields_of,
        item_id,
        plain,
        scope_of,
        wants_results,
    )
    from memstate_sa.integrations.langgraph.namespaces import list_namespaces
except ImportError as error:
    raise MissingExtra("langgraph", "langgraph") from error

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

_ATTEMPTS = 20
_FEW = 50
_SWEEP_PAGE = 500
_SWEEP_INTERVAL_MINUTES = 5


class MemStateStore(BaseStore):
    """LangGraph's store in the database of the facts: PostgreSQL or SQLite.

    *where* is a `MemoryStore` (or AsyncMemoryStore). With *memory*, it can also be an Engine (or AsyncEngine) or a URL.
    Items are facts. The log has every put and delete, `Memory.rollback` undoes them, and relays deliver them. A search
    returns only items that SQL has. In a node of a graph, changes are labelled with the thread as session_id and the
    node as reason.

    Calls inside ``with memory_store.transaction():``, or inside a checkpointer's `step`, join that transaction. This
    works in the same thread only (with asyncio, in the same task).

    *index* has the paths to the texts for embedding: ``{"fields": ["title", "notes[*].text"]}``. Each text has its own
    vector. The default is the whole value, as JSON. With False nothing is embedded, and a *query* is ignored. The
    embedder is the Memory's. *ttl* is LangGraph's TTLConfig. Expired items are never returned, and `sweep_ttl` deletes
    them.

    A process that only runs a relay must create a MemStateStore too, so that its Memory knows items.

    All writes of a batch are one transaction. Its reads do not see them. The async methods run the same code in
    threads. Puts and gets that coroutines of one node make at the same time are one batch, and so one step for undo.

    ::

        store = MemStateStore(memory_store)
        store.setup()
        graph = builder.compile(store=store)
    """

    supports_ttl = True

    def __init__(
        self,
        where: MemoryStore | AsyncMemoryStore | Engine | AsyncEngine | URL | str,
        *,
        memory: Memory | None = None,
        index: IndexConfig | Literal[False] | None = None,
        ttl: TTLConfig | None = None,
    ) -> None:
        if isinstance(where, AsyncMemoryStore):
            where = where.sync_store
        if isinstance(where, MemoryStore):
            memory = where.memory
        if memory is None:
            raise MemstateError(
                "Cannot create the store without a Memory, because items are facts. Pass a MemoryStore or memory=."
            )
        self.memory = memory
        self.engine = sync_engine(where, self.memory)
        self.ttl_config = ttl
        self._fields = fields_of(index)
        self._now: Callable[[], datetime] = utcnow
        self._moment: Moment | None = None
        self._sweeper = TtlSweeper()
        self._gathering = Gathering()
        if self.memory._registry.find(inspect(ItemRow)) is None:  # noqa: SLF001
            self.memory.track(ItemRow, text="text", metadata=("scope",))
        in_memory = sqlite.is_in_memory(self.engine)
        # BEGIN and ROLLBACK take longer than the one statement between them. On SQLite, autocommit would be slower.
        autocommit = database_of(self.engine).isolation("AUTOCOMMIT")
        self._readers = sessionmaker(self.engine.execution_options(**autocommit))
        self._facts = where if isinstance(where, MemoryStore) else None
        if self._facts is not None:
            self._begin: Callable[[], AbstractContextManager[Session]] = self._facts.transaction
        elif in_memory:
            raise MemstateError(
                "Cannot use an in-memory SQLite database. It has one connection. Pass the MemoryStore, or use a file."
            )
        else:
            sessions = sessionmaker(self.engine, expire_on_commit=False)
            self.memory.attach(sessions)
            self._begin = sessions.begin
        self._is_shared = in_memory

    def setup(self) -> None:
        """Create missing tables. With Alembic, a migration does this."""
        self.memory.create_tables(self.engine)

    async def asetup(self) -> None:
        await asyncio.to_thread(self.setup)

    # -- batches ---------------------------------------------------------------------------------------------------

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """The results of *ops*, in order. If several puts have one key, the last one counts.

        Raises InvalidItem (a ValueError) for values that are not JSON objects, and InvalidNamespaceError.
        """
        ops = list(ops)
        for op in ops:
            validate_op_namespace(op)
        puts = {put.id: put for put in (ItemPut(op, self._fields) for op in ops if isinstance(op, PutOp))}
        if puts and self._moment is not None:
            raise MemstateError("Cannot put: a store of as_of() is read-only. Put into the store itself.")
        for _attempt in range(_ATTEMPTS):
            try:
                return self._read_and_write(ops, puts) if puts else self._read_and_keep(ops)
            except (IntegrityError, ItemSwept):  # another writer has put one of the items, or a sweep has deleted one
                continue
        raise ConflictError("Cannot write these items: others keep putting and deleting them. Please try again.")

    def _read_and_keep(self, ops: Sequence[Op]) -> list[Result]:
        with self._reading() as session:
            results, kept = self._read(session, ops)
        if kept:
            with self._writing() as session:
                item_rows.keep(session.connection(), kept)
        return results

    def _read_and_write(self, ops: Sequence[Op], puts: Mapping[str, ItemPut]) -> list[Result]:
        with self._labelled() as session:
            results, kept = self._read(session, ops)
            self._write(session, puts, kept)
        return results

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """Do the same as `batch`, in a thread. Calls of one node at the same time share one transaction."""
        ops = list(ops)
        if any(isinstance(op, SearchOp) for op in ops):  # a search may wait for an embedder, so it gets its own thread
            return await asyncio.to_thread(self.batch, ops)
        # Group by labels, because a transaction has one set of them.
        return await self._gathering.call(self.batch, ops, (self, *_labels().items()))

    def _reading(self) -> AbstractContextManager[Session]:
        if self._moment is not None:
            return self.memory.as_of_session(self.engine, self._moment, [ItemRow])
        open_session = current_session(self.memory, self.engine)
        if open_session is not None:
            return nullcontext(open_session)
        if self._facts is not None:
            self._facts._open()  # noqa: SLF001  # MemoryStore is in the same package
            if self._is_shared:
                return self._facts._reading()  # noqa: SLF001
        return self._readers()

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        open_session = current_session(self.memory, self.engine)
        if open_session is None:
            with self._begin() as session:
                yield session
        else:
            with open_session.begin_nested():
                yield open_session

    @contextmanager
    def _labelled(self) -> Iterator[Session]:
        with self._writing() as session:
            if not session.in_nested_transaction():  # otherwise the outer transaction has its own labels
                self.memory.annotate(session, **_labels())
            yield session
            session.flush()

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read(self, session: Session, ops: Sequence[Op]) -> tuple[list[Result], set[KeptItem]]:
        """The results, and the items that must live longer because they were read."""
        now = self._now()
        ids = {item_id(op.namespace, op.key) for op in ops if isinstance(op, GetOp)}
        rows_by_id = self._rows_by_id(session, ids, now) if ids else {}
        results: list[Result] = []
        kept: set[KeptItem] = set()
        for op in ops:
            rows: list[Row[Any]] = []
            if isinstance(op, GetOp):
                row = rows_by_id.get(item_id(op.namespace, op.key))
                rows = [] if row is None else [row]
                results.append(None if row is None else _item(row))
            elif isinstance(op, SearchOp):
                scored = self._search(session, op, now)
                rows = [row for row, _ in scored]
                results.append([_item(row, SearchItem, score=score) for row, score in scored])
            elif isinstance(op, ListNamespacesOp):
                results.append(list_namespaces(session, op, now if self._moment is None else None))
            elif isinstance(op, PutOp):
                results.append(None)
            else:
                raise InvalidItem(
                    f"Unknown operation {type(op).__name__}: use GetOp, PutOp, SearchOp or ListNamespacesOp."
                )
            if self._moment is None and getattr(op, "refresh_ttl", False):
                mortal = (row for row in rows if row.expires_at is not None)
                kept.update(KeptItem(row.id, row.updated_at, now + (row.expires_at - row.updated_at)) for row in mortal)
        return results, kept

    def _alive(self, now: datetime) -> list[ColumnElement[bool]]:
        # An earlier moment shows the content of the table, including expired items.
        return [item_rows.alive(now)] if self._moment is None else []

    def _search(self, session: Session, op: SearchOp, now: datetime) -> list[tuple[Row[Any], float | None]]:
        if not wants_results(op):
            return []
        scope, alive = scope_of(op.namespace_prefix), self._alive(now)
        criteria = [] if not op.filter else [self._filter(op.filter)]
        scored: list[tuple[Row[Any], float | None]] = []
        if op.query and self._fields is not None:
            scopes = [] if not scope else list(islice(item_rows.scopes(session, scope), _FEW + 1))
            # A vector index can filter a few scopes by equality. It cannot filter a range of scopes, only SQL can.
            is_in_scope = item_rows.below(scope) if not 0 < len(scopes) <= _FEW else ItemRow.scope.in_(scopes)
            target = select(ItemRow).where(is_in_scope, *map(item_rows.of_heads, criteria))
            scored += self._ranked(session, op.query, target, op.offset + op.limit, now)
        page, missing = scored[op.offset : op.offset + op.limit], op.offset + op.limit - len(scored)
        if missing > 0:
            # Items without a score come after the ranked ones.
            others = item_rows.heads.where(
                item_rows.below(scope), *alive, *(criterion(ItemRow) for criterion in criteria)
            )
            ids = {"ids": as_array(row.id for row, _ in scored)}
            if scored:
                others = others.where(~item_rows.with_ids)
            others = others.order_by(ItemRow.updated_at.desc(), ItemRow.id)
            others = others.limit(min(missing, op.limit)).offset(max(op.offset - len(scored), 0))
            page += [(row, None) for row in session.execute(others, ids)]
        return page

    def _ranked(
        self, session: Session, query: str, target: Select[Any], count: int, now: datetime
    ) -> list[tuple[Row[Any], float]]:
        """The *count* items nearest to *query*, best first. An item counts with its nearest text."""
        limit = count
        while True:
            hits = self.memory.search(session, query, target, limit=limit, as_of=self._moment)
            scores: dict[str, float] = {}
            for hit in hits:
                scores.setdefault(hit.fact.item, hit.score)
            rows = self._rows_by_id(session, scores, now)
            if len(rows) >= count or len(hits) < limit:
                return [(rows[id_], score) for id_, score in scores.items() if id_ in rows][:count]
            limit *= 4

    def _rows_by_id(self, session: Session, ids: Iterable[str], now: datetime) -> dict[str, Row[Any]]:
        statement = item_rows.living_of_ids if self._moment is None else item_rows.of_ids
        return {row.id: row for row in session.execute(statement, {"ids": as_array(ids), "now": now})}

    def _filter(self, value: Any) -> Callable[[Any], ColumnElement[bool]]:
        if not isinstance(value, Mapping):
            raise InvalidItem(f"Invalid filter: it must be a dict, not {type(value).__name__}.")
        filter_ = plain(value, "filter")
        database = database_of(self.engine)
        try:
            json_filter.matches(database, ItemRow.value, filter_)
        except (ValueError, OverflowError) as error:
            raise InvalidItem(f"Invalid filter: {error}") from error
        return lambda row: json_filter.matches(database, row.value, filter_)

    # -- writing ---------------------------------------------------------------------------------------------------

    def _write(self, session: Session, puts: Mapping[str, ItemPut], kept: set[KeptItem]) -> None:
        connection = session.connection(bind_arguments={"mapper": inspect(ItemRow)})
        take_write_lock(connection)
        now = self._now()
        rows_by_item: dict[str, list[ItemRow]] = {}
        for row in session.scalars(item_rows.all_rows, {"ids": as_array(puts)}):
            rows_by_item.setdefault(row.item, []).append(row)
        over = {id_ for id_, (row, *_) in rows_by_item.items() if row.expires_at is not None and row.expires_at <= now}
        expired = over - item_rows.living(connection, over, now) if over else over
        kept = {item for item in kept if item.id not in puts}  # a put sets the end itself
        changes: list[tuple[ItemRow, dict[str, Any]]] = []
        surplus: list[ItemRow] = []
        for id_, put in sorted(puts.items()):
            rows = rows_by_item.get(id_, [])
            is_new = not rows or id_ in expired
            expires_at = None if put.ttl is None else end_of(now, put.ttl)
            if put.value is not None and not is_new and put.is_same(rows):
                if expires_at is not None:
                    kept.add(KeptItem(id_, rows[0].updated_at, expires_at))
                continue
            created_at = now if is_new else rows[0].created_at
            times = {"created_at": created_at, "updated_at": now, "expires_at": expires_at}
            for n, text in enumerate(put.texts):
                values = {"text": text, **times} | ({"value": put.value} if n == 0 else {})
                if n < len(rows):
                    changes.append((rows[n], values))
                else:
                    new = ItemRow(id=item_rows.row_id(id_, n), item=id_, n=n, scope=put.scope, key=put.key, **values)
                    session.add(new)
            surplus += rows[len(put.texts) :]
        # Add new rows first, because one flush would change rows before it adds others, and that can deadlock. Another
        # batch that adds a row with an id that we have changed waits for us. At the same time, we may wait for a row
        # that it has added. But if we have only locked our row, the other batch fails at once, and tries again.
        session.flush()
        for row, values in changes:
            for name, value in values.items():
                setattr(row, name, value)
            if "value" in values:
                flag_modified(row, "value")  # True and 1 are equal in Python, but not in JSON
        for row in surplus:
            session.delete(row)
        session.flush()
        item_rows.keep_without_waiting(connection, kept)  # every transaction does this last

    # -- time ------------------------------------------------------------------------------------------------------

    def sweep_ttl(self) -> int:
        """Delete the expired items, and return their number. The transactions have the reason "expired".

        The items stay in the history. A sweep is not a step, so rollback skips it.
        """
        deleted = 0
        while True:
            with self._writing() as session:
                if session.in_nested_transaction():
                    raise MemstateError(
                        "Cannot sweep inside another transaction: a sweep has its own transactions. Call it outside."
                    )
                transaction = self.memory._transaction(session)  # noqa: SLF001
                transaction.reason, transaction.step = EXPIRED, False
                connection = session.connection(bind_arguments={"mapper": inspect(ItemRow)})
                take_write_lock(connection)
                ids = item_rows.expired(connection, self._now(), _SWEEP_PAGE)
                for row in session.scalars(item_rows.all_rows, {"ids": as_array(ids)}) if ids else ():
                    session.delete(row)
                session.flush()
                item_rows.delete_kept(connection, self._now())
            deleted += len(ids)
            if not ids:
                return deleted

    def start_ttl_sweeper(self, sweep_interval_minutes: float | None = None) -> Future[None]:
        """Sweep in a thread until the result is cancelled. The default interval is that of *ttl*, or 5 minutes.

        Without a TTLConfig this does nothing.
        """
        if not self.ttl_config:
            future: Future[None] = Future()
            future.set_result(None)
            return future
        interval = sweep_interval_minutes or self.ttl_config.get("sweep_interval_minutes") or _SWEEP_INTERVAL_MINUTES
        return self._sweeper.start(self.sweep_ttl, interval * 60)

    def stop_ttl_sweeper(self, timeout: float | None = None) -> bool:
        """Stop the thread. Returns whether it ended within *timeout* seconds."""
        return self._sweeper.stop(timeout)

    def as_of(self, moment: Moment | None) -> Self:
        """A read-only store with the items of a moment: a time, or the end of a transaction.

        None means the present, so a node can always use ``store.as_of(checkpointer.as_of())``. The result includes
        items that had expired and were not yet swept.
        """
        if moment is None:
            return self
        past = copy.copy(self)
        past._moment = moment  # noqa: SLF001
        return past

    def history(self, namespace: tuple[str, ...], key: str) -> list[Change]:
        """The changes of an item, oldest first."""
        with self._reading() as session:
            return self.memory.history(session, ItemRow, item_id(namespace, key))

    def erase(self, namespace: tuple[str, ...], key: str, *, reason: str | None = None) -> None:
        """Erase an item, its history and its vectors (see `Memory.erase`). `Memory.purge` also cleans the files.

        A hash of its key stays. Raises NotFound if neither the table nor the log has the item.
        """
        item = item_id(namespace, key)
        with self._labelled() as session:
            self.memory.erase(session, ItemRow, item, reason)
            with suppress(NotFound):  # this is raised after the last row that the item ever had
                for n in count(1):
                    self.memory.erase(session, ItemRow, item_rows.row_id(item, n), reason)


def _item(row: Row[Any], kind: type[Item] = Item, **more: Any) -> Any:
    return kind(
        value=row.value,
        key=row.key,
        namespace=item_rows.namespace_of(row.scope),
        created_at=row.created_at,
        updated_at=row.updated_at,
        **more,
    )


def _labels() -> dict[str, str]:
    """The labels of the running node: its thread and its name. Empty outside a node."""
    from langgraph.config import get_config

    try:
        config = get_config()
    except RuntimeError:
        return {}
    node = config.get("metadata", {}).get("langgraph_node")
    labels = {"session_id": as_text(configured(config).get("thread_id")), "reason": node and f"node {node}"}
    return {name: label for name, label in labels.items() if is_text(label)}
