"""Erasure removes a fact's content everywhere, and keeps the record that the fact existed.

Purging removes the content from the files as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from sqlalchemy import (
    CHAR,
    Connection,
    Engine,
    ForeignKey,
    String,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from memstate_sa import ConflictError, Memory, MemstateError, NotFound, metadata, sqlite
from memstate_sa.capture.append_only import rewriting
from memstate_sa.db.tables import embedding, ledger, log, outbox, parked, trigger_context, unique, utcnow
from memstate_sa.indexes import ChromaIndex, InMemoryIndex, VectorIndex
from memstate_sa.relay.retention import fold_log
from memstate_sa.testing import HashEmbedder
from tests.support import WAITING_FOR_A_LOCK, Base, Note, Person, Tag, World
from tests.support.apps import App, make_app
from tests.support.relays import say

# The tests show a gap: no Session sees changes that the database makes by itself.
pytestmark = pytest.mark.filterwarnings("ignore:The log misses some changes")

MARKERS = ("Zxqvertigo77", "Şükrü Überfährt 東京 Zxqvertigo77")
"""The erased text, in ASCII and in other scripts."""


class Local(DeclarativeBase):
    pass


class Account(Local):
    """A fact with a unique value. Payments refer to it."""

    __tablename__ = "account"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(80))
    about: Mapped[str | None]


class Payment(Local):
    __tablename__ = "payment"
    id: Mapped[int] = mapped_column(primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("account.id"))
    what: Mapped[str]


class Counting(HashEmbedder):
    def __init__(self) -> None:
        super().__init__()
        self.embedded = 0

    def embed(self, texts: Sequence[str]) -> Any:
        self.embedded += len(texts)
        return super().embed(texts)


class Accounts(App):
    def __init__(self, engine: Engine, index: VectorIndex | None = None, *, capture: Any = "session") -> None:
        if engine.dialect.name == "sqlite":
            # Some builds of SQLite overwrite deleted content by themselves.
            event.listen(engine, "connect", lambda dbapi, record: dbapi.execute("PRAGMA secure_delete = OFF"))
        unique_by = ("email",) if capture == "session" else ()  # triggers cannot enforce it
        tracking = {
            Account: {"text": "about", "metadata": ("email",), "unique_by": unique_by},
            Payment: {"text": "what"},
        }
        options = {"tracking": tracking, "foreign_keys": True, "capture": capture}
        super().__init__(engine, *tracking, index=index, embedder=Counting(), **options)

    def tell(self, marker: str) -> None:
        """Add an account whose values, past and present, all contain *marker*, and another account."""
        with self.sessions() as session:
            session.add(Account(id=1, email=f"{marker}@example.org", about=f"first {marker}"))
            session.add(Account(id=2, email="other@example.org", about="another"))
            session.commit()
            self.relay.drain()
            session.get_one(Account, 1).about = f"second {marker}"
            session.commit()
            self.relay.drain()

    def erase(self, reason: str | None = None) -> int:
        with self.sessions() as session:
            redacted = self.memory.erase(session, Account, 1, reason=reason)
            session.commit()
        return redacted

    def assert_fine(self) -> None:
        assert self.memory.verify(self.engine).clean
        diagnosis = self.memory.doctor(self.engine)
        assert diagnosis.healthy, diagnosis
        with self.engine.connect() as connection:
            assert connection.execute(select(trigger_context)).all() == []


@pytest.fixture(params=["session", "trigger"])
def accounts(request: pytest.FixtureRequest, engine: Engine) -> Iterator[Accounts]:
    made = Accounts(engine, capture=request.param)
    yield made
    made.memory.close()


@pytest.fixture
def world(engine: Engine) -> Iterator[World]:
    made = World(engine)
    yield made
    made.memory.close()


def stored(connection: Connection, *models: type[Any]) -> str:
    """The content of our tables, and of the tables of *models*, as text."""
    tables = [*metadata.sorted_tables, *(model.__table__ for model in models)]
    there = [row for table in tables for row in connection.execute(select(text("*")).select_from(table))]
    return repr([list(row) for row in there])


# -- erased content ----------------------------------------------------------------------------------------------------


@pytest.mark.sa20
@pytest.mark.parametrize("marker", MARKERS)
def test_nothing_is_left_in_any_table(accounts: Accounts, marker: str) -> None:
    """Row, images, unique values and the index's records are gone. The other fact is unchanged."""
    accounts.tell(marker)
    with accounts.engine.begin() as connection:
        given = {"index": "memory", "incarnation": "old", "entity": "account", "key": "[1]"}
        state = {"slot": 0, "attempts": 1, "next_at": utcnow(), "state": "dead", "mark": "x"}
        connection.execute(insert(parked).values(**given, **state, error=f"refused {marker}"))
        # A leftover from a time with other unique columns.
        connection.execute(insert(unique).values(entity="account", value=f'["then", "{marker}"]', key="[1]"))
    with accounts.engine.connect() as connection:
        assert stored(connection, Account).count(marker) >= 6
        other = connection.execute(select(log).where(log.c.key == "[2]")).all()
        texts = connection.scalar(select(func.count()).select_from(embedding))
        values = set(connection.scalars(select(unique.c.key)))
    assert accounts.erase() == 2
    with accounts.engine.connect() as connection:
        assert marker not in stored(connection, Account)
        assert connection.execute(select(log).where(log.c.key == "[2]")).all() == other
        assert connection.scalar(select(func.count()).select_from(embedding)) == texts - 2  # type: ignore[operator]
        assert set(connection.scalars(select(unique.c.key))) == values - {"[1]"}
    accounts.relay.drain()
    assert accounts.index.get(["account[1]"]) == []
    with accounts.engine.connect() as connection:
        hashes = select(ledger.c.fingerprint, ledger.c.text_fingerprint).where(ledger.c.key == "[1]")
        assert connection.execute(hashes).all() == [(None, None)]
    accounts.assert_fine()


