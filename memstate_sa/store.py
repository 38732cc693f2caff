"""`MemoryStore`: memory for people without models of their own. A thin layer over `Memory` and `Fact`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from sqlalchemy import ColumnElement, Select, create_engine, select, text
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import StaticPool

from memstate_sa import sqlite
from memstate_sa.changes import Change
from memstate_sa.codec import decode_key, encode_key
from memstate_sa.embedders import Embedder
from memstate_sa.errors import ConflictError, MemstateError, NotFound, ValidationFailed
from memstate_sa.facts import Fact
from memstate_sa.indexes.base import VectorIndex
from memstate_sa.memory import Memory
from memstate_sa.relay import Relay
from memstate_sa.schemas import failure
from memstate_sa.search import Hits
from memstate_sa.tables import unique

T = TypeVar("T")

_UNIQUE_ATTEMPTS = 10


@dataclass(frozen=True)
class _FactType:
    model: type[BaseModel]
    unique_by: tuple[str, ...]
    immutable: bool


class MemoryStore:
    """Facts with a type and a JSON payload, in any SQLite or PostgreSQL database.

    Creates its tables; with *background* a relay thread keeps the index up to date (on an in-memory SQLite, each commit
    drains instead). ``.engine`` and ``.memory`` are what it is made of. Thread-safe; close it, or use it as a context
    manager. Raises MemstateError for a URL that does not connect.
    """

    def __init__(
        self,
        url_or_engine: str | Engine,
        index: VectorIndex | Mapping[str, VectorIndex],
        *,
        embedder: Embedder | None = None,
        delivery: Literal["relay"] = "relay",
        background: bool = True,
        strict_types: bool = False,
    ) -> None:
        self._owns_engine = isinstance(url_or_engine, str)
        self.engine = _connect(url_or_engine) if isinstance(url_or_engine, str) else url_or_engine
        self.memory = Memory(index, embedder=embedder, delivery=delivery)
        self.memory.track(
            Fact,
            text=_text,
            metadata=("type", "session_id"),
            schema=self._check,
            unique_by=self._unique_values,
            immutable=self._is_immutable,
        )
        self._types: dict[str, _FactType] = {}
        self._strict_types = strict_types
        self._local = threading.local()
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        self.memory.attach(self._sessions)
        try:
            self.memory.create_tables(self.engine)
        except DBAPIError as error:
            raise MemstateError(f"cannot open {self.engine.url!r}: {type(error.orig).__name__}") from error
        self._drains = sqlite.is_in_memory(self.engine)
        self._relay: Relay = self.memory.relay(self.engine)
        if background and not self._drains:
            self._relay.start()

    # -- what may be remembered ------------------------------------------------------------------------------------

    def register_schema(
        self,
        type: str,
        model: type[BaseModel],
        *,
        unique_by: str | Sequence[str] | None = None,
        immutable: bool = False,
    ) -> None:
        """Facts of *type* must satisfy the Pydantic *model*.

        With *unique_by*, one or more payload fields, committing a fact whose values exist already updates that fact.
        An *immutable* fact can be added and deleted, not changed.
        """
        if not (isinstance(model, type_) and issubclass(model, BaseModel)):
            raise MemstateError(f"model={model!r}: give a Pydantic model class")
        fields = (unique_by,) if isinstance(unique_by, str) else tuple(unique_by or ())
        unknown = [name for name in fields if name not in model.model_fields]
        if unknown:
            raise MemstateError(f"{model.__name__} has no field {unknown[0]!r}")
        self._types[type] = _FactType(model, fields, immutable)

    def _check(self, values: Mapping[str, Any]) -> None:
        kind, payload = values.get("type"), values.get("payload")
        known = self._types.get(kind) if isinstance(kind, str) else None
        if known is None:
            if self._strict_types:
                raise _invalid("type", f"unknown fact type {kind!r}; register_schema() declares one")
        else:
            known.model.model_validate(payload)
        if not isinstance(kind, str) or not kind or len(kind) > 128:
            raise _invalid("type", "a string of 1 to 128 characters")
        if not isinstance(payload, dict):
            raise _invalid("payload", "a JSON object")
        try:
            # PostgreSQL's JSONB takes neither NUL, lone surrogates nor NaN; SQLite would.
            written = json.dumps(payload, ensure_ascii=False, allow_nan=False)
            written.encode()
        except (TypeError, ValueError) as error:
            raise _invalid("payload", f"not JSON: {type_(error).__name__}") from error
        if "\\u0000" in written and "\x00" in _strings(payload):
            raise _invalid("payload", "contains a NUL character, which JSONB cannot hold")

    def _unique_values(self, values: Mapping[str, Any]) -> Sequence[Any] | None:
        known = self._types.get(values["type"])
        if known is None or not known.unique_by:
            return None
        found = [values["payload"].get(name) for name in known.unique_by]
        # As JSON: equal payload values have equal text, whatever they contain.
        return None if None in found else [values["type"], *(json.dumps(item, sort_keys=True) for item in found)]

    def _is_immutable(self, values: Mapping[str, Any]) -> bool:
        known = self._types.get(values["type"])
        return known is not None and known.immutable

    # -- writing ---------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(
        self, *, session_id: str | None = None, actor: str | None = None, reason: str | None = None
    ) -> Iterator[Session]:
        """Several calls as one SQL transaction: all of them, or none. Calls in the same thread join it."""
        open_session: Session | None = getattr(self._local, "session", None)
        if open_session is not None:
            self.memory.annotate(open_session, actor, reason, session_id)
            yield open_session
            return
        with self._sessions() as session:
            self._local.session = session
            try:
                self.memory.annotate(session, actor, reason, session_id)
                with session.begin():
                    yield session
            finally:
                self._local.session = None
        if self._drains:
            self._relay.drain()

    def commit(
        self,
        fact: Fact,
        *,
        session_id: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
        ephemeral: bool = False,
    ) -> str:
        """Remember *fact* and return its id. An *ephemeral* fact waits to be promoted or discarded with its session.

        Raises ValidationFailed, with Pydantic's errors, when its schema does not allow it; nothing is written then.
        """
        if not isinstance(fact, Fact):
            raise MemstateError(f"commit {fact!r}: give a Fact(type=…, payload=…); commit_model() takes models")
        with self.transaction(session_id=session_id, actor=actor, reason=reason) as session:
            new = Fact(
                type=fact.type,
                payload=fact.payload,
                session_id=session_id if session_id is not None else fact.session_id,
                ephemeral=ephemeral or bool(fact.ephemeral),
            )
            if fact.id is not None:
                new.id = fact.id
            self._validated(new)
            return self._add(session, new)

    def _validated(self, fact: Fact) -> None:
        # Before anything asks what makes the fact unique: an invalid payload has no answer to that.
        try:
            self._check({"type": fact.type, "payload": fact.payload})
        except ValidationError as error:
            raise failure("Fact", error) or ValidationFailed() from error

    def _add(self, session: Session, new: Fact) -> str:
        values = self._unique_values({"type": new.type, "payload": new.payload})
        if values is None:
            session.add(new)
            session.flush()
            return new.id
        for _ in range(_UNIQUE_ATTEMPTS):
            existing = self._holder(session, values)
            if existing is not None:
                existing.payload = new.payload
                session.flush()
                return existing.id
            try:
                with session.begin_nested():
                    session.add(new)
            except ConflictError:
                # Another writer was first; its fact is to be updated. The rolled back object is fresh again.
                session.expunge_all() if new in session else None
                new = Fact(type=new.type, payload=new.payload, session_id=new.session_id, ephemeral=new.ephemeral)
            else:
                return new.id
        raise ConflictError(f"facts of {new.type} with these values keep coming and going; try again")

    def _holder(self, session: Session, values: Sequence[Any]) -> Fact | None:
        entity = Fact.__tablename__
        key = session.execute(
            select(unique.c.key).where(unique.c.entity == entity, unique.c.value == encode_key(values))
        ).scalar_one_or_none()
        return None if key is None else session.get(Fact, decode_key(key)[0])

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
        """Remember a Pydantic *model* of a registered class; with *fact_id*, replace that fact's payload."""
        kind = next((name for name, known in self._types.items() if known.model is type_(model)), None)
        if kind is None:
            raise MemstateError(f"{type_(model).__name__} is not registered; register_schema() does that")
        payload = model.model_dump(mode="json")
        if fact_id is None:
            fact = Fact(type=kind, payload=payload)
            return self.commit(fact, session_id=session_id, actor=actor, reason=reason, ephemeral=ephemeral)
        with self.transaction(session_id=session_id, actor=actor, reason=reason) as session:
            self._existing(session, fact_id).payload = payload
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
        if set(patch) != {"payload"} or not isinstance(patch["payload"], Mapping):
            raise MemstateError("update takes {'payload': {…}}; type and id of a fact do not change")
        with self.transaction(session_id=session_id, actor=actor, reason=reason) as session:
            fact = self._existing(session, id)
            fact.payload = {**fact.payload, **patch["payload"]}
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

    @staticmethod
    def _existing(session: Session, id: str) -> Fact:
        fact = session.get(Fact, id)
        if fact is None:
            raise NotFound(f"no fact {id!r}")
        return fact

    # -- sessions of an agent --------------------------------------------------------------------------------------

    def promote_session(self, session_id: str, selector: Callable[[Fact], bool] | None = None) -> list[str]:
        """Keep the ephemeral facts of a session (those that *selector* picks); returns their ids."""
        with self.transaction(session_id=session_id, reason="promote") as session:
            chosen = [fact for fact in self._ephemeral(session, session_id) if selector is None or selector(fact)]
            for fact in chosen:
                fact.ephemeral = False
        return [fact.id for fact in chosen]

    def discard_session(self, session_id: str) -> list[str]:
        """Delete the ephemeral facts of a session; returns their ids. An ordinary transaction: rollback undoes it."""
        with self.transaction(session_id=session_id, reason="discard") as session:
            gone = self._ephemeral(session, session_id)
            for fact in gone:
                session.delete(fact)
        return [fact.id for fact in gone]

    @staticmethod
    def _ephemeral(session: Session, session_id: str) -> Sequence[Fact]:
        return session.scalars(select(Fact).where(Fact.session_id == session_id, Fact.ephemeral)).all()

    # -- reading ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        open_session: Session | None = getattr(self._local, "session", None)
        if open_session is not None:
            yield open_session
        else:
            with self._sessions() as session:
                yield session
                session.expunge_all()

    def get(self, id: str) -> Fact | None:
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

    def _selecting(
        self, type: str | None, filters: Mapping[str, Any] | None, session_id: str | None
    ) -> Select[tuple[Fact]]:
        statement = select(Fact)
        if type is not None:
            statement = statement.where(Fact.type == type)
        if session_id is not None:
            statement = statement.where(Fact.session_id == session_id)
        for name, value in (filters or {}).items():
            statement = statement.where(_payload_equals(name, value))
        return statement

    def history(self, id: str) -> list[Change]:
        """What happened to fact *id*, oldest first."""
        with self._reading() as session:
            return self.memory.history(session, Fact, id)

    def rollback(self, steps: int = 1, session_id: str | None = None) -> list[Change]:
        """Undo the last *steps* transactions (of a session); see `Memory.rollback`."""
        with self.transaction() as session:
            return self.memory.rollback(session, steps, session_id=session_id)

    # -- life ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the relay and close the index. What is not delivered yet is delivered by the next one to open it."""
        self.memory.close()
        if self._owns_engine:
            self.engine.dispose()

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


