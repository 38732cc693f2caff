"""Facts with their history as JSON lines, from one database to another. A broken file imports nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from hypothesis import strategies as st
from sqlalchemy import Engine, ForeignKey, create_engine, func, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from memstate_sa import ConflictError, Memory, MemstateError, sqlite
from memstate_sa.db.tables import log, outbox, transaction, unique
from memstate_sa.maintenance import export_import
from tests.support import PATIENCE_S, Note, Person, Tag, World, explore, sizes
from tests.support.apps import App, make_app
from tests.support.programs import STEPS, Play, programs, small, wipe

pytestmark = pytest.mark.sa20

MODELS = (Person, Note, Tag)


def export(memory: Memory, engine: Engine, *models: type[Any]) -> str:
    file = io.StringIO()
    memory.export_facts(engine, file, models)
    return file.getvalue()


def import_file(memory: Memory, engine: Engine, file: str) -> int:
    return memory.import_facts(engine, io.StringIO(file))


def body(file: str) -> str:
    """The file without its header."""
    return file.partition("\n")[2]


def lines(file: str, kind: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, file.splitlines()) if line["line"] == kind]


def history(memory: Memory, session: Session, *models: type[Any]) -> list[Any]:
    """The changes without ids, which differ between logs. Their order stays."""
    return [replace(change, id=0) for model in models for change in memory.history(session, model)]


def state(world: World) -> tuple[Any, ...]:
    with world.session() as session:
        return history(world.memory, session, *MODELS), [world.rows(model, session) for model in MODELS]


def empty(world: World) -> None:
    """Restore the empty state, with its tables."""
    world.relay.stop()
    wipe(world.engine)
    world.index.delete([entry.id for entry in world.index.scan(None, 10_000)])
    if world.engine.dialect.name == "postgresql":
        with world.engine.begin() as connection:
            connection.execute(text("TRUNCATE person RESTART IDENTITY CASCADE"))


@pytest.fixture
def other(tmp_path: Path) -> Iterator[World]:
    """Another application's database, on SQLite."""
    made = World(sqlite.configure(create_engine(f"sqlite:///{tmp_path / 'other.db'}")))
    yield made
    made.memory.close()
    made.engine.dispose()


def write_history(world: World) -> list[str]:
    """Write some history: labels, an update, a delete, an undo, older rows. Returns its transactions."""
    txs = []
    with world.engine.begin() as connection:
        connection.execute(insert(Person.__table__), {"name": "old", "about": "was here before"})
        connection.execute(insert(Tag.__table__), {"name": "early", "meaning": "before all", "person_id": 1})
    with world.session() as session:
        for n, about in enumerate(("tea", "rain\u2028and \r\n 🦊", "sushi")):
            world.memory.annotate(session, actor=f"actor {n}", reason="said so", session_id="s1")
            session.add(
                Person(name=f"p{n}", about=about, notes=[Note(topic="t", number=n, content=about, data={"n": n})])
            )
            session.commit()
            txs.append(world.memory.token(session) or "")
        person = session.scalars(select(Person).where(Person.name == "p0")).one()
        person.about = "coffee"
        session.commit()
        session.delete(session.scalars(select(Person).where(Person.name == "p1")).one())
        session.commit()
        world.memory.rollback(session)
        session.commit()
        session.add(Person(name="last", about="the last one"))
        session.commit()
    return txs


# -- export and import -------------------------------------------------------------------------------------------------


def test_history_rows_and_vectors_are_there_again(world: World) -> None:
    """The log replays to the tables, the index follows, and undo works as in the first database."""
    write_history(world)
    file = export(world.memory, world.engine)
    before, rows = state(world)
    with world.session() as session:
        ids = [change.id for model in MODELS for change in world.memory.history(session, model)]
    empty(world)

    count = import_file(world.memory, world.engine, file)
    after, rows_now = state(world)
    baselines = [change for change in after if change.reason is None and change.op == "baseline"]
    assert rows_now == rows
    assert [change for change in after if change not in baselines] == before
    assert {change.key for change in baselines} == {1, "early"}
    assert count == len(ids) + 2 == len(lines(file, "entry"))
    world.assert_in_step()
    assert world.memory.verify(world.engine).clean
    with world.session() as session:
        changes = world.memory.rollback(session, steps=2)
        session.commit()
        assert {change.entity for change in changes} == {"person"}
        assert session.scalars(select(Person.about).where(Person.name == "p0")).one() == "tea"
    world.assert_in_step()