@pytest.mark.sa20
def test_history_shows_that_and_when_a_fact_was_erased(accounts: Accounts) -> None:
    """It does not show the content. Actor and reason of the erasure are ordinary labels."""
    accounts.tell("secret")
    with accounts.sessions() as session:
        accounts.memory.annotate(session, actor="officer")
        accounts.memory.erase(session, Account, 1, reason="request 7")
        session.commit()
        changes = accounts.memory.history(session, Account, 1)
    assert [(change.op, change.before, change.after) for change in changes] == [
        ("insert", None, None),
        ("update", None, None),
        ("delete", None, None),
    ]
    assert [(change.actor, change.reason) for change in changes] == [(None, None)] * 2 + [("officer", "request 7")]
    assert changes[2].tx not in {change.tx for change in changes[:2]}
    with accounts.sessions() as session:
        accounts.memory.erase(session, Account, 2)
        session.commit()
        assert accounts.memory.history(session, Account, 2)[-1].reason == "erased"


def test_search_does_not_find_an_erased_fact(accounts: Accounts) -> None:
    """It is hidden in the erasing transaction and afterwards, before and after delivery. Loaded instances drop their
    values.
    """
    accounts.tell("secret")
    with accounts.sessions() as session:
        found = accounts.memory.search(session, "second secret", Account)
        assert {hit.fact.id for hit in found} == {1, 2}
        erased = session.get_one(Account, 1)
        accounts.memory.erase(session, Account, 1)
        for deliver in (False, False, True):
            assert {hit.fact.id for hit in accounts.memory.search(session, "second secret", Account)} == {2}
            assert session.get(Account, 1) is None
            assert "about" not in vars(erased)
            session.commit()
            if deliver:
                accounts.relay.drain()
    accounts.assert_fine()


@pytest.mark.sa20
def test_deleted_fact_can_be_erased(accounts: Accounts) -> None:
    """Only its history is left. Erasing twice is not an error."""
    accounts.tell("secret")
    with accounts.sessions() as session:
        session.delete(session.get_one(Account, 1))
        session.commit()
    assert accounts.erase() == 3
    assert accounts.erase() == 4
    with accounts.engine.connect() as connection:
        assert "secret" not in stored(connection, Account)
    accounts.relay.drain()
    accounts.assert_fine()


@pytest.mark.sa20
def test_row_older_than_tracking_is_erased(accounts: Accounts) -> None:
    """The log does not know the row, before or after."""
    with accounts.engine.begin() as connection:
        triggers = accounts.memory._registry.by_trigger
        connection.execute(insert(Account.__table__).values(id=1, email="e", about="secret"))
    assert accounts.erase() == (1 if triggers else 0)
    with accounts.engine.connect() as connection:
        assert "secret" not in stored(connection, Account)
    with accounts.sessions() as session:
        assert accounts.memory.history(session, Account, 1)[-1].op == "delete"
    accounts.relay.drain()
    accounts.assert_fine()