type_ = type
"""The builtin, where a parameter has the name that users expect of it."""


def _connect(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "postgresql" and parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        in_memory = parsed.get_backend_name() == "sqlite" and (parsed.database or ":memory:") == ":memory:"
        options: dict[str, Any] = (
            {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}} if in_memory else {}
        )
        engine = create_engine(parsed, **options)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise MemstateError(f"not a usable database URL: {type(error).__name__}") from error
    if engine.dialect.name == "sqlite":
        sqlite.configure(engine)
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except DBAPIError as error:
        raise MemstateError(f"cannot connect to {parsed!r}: {type(error.orig).__name__}") from error
    return engine


def _text(fact: Fact) -> str:
    """The payload as one line a field, without the braces and quotes that carry no meaning."""
    return "\n".join(f"{name}: {_flat(value)}" for name, value in fact.payload.items() if value is not None)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    return str(value)


def _strings(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "".join(name + _strings(item) for name, item in value.items())
    return "".join(map(_strings, value)) if isinstance(value, list) else ""


def _payload_equals(name: str, value: Any) -> ColumnElement[bool]:
    field = Fact.payload[name]
    if isinstance(value, bool):
        return field.as_boolean() == value
    if isinstance(value, int):
        return field.as_integer() == value
    if isinstance(value, float):
        return field.as_float() == value
    if isinstance(value, str):
        return field.as_string() == value
    if value is None:
        return field.as_string().is_(None)
    raise MemstateError(f"filter {name}={value!r}: give a string, number, boolean or None")


def _invalid(field: str, message: str) -> ValidationFailed:
    errors = [{"type": "value_error", "loc": (field,), "msg": message}]
    return ValidationFailed(f"Fact may not be remembered: {field}: {message}", errors=errors)
