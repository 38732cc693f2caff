"""A database or an index was restored from a backup. One is ahead of the other, without notice."""

from __future__ import annotations

import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memstate_sa import sqlite
from memstate_sa.db.tables import past, refill
from memstate_sa.errors import DeliveryRetryable
from memstate_sa.indexes import InMemoryIndex, VectorIndex
from tests.support import apps, assert_index_holds
from tests.support.indexes import KINDS, Make, storage
from tests.support.relays import eventually


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    words: Mapped[str | None]


class App(apps.App):
    """A process of the application."""

    def __init__(self, engine: Engine, index: VectorIndex) -> None:
        super().__init__(engine, Note, index=index, text="words")

    def say(self, *, drain: bool = True, **words: str | None) -> None:
        """Write note ``n5`` and others. None deletes a note."""
        with self.sessions() as session:
            for name, said in words.items():
                note = session.get(Note, int(name[1:]))
                if said is None:
                    session.delete(note)
                elif note is None:
                    session.add(Note(id=int(name[1:]), words=said))
                else:
                    note.words = said
            session.commit()
        if drain:
            self.drain()

    def drain(self) -> None:
        self.memory.relay(self.engine).drain()

    def search(self, query: str) -> tuple[list[int], bool]:
        with self.sessions() as session:
            hits = self.memory.search(session, query, Note, limit=10)
            return sorted(hit.fact.id for hit in hits), hits.complete

    def truth(self) -> dict[str, str]:
        with self.sessions() as session:
            return {f"note[{note.id}]": note.words for note in session.scalars(select(Note)) if note.words}

    def assert_converged(self) -> None:
        self.drain()
        assert_index_holds(self.index, self.embedder, self.truth())
        assert self.search("apple") == (sorted(int(name[5:-1]) for name in self.truth()), True)
        assert self.memory.verify(self.engine).clean

    def is_filled(self) -> bool:
        with self.engine.connect() as connection:
            return all(connection.scalars(select(refill.c.done)))

    def close(self) -> None:
        self.memory.close()
        self.engine.dispose()


class Backups:
    """A database that is backed up and restored with its own tools while no program is connected."""

    def __init__(self, kind: str, folder: Path, postgres_url: Callable[[], str]) -> None:
        self.kind, self.folder = kind, folder
        self.name = f"app_{uuid.uuid4().hex[:12]}"
        if kind == "postgres":
            self.admin = create_engine(postgres_url(), isolation_level="AUTOCOMMIT")
            self._run(f"CREATE DATABASE {self.name}")

    def engine(self) -> Engine:
        if self.kind == "postgres":
            return create_engine(self.admin.url.set(database=self.name))
        return sqlite.configure(create_engine(f"sqlite:///{self.folder / 'app.db'}"))

    def back_up(self) -> None:
        if self.kind == "postgres":  # the same cluster: transaction ids keep growing
            self._run(f"CREATE DATABASE {self.name}_backup TEMPLATE {self.name}")
        else:
            copy(self.folder / "app.db", self.folder / "backup.db")

    def restore(self) -> None:
        if self.kind == "postgres":
            self._run(f"DROP DATABASE {self.name}", f"ALTER DATABASE {self.name}_backup RENAME TO {self.name}")
        else:
            for ending in ("-wal", "-shm"):
                (self.folder / f"app.db{ending}").unlink(missing_ok=True)
            shutil.move(self.folder / "backup.db", self.folder / "app.db")

    def _run(self, *statements: str) -> None:
        with self.admin.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def close(self) -> None:
        if self.kind == "postgres":
            self._run(*(f"DROP DATABASE IF EXISTS {self.name}{which} WITH (FORCE)" for which in ("", "_backup")))
            self.admin.dispose()


def copy(source: Path, target: Path) -> None:
    """Copy a database. Both may be in use."""
    with sqlite3.connect(source) as left, sqlite3.connect(target) as right:
        left.backup(right)
    left.close()
    right.close()