@pytest.mark.sa20
def test_a_rollback_brings_everything_back(accounts: Accounts) -> None:
    """A rollback of the transaction or of its SAVEPOINT restores row, images, vectors and instance."""
    accounts.tell("secret")

    def everything() -> str:
        with accounts.engine.connect() as connection:
            return stored(connection, Account)

    before = everything()
    with accounts.sessions() as session:
        found = session.get_one(Account, 1)
        accounts.memory.erase(session, Account, 1)
        session.rollback()
        assert found.about == "second secret" and found in session
        savepoint = session.begin_nested()
        accounts.memory.erase(session, Account, 1)
        savepoint.rollback()
        assert found.about == "second secret" and session.get(Account, 1) is found
        session.commit()
    with accounts.sessions() as session:
        accounts.memory.erase(session, Account, 1)  # the Session closes without a commit
    assert everything() == before
    accounts.relay.drain()
    accounts.assert_fine()


# -- later changes -----------------------------------------------------------------------------------------------------


@pytest.mark.sa20
def test_a_fact_that_is_added_again_is_a_new_fact(accounts: Accounts) -> None:
    """It can be undone and redone. This restores nothing of the erased fact."""
    accounts.tell("secret")
    with accounts.sessions() as session:
        accounts.memory.erase(session, Account, 1)
        session.add(Account(id=1, email="new@example.org", about="new"))  # in the same Session, too
        session.commit()
        session.get_one(Account, 1).about = "newer"
        session.commit()
        accounts.relay.drain()
        accounts.assert_fine()
        [undone] = accounts.memory.rollback(session)
        session.commit()
        assert session.get_one(Account, 1).about == "new"
        accounts.memory.rollback(session, tx=undone.tx)
        session.commit()
        assert session.get_one(Account, 1).about == "newer"
        accounts.memory.rollback(session, steps=2)
        session.commit()
        assert session.get(Account, 1) is None
        accounts.memory.rollback(session, steps=10)
        session.commit()
        assert session.get(Account, 1) is None and session.get(Account, 2) is None
        assert "secret" not in repr(accounts.memory.history(session, Account))
    accounts.relay.drain()
    accounts.assert_fine()


@pytest.mark.sa20
def test_undo_of_a_transaction_leaves_its_erased_facts_alone(accounts: Accounts) -> None:
    """The rest of the transaction is undone, even if a fact of the same key was added later."""
    accounts.tell("secret")
    for again in (False, True):
        with accounts.sessions() as session:
            session.merge(Account(id=1, email="e@example.org", about="touched"))
            session.add(Account(id=3, email="three@example.org", about="beside"))
            session.commit()
            [touched] = {change.tx for change in accounts.memory.history(session, Account, 3)[-1:]}
            accounts.memory.erase(session, Account, 1)
            session.commit()
            if again:
                session.add(Account(id=1, email="new@example.org", about="new"))
                session.commit()
            assert [change.key for change in accounts.memory.rollback(session, tx=touched)] == [3]
            session.commit()
            assert session.get(Account, 3) is None
            assert (session.get(Account, 1) is not None) is again
    accounts.relay.drain()
    accounts.assert_fine()


@pytest.mark.sa20
def test_steps_skip_an_erasure(accounts: Accounts) -> None:
    """They also skip transactions whose changes are all redacted."""
    accounts.tell("secret")  # the first step adds both accounts, the second changes the account that is erased
    accounts.erase()
    with accounts.sessions() as session:
        assert [change.key for change in accounts.memory.rollback(session)] == [2]
        session.commit()
        assert accounts.memory.rollback(session, steps=5) == []
    accounts.relay.drain()
    accounts.assert_fine()


@pytest.mark.sa20
def test_an_erasure_is_not_undone(accounts: Accounts) -> None:
    """Undoing it does not remove later facts either."""
    accounts.tell("secret")
    accounts.erase()
    with accounts.sessions() as session:
        tx = accounts.memory.history(session, Account, 1)[-1].tx
        for again in (False, True):
            if again:
                session.add(Account(id=1, email="new@example.org", about="new"))
                session.commit()
            try:
                assert accounts.memory.rollback(session, tx=tx) == []
            except ConflictError:
                session.rollback()
            session.commit()
            assert (session.get(Account, 1) is not None) is again
    accounts.relay.drain()
    accounts.assert_fine()