def test_imported_facts_export_the_same_file(world: World) -> None:
    """Only the header differs, because it counts rows that the log did not have."""
    write_history(world)
    file = export(world.memory, world.engine)
    empty(world)
    import_file(world.memory, world.engine, file)
    assert body(export(world.memory, world.engine)) == body(file)


@pytest.mark.deep
def test_transfer_to_postgres_and_back_keeps_the_file(
    sqlite_engine: Engine, postgres_engine: Engine, other: World
) -> None:
    """The returned file equals the original."""
    here, there = World(sqlite_engine), World(postgres_engine)
    write_history(here)
    file = export(here.memory, sqlite_engine)
    import_file(there.memory, postgres_engine, file)
    there.assert_in_step()
    history_there, rows = state(there)
    returned = export(there.memory, postgres_engine)
    import_file(other.memory, other.engine, returned)
    assert state(other) == (history_there, rows)
    assert body(export(other.memory, other.engine)) == body(file)
    with there.session() as session:
        session.add(Person(name="new", about="of a sequence that has moved on"))
        session.commit()
    there.assert_in_step()
    here.memory.close()
    there.memory.close()


class Labelling(Play):
    def label(self, n: int) -> None:
        self.world.memory.annotate(self.session, actor=f"actor {n}", session_id="s" if n else None)


programs_with_labels = programs({**STEPS, "label": st.tuples(small)})


def round_trip(source: World, target: World, steps: Any, untracked: int) -> None:
    for world in (source, target):
        empty(world)
    with source.engine.begin() as connection:
        for n in range(untracked):
            connection.execute(insert(Person.__table__), {"name": f"old{n}", "about": f"was here {n}"})
            connection.execute(insert(Tag.__table__), {"name": f"tag{n}", "meaning": f"was here {n}"})
    with source.session() as session:
        Labelling(source, session).run(steps)
    file = export(source.memory, source.engine)
    before, rows = state(source)
    if source is target:
        empty(source)
    import_file(target.memory, target.engine, file)
    after, rows_now = state(target)
    assert rows_now == rows
    if not untracked:
        assert after == before
    assert body(export(target.memory, target.engine)) == body(file)
    target.assert_in_step()
    assert target.memory.verify(target.engine).clean
    with target.session() as session:
        target.memory.rollback(session, steps=2)
        session.commit()
    target.assert_in_step()


@pytest.mark.deep_on("postgres")
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("histories", sizes(3, 60))
@pytest.mark.parametrize(("source", "target"), [("sqlite", "sqlite"), ("postgres", "postgres"), ("sqlite", "postgres")])
def test_random_histories_survive_a_transfer(
    request: pytest.FixtureRequest, source: str, target: str, histories: int
) -> None:
    """Any history is the same afterwards, and exports the same file."""
    first = World(request.getfixturevalue(f"{source}_engine"))
    second = first if source == target else World(request.getfixturevalue(f"{target}_engine"))

    @explore(histories, steps=programs_with_labels, untracked=st.integers(0, 2))
    def _survives(steps: Any, untracked: int) -> None:
        round_trip(first, second, steps, untracked)