@pytest.fixture(params=["sqlite", "postgres"])
def backups(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backups]:
    made = Backups(request.param, tmp_path, lambda: request.getfixturevalue("postgres_url"))
    yield made
    made.close()


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    with storage(request.param, tmp_path, request) as made:
        yield made


FIVE = {f"n{n}": f"apple {n}" for n in range(1, 6)}


@pytest.mark.deep_on("qdrant")
def test_index_is_compared_when_the_database_was_restored(backups: Backups, make: Make) -> None:
    """This covers each index on each database, with rows written, added and deleted since the backup.

    The same kind: a recovery to a point in time, a file that was copied back, a database made of a template.
    """
    app = App(backups.engine(), make())
    app.say(**FIVE)
    app.close()
    backups.back_up()
    app = App(backups.engine(), make())
    app.say(n1="a zebra", n2="a quagga", n3=None, n6="apple 6")
    app.close()
    backups.restore()
    app = App(backups.engine(), make())
    found, complete = app.search("apple")  # no relay has looked yet
    assert set(found) <= set(range(1, 6))
    assert not complete
    app.assert_converged()
    assert app.truth() == {f"note[{n}]": f"apple {n}" for n in range(1, 6)}
    app.close()


@pytest.mark.deep_on("postgres")
def test_restore_from_before_any_delivery_is_noticed(
    backups: Backups, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The backup has no tables of ours, or it has them, but no relay had run."""
    with storage("faiss", tmp_path, request) as make:
        app = App(backups.engine(), make())
        app.say(n1="apple 1", drain=False)
        app.close()
        backups.back_up()
        app = App(backups.engine(), make())
        app.say(n1="a zebra", n2="apple 2")
        app.close()
        backups.restore()
        app = App(backups.engine(), make())
        app.assert_converged()
        app.close()


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., App]:
    """A function that makes an application on a SQLite file of this name."""

    def made(index: VectorIndex, name: str = "app.db") -> App:
        return App(sqlite.configure(create_engine(f"sqlite:///{tmp_path / name}")), index)

    return made


def test_running_relay_notices_a_restore(files: Callable[..., App], tmp_path: Path) -> None:
    """The relay remembers a later page than the database has, and a position that new ids have not reached.

    The same kind: a backup from the time when the same relay held its lease.
    """
    app = files(InMemoryIndex())
    with app.memory.relay(app.engine):
        app.say(**FIVE, drain=False)
        eventually(lambda: holds(app))
        copy(tmp_path / "app.db", tmp_path / "backup.db")
        app.say(n1="a zebra", n3=None, n6="apple 6", drain=False)
        eventually(lambda: holds(app))
        copy(tmp_path / "backup.db", tmp_path / "app.db")
        eventually(lambda: holds(app))
        app.say(n7="apple 7", drain=False)
        eventually(lambda: holds(app))
        eventually(lambda: app.search("apple") == ([1, 2, 3, 4, 5, 7], True))
    app.close()


def test_relay_that_wrote_nothing_since_notices_a_restore(files: Callable[..., App], tmp_path: Path) -> None:
    """No page was begun, because the rows had no text. Only the position shows that the database went back."""
    app = files(InMemoryIndex())
    with app.memory.relay(app.engine):
        app.say(**FIVE, drain=False)
        eventually(lambda: holds(app) and app.memory.status(app.engine)["memory"].pending == 0)
        copy(tmp_path / "app.db", tmp_path / "backup.db")
        app.say(n8="", n9="", drain=False)
        eventually(lambda: app.memory.status(app.engine)["memory"].pending == 0)
        copy(tmp_path / "backup.db", tmp_path / "app.db")
        app.say(n7="apple 7", drain=False)  # reuses an id
        eventually(lambda: holds(app))
    app.close()


def holds(app: App) -> bool:
    entries = app.index.scan(None, 100)
    given = {entry.id: entry.fingerprint for entry in entries}
    tracked = app.memory._registry.of(Note)
    with app.sessions() as session:
        notes = session.execute(select(Note.id, Note.words)).all()
    rows = (tracked.project(f"[{id_}]", (words,), app.embedder.fingerprint) for id_, words in notes)
    return given == {tracked.point_id(row.key): row.fingerprint for row in rows if row.fingerprint}


def test_relays_of_two_copies_each_make_the_index_their_own(files: Callable[..., App], tmp_path: Path) -> None:
    """A copy of the database is used separately with the same index. Each relay makes the index its own again."""
    index = InMemoryIndex()
    one = files(index)
    one.say(**FIVE)
    copy(tmp_path / "app.db", tmp_path / "copy.db")
    other = files(index, "copy.db")
    for turn in range(2):
        for app, animal in ((one, "zebra"), (other, "quagga")):
            app.say(n1=f"a {animal} {turn}", **{f"n{10 + turn}": f"one more {animal}"})
            app.assert_converged()
    one.close()
    other.close()


def test_restored_index_is_compared_with_its_database(
    files: Callable[..., App], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """This is the opposite case: the index is behind its database."""
    with storage("faiss", tmp_path, request) as make:
        app = files(make())
        app.say(**FIVE)
        app.close()
        shutil.copytree(tmp_path / "faiss", tmp_path / "faiss_backup")
        app = files(make())
        for n in range(6, 9):
            app.say(**{f"n{n}": f"apple {n}"})
        app.close()
        shutil.rmtree(tmp_path / "faiss")
        shutil.move(tmp_path / "faiss_backup", tmp_path / "faiss")
        app = files(make())
        app.assert_converged()
        app.close()


class Breaking(InMemoryIndex):
    """An index that fails at the chosen place."""

    at = ""

    def upsert(self, points: Any) -> None:
        self._break("upsert")
        super().upsert(points)

    def write_mark(self, mark: str) -> None:
        self._break("mark")
        super().write_mark(mark)

    def _break(self, where: str) -> None:
        if self.at == where:
            raise DeliveryRetryable(f"broken at {where}")


@pytest.mark.deep_on("postgres")
@pytest.mark.parametrize("at", ["upsert", "mark"])
def test_crash_is_not_taken_for_a_restore(engine: Engine, at: str) -> None:
    """A relay may end between the row, the mark and the points. Nothing is compared again, even after many ends."""
    index = Breaking()
    app = App(engine, index)
    app.say(**FIVE)
    with engine.connect() as connection:
        [before] = connection.scalars(select(past.c.refused))
    for n in range(6, 10):
        index.at = at
        app.say(**{f"n{n}": f"apple {n}"}, drain=False)
        relay = app.memory.relay(engine)
        for _ in range(3):
            with pytest.raises(DeliveryRetryable):
                relay.run_once()
        relay._workers[0].delivery.slot_worker.reset()  # as a process that was killed
        relay.stop()
        index.at = ""
        app.drain()
        assert app.is_filled()
    for _ in range(3):
        app.drain()
    with engine.connect() as connection:
        assert connection.scalars(select(past.c.refused)).all() == [before]
    app.assert_converged()
    app.close()


def test_index_without_marks_goes_on(engine: Engine) -> None:
    """A custom index need not keep a mark."""

    class Plain:
        """Has everything but the mark."""

        def __init__(self) -> None:
            self.inner = InMemoryIndex()

        def __getattr__(self, name: str) -> Any:
            if name.endswith("_mark"):
                raise AttributeError(name)
            return getattr(self.inner, name)

        def upsert(self, points: Any) -> None:
            self.inner.upsert(points)

    index: Any = Plain()
    app = App(engine, index)
    for n in range(3):
        app.say(**{f"n{n}": f"apple {n}"})
    app.assert_converged()
    app.close()