@pytest.mark.sa20
def test_retention_folds_redacted_entries_into_nothing(accounts: Accounts) -> None:
    """A page may end before the tombstone. A baseline without a row would invent a fact."""
    accounts.tell("secret")
    accounts.erase()
    with accounts.engine.begin() as connection:
        with rewriting(connection):
            connection.execute(update(log).values(at=utcnow() - timedelta(days=31)))
        entries = select(log.c.op).where(log.c.key == "[1]").order_by(log.c.id)
        left, after = [], 0
        for _page in range(4):
            after = fold_log(connection, timedelta(days=30), after, limit=2)
            left.append([op for (op,) in connection.execute(entries)])
    assert left[0] == ["update", "delete"] and left[-1] == []
    accounts.relay.drain()
    accounts.assert_fine()


# -- rows that go along, and rows that block ---------------------------------------------------------------------------


@pytest.mark.sa20
def test_erase_refuses_a_row_that_others_refer_to(accounts: Accounts) -> None:
    """Nothing changes, and the transaction goes on. The row can be erased once the others are gone."""
    accounts.tell("secret")
    with accounts.sessions() as session:
        session.add(Payment(id=5, account_id=1, what="a book"))
        session.commit()
        before = stored(session.connection(), Account, Payment)
        with pytest.raises(ConflictError, match=r"Cannot erase account \[1\]: other rows refer to it"):
            accounts.memory.erase(session, Account, 1)
        assert stored(session.connection(), Account, Payment) == before
        assert session.get_one(Account, 1).about == "second secret"
        accounts.memory.erase(session, Payment, 5)
        accounts.memory.erase(session, Account, 1)
        session.commit()
        assert "secret" not in stored(session.connection(), Account)
    accounts.relay.drain()
    accounts.assert_fine()


@pytest.mark.sa20
def test_history_under_an_earlier_key_is_erased_apart(accounts: Accounts) -> None:
    """It belongs to another fact, which is erased by the earlier key. This fact has no row."""
    accounts.tell("secret")
    with accounts.sessions() as session:
        session.get_one(Account, 1).id = 7
        session.commit()
        assert accounts.memory.erase(session, Account, 7) == 1
        assert "secret" in stored(session.connection(), Account)
        assert accounts.memory.erase(session, Account, 1) == 3
        session.commit()
        assert "secret" not in stored(session.connection(), Account)
    accounts.relay.drain()
    accounts.assert_fine()


class Cascading(DeclarativeBase):
    pass


class Parent(Cascading):
    __tablename__ = "parent"
    id: Mapped[int] = mapped_column(primary_key=True)


class Child(Cascading):
    __tablename__ = "child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("parent.id", ondelete="CASCADE"))
    friend_id: Mapped[int | None] = mapped_column(ForeignKey("parent.id", ondelete="SET NULL"))
    child_id: Mapped[int | None] = mapped_column(ForeignKey("child.id", ondelete="CASCADE"))


class Grandchild(Cascading):
    __tablename__ = "grandchild"
    id: Mapped[int] = mapped_column(primary_key=True)
    child_id: Mapped[int] = mapped_column(ForeignKey("child.id", ondelete="CASCADE"))


class Family(Accounts):
    """Rows whose parents the database deletes or changes with them. *capture* applies to children."""

    def __init__(self, engine: Engine, capture: Any) -> None:
        tracking = {Child: {"capture": capture}}
        App.__init__(self, engine, Parent, Child, Grandchild, tracking=tracking, foreign_keys=True, text=None)
        self.write(Parent(id=1), Parent(id=2))

    def add(self, *rows: Any) -> None:
        with self.sessions() as session:
            for row in rows:
                session.add(row)
                session.flush()
            session.commit()

    def refuses(self) -> bool:
        """Whether erasing the parent is refused. A refusal changes nothing, and no change escapes the log."""
        with self.sessions() as session:
            before = stored(session.connection(), Parent, Child, Grandchild)
            try:
                self.memory.erase(session, Parent, 1)
            except ConflictError:
                assert stored(session.connection(), Parent, Child, Grandchild) == before
                return True
            session.commit()
        self.assert_fine()
        return False


@pytest.mark.sa20
@pytest.mark.parametrize("column", ["parent_id", "friend_id"])
@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_erase_cascades_only_where_triggers_log_it(engine: Engine, capture: str, column: str) -> None:
    """ON DELETE may delete or change children where triggers log it. Elsewhere children block the erasure."""
    family = Family(engine, capture)
    family.add(Child(id=1, **{column: 1}), Child(id=2, **{column: 2}))
    assert family.refuses() is (capture == "session")
    with family.sessions() as session:
        assert {child.id: getattr(child, column) for child in session.scalars(select(Child))} == (
            {1: 1, 2: 2} if capture == "session" else {2: 2} if column == "parent_id" else {1: None, 2: 2}
        )
    family.memory.close()


