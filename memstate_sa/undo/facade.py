"""`UndoMethods`: the methods of `Memory` that undo."""

from __future__ import annotations

from typing import Unpack

from sqlalchemy.orm import Session

from memstate_sa.db.async_methods import AsyncMethod
from memstate_sa.db.sessions import SyncSession, blocking_session
from memstate_sa.errors import MemstateError
from memstate_sa.log.changes import Changes
from memstate_sa.options import RevokeOptions, RollbackOptions, UndoOptions, require_options
from memstate_sa.relay.memory_parts import MemoryParts
from memstate_sa.tracking.validation import require_label
from memstate_sa.undo.selection import Scope
from memstate_sa.undo.undo import Revocation, Undo


class UndoMethods(MemoryParts):
    """The methods of `Memory` that undo."""

    _undo: Undo

    def rollback(
        self,
        session: SyncSession,
        /,
        steps: int = 1,
        *,
        session_id: str | None = None,
        **options: Unpack[RollbackOptions],
    ) -> Changes:
        """Undo the last *steps* transactions, newest first, in the caller's transaction, and return the new entries.

        Commit the session afterwards. The log only grows, and the vectors follow as for any write. Undone transactions
        do not count again, so two calls walk back two steps. Instances in the session are expired, and relationships to
        them too. The result has fewer transactions than *steps* if there are no more to undo.

        *session_id*: undo only transactions with this label. By default, the labels of `annotate` apply, if any.
        *options*: see `RollbackOptions`. Instead of steps, ``to=`` undoes everything since a moment, and ``tx=`` one
        transaction.

        Raises ConflictError, which has the changes in the way, and writes nothing if a later transaction has

        - changed one of the facts,
        - added a reference to a row that the undo would delete, or
        - taken a unique value that the undo would bring back.

        ``on_conflict="skip"`` leaves such facts as they are, and "force" overwrites later changes of the same facts.
        A constraint that only the database knows always raises, for example a partial index.
        """
        require_options(UndoMethods.rollback, options, RollbackOptions)
        sync = blocking_session(session, "rollback")
        scope = self._scope(sync, session_id, options)
        tx, to = options.get("tx"), options.get("to")
        on_conflict, dry_run = options.get("on_conflict", "raise"), options.get("dry_run", False)
        require_label("tx", tx)
        if tx is not None and to is not None:
            raise MemstateError("Cannot use both tx= and to=. Give one of them.")
        if tx is not None:
            return Changes(self._undo.transaction(sync, tx, scope, on_conflict, dry_run=dry_run))
        if to is not None:
            return Changes(self._undo.back_to(sync, to, scope, on_conflict, dry_run=dry_run))
        return Changes(self._undo.last_steps(sync, steps, scope, on_conflict, dry_run=dry_run))

    arollback = AsyncMethod(rollback)
    """`rollback` for an AsyncSession."""

    def revoke(self, session: SyncSession, /, **options: Unpack[RevokeOptions]) -> Revocation:
        """Undo all changes of an actor, of a session_id, or of given transactions, in the caller's transaction.

        By default, facts that others have changed since stay as they are. The result lists the new entries, the kept
        changes, and the changes in their way. When nothing is kept, tables and vectors are as if only the others had
        written.

        *options*: see `RevokeOptions`.
        """
        require_options(UndoMethods.revoke, options, RevokeOptions)
        sync = blocking_session(session, "revoke")
        scope = self._scope(sync, options.get("session_id"), options)
        tx = options.get("tx", ())
        txs = [tx] if isinstance(tx, str) else list(tx)
        for name in txs:
            require_label("tx", name)
        if bool(txs) == bool(scope.labels):
            raise MemstateError(
                "Cannot revoke: choose the changes either by actor= or session_id=, or by their transactions with tx=."
            )
        on_conflict, dry_run = options.get("on_conflict", "skip"), options.get("dry_run", False)
        return self._undo.revoke(sync, scope, txs, on_conflict, dry_run=dry_run)

    arevoke = AsyncMethod(revoke)
    """`revoke` for an AsyncSession."""

    def _scope(self, session: Session, session_id: str | None, options: UndoOptions) -> Scope:
        self._transaction(session)
        actor, model = options.get("actor"), options.get("model")
        for name, value in (("session_id", session_id), ("actor", actor)):
            require_label(name, value)
        self._registry.require_any()
        on_conflict = options.get("on_conflict", "raise")
        if on_conflict not in ("raise", "skip", "force"):
            raise MemstateError(f"Cannot use on_conflict={on_conflict!r}. Choose 'raise', 'skip' or 'force'.")
        return Scope(session_id, actor, None if model is None else self._registry.of_whole(model).entity)
