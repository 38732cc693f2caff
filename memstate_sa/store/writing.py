"""`WritingMethods`: the methods of `MemoryStore` that add, change and delete facts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Unpack

from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from memstate_sa.db.codec import decode_key, encode_key
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import in_utc, unique, utcnow
from memstate_sa.errors import ConflictError, MemstateError, NotFound
from memstate_sa.fact import Fact, expiry_after
from memstate_sa.options import Labels
from memstate_sa.store.parts import StoreParts
from memstate_sa.tracking.fact_types import check_id
from memstate_sa.tracking.payloads import json_payload, payload_of

_UNIQUE_ATTEMPTS = 10


class ThreadState(threading.local):
    """The state of a thread in its present call."""

    is_promoting = False


class WritingMethods(StoreParts):
    """The methods of `MemoryStore` that write."""

    _thread: ThreadState

    def commit(
        self, fact: Fact, *, ephemeral: bool = False, ttl: timedelta | None = None, **labels: Unpack[Labels]
    ) -> str:
        """Remember *fact* and return its id.

        An *ephemeral* fact lives until its session is promoted or discarded, so it needs a *session_id*.

        The fact expires after *ttl*, or at its ``expires_at``, an aware datetime. A running relay deletes expired facts
        within a minute.

        If an older fact has the same ``unique_by`` values, this call gives the new payload and expiry to the older
        fact. An ephemeral older fact becomes durable, and belongs to this session. An expired older fact is replaced by
        a new fact.

        An error writes nothing. Raises ValidationFailed, with Pydantic's errors, if the schema refuses the fact. Raises
        ConflictError if an ephemeral fact would replace a durable fact, or a fact of another session.

        ::

            store.commit(Fact(type="note", payload={"content": "Ada likes tea"}), session_id="chat-1", actor="ada")
        """
        if not isinstance(fact, Fact):
            raise MemstateError(
                f"Cannot commit fact={fact!r}. It is not a Fact. Give Fact(type=…, payload=…), or use commit_model()."
            )
        session_id = labels.get("session_id")
        values = {
            "type": fact.type,
            "payload": json_payload(fact.payload),
            "session_id": session_id if session_id is not None else fact.session_id,
            "ephemeral": ephemeral or bool(fact.ephemeral),
            "expires_at": fact.expires_at if ttl is None else expiry_after(ttl),
        }
        if values["ephemeral"] and values["session_id"] is None:
            raise MemstateError(
                "Cannot commit an ephemeral fact without session_id=. No session could promote or discard it. Give a "
                "session_id, or leave ephemeral out."
            )
        if fact.id is not None:
            values["id"] = fact.id
        if values["expires_at"] is not None:
            in_utc(values["expires_at"], "expires_at")
        # Validate first, because the unique values of an invalid payload cannot be read.
        self._types.require_valid(values)
        with self.transaction(**labels) as session:
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
                session.delete(existing)  # an expired fact that is not swept yet must not block the new fact
                session.flush()
            elif existing is not None:
                self._replace(session, existing, values)
                return existing.id
            new = Fact(**values)
            try:
                with session.begin_nested():
                    session.add(new)
            except ConflictError:
                continue  # another writer was first: update its fact
            except IntegrityError as error:
                raise ConflictError(
                    f"Cannot add fact {values.get('id')!r}. A fact with this id exists. Use update() to change it."
                ) from error
            return new.id
        raise ConflictError(
            f"Cannot commit a fact of type {values['type']!r}. Other writers keep adding and deleting one with the "
            "same unique values. Try again."
        )

    def _replace(self, session: Session, existing: Fact, values: Mapping[str, Any]) -> None:
        if values["ephemeral"] and not (existing.ephemeral and existing.session_id == values["session_id"]):
            state = f"ephemeral in session {existing.session_id!r}" if existing.ephemeral else "durable"
            raise ConflictError(
                f"Cannot replace fact {existing.id!r} by an ephemeral one. It has the same unique values, and is "
                f"{state}. Commit a durable fact, or use update()."
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
        # The fact's values differ for one of two reasons. Another transaction changed them while we waited for the
        # lock. Or its type was registered with another unique_by before: then the fact still owns the values.
        return fact if session.scalar(owner_key) == key else None

    @staticmethod
    def _locked(session: Session, id: str) -> Fact | None:
        """The fact as it is committed now, locked until this transaction ends."""
        session.flush()
        take_write_lock(session.connection())
        return session.get(Fact, id, populate_existing=True, with_for_update=True)

    def commit_model(
        self, model: BaseModel, *, fact_id: str | None = None, ephemeral: bool = False, **labels: Unpack[Labels]
    ) -> str:
        """Remember a Pydantic *model* of a registered class. With *fact_id*, replace the payload of that fact.

        The payload is JSON that the class reads back as the same model. Computed and excluded fields are left out.

        Raises ValidationFailed if the class would read another model from this JSON. The cause may be a field whose
        alias is only a path.
        """
        fact_type = self._types.name_of(type(model))
        payload = payload_of(model)
        if fact_id is None:
            return self.commit(Fact(type=fact_type, payload=payload), ephemeral=ephemeral, **labels)
        with self.transaction(**labels) as session:
            fact = self._existing(session, fact_id)
            if fact.type != fact_type:
                raise MemstateError(
                    f"Cannot replace the payload of fact_id={fact_id!r}. The fact is of type {fact.type!r}, not "
                    f"{fact_type!r}. Commit the model as a new fact."
                )
            fact.payload = payload
            session.flush()
        return fact_id

    def update(self, id: str, patch: Mapping[str, Any], **labels: Unpack[Labels]) -> str:
        """Merge ``patch["payload"]`` into the payload of fact *id*, and return the id.

        Raises NotFound if there is no fact *id*.

        ::

            store.update(id, {"payload": {"strength": 9}})
        """
        payload = patch.get("payload") if isinstance(patch, Mapping) and set(patch) == {"payload"} else None
        if not isinstance(payload, Mapping):
            raise MemstateError(
                f"Cannot update fact {id!r}. Only its payload can change. Give patch={{'payload': {{…}}}}."
            )
        changed_fields = json_payload(dict(payload))
        with self.transaction(**labels) as session:
            fact = self._existing(session, id)
            fact.payload = {**fact.payload, **changed_fields}
            session.flush()
        return id

    def delete(self, id: str, **labels: Unpack[Labels]) -> str:
        """Delete fact *id*, and return the id. Its history stays, and `rollback` brings the fact back.

        Raises NotFound if there is no fact *id*.
        """
        with self.transaction(**labels) as session:
            session.delete(self._existing(session, id))
            session.flush()
        return id

    def _existing(self, session: Session, id: str) -> Fact:
        check_id(id)
        fact = self._locked(session, id)
        if fact is None:
            raise NotFound(f"There is no fact {id!r}.")
        return fact

    # -- sessions of an agent --------------------------------------------------------------------------------------

    def promote_session(self, session_id: str, selector: Callable[[Fact], bool] | None = None) -> list[str]:
        """Make the ephemeral facts of a session durable, and return their ids.

        *selector*: a function that chooses the facts. Default: all.
        """
        with self.transaction(session_id=session_id, reason="promote") as session:
            facts = [fact for fact in self._ephemeral(session, session_id) if selector is None or selector(fact)]
            self._promote(session, facts, session_id)
        return [fact.id for fact in facts]

    def _promote(self, session: Session, facts: Sequence[Fact], session_id: str | None) -> None:
        self._thread.is_promoting = True
        try:
            for fact in facts:
                fact.ephemeral, fact.session_id = False, session_id
            session.flush()
        finally:
            self._thread.is_promoting = False

    def _is_immutable(self, values: Mapping[str, Any]) -> bool:
        # A promoted fact keeps its payload, so immutable types allow it.
        return self._types.is_immutable(values) and not self._thread.is_promoting

    def discard_session(self, session_id: str) -> list[str]:
        """Delete the ephemeral facts of a session, and return their ids. `rollback` brings them back."""
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