@pytest.mark.sa20
def test_erase_follows_chains_of_cascades_that_triggers_log(engine: Engine) -> None:
    """Triggers log one kind of child, and nothing logs the other. Children that are not touched do not block."""
    family = Family(engine, "trigger")
    family.add(Child(id=1, friend_id=1), Grandchild(id=1, child_id=1))
    family.add(Child(id=2, parent_id=1), Child(id=3, child_id=2), Grandchild(id=3, child_id=3))
    assert family.refuses()
    with family.sessions() as session:
        session.delete(session.get_one(Grandchild, 3))
        session.commit()
    assert not family.refuses()
    with family.sessions() as session:
        assert session.scalars(select(Child.id)).all() == [1]
        assert session.scalars(select(Grandchild.id)).all() == [1]
    family.memory.close()


def test_erase_waits_for_a_row_that_may_refer_to_it(postgres_engine: Engine) -> None:
    """Its transaction is open when the erasure looks. Its end decides whether the row refers to the fact."""
    family = Family(postgres_engine, "session")

    def erase() -> None:
        with (
            family.sessions() as session,
            pytest.raises(ConflictError, match=r"other rows refer to it \(child \[1\]\)"),
        ):
            family.memory.erase(session, Parent, 1)

    with family.sessions() as other, ThreadPoolExecutor(1) as pool:
        other.add(Child(id=1, parent_id=1))
        other.flush()
        erasing = pool.submit(erase)
        with postgres_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watcher:
            while not watcher.scalar(text(f"SELECT count(*) {WAITING_FOR_A_LOCK}")):
                assert not erasing.done()
                time.sleep(0.01)
        other.commit()
        erasing.result(30)
    family.assert_fine()
    family.memory.close()


@pytest.mark.sa20
def test_pending_changes_are_erased_too(accounts: Accounts) -> None:
    """The edit of a loaded instance, and an instance that is only pending."""
    accounts.tell("secret")
    with accounts.sessions() as session:
        session.get_one(Account, 1).about = "third secret"
        session.add(Account(id=3, email="3", about="fourth secret"))
        assert accounts.memory.erase(session, Account, 1) == 3
        assert accounts.memory.erase(session, Account, 3) == 1
        session.commit()
        assert "secret" not in stored(session.connection(), Account)
    accounts.relay.drain()
    accounts.assert_fine()


@pytest.mark.sa20
def test_facts_with_composite_keys_and_many_columns_are_erased(world: World) -> None:
    """The key is a tuple. Vectors of texts made by a callable are forgotten too."""
    with world.session() as session:
        session.add(Note(topic="t", number=1, content="secret", person=Person(name="p", about="y")))
        session.add(Note(topic="t", number=2, content="other", person=Person(name="q", about="z")))
        session.add(Tag(name="a", meaning="secret"))
        session.commit()
        world.relay.drain()
        kept = session.scalar(select(func.count()).select_from(embedding))
        assert world.memory.erase(session, Note, ("t", 1)) == 1
        assert world.memory.erase(session, Tag, "a") == 1
        session.commit()
        assert session.scalar(select(func.count()).select_from(embedding)) == kept - 2  # type: ignore[operator]
        assert "secret" not in stored(session.connection(), Note, Tag)
    world.assert_in_step()


@pytest.mark.sa20
def test_vectors_of_older_shapes_are_forgotten(engine: Engine) -> None:
    """Both the old texts of the class and the upgraded texts of its history are forgotten."""
    old = Accounts(engine)
    old.tell("secret")
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    upgrade = {1: lambda row: {**row, "about": f"{row['about']} now"}}
    memory.track(Account, text="about", metadata=("email",), version=2, upgrade=upgrade)
    sessions = sessionmaker(engine)
    memory.attach(sessions)
    with sessions() as session:
        session.get_one(Account, 1).about = "first secret now"  # as an undo would write it
        session.commit()
        memory.relay(engine).drain()
        assert session.scalar(select(func.count()).select_from(embedding)) == 4
        memory.erase(session, Account, 1)
        session.commit()
        assert session.scalar(select(func.count()).select_from(embedding)) == 1
    memory.close()
    old.memory.close()


