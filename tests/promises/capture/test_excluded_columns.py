"""Columns that the log leaves out: `track(exclude=...)`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, ForeignKey, insert, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, column_property, mapped_column

from memstate_sa import ConflictError, Memory, MemstateError, UntrackedWriteWarning
from memstate_sa.db.tables import log, outbox, parked
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support.apps import App


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    password: Mapped[str | None]
    seen: Mapped[int] = mapped_column(server_default="0")


class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    kind: Mapped[str]
    version: Mapped[int] = mapped_column()
    __mapper_args__: ClassVar[Any] = {
        "polymorphic_on": "kind",
        "polymorphic_identity": "document",
        "version_id_col": version,
    }


Document.double = column_property(Document.text + Document.text)  # type: ignore[attr-defined]


class Scan(Document):
    __tablename__ = "scan"
    scan_id: Mapped[int] = mapped_column("id", ForeignKey("document.id"), primary_key=True)
    pages: Mapped[int]
    photo: Mapped[bytes | None]
    __mapper_args__: ClassVar[Any] = {"polymorphic_identity": "scan"}


class Key(Base):
    __tablename__ = "api_key"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    secret: Mapped[str]


EXCLUDED = ("password", "seen")


@pytest.fixture(params=["session", "trigger"])
def app(request: pytest.FixtureRequest, engine: Engine) -> Iterator[App]:
    made = App(engine, Account, text="name", exclude=EXCLUDED, capture=request.param)
    made.write(Account(id=1, name="ada", password="s3cret", seen=1))
    yield made
    made.memory.close()


def entries(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return [(op, image) for op, image in connection.execute(select(log.c.op, log.c.image).order_by(log.c.id))]


INSERTED = ("insert", {"id": 1, "name": "ada"})


def by_object(session: Session) -> None:
    account = session.get_one(Account, 1)
    account.password, account.seen = "other", 2


def in_bulk(session: Session) -> None:
    session.execute(update(Account).values(password="other", seen=2))


@pytest.mark.parametrize("change", [by_object, in_bulk])
def test_a_change_of_only_excluded_columns_is_not_logged(app: App, change: Any) -> None:
    """Such a change is neither logged nor delivered."""
    app.relay.drain()
    with app.session() as session:
        change(session)
        session.commit()
    assert entries(app.engine) == [INSERTED]
    with app.engine.connect() as connection:
        keys = connection.scalars(select(outbox.c.tx)).all()
    assert len(set(keys)) <= 1  # from the insert, until it is forgotten
    assert app.rows(Account)[1]["password"] == "other"


def test_excluded_values_are_stored_nowhere(app: App) -> None:
    """It is missing from history, from as_of and from exports."""
    with app.session() as session:
        account = session.get_one(Account, 1)
        account.name, account.password = "eve", "0ther"
        session.commit()
        changes = app.memory.history(session, Account, 1)
        assert [change.after for change in changes] == [{"id": 1, "name": "ada"}, {"id": 1, "name": "eve"}]
        assert app.memory.as_of(session, Account, 1, changes[0].tx) == {"id": 1, "name": "ada"}
    file = io.StringIO()
    app.memory.export_facts(app.engine, file)
    assert "s3cret" not in file.getvalue() and "0ther" not in file.getvalue()
    assert "ada" in file.getvalue()
    assert app.memory.doctor(app.engine).healthy


def test_an_undo_leaves_excluded_columns_as_they_are(app: App) -> None:
    with app.session() as session:
        account = session.get_one(Account, 1)
        account.name, account.password = "eve", "other"
        session.commit()
        app.memory.rollback(session)
        session.commit()
    assert app.rows(Account)[1] == {"id": 1, "name": "ada", "password": "other", "seen": 1}


def test_a_row_that_comes_back_lacks_excluded_columns(app: App) -> None:
    """The restored row has their defaults, or NULL. The undo warns of it."""
    with app.session() as session:
        session.delete(session.get_one(Account, 1))
        session.commit()
        with pytest.warns(UntrackedWriteWarning, match=r"account has columns.*: password, seen\."):
            app.memory.rollback(session)
        session.commit()
    assert app.rows(Account)[1] == {"id": 1, "name": "ada", "password": None, "seen": 0}


def test_a_row_that_needs_excluded_columns_cannot_come_back(engine: Engine) -> None:
    """A NOT NULL column without a default is missing, so the undo is refused. The error names the column."""
    app = App(engine, Key, exclude=("secret",))
    app.write(Key(id=1, text="a", secret="s"))
    with app.session() as session:
        session.delete(session.get_one(Key, 1))
        session.commit()
        with pytest.raises(ConflictError, match="secret"):
            app.memory.rollback(session)
        session.rollback()
    assert app.rows(Key) == {}
    app.memory.close()


def test_older_rows_and_erasures_leave_them_out(app: App) -> None:
    """Backfill and the baseline of a first change leave them out. An erasure removes the whole row."""
    with app.engine.begin() as connection:
        connection.execute(insert(Account.__table__), {"id": 2, "name": "bob", "password": "old"})
    app.memory.backfill(app.engine, Account)
    images = [image for _, image in entries(app.engine)]
    assert images == [{"id": 1, "name": "ada"}, {"id": 2, "name": "bob"}]
    with app.session() as session:
        app.memory.erase(session, Account, 2)
        session.commit()
    assert [image for _, image in entries(app.engine)] == [{"id": 1, "name": "ada"}, None, None]
    assert list(app.rows(Account)) == [1]


def test_columns_of_a_subclass_can_be_excluded(engine: Engine) -> None:
    """The subclass has its own table (joined inheritance)."""
    app = App(engine, Document, exclude=("photo",))
    app.write(Scan(id=1, text="a", pages=3, photo=b"1"), Document(id=2, text="b"))
    with app.session() as session:
        session.get_one(Scan, 1).photo = b"2"
        session.commit()
        session.get_one(Scan, 1).pages = 4
        session.commit()
    first = {"id": 1, "text": "a", "kind": "scan", "scan.id": 1}
    assert [(op, json.loads(json.dumps(image))) for op, image in entries(engine)] == [
        ("insert", {**first, "version": 1, "scan.pages": 3}),
        ("insert", {"id": 2, "text": "b", "kind": "document", "version": 1}),
        ("update", {**first, "version": 2, "scan.pages": 3}),
        ("update", {**first, "version": 3, "scan.pages": 4}),
    ]
    app.memory.close()


class AccountSchema(BaseModel):
    name: str
    password: str
    seen: int = 0


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Account, {"exclude": ("id",)}, "Cannot exclude Account.id: the primary key needs it"),
        (Account, {"exclude": ("name",)}, "Cannot exclude Account.name: text needs it"),
        (Account, {"exclude": ("seen",), "metadata": ("seen",)}, "Account.seen: metadata needs it"),
        (Account, {"exclude": ("seen",), "unique_by": ("seen",)}, "Account.seen: unique_by needs it"),
        (Account, {"exclude": ("password",), "schema": AccountSchema}, "Account.password: schema needs it"),
        (Document, {"exclude": ("scan_id",), "text": "text"}, "Document.scan_id: the primary key needs it"),
        (Account, {"exclude": ("sen",)}, "Account has no column attribute 'sen'"),
        (Account, {"exclude": "seen"}, "exclude='seen': it is a string. Give a tuple"),
        (Document, {"exclude": ("kind",), "text": "text"}, "Document.kind: polymorphic_on needs it"),
        (Document, {"exclude": ("version",), "text": "text"}, "Document.version: version_id_col needs it"),
        (Document, {"exclude": ("double",), "text": "text"}, "Document has no column attribute 'double'"),
    ],
)
def test_needed_columns_cannot_be_excluded(model: Any, options: dict[str, Any], message: str) -> None:
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    with pytest.raises(MemstateError, match=message):
        memory.track(model, **{"text": "name", **options})


def test_a_text_function_cannot_read_excluded_columns(engine: Engine) -> None:
    """Otherwise the index would have text that the log lacks, and would miss its changes."""
    app = App(engine, Account, text=lambda account: account.password, exclude=EXCLUDED)
    app.write(Account(id=1, name="ada", password="s3cret"))
    app.relay.drain()
    with engine.connect() as connection:
        [reason] = connection.scalars(select(parked.c.error))
    assert reason.endswith("the text callable: DetachedInstanceError")
    assert [] == list(app.index.scan(None, 10))
    app.memory.close()
