"""`UndoMethods`: the methods of `Memory` that undo."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from memstate_sa.db.sessions import blocking_session
from memstate_sa.errors import MemstateError
from memstate_sa.log.changes import Change
from memstate_sa.relay.memory_parts import MemoryParts
from memstate_sa.tracking.validation import require_label
from memstate_sa.undo.selection import Scope
from memstate_sa.undo.undo import OnConflict, Revocation, Undo


class UndoMethods(MemoryParts):
    """The methods of `Memory` that undo."""

    _undo: Undo

    def rollback(
        self,
        session: Session,
        steps: int = 1,
        *,
        session_id: str | None = None,
        actor: str | None = None,
        model: type[Any] | None = None,
        to: datetime | str | None = None,
        tx: str | None = None,
        on_conflict: OnConflict = "raise",
        dry_run: bool = False,
    ) -> list[Change]:
        """Undo the last *steps* transactions as new log entries, newest first, in the caller's transaction.

        Nothing is committed on your behalf, the log only grows, and the vectors follow as for any write. With
        *session_id* or *actor* (by default what the session is annotated with) only transactions so labelled count,
        with *model* only changes of that class. What is undone does not count again, so two calls walk back two steps.
        Instead of a number, *to* undoes everything since a time or a transaction (``Change.tx``), and *tx* names one
        transaction; undoing a rollback that way redoes what it undid. Instances in the session are expired, and so are
        loaded relationships to them.

        Returns the new entries; fewer transactions than *steps* may have been there. Raises ConflictError, with the
        changes in the way, when someone outside of what is undone has since changed a fact, refers to one that would
        go, or holds a value that must be unique; nothing is written then. ``on_conflict="skip"`` leaves such facts as
        they are, "force" overwrites later changes of the same facts. A constraint that only the database knows (an
        index on some rows, a table that is not tracked) raises ConflictError in any case. *dry_run* writes nothing, and
        returns the entries that would have been written.
        """
        session = blocking_session(session)
        scope = self._scope(session, session_id, actor, model, on_conflict)
        require_label("tx", tx)
        if tx is not None and to is not None:
            raise MemstateError("give tx= or to=, not both")
        if tx is not None:
            return self._undo.transaction(session, tx, scope, on_conflict, dry_run=dry_run)
        if to is not None:
            return self._undo.back_to(session, to, scope, on_conflict, dry_run=dry_run)
        return self._undo.last_steps(session, steps, scope, on_conflict, dry_run=dry_run)

    def revoke(
        self,
        session: Session,
        *,
        session_id: str | None = None,
        actor: str | None = None,
        tx: Sequence[str] = (),
        model: type[Any] | None = None,
        on_conflict: OnConflict = "skip",
        dry_run: bool = False,
    ) -> Revocation:
        """Take one run's changes out from among those of others: of an actor, a session_id, or the transactions *tx*.

        As `rollback` undoes them, but all of them, and by default leaving alone what others have built upon: the
        result says what was reverted, which changes of the run are kept, and whose are in their way. Where nothing is
        kept, tables and vectors are what the others alone would have made.
        """
        session = blocking_session(session)
        scope = self._scope(session, session_id, actor, model, on_conflict)
        txs = [tx] if isinstance(tx, str) else list(tx)
        for name in txs:
            require_label("tx", name)
        if bool(txs) == bool(scope.labels):
            raise MemstateError("revoke whose changes? Give actor= or session_id=, or transactions as tx=")
        return self._undo.revoke(session, scope, txs, on_conflict, dry_run=dry_run)

    def _scope(
        self, session: Session, session_id: str | None, actor: str | None, model: type[Any] | None, on_conflict: str
    ) -> Scope:
        self._transaction(session)
        for name, value in (("session_id", session_id), ("actor", actor)):
            require_label(name, value)
        self._registry.require_any()
        if on_conflict not in ("raise", "skip", "force"):
            raise MemstateError(f"on_conflict={on_conflict!r}: 'raise', 'skip' or 'force'")
        return Scope(session_id, actor, None if model is None else self._registry.of_whole(model).entity)