@pytest.mark.sa20
def test_erase_explains_its_refusals(world: World) -> None:
    """Nothing changes."""
    say(world, a="x")

    class Nobody:
        pass

    with world.session() as session:
        before = stored(session.connection(), Tag)
        cases: list[tuple[type[Any], Any, type[Exception], str]] = [
            (Tag, "unknown", NotFound, "Cannot erase 'unknown': neither tag nor its history has"),
            (Person, "no number", NotFound, "person"),
            (Note, "t", MemstateError, "the primary key of note is topic, number"),
            (Note, ("t", 1, 2), MemstateError, "the primary key of note is topic, number"),
            (Note, ("t", 1), NotFound, "note"),
            (Nobody, 1, MemstateError, "not tracked"),
            (Base, 1, MemstateError, "not tracked"),
        ]
        for model, key, kind, message in cases:
            with pytest.raises(kind, match=message):
                world.memory.erase(session, model, key)
        with pytest.raises(MemstateError, match="reason="):
            world.memory.erase(session, Tag, "a", reason=7)  # type: ignore[arg-type]
        assert stored(session.connection(), Tag) == before
        session.commit()
    other = sessionmaker(world.engine)
    with other() as session, pytest.raises(MemstateError, match="not attached"):
        world.memory.erase(session, Tag, "a")
    world.assert_in_step()


def test_erase_leaves_rows_of_other_classes_in_the_table(engine: Engine) -> None:
    """A row of another, untracked class is not touched."""

    class Local(DeclarativeBase):
        pass

    class Animal(Local):
        __tablename__ = "animal"
        name: Mapped[str] = mapped_column(CHAR(8), primary_key=True)
        kind: Mapped[str]
        sound: Mapped[str | None]
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}

    class Dog(Animal):
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "dog"}

    app = make_app(engine, Dog, text="sound")
    padded = "{:8}".format if engine.dialect.name == "postgresql" else str
    with app.session() as session:
        session.add_all([Dog(name=padded("rex"), sound="secret"), Animal(name=padded("tom"), sound="meow")])
        session.commit()
        with pytest.raises(NotFound):
            app.memory.erase(session, Dog, "tom")
        assert app.memory.erase(session, Dog, "rex") == 1
        session.commit()
        assert [animal.sound for animal in session.scalars(select(Animal))] == ["meow"]
        assert "secret" not in stored(session.connection(), Animal)
    app.memory.close()


def test_strict_delivery_removes_an_erased_fact_before_commit(engine: Engine) -> None:
    """This is like any deleted row. No relay has run."""
    index = InMemoryIndex()
    app = make_app(engine, Tag, index=index, memory={"delivery": "strict"}, text="meaning")
    with app.session() as session:
        session.add_all([Tag(name="a", meaning="secret"), Tag(name="b", meaning="other")])
        session.commit()
        assert {entry.id for entry in index.scan(None, 10)} == {'tag["a"]', 'tag["b"]'}
        app.memory.erase(session, Tag, "a")
        session.commit()
        assert {entry.id for entry in index.scan(None, 10)} == {'tag["b"]'}
    app.memory.close()


def test_an_in_memory_database_is_purged_of_its_index_only() -> None:
    """It has no files. Its only connection may have no open transaction."""
    engine = sqlite.configure(create_engine("sqlite://"))
    accounts = Accounts(engine)
    accounts.tell("secret")
    with accounts.sessions() as session:
        accounts.memory.erase(session, Account, 1)
        with pytest.raises(MemstateError, match="a transaction is open on its only connection"):
            accounts.memory.purge(engine)
        session.commit()
    accounts.memory.purge(engine)
    assert [entry.id for entry in accounts.index.scan(None, 10)] == ["account[2]"]
    accounts.memory.close()
    engine.dispose()


# -- purging -----------------------------------------------------------------------------------------------------------


def occurrences(marker: str, *places: Path) -> list[str]:
    """The files that contain *marker*, as UTF-8 or with JSON escapes.

    Files of vectors do not count: hnswlib writes whole blocks of memory, with leftovers of the process.
    """
    forms = {marker.encode(), json.dumps(marker)[1:-1].encode()}
    found = (file for place in places for file in (place.rglob("*") if place.is_dir() else [place]))
    files = [file for file in found if file.is_file() and file.suffix != ".bin"]
    return [str(file) for file in files if any(form in file.read_bytes() for form in forms)]


def database_files(engine: Engine) -> list[Path]:
    path = str(engine.url.database)
    return [Path(path), Path(path + "-wal"), Path(path + "-journal")]