def test_transfer_works_page_by_page(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of pages does not matter. *progress* shows the position."""
    write_history(world)
    whole = export(world.memory, world.engine)
    monkeypatch.setattr(export_import, "_PAGE", 2)
    monkeypatch.setattr("memstate_sa.log.unlogged.READ_CHUNK", 1)
    told: list[tuple[int, int | None]] = []
    file = io.StringIO()
    world.memory.export_facts(world.engine, file, progress=lambda done, total: told.append((done, total)))
    assert len(lines(file.getvalue(), "entry")) == len(lines(whole, "entry"))
    assert told == sorted(told) and told[-1] == (len(whole.splitlines()) - 1,) * 2
    empty(world)
    told.clear()
    world.memory.import_facts(
        world.engine, io.StringIO(file.getvalue()), progress=lambda done, total: told.append((done, total))
    )
    assert told == sorted(told) and told[-1][0] == len(whole.splitlines()) - 1
    assert body(export(world.memory, world.engine)) == body(file.getvalue())
    world.assert_in_step()


def test_an_export_shows_one_moment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction that commits during the export is not in the file, not even in part."""
    write_history(world)
    monkeypatch.setattr(export_import, "_PAGE", 2)
    expected = [change["tx"] for change in lines(export(world.memory, world.engine), "entry")][:-2]

    class Meanwhile(io.StringIO):
        wrote = False

        def write(self, line: str) -> int:
            if not self.wrote:
                self.wrote = True
                with world.session() as session:
                    session.add(Person(name="late", about="too late"))
                    session.commit()
            return super().write(line)

    file = Meanwhile()
    world.memory.export_facts(world.engine, file)
    assert [change["tx"] for change in lines(file.getvalue(), "entry")][:-2] == expected
    assert "too late" not in file.getvalue()


def test_one_class_can_be_exported_alone(world: World) -> None:
    """The file has only the labels of its own transactions. It may be imported before rows that refer to it."""
    txs = write_history(world)
    with world.session() as session:
        world.memory.annotate(session, actor="tagger")
        session.add(Tag(name="of nobody", meaning="x"))
        session.commit()
        tagged = world.memory.token(session)
    people = export(world.memory, world.engine, Person)
    assert {line["entity"] for line in lines(people, "entry")} == {"person"}
    assert set(txs) <= {line["tx"] for line in lines(people, "transaction")} and tagged not in people
    empty(world)
    import_file(world.memory, world.engine, people)
    world.assert_in_step()


def test_relays_deliver_imported_facts(world: World) -> None:
    """This includes deleted keys, because an existing index may hold them."""
    write_history(world)
    file = export(world.memory, world.engine)
    empty(world)
    import_file(world.memory, world.engine, file)
    with world.engine.connect() as connection:
        marked = set(connection.execute(select(outbox.c.entity, outbox.c.key)).all())
        logged = set(connection.execute(select(log.c.entity, log.c.key)).all())
    assert marked == logged


def test_erased_facts_stay_erased(world: World) -> None:
    """Their entries record that a fact existed, without its content."""
    write_history(world)
    with world.session() as session:
        world.memory.erase(session, Person, session.scalars(select(Person.id).where(Person.name == "last")).one())
        session.commit()
    file = export(world.memory, world.engine)
    assert "the last one" not in file
    empty(world)
    import_file(world.memory, world.engine, file)
    assert body(export(world.memory, world.engine)) == body(file)
    world.assert_in_step()


def test_triggers_do_not_log_an_import_twice(engine: Engine) -> None:
    """The import already logs its rows, so triggers must skip them."""
    world = World(engine, capture="trigger")
    write_history(world)
    file = export(world.memory, engine)
    empty(world)
    import_file(world.memory, engine, file)
    assert body(export(world.memory, engine)) == body(file)
    world.assert_in_step()
    with world.session() as session:
        world.memory.rollback(session)
        session.commit()
    world.assert_in_step()
    world.memory.close()


# -- refused files -----------------------------------------------------------------------------------------------------


def counts(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        tables = (log, transaction, outbox, Person.__table__, Note.__table__, Tag.__table__)
        return [connection.scalar(select(func.count()).select_from(table)) or 0 for table in tables]


def refused(world: World, file: str, error: type[Exception] = MemstateError) -> str:
    before = counts(world.engine)
    with pytest.raises(error) as raised:
        import_file(world.memory, world.engine, file)
    assert counts(world.engine) == before
    return str(raised.value)


def changed(file: str, number: int, **values: Any) -> str:
    """*file* with other values in one line. The first line is 1."""
    found = file.splitlines()
    found[number - 1] = json.dumps(json.loads(found[number - 1]) | values)
    return "\n".join(found) + "\n"


def test_a_broken_file_is_refused_as_a_whole(world: World) -> None:
    """The error has the number of the line and the reason."""
    write_history(world)
    file = export(world.memory, world.engine)
    empty(world)
    count = len(file.splitlines())
    first = next(n for n, line in enumerate(file.splitlines(), start=1) if '"line":"entry"' in line)
    assert refused(world, "").startswith("line 1: ")
    assert refused(world, "[1, 2]\n") == "line 1: not an export of facts"
    assert refused(world, body(file)) == "line 1: not an export of facts"
    assert "format 2, but this release reads format 1" in refused(world, changed(file, 1, format=2))
    assert refused(world, file[:-60]).startswith(f"line {count - 1}: Invalid JSON")
    assert refused(world, "".join(file.splitlines(keepends=True)[:-1])).startswith(f"line {count}: ")
    assert refused(world, file.replace(file.splitlines(keepends=True)[first], "")).startswith(f"line {count - 1}: ")
    assert refused(world, file + file.splitlines(keepends=True)[first]).startswith(
        f"line {count + 1}: it follows the closing line"
    )
    assert refused(world, file[:-1] + "\n" + file) == f"line {count + 1}: it follows the closing line"
    assert refused(world, changed(file, 2, line="header")).startswith("line 2: ")
    assert refused(world, changed(file, 2, line="picture")).startswith("line 2: ")
    for values in (
        {"op": "truncate"},
        {"tx": "x" * 33},
        {"at": "yesterday"},
        {"at": "2026-01-01T00:00:00"},
        {"key": "[ 1]"},
        {"key": "1"},
        {"image": {"about": {"$nothing": 1}}},
        {"image": {"about": {"$datetime": "tomorrow"}}},
        {"op": "delete"},
        {"image": None},
        {"version": 2},
        {"entity": "other"},
        {"colour": "red"},
    ):
        assert refused(world, changed(file, first, **values)).startswith(f"line {first}: "), values
    assert (
        refused(world, changed(file, 3, tx=json.loads(file.splitlines()[1])["tx"]))
        == "The file has two lines of labels for one transaction."
    )
    assert "its last image is a row with another key" in refused(world, changed(file, count - 1, key='["x"]'))
    with pytest.raises(MemstateError, match="line 2: not UTF-8"):
        stream = io.TextIOWrapper(io.BytesIO(file.splitlines(keepends=True)[0].encode() + b"\xff\xfe\n"), "utf-8")
        stream._CHUNK_SIZE = 1  # type: ignore[attr-defined]
        world.memory.import_facts(world.engine, stream)
    import_file(world.memory, world.engine, file)
    world.assert_in_step()


def test_classes_that_are_not_tracked_are_refused(world: World) -> None:
    write_history(world)
    file = export(world.memory, world.engine)
    empty(world)
    assert "unknown entities: other" in refused(world, changed(file, 1, entities={"person": 1, "other": 1}))
    assert "person has version 7 in the file" in refused(world, changed(file, 1, entities={"person": 7}))
    assert "does not name the entity 'note'" in refused(world, changed(file, 1, entities={"person": 1, "tag": 1}))


def test_import_refuses_facts_that_exist(world: World) -> None:
    """A known transaction, a fact, a deleted fact, and a row that the log does not know."""
    write_history(world)
    file = export(world.memory, world.engine)
    assert "Perhaps this file was imported before" in refused(world, file, ConflictError)
    without_labels = [line for line in file.splitlines(keepends=True) if '"line":"transaction"' not in line]
    shorter = "".join([*without_labels[:-1], json.dumps({"line": "end", "lines": len(without_labels) - 1})])
    assert "Perhaps this file was imported before" in refused(world, shorter, ConflictError)
    empty(world)
    with world.session() as session:
        session.add(Tag(name="early", meaning="another"))
        session.commit()
        assert 'Cannot import tag ["early"]: this database has or had' in refused(world, file, ConflictError)
        session.delete(session.get_one(Tag, "early"))
        session.commit()
    assert 'Cannot import tag ["early"]: this database has or had' in refused(world, file, ConflictError)
    empty(world)
    with world.engine.begin() as connection:
        connection.execute(insert(Tag.__table__), {"name": "early", "meaning": "unlogged"})
    assert 'Cannot import tag ["early"]: this database has or had' in refused(world, file, ConflictError)
    with world.engine.begin() as connection:
        connection.execute(text("DELETE FROM tag"))
        connection.execute(insert(Tag.__table__), {"name": "another", "meaning": "in nobody's way"})
    import_file(world.memory, world.engine, file)
    world.memory.backfill(world.engine, Tag)
    world.assert_in_step()


# -- constraints of the tables -----------------------------------------------------------------------------------------


class Own(DeclarativeBase):
    pass


class Mood(Enum):
    GOOD = "good"
    BAD = "bad"


class Team(Own):
    __tablename__ = "team"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="team")
    captain_id: Mapped[int | None] = mapped_column(ForeignKey("player.id", use_alter=True, name="captain"))


class Player(Own):
    __tablename__ = "player"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="player")
    team_id: Mapped[int] = mapped_column(ForeignKey("team.id"))
    mentor_id: Mapped[int | None] = mapped_column(ForeignKey("player.id"))


