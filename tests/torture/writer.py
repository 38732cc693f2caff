"""A process that commits, rolls back, undoes and searches until it is told to stop. Its journal records its work.

The journal has a line before each commit, with the writer's own rows after it, and a line after each commit. The
receipt
decides about a killed writer's open transaction: it is there as a whole, or not at all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from memstate_sa import ConflictError
from memstate_sa.errors import DeliveryError, HistoryMissing
from tests.torture import child
from tests.torture.app import App, Habit, Receipt, Recollection, Setting
from tests.torture.faults import HTTPError, Lines

_WORDS = (
    *("tea", "rain", "chess", "piano", "garden", "winter", "train", "letter"),
    *("mild", "chilli", "window", "doctor", "Tuesday", "sister", "blue", "walks"),
)
_SHELVES = 5
_EXACT = ("file", "redis")
"""The indexes whose queries compare every point."""
_MOST_ROWS = 150

Row = dict[str, Any]


class Problem(Exception):
    """An error that no fault may cause."""


def run(setting: Setting, number: int, life: int) -> None:
    stopping = child.begin(setting, f"writer-{number}", life)
    writer = Writer(App(setting, f"writer-{number}", life), setting, number, life)
    writer.recover(stopping)
    while not stopping.wait(writer.chance.expovariate(1 / 0.01)):
        if not writer.transaction():
            writer.recover(stopping)
    writer.app.close()


class Writer:
    def __init__(self, app: App, setting: Setting, number: int, life: int) -> None:
        self.app = app
        self.number = number
        self.life = life
        self.chance = random.Random(f"{setting.seed} writer {number} {life}")
        self.rows: dict[str, Row] = {}  # committed rows of this writer
        self.past: dict[str, Row] = {}  # an earlier committed state, for changing back
        self.pending: dict[str, Row | None] = {}  # the open transaction's changes of this writer's rows
        self.transactions = 0
        self.mark = ""
        self.journal = Lines(setting.folder / "journal" / f"writer-{number}.jsonl")
        self.journal.add(life=life)

    # -- one transaction -----------------------------------------------------------------------------------------------

    def transaction(self) -> bool:
        """Run one transaction. Returns False if its outcome is unknown, or the database did not answer."""
        self.transactions += 1
        mark = f"w{self.number}.{self.life}.{self.transactions}"
        doomed = self.chance.random() < 0.12
        self.mark, self.pending = mark + "!" * doomed, {}
        with self.app.sessions() as session:
            try:
                self.app.memory.annotate(session, session_id=f"writer {self.number}", reason=mark)
                self._operate(session)
                session.flush()
                if self.chance.random() < 0.04:
                    time.sleep(self.chance.choice((0.2, 0.5, 1.0, 4.0)))  # while others commit
                if self.chance.random() < 0.03:
                    self._search(session)
                if doomed:
                    self.journal.add(mark=mark, rolled_back="on purpose")
                    (session.rollback if self.chance.random() < 0.5 else session.close)()
                    return True
                session.add(Receipt(mark=mark))
                session.flush()
            except (SQLAlchemyError, ConflictError, HistoryMissing) as error:
                self.journal.add(mark=mark, rolled_back=type(error).__name__)
                return not isinstance(error, SQLAlchemyError)
            except Problem as problem:
                self.journal.add(mark=mark, rolled_back="problem", problem=str(problem))
                return True
            self.journal.add(mark=mark, committing=self.pending)
            try:
                session.commit()
            except SQLAlchemyError as error:
                self.journal.add(mark=mark, unknown=type(error).__name__)
                return False
            self.journal.add(mark=mark, committed=True)
        self.past.update({id_: self.rows[id_] for id_ in self.pending if id_ in self.rows})
        for id_, row in self.pending.items():
            if row is None:
                self.rows.pop(id_, None)
            else:
                self.rows[id_] = row
        return True

    def recover(self, stopping: child.Stopping) -> None:
        """Wait for the database, and for the end of an earlier connection's work. Then read the state again."""
        while not stopping.wait(0.1):
            try:
                with self.app.engine.connect() as connection:
                    mine = "application_name = current_setting('application_name') AND pid <> pg_backend_pid()"
                    busy = f"SELECT count(*) FROM pg_stat_activity WHERE {mine} AND backend_xid IS NOT NULL"
                    if connection.execute(text(busy)).scalar_one():
                        continue
                    rows = connection.execute(select(Recollection).where(Recollection.writer == self.number)).all()
            except SQLAlchemyError:
                continue
            self.rows = {row.id: {"shelf": row.shelf, "content": row.content, "mark": row.mark} for row in rows}
            self.past = {}
            return

    # -- operations ----------------------------------------------------------------------------------------------------

    def _operate(self, session: Session) -> None:
        if self.chance.random() < 0.04:
            self._undo(session)
            return
        for _ in range(self.chance.randint(1, 5)):
            if self.chance.random() < 0.08:
                self._savepoint(session)
            else:
                self._operation()(session)
            if self.chance.random() < 0.3:
                session.flush()

    def _operation(self) -> Callable[[Session], None]:
        operations = {
            self._insert: 4.0 if len(self.rows) < _MOST_ROWS else 0.0,
            self._bulk_insert: 0.5 if len(self.rows) < _MOST_ROWS else 0.0,
            self._change: 4.0,
            self._change_back: 2.0,
            self._delete: 2.0,
            self._bulk_update: 0.3,
            self._bulk_delete: 0.3,
            self._fight: 4.0,
        }
        return self.chance.choices(list(operations), list(operations.values()))[0]

    def _savepoint(self, session: Session) -> None:
        """Use a SAVEPOINT, which mostly rolls back."""
        mark, pending = self.mark, dict(self.pending)
        savepoint = session.begin_nested()
        kept = self.chance.random() < 0.3
        if not kept:
            self.mark += "~"
        for _ in range(self.chance.randint(1, 3)):
            self._operation()(session)
        if kept:
            savepoint.commit()
            return
        if self.chance.random() < 0.7:
            session.flush()
        savepoint.rollback()
        self.mark, self.pending = mark, pending

    def _insert(self, session: Session) -> None:
        for _ in range(self.chance.randint(1, 3)):
            session.add(Recollection(**self._new()))

    def _bulk_insert(self, session: Session) -> None:
        session.execute(insert(Recollection), [self._new() for _ in range(self.chance.randint(2, 6))])

    def _new(self) -> dict[str, Any]:
        id_ = f"w{self.number}-{self.life}-{self.chance.getrandbits(48):012x}"
        row = self.pending[id_] = self._row()
        return {"id": id_, "writer": self.number, **row}

    def _change(self, session: Session) -> None:
        if (id_ := self._any()) is not None:
            row = self._row()
            if self.chance.random() < 0.1:
                row["content"] = self.chance.choice((None, "", "  "))  # no vector
            if self.chance.random() < 0.3:
                row["content"] = self._of(id_)["content"]  # other metadata for the same text
            self._set(session, id_, row)

    def _change_back(self, session: Session) -> None:
        ids = [id_ for id_ in self.past if self.pending.get(id_, self.rows.get(id_)) is not None]
        if ids:
            id_ = self.chance.choice(ids)
            self._set(session, id_, self.past[id_])

    def _set(self, session: Session, id_: str, row: Row) -> None:
        found = self._found(session, id_)
        for name, value in row.items():
            setattr(found, name, value)
        self.pending[id_] = row

    def _delete(self, session: Session) -> None:
        if (id_ := self._any()) is not None:
            session.delete(self._found(session, id_))
            session.flush()
            self.pending[id_] = None

    def _bulk_update(self, session: Session) -> None:
        shelf, row = self.chance.randrange(_SHELVES), self._row()
        of_shelf = [id_ for id_ in self._all() if self._of(id_)["shelf"] == shelf]
        where = (Recollection.writer == self.number, Recollection.shelf == shelf)
        session.execute(update(Recollection).where(*where).values(content=row["content"], mark=row["mark"]))
        self.pending.update({id_: {**row, "shelf": shelf} for id_ in of_shelf})

    def _bulk_delete(self, session: Session) -> None:
        some = self._all()
        some = self.chance.sample(some, min(len(some), self.chance.randint(1, 8)))
        session.execute(delete(Recollection).where(Recollection.id.in_(some)))
        self.pending.update(dict.fromkeys(some))

    def _fight(self, session: Session) -> None:
        """Change a fact that all writers share: locks are waited for, and some transactions lose."""
        key = (self.chance.choice(("breakfast", "sleep", "post", "music")), self.chance.randrange(5))
        found = session.get(Habit, key)
        if found is None:
            session.add(Habit(topic=key[0], number=key[1], content=self._text(), mark=self.mark))
        elif self.chance.random() < 0.3:
            session.delete(found)
        else:
            found.content, found.mark = self._text(), self.mark
        session.flush()

    def _undo(self, session: Session) -> None:
        for change in self.app.memory.rollback(session, 1, session_id=f"writer {self.number}"):
            if change.entity == "recollection":
                after = change.after
                self.pending[change.key] = (
                    None if after is None else {name: after[name] for name in ("shelf", "content", "mark")}
                )

    def _search(self, session: Session) -> None:
        """Each hit is a visible row, at the distance of its present text. Our own rows are found, delivered or not.

        The graphs of Chroma and of pgvector are approximate, so for them only the hits are checked.
        """
        ids = [id_ for id_ in self._all() if (self._of(id_)["content"] or "").strip()]
        if not ids:
            return
        query, name = self._of(self.chance.choice(ids))["content"], self.chance.choice(list(self.app.memory.indexes))
        session.expire_all()
        try:
            hits = self.app.memory.search(session, query, Recollection, limit=3, index=name)
        except (DeliveryError, OSError, HTTPError):  # an index's own error passes through a search
            return
        [vector] = self.app.embedder.embed([query])
        for hit in hits:
            [of_hit] = self.app.embedder.embed([hit.fact.content or ""])
            if abs(hit.distance - (1.0 - float(np.dot(vector, of_hit)))) > 1e-4:
                raise Problem(f"search of {name}: {hit.fact.id} at {hit.distance}, not the distance of its text")
        if hits.complete and name in _EXACT and not (hits and hits[0].distance < 1e-4):
            raise Problem(f"search of {name}: a visible row with exactly this text was not found: {query!r}")

    # -- this writer's rows --------------------------------------------------------------------------------------------

    def _row(self) -> Row:
        return {"shelf": self.chance.randrange(_SHELVES), "content": self._text(), "mark": self.mark}

    def _text(self) -> str:
        return " ".join((self.mark, *self.chance.sample(_WORDS, 4), str(self.chance.randrange(1000))))

    def _all(self) -> list[str]:
        return [id_ for id_, row in {**self.rows, **self.pending}.items() if row is not None]

    def _any(self) -> str | None:
        return self.chance.choice(self._all()) if self._all() else None

    def _of(self, id_: str) -> Row:
        row = self.pending[id_] if id_ in self.pending else self.rows[id_]
        assert row is not None
        return row

    def _found(self, session: Session, id_: str) -> Recollection:
        session.flush()
        found = session.get(Recollection, id_)
        if found is None:
            raise Problem(
                f"{id_} is missing, although it was committed or is ours. The table has {_count(session)} rows"
            )
        return found


def _count(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(Recollection)) or 0