@pytest.mark.deep_on("Zxqvertigo77")
@pytest.mark.deep_on("True")
@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("store_text", [False, True])
def test_the_bytes_are_gone_from_sqlite_and_chroma(
    sqlite_engine: Engine, tmp_path: Path, marker: str, store_text: bool
) -> None:
    """Even after the erasure the bytes are still there, so purging is needed."""
    chromadb = pytest.importorskip("chromadb")
    folder = tmp_path / "chroma"
    accounts = Accounts(sqlite_engine, ChromaIndex(chromadb.PersistentClient(folder), store_text=store_text))
    with accounts.sessions() as session:  # several pages, so that Chroma writes its vectors to disk
        session.add_all(Account(id=n, email=f"{n}", about=f"about {n}") for n in range(10, 1300))
        session.commit()
    accounts.tell(marker)
    places = [*database_files(sqlite_engine), folder]
    assert {Path(place).name.partition("-")[0] for place in occurrences(marker, *places)} == {
        "facts.db",
        "chroma.sqlite3",
    }
    accounts.erase()
    accounts.relay.drain()
    assert len(occurrences(marker, *places)) >= 2
    embedded, before = accounts.embedder.embedded, accounts.index.incarnation
    accounts.memory.purge(sqlite_engine)
    assert occurrences(marker, *places) == []
    assert accounts.index.incarnation != before
    assert accounts.embedder.embedded == embedded  # nothing is embedded again
    vectors = [path.parent for path in folder.rglob("header.bin")]
    assert len(vectors) == 1  # the vectors of the replaced collection are gone, too
    with sqlite_engine.connect() as connection:
        assert set(connection.scalars(select(ledger.c.incarnation))) == {accounts.index.incarnation}
    accounts.assert_fine()
    with accounts.sessions() as session:
        assert accounts.memory.search(session, "about 77", Account, limit=1)[0].fact.id == 77
        session.add(Account(id=1, email="new", about="new"))
        session.commit()
    accounts.relay.drain()
    accounts.assert_fine()
    accounts.memory.close()


def test_relay_goes_on_after_a_purge(sqlite_engine: Engine, tmp_path: Path) -> None:
    """The background relay goes on with the index's replacement."""
    chromadb = pytest.importorskip("chromadb")
    folder = tmp_path / "chroma"
    accounts = Accounts(sqlite_engine, ChromaIndex(chromadb.PersistentClient(folder), store_text=True))
    accounts.tell("secret")
    with accounts.memory.relay(sqlite_engine):
        accounts.erase()
        accounts.memory.purge(sqlite_engine)
        assert occurrences("secret", *database_files(sqlite_engine), folder) == []
        with accounts.sessions() as session:
            session.add(Account(id=1, email="new", about="new"))
            session.commit()
            accounts.memory.wait(session)
    accounts.assert_fine()
    accounts.memory.close()


def test_data_of_other_programs_in_the_folder_stays(tmp_path: Path, sqlite_engine: Engine) -> None:
    """Other programs keep points with documents in our collection, and their own collections."""
    chromadb = pytest.importorskip("chromadb")
    client = chromadb.PersistentClient(tmp_path / "chroma")
    index = ChromaIndex(client)
    accounts = Accounts(sqlite_engine, index)
    accounts.tell("secret")
    ours = client.get_collection("memory", embedding_function=None)
    dimension = accounts.embedder.dimension
    ours.add(ids=["theirs"], embeddings=[[1.0] * dimension], metadatas=[{"of": "them"}], documents=["their words"])
    client.create_collection("memory.copy", embedding_function=None)  # left by a purge that was killed
    other = client.create_collection("other", embedding_function=None)
    other.add(ids=["x"], embeddings=[[1.0, 0.0]], documents=["other words"])
    accounts.erase()
    accounts.relay.drain()
    index.purge()
    assert [entry.id for entry in index.scan(None, 10)] == ["account[2]"]  # without waiting
    accounts.memory.purge(sqlite_engine)
    collection: Any = client.get_collection("memory", embedding_function=None)
    theirs = collection.get(ids=["theirs"], include=["embeddings", "metadatas", "documents"])
    assert theirs["documents"] == ["their words"] and theirs["metadatas"] == [{"of": "them"}]
    assert other.get(ids=["x"])["documents"] == ["other words"]
    assert other.query(query_embeddings=[[1.0, 0.0]], n_results=1)["ids"] == [["x"]]
    assert {each.name for each in client.list_collections()} == {"memory", "other"}
    accounts.assert_fine()
    accounts.memory.close()


