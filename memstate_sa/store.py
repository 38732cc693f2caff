"""`MemoryStore`: memory for people without models of their own. A thin layer over `Memory` and `Fact`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import BaseModel
from sqlalchemy import Select, select
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from memstate_sa.db import sqlite
from memstate_sa.db.codec import decode_key, encode_key
from memstate_sa.db.dialects import database_of
from memstate_sa.db.engines import engine_of
from memstate_sa.db.joined_session import current_session, use_session
from memstate_sa.db.json_filter import member_equals
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import in_utc, unique, utcnow
from memstate_sa.embedders import Embedder
from memstate_sa.errors import ConflictError, DeliveryError, MemstateError, NotFound
from memstate_sa.fact import Fact, expiry_after
from memstate_sa.indexes.base import VectorIndex
from memstate_sa.log.changes import Change
from memstate_sa.memory import Memory
from memstate_sa.relay import Relay
from memstate_sa.relay.loop import STOP_TIMEOUT_S
from memstate_sa.runtime import forks
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.search.hits import Hits
from memstate_sa.tracking.fact_types import FactTypes, check_id, check_texts
from memstate_sa.tracking.payloads import filter_value, json_payload, payload_of, text_of
from memstate_sa.undo.undo import Revocation

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")
logger = printable_logger("memstate_sa.store")

_UNIQUE_ATTEMPTS = 10
_DRAIN_TIMEOUT_S = 30.0


class MemoryStore:
    """Facts with a type and a JSON payload, in any SQLite or PostgreSQL database.

    Creates its tables; with *background* a relay thread keeps the index up to date (on an in-memory SQLite, each commit
    drains instead). ``.engine`` and ``.memory`` are what it is made of. Thread-safe; close it, or use it as a context
    manager. What `get`, `query` and `search` return is detached, and stays usable after that.

    Raises MemstateError for a URL that does not connect, IndexMismatch for an index of another embedder.
    """

    def __init__(
        self,
        url_or_engine: str | Engine | AsyncEngine,
        index: VectorIndex | Mapping[str, VectorIndex],
        *,
        embedder: Embedder | Mapping[str, Embedder] | None = None,
        delivery: Literal["relay", "strict"] = "relay",
        background: bool = True,
        strict_types: bool = False,
        embedding_cache: int = 100_000,
        successors: Mapping[str, str] | None = None,
    ) -> None:
        self._types = FactTypes(strict=strict_types)
        self.memory = Memory(
            index, embedder=embedder, delivery=delivery, embedding_cache=embedding_cache, successors=successors
        )
        self.memory.track(
            Fact,
            text=_text,
            metadata=("type", "session_id"),
            schema=self._types.check,
            unique_by=self._types.unique_values,
            immutable=self._is_immutable,
            expires="expires_at",
        )
        self._local = threading.local()
        self._closed = False
        self.engine: Engine = (
            engine_of(url_or_engine) if isinstance(url_or_engine, str) else self.memory.sync_engine(url_or_engine)
        )
        self._owns_engine = self.engine is not url_or_engine
        self._is_shared = sqlite.is_in_memory(self.engine)
        self._make_lock()
        forks.in_child(self, MemoryStore._make_lock)
        self._drains = background and self._is_shared
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        self.memory.attach(self._sessions)
        self._relay: Relay = self.memory.relay(self.engine)
        try:
            self._create_tables()
            if self._drains:
                self._deliver()
            elif background:
                self._relay.start()
        except BaseException:
            self.close()
            raise

    def _make_lock(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The threads of an in-memory SQLite share one connection, and would commit each other's transactions."""
        if self._is_shared:
            with self._lock, forks.uninterrupted():  # a child has a copy of the connection
                yield
        else:
            yield

    def _create_tables(self) -> None:
        try:
            self.memory.create_tables(self.engine)
        except DBAPIError as error:
            # The query of a URL may hold a password, too.
            raise MemstateError(
                f"cannot open {self.engine.url.set(query={})!r}: {type(error.orig).__name__}"
            ) from error

    def _deliver(self) -> None:
        try:
            self._relay.drain(_DRAIN_TIMEOUT_S)
        except (DeliveryError, SQLAlchemyError) as error:  # what is committed stays committed, and pending
            logger.warning("not delivered yet: %s", error if isinstance(error, DeliveryError) else type(error).__name__)

    # -- types of facts --------------------------------------------------------------------------------------------

    def register_schema(
        self,
        type: str,
        model: type[BaseModel],
        *,
        unique_by: str | Sequence[str] | None = None,
        immutable: bool = False,
    ) -> None:
        """Facts of *type* must satisfy the Pydantic *model*.

        With *unique_by*, one or more of the model's fields, committing a fact whose values exist already updates that
        fact: see `commit`. They are looked for under the names by which the model reads them, aliases included.
        An *immutable* fact can be added and deleted, not changed.
        """
        self._types.register(type, model, unique_by, immutable=immutable)

    def _is_immutable(self, values: Mapping[str, Any]) -> bool:
        # To promote a fact is not to change it.
        return self._types.is_immutable(values) and not getattr(self._local, "promoting", False)

    # -- writing ---------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(
        self, *, session_id: str | None = None, actor: str | None = None, reason: str | None = None
    ) -> Iterator[Session]:
        """Several calls as one SQL transaction: all of them, or none. Calls in the same thread join it.

        A call that raises leaves nothing of its own; whoever catches that goes on with the others.

        In asyncio, a transaction with an ``await`` in it is its task's: until it ends, calls of other tasks of the
        thread raise MemstateError. They may wait for it, or be made by ``asyncio.to_thread(store.commit, …)``.
        """
        check_texts(session_id=session_id, actor=actor, reason=reason)
        open_session = current_session(self.memory, self.engine)
        if open_session is not None:
            with open_session.begin_nested():
                yield open_session
            self.memory.annotate(open_session, actor, reason, session_id)  # a call that failed leaves no label either
            return
        self._check_open()
        with self._alone():
            with self._sessions() as session, use_session(self.memory, self.engine, session):
                self.memory.annotate(session, actor, reason, session_id)
                with session.begin():
                    yield session
            if self._drains:
                self._deliver()

    def commit(
        self,
        fact: Fact,
        *,
        session_id: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
        ephemeral: bool = False,
        ttl: timedelta | None = None,
    ) -> str:
        """Remember *fact* and return its id. An *ephemeral* fact waits to be promoted or discarded with its session.

        After *ttl*, or at the fact's own ``expires_at``, it is deleted, within a minute while a relay runs. A time is
        an aware datetime: ValidationFailed for another one.

        Where a fact has the same ``unique_by`` values, it is that which gets the payload and, or without, an end. An
        ephemeral one becomes durable by it, and of this session; one that is over makes way for a new one.

        Raises ValidationFailed, with Pydantic's errors, when its schema does not allow it; ConflictError when an
        ephemeral fact would replace a durable one, or one of another session. Nothing is written then.
        """
        if not isinstance(fact, Fact):
            raise MemstateError(f"commit {fact!r}: give a Fact(type=…, payload=…); commit_model() takes models")
        values = {
            "type": fact.type,
            "payload": json_payload(fact.payload),
            "session_id": session_id if session_id is not None else fact.session_id,
            "ephemeral": ephemeral or bool(fact.ephemeral),
            "expires_at": fact.expires_at if ttl is None else expiry_after(ttl),
        }
        if fact.id is not None:
            values["id"] = fact.id
        if values["expires_at"] is not None:
            in_utc(values["expires_at"], "expires_at")
        # Before anything asks what makes the fact unique: an invalid payload has no answer to that.
        self._types.require_valid(values)
        with self.transaction(session_id=session_id, actor=actor, reason=reason) as session:
            return self._add(session, values)

    def _add(self, session: Session, values: Mapping[str, Any]) -> str:
        unique_values = self._types.unique_values(values)
        if unique_values is None and "id" not in values:
            new = Fact(**values)
            session.add(new)
            session.flush()
            return new.id
        for _ in range(_UNIQUE_ATTEMPTS):
            existing = None if unique_values is None else self._fact_with(session, unique_values)
            if existing is not None and existing.expires_at is not None and existing.expires_at <= utcnow():
                session.delete(existing)  # over, if not swept yet: nothing of it is in the way, or goes on
                session.flush()
            elif existing is not None:
                self._replace(session, existing, values)
                return existing.id
            new = Fact(**values)
            try:
                with session.begin_nested():
                    session.add(new)
            except ConflictError:
                continue  # another writer was first; its fact is to be updated
            except IntegrityError as error:
                raise ConflictError(f"there is a fact {values.get('id')!r} already; update() changes it") from error
            return new.id
        raise ConflictError(f"facts of {values['type']} with these values keep coming and going; try again")

    def _replace(self, session: Session, existing: Fact, values: Mapping[str, Any]) -> None:
        if values["ephemeral"] and not (existing.ephemeral and existing.session_id == values["session_id"]):
            whose = f"ephemeral in session {existing.session_id!r}" if existing.ephemeral else "durable"
            raise ConflictError(
                f"fact {existing.id!r} has the same unique values, and is {whose}: an ephemeral one does not replace it"
            )
        existing.payload, existing.expires_at = values["payload"], values["expires_at"]
        session.flush()
        if existing.ephemeral and not values["ephemeral"]:
            self._promote(session, [existing], values["session_id"])

    def _fact_with(self, session: Session, unique_values: Sequence[Any]) -> Fact | None:
        """The fact that has these unique values, locked."""
        take_write_lock(session.connection())
        owner_key = select(unique.c.key).where(
            unique.c.entity == Fact.__tablename__, unique.c.value == encode_key(unique_values)
        )
        key = session.scalar(owner_key)
        fact = None if key is None else self._locked(session, decode_key(key)[0])
        values = None if fact is None else {"type": fact.type, "payload": fact.payload}
        if values is None or self._types.unique_values(values) == unique_values:
            return fact
        # While we waited for it, it was given others; or it has them by what its type was registered as before.
        return fact if session.scalar(owner_key) == key else None

    @staticmethod
    def _locked(session: Session, id: str) -> Fact | None:
        """The fact as it is committed now, and stays until this transaction ends: it is about to be changed."""
        session.flush()
        take_write_lock(session.connection())
        return session.get(Fact, id, populate_existing=True, with_for_update=True)

    def commit_model(
        self,
        model: BaseModel,
        *,
        fact_id: str | None = None,
        session_id: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
        ephemeral: bool = False,
    ) -> str:
        """Remember a Pydantic *model* of a registered class; with *fact_id*, replace that fact's payload.

        What is stored is JSON that the class reads back as it is: without computed fields and those that it excludes.

        Raises ValidationFailed when it would read something else, as where only a path is its name for a field.
        """
        fact_type = self._types.name_of(type_(model))
        payload = payload_of(model)
        if fact_id is None:
            fact = Fact(type=fact_type, payload=payload)
            return self.commit(fact, session_id=session_id, actor=actor, reason=reason, ephemeral=ephemeral)
        with self.transaction(session_id=session_id, actor=actor, reason=reason) as session:
            fact = self._existing(session, fact_id)
            if fact.type != fact_type:
                raise MemstateError(f"fact {fact_id!r} is of type {fact.type!r}, not {fact_type!r}")
            fact.payload = payload
            session.flush()
        return fact_id

    def update(
        self,
        id: str,
        patch: Mapping[str, Any],
        *,
        session_id: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> str:
        """Merge ``patch["payload"]`` into the payload of fact *id*. Raises NotFound."""
        payload = patch.get("payload") if isinstance(patch, Mapping) and set(patch) == {"payload"} else None
        if not isinstance(payload, Mapping):
            raise MemstateError("update takes {'payload': {…}}; type and id of a fact do not change")
        changed_fields = json_payload(dict(payload))
        with self.transaction(session_id=session_id, actor=actor, reason=reason) as session:
            fact = self._existing(session, id)
            fact.payload = {**fact.payload, **changed_fields}
            session.flush()
        return id

    def delete(
        self, id: str, *, session_id: str | None = None, actor: str | None = None, reason: str | None = None
    ) -> str:
        """Forget fact *id*. Its history stays. Raises NotFound."""
        with self.transaction(session_id=session_id, actor=actor, reason=reason) as session:
            session.delete(self._existing(session, id))
            session.flush()
        return id

    def _existing(self, session: Session, id: str) -> Fact:
        check_id(id)
        fact = self._locked(session, id)
        if fact is None:
            raise NotFound(f"no fact {id!r}")
        return fact

    # -- sessions of an agent --------------------------------------------------------------------------------------

    def promote_session(self, session_id: str, selector: Callable[[Fact], bool] | None = None) -> list[str]:
        """Keep the ephemeral facts of a session (those that *selector* picks); returns their ids."""
        with self.transaction(session_id=session_id, reason="promote") as session:
            facts = [fact for fact in self._ephemeral(session, session_id) if selector is None or selector(fact)]
            self._promote(session, facts, session_id)
        return [fact.id for fact in facts]

    def _promote(self, session: Session, facts: Sequence[Fact], session_id: str | None) -> None:
        self._local.promoting = True
        try:
            for fact in facts:
                fact.ephemeral, fact.session_id = False, session_id
            session.flush()
        finally:
            self._local.promoting = False

    def discard_session(self, session_id: str) -> list[str]:
        """Delete the ephemeral facts of a session; returns their ids. An ordinary transaction: rollback undoes it."""
        with self.transaction(session_id=session_id, reason="discard") as session:
            facts = self._ephemeral(session, session_id)
            for fact in facts:
                session.delete(fact)
        return [fact.id for fact in facts]

    @staticmethod
    def _ephemeral(session: Session, session_id: str) -> Sequence[Fact]:
        session.flush()
        take_write_lock(session.connection())
        statement = select(Fact).where(Fact.session_id == session_id, Fact.ephemeral).order_by(Fact.created_at, Fact.id)
        return session.scalars(statement.with_for_update(), execution_options={"populate_existing": True}).all()

    # -- reading ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        open_session = current_session(self.memory, self.engine)
        if open_session is not None:
            yield open_session
        else:
            self._check_open()
            with self._alone(), self._sessions() as session:
                yield session
                session.expunge_all()

    def get(self, id: str) -> Fact | None:
        """Fact *id*, or None."""
        check_id(id)
        with self._reading() as session:
            return session.get(Fact, id)

    def query(
        self, type: str | None = None, filters: Mapping[str, Any] | None = None, session_id: str | None = None
    ) -> list[Fact]:
        """The facts of a type, of a session, and whose payload fields equal *filters*, oldest first."""
        with self._reading() as session:
            statement = self._selecting(type, filters, session_id).order_by(Fact.created_at, Fact.id)
            return list(session.scalars(statement))

    def search(
        self,
        query: str,
        limit: int = 5,
        filters: Mapping[str, Any] | None = None,
        *,
        type: str | None = None,
        session_id: str | None = None,
        max_distance: float | None = None,
        consistency: Literal["fresh", "eventual"] = "fresh",
    ) -> Hits[Fact]:
        """The facts nearest in meaning to *query*, best first; see `Memory.search`. *filters* as for `query`."""
        with self._reading() as session:
            target = self._selecting(type, filters, session_id)
            return self.memory.search(
                session, query, target, limit=limit, max_distance=max_distance, consistency=consistency
            )

    def _selecting(self, type: str | None, filters: Mapping[str, Any] | None, session_id: str | None) -> Select[Any]:
        check_texts(type=type, session_id=session_id)
        statement = select(Fact)
        if type is not None:
            statement = statement.where(Fact.type == type)
        if session_id is not None:
            statement = statement.where(Fact.session_id == session_id)
        for name, value in (filters or {}).items():
            criterion = member_equals(database_of(self.engine), Fact.payload, name, filter_value(name, value))
            statement = statement.where(criterion)
        return statement

    def history(self, id: str) -> list[Change]:
        """What happened to fact *id*, oldest first."""
        check_id(id)
        with self._reading() as session:
            return self.memory.history(session, Fact, id)

    def rollback(self, steps: int = 1, session_id: str | None = None, **options: Any) -> list[Change]:
        """Undo the last *steps* transactions (of a session); see `Memory.rollback`, also for the *options*."""
        with self.transaction() as session:
            return self.memory.rollback(session, steps, session_id=session_id, **options)

    def revoke(self, **whose: Any) -> Revocation:
        """Take one run's changes out from among those of others; see `Memory.revoke` for who it can be."""
        with self.transaction() as session:
            return self.memory.revoke(session, **whose)

    def erase(self, id: str, *, reason: str | None = None) -> None:
        """Forget fact *id*, its history and its vectors; see `Memory.erase`, and `Memory.purge` for what files keep."""
        check_id(id)
        with self.transaction() as session:
            self.memory.erase(session, Fact, id, reason=reason)

    # -- life ------------------------------------------------------------------------------------------------------

    def close(self, timeout: float = STOP_TIMEOUT_S) -> None:
        """Stop the relay and close the index. What is not delivered yet is delivered by the next one to open it.

        See `Memory.close` for *timeout*.
        """
        self._closed = True
        self.memory.close(timeout)
        if self._owns_engine:
            self.engine.dispose()

    def _check_open(self) -> None:
        if self._closed:
            raise MemstateError("this MemoryStore is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


type_ = type
"""The builtin, where a parameter has the name that users expect of it."""


def _text(fact: Fact) -> str:
    return text_of(fact.payload)