class Goal(Own):
    __tablename__ = "a_goal"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(default="goal")
    player_id: Mapped[int] = mapped_column(ForeignKey("player.id"))


class Kinds(Own):
    __tablename__ = "kinds"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    text: Mapped[str]
    number: Mapped[Decimal | None] = mapped_column(sa.Numeric(10, 2))
    fraction: Mapped[float | None]
    flag: Mapped[bool | None]
    blob: Mapped[bytes | None]
    data: Mapped[Any] = mapped_column(sa.JSON, nullable=True)
    mood: Mapped[Mood | None]
    day: Mapped[date | None]
    clock: Mapped[time | None]
    wait: Mapped[timedelta | None]
    wall: Mapped[datetime | None]
    moment: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))
    fixed: Mapped[str | None] = mapped_column(sa.CHAR(6))


class Node(Own):
    """A tree, and a subclass with its own table."""

    __tablename__ = "node"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="node")
    kind: Mapped[str] = mapped_column(sa.String(20))
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("node.id"))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "node"}  # noqa: RUF012


class Leaf(Node):
    __tablename__ = "leaf"
    id: Mapped[int] = mapped_column(ForeignKey("node.id"), primary_key=True)
    due: Mapped[datetime | None]
    __mapper_args__ = {"polymorphic_identity": "leaf"}  # noqa: RUF012