def test_purge_reports_files_out_of_reach(sqlite_engine: Engine, tmp_path: Path) -> None:
    """They belong to a server. All other files are still purged."""

    class Remote(InMemoryIndex):
        def purge(self) -> None:
            raise MemstateError("stop the server")

    accounts = Accounts(sqlite_engine, Remote())
    accounts.tell("secret")
    accounts.erase()
    with pytest.raises(MemstateError, match="stop the server The tables, and all other indexes, are purged"):
        accounts.memory.purge(sqlite_engine)
    assert occurrences("secret", *database_files(sqlite_engine)) == []
    accounts.memory.close()


@pytest.mark.deep_on("trigger")
def test_purge_reports_a_reader_of_the_past(accounts: Accounts) -> None:
    """Content that a reader may still read cannot be overwritten."""
    accounts.tell("secret")
    reader = create_engine(accounts.engine.url)
    with reader.connect() as connection:
        if accounts.engine.dialect.name == "postgresql":
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        else:
            connection.exec_driver_sql("BEGIN")
        connection.execute(select(log)).all()
        accounts.erase()
        accounts.relay.drain()
        with pytest.raises(MemstateError, match=r"a transaction .* open"):
            accounts.memory.purge(accounts.engine, timeout=0.5)
        connection.rollback()
    accounts.memory.purge(accounts.engine)
    reader.dispose()
    if accounts.engine.dialect.name == "sqlite":
        with accounts.engine.connect() as connection:
            assert connection.scalar(text("PRAGMA busy_timeout")) == 30_000
    accounts.assert_fine()


@pytest.mark.deep
def test_the_bytes_are_gone_from_postgresql(postgres_engine: Engine) -> None:
    """They leave the files of the tables and their indexes, and the statistics."""
    accounts = Accounts(postgres_engine)
    marker = MARKERS[1]
    tables = [Account.__table__, log, outbox, ledger, unique, parked, embedding]

    def found() -> set[str]:
        with postgres_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("CHECKPOINT"))
            relations = connection.execute(
                text(
                    "SELECT c.relname, pg_relation_filepath(c.oid) FROM pg_class AS c WHERE c.oid = ANY("
                    "SELECT t::regclass FROM unnest(CAST(:names AS text[])) AS t UNION "
                    "SELECT indexrelid FROM pg_index WHERE indrelid IN "
                    "(SELECT t::regclass FROM unnest(CAST(:names AS text[])) AS t))"
                ),
                {"names": [table.name for table in tables]},
            ).all()
            there = {
                name
                for name, path in relations
                if marker.encode() in connection.scalar(text("SELECT pg_read_binary_file(:path)"), {"path": path})  # type: ignore[operator]
            }
            statistics = connection.execute(text("SELECT tablename, most_common_vals FROM pg_stats")).all()
            return there | {f"statistics of {table}" for table, values in statistics if marker in str(values)}

    accounts.tell(marker)
    with accounts.sessions() as session:
        session.add_all(Account(id=n, email=f"{marker} {n}", about=marker) for n in range(10, 30))
        session.commit()
    with postgres_engine.begin() as connection:
        connection.execute(text("ANALYZE"))
    before = found()
    assert before > {"account", "memstate_log", "memstate_unique", "statistics of account"}
    with accounts.sessions() as session:
        for key in (1, *range(10, 30)):
            accounts.memory.erase(session, Account, key)
        session.commit()
        assert marker not in stored(session.connection(), Account)
    accounts.relay.drain()
    with postgres_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM"))
    assert "memstate_log" in found()  # so a plain VACUUM is not enough
    accounts.memory.purge(postgres_engine)
    assert found() == set()
    accounts.assert_fine()
    accounts.memory.close()


def test_vectors_that_no_fact_has_are_purged(accounts: Accounts) -> None:
    """A running delivery may have stored them again."""
    accounts.tell("secret")
    accounts.erase()
    stale = {"text_fingerprint": "0" * 32, "embedder": "another", "vector": b"1234"}
    with accounts.engine.begin() as connection:
        connection.execute(insert(embedding).values(**stale))
    accounts.memory.purge(accounts.engine)
    with accounts.engine.connect() as connection:
        kept = set(connection.scalars(select(embedding.c.text_fingerprint)))
        assert kept == set(connection.scalars(select(ledger.c.text_fingerprint))) - {None}
        assert len(kept) == 1
    accounts.assert_fine()