class Application(App):
    def __init__(self, engine: Engine, **tracking: dict[str, Any]) -> None:
        super().__init__(engine, Goal, Player, Team, Kinds, Node, tracking=tracking, foreign_keys=True)

    def check(self) -> None:
        """Assert replay(log) == tables, by the values that the ORM loads. The index must follow."""
        self.assert_log_is_truth(Goal, Player, Team, Kinds)
        self.memory.relay(self.engine).drain()
        assert self.memory.verify(self.engine).clean
        assert self.memory.doctor(self.engine).healthy


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Engine]:
    engine = sqlite.configure(create_engine(f"sqlite:///{tmp_path / 'second.db'}"))
    yield engine
    engine.dispose()


@pytest.mark.parametrize("page", [1, 1000])
def test_rows_that_refer_to_each_other_are_imported(
    second: Engine, engine: Engine, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    """They refer in circles, to rows of their own class with greater keys, and to rows of classes tracked later."""
    monkeypatch.setattr(export_import, "_PAGE", page)
    source, target = Application(second), Application(engine)
    source.write(Team(id=1), Team(id=2))
    source.write(Player(id=9, team_id=1), Player(id=8, team_id=1))
    source.write(Player(id=1, team_id=2, mentor_id=9))
    source.write(Goal(id=5, player_id=1))
    with source.sessions() as session:
        session.get_one(Player, 8).mentor_id = 9
        session.flush()
        session.get_one(Team, 1).captain_id = 8
        session.get_one(Team, 2).captain_id = 1
        session.commit()
    file = export(source.memory, second)
    assert import_file(target.memory, engine, file) == len(lines(file, "entry"))
    target.check()
    assert body(export(target.memory, engine)) == body(file)
    target.write(Goal(player_id=9))  # the next key is free
    target.check()
    target.memory.close()


def test_import_moves_a_custom_sequence_past_its_keys(second: Engine, engine: Engine) -> None:
    """The table does not own the sequence. The next key is free for both ways of using one."""

    class Local(DeclarativeBase):
        pass

    class Ticket(Local):
        __tablename__ = "ticket"
        id: Mapped[int] = mapped_column(sa.Sequence("the 50% queue"), primary_key=True)

    class Coupon(Local):
        __tablename__ = "coupon"
        id: Mapped[int] = mapped_column(sa.Sequence("unused", optional=True), primary_key=True)

    class Seat(Local):
        __tablename__ = "seat"
        id: Mapped[int] = mapped_column(sa.Sequence("gone"), primary_key=True, autoincrement=False)

    models = (Ticket, Coupon, Seat)
    source, target = make_app(second, *models, text=None), make_app(engine, *models, text=None)
    source.write(*(model(id=n) for model in models for n in (1, 2, 7)))
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(text("DROP SEQUENCE gone"))
    import_file(target.memory, engine, export(source.memory, second))
    target.write(Ticket(), Coupon())
    with target.session() as session:
        for model in (Ticket, Coupon):
            assert set(session.scalars(select(model.id))) == {1, 2, 7, 8}
    for app in (source, target):
        app.memory.close()


@pytest.mark.parametrize("page", [1, 1000])
def test_trees_and_rows_in_several_tables_are_imported(
    second: Engine, engine: Engine, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    """A child may have the smaller key, and a fact in two tables is one fact."""
    monkeypatch.setattr(export_import, "_PAGE", page)
    source, target = Application(second), Application(engine)
    source.write(Node(id=3))
    source.write(Leaf(id=2, parent_id=3, due=datetime(2026, 2, 28, 12, 30)))
    source.write(Leaf(id=1, parent_id=2))
    import_file(target.memory, engine, export(source.memory, second))
    target.check()
    with target.sessions() as session:
        nodes = session.scalars(select(Node).order_by(Node.id)).all()
        assert [(type(node), node.parent_id) for node in nodes] == [(Leaf, 2), (Leaf, 3), (Node, None)]
        assert session.get_one(Leaf, 2).due == datetime(2026, 2, 28, 12, 30)
        last = target.memory.history(session, Node, 2)[-1]
        assert last.after is not None and last.after["leaf.due"] == datetime(2026, 2, 28, 12, 30)
        target.memory.rollback(session, steps=3)
        session.commit()
        assert session.scalars(select(Node)).all() == []
    target.memory.close()


def test_a_row_that_the_tables_refuse_fails_the_whole_import(second: Engine, engine: Engine) -> None:
    """The row refers to a row that is not in the file."""
    source, target = Application(second), Application(engine)
    for row in (Team(id=1), Player(id=1, team_id=1), Goal(player_id=1)):
        source.write(row)
    with pytest.raises(ConflictError, match=r"Cannot import rows of a_goal: .*(?i:foreign key)"):
        import_file(target.memory, engine, export(source.memory, second, Goal))
    with engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(log)) == 0
    target.memory.close()


def kinds(**values: Any) -> Kinds:
    given: dict[str, Any] = {
        "id": uuid4(),
        "text": "all of them",
        "number": Decimal("12.50"),
        "fraction": 0.1,
        "flag": True,
        "blob": b"\x00\xff",
        "data": {"a": [1, 2.5, None, "ü"], "b": {"c": False}},
        "mood": Mood.BAD,
        "day": date(2026, 2, 28),
        "clock": time(12, 30, 0, 5),
        "wait": timedelta(days=3, seconds=1, microseconds=7),
        "wall": datetime(2026, 2, 28, 12, 30, 0, 5),
        "moment": datetime(2026, 2, 28, 12, 30, 0, 5, tzinfo=UTC),
        "fixed": "sixsix",
    }
    return Kinds(**{**given, **values})


@pytest.mark.deep_on("sqlite")
def test_values_of_every_kind_cross_over(second: Engine, engine: Engine, tmp_path: Path) -> None:
    """Drivers read different values (text for times on SQLite, bytes for UUIDs). The ORM loads equal values."""
    source, target = Application(second), Application(engine)
    nothing = dict.fromkeys(("number", "fraction", "flag", "blob", "mood", "day", "clock", "wait", "wall", "moment"))
    source.write(kinds(), kinds(data=None, **nothing), kinds(fraction=float("inf"), text="b"), kinds(data=sa.null()))
    import_file(target.memory, engine, export(source.memory, second))
    target.check()
    for each in (second, engine):  # JSON's null differs from SQL's
        with each.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM kinds WHERE data IS NULL")) == 1

    def loaded(app: Application, *, drop_zone: bool) -> list[Any]:
        with app.sessions() as session:
            rows = session.scalars(select(Kinds).order_by(Kinds.text, Kinds.id)).all()
            values = [{column.key: getattr(row, column.key) for column in Kinds.__table__.columns} for row in rows]
            for value in values if drop_zone else ():
                value["moment"] = (
                    None if value["moment"] is None else value["moment"].astimezone(UTC).replace(tzinfo=None)
                )
            return sorted(values, key=lambda value: str(value["id"]))

    assert loaded(target, drop_zone=engine.dialect.name == "postgresql") == loaded(source, drop_zone=False)

    third = sqlite.configure(create_engine(f"sqlite:///{tmp_path / 'third.db'}"))
    back = Application(third)
    import_file(back.memory, third, export(target.memory, engine))
    back.check()
    assert loaded(back, drop_zone=False) == loaded(source, drop_zone=False)
    assert body(export(back.memory, third)) == body(export(source.memory, second))
    third.dispose()
    target.memory.close()


@pytest.mark.deep_on("postgres")
def test_import_logs_values_as_the_database_stores_them(second: Engine, engine: Engine) -> None:
    """The log must equal the tables: PostgreSQL pads CHAR, and a trigger may change any value."""
    source, target = Application(second), Application(engine)
    if engine.dialect.name == "sqlite":
        with engine.begin() as connection:
            connection.execute(
                text(
                    "CREATE TRIGGER pad AFTER INSERT ON kinds BEGIN "
                    "UPDATE kinds SET fixed = fixed || '   ' WHERE id = NEW.id; END"
                )
            )
    source.write(kinds(fixed="six"))
    import_file(target.memory, engine, export(source.memory, second))
    target.check()
    with target.sessions() as session:
        *_, last = target.memory.history(session, Kinds)
        assert last.after is not None and last.after["fixed"] == "six   "
        assert [change.op for change in target.memory.rollback(session)] == ["update", "delete"]  # it is one step
        session.commit()
    target.check()
    target.memory.close()


def test_history_of_an_older_shape_is_taken_in(second: Engine, engine: Engine) -> None:
    """The rows have the current shape. The file may come from before a migration."""
    source = Application(second)
    source.write(Team(id=1, text="old"))
    upgraded = {"version": 2, "upgrade": {1: lambda row: {**row, "text": row["text"] + "!"}}}
    target = Application(engine, Team=upgraded)
    import_file(target.memory, engine, export(source.memory, second))
    target.check()
    with target.sessions() as session:
        assert session.get_one(Team, 1).text == "old!"
    target.memory.close()


def test_unique_values_are_kept(second: Engine, engine: Engine) -> None:
    """memstate_unique still enforces them."""
    source = Application(second, Team={"unique_by": ("text",)})
    target = Application(engine, Team={"unique_by": ("text",)})
    source.write(Team(id=1, text="only one"))
    import_file(target.memory, engine, export(source.memory, second))
    with engine.connect() as connection:
        assert connection.execute(select(unique.c.key)).all() == [("[1]",)]
    with pytest.raises(ConflictError):
        target.write(Team(id=2, text="only one"))
    target.memory.close()
