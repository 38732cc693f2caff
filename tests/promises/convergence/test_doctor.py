"""doctor: writes that the log lacks, and gaps that would allow more of them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from sqlalchemy import Engine, delete, insert, select, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from memstate_sa import ConflictError, DeliveryRetryable, Memory
from memstate_sa.capture.append_only import rewriting
from memstate_sa.db.tables import log, unique
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import Base, Note, Person, Tag, World
from tests.support.apps import make_app
from tests.support.relays import say

pytestmark = pytest.mark.sa20


def run(world: World, *statements: str) -> None:
    with world.engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def test_doctor_reports_rows_changed_past_the_log(world: World) -> None:
    """Rows that were changed, deleted, added again or never logged are named. Repair logs all but the last kind."""
    with world.session() as session:
        session.add_all(Tag(name=name, meaning="one") for name in "abcd")
        session.add(Note(topic="t", number=1, content="x", person=Person(name="p", about="y")))
        session.commit()
        session.delete(session.get_one(Tag, "d"))
        session.commit()
    assert world.memory.doctor(world.engine).healthy
    run(
        world,
        "UPDATE tag SET meaning = 'two' WHERE name = 'a'",
        "DELETE FROM tag WHERE name = 'b'",
        "INSERT INTO tag (name, meaning) VALUES ('d', 'again'), ('e', 'new')",
        "UPDATE note SET content = 'z'",
    )
    for repair in (False, True):
        found = world.memory.doctor(world.engine, repair=repair)
        assert sorted(found.changed) == [("note", ("t", 1)), ("tag", "a"), ("tag", "d")]
        assert (found.gone, found.unlogged, found.checked) == ([("tag", "b")], 1, 6)
        assert not found.healthy
    healed = world.memory.doctor(world.engine)
    assert healed.healthy and healed.unlogged == 1
    with world.session() as session:
        changes = [change for change in world.memory.history(session, Tag) if change.reason == "reconciled"]
        assert [(change.op, change.key) for change in changes] == [("update", "a"), ("insert", "d"), ("delete", "b")]
        with pytest.raises(ConflictError, match="tag 'd'"):  # the last step deleted it, and it has been restored since
            world.memory.rollback(session)
    world.memory.backfill(world.engine, Tag)
    world.assert_in_step()


def test_doctor_reports_an_index_that_cannot_be_opened(engine: Engine) -> None:
    """A folder is left alone: another process may have it open. A missing embedder is reported for any index."""

    class Unreachable(InMemoryIndex):
        in_process = False

        def open(self, *, embedder: str, dimension: int) -> None:
            raise DeliveryRetryable("the server does not answer")

    class Folder(Unreachable):
        in_process = True

    world = World(engine, Folder())
    assert world.memory.doctor(engine).healthy
    world = World(engine, Unreachable())
    found = world.memory.doctor(engine)
    assert found.problems == [("index 'memory'", "cannot be opened: the server does not answer")]
    assert not found.healthy
    assert not world.memory.doctor(engine, rows=False).problems  # of `init`, which opens nothing


def test_doctor_reports_a_missing_embedder(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(engine)
    monkeypatch.setitem(sys.modules, "wordllama", None)
    memory = Memory(InMemoryIndex())
    memory.track(Tag, text="meaning")
    memory.attach(world.sessions)
    [problem] = memory.doctor(engine).problems
    assert problem.subject == "index 'memory'"
    assert "memstate-sa[wordllama]" in problem.message


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_doctor_finds_rows_that_core_wrote_without_a_session(engine: Engine, capture: str) -> None:
    """pandas.to_sql writes like this. Triggers log such rows."""
    app = make_app(engine, Tag, text="meaning", capture=capture)
    app.write(Tag(name="a", meaning="one"), Tag(name="b", meaning="one"), Tag(name="c", meaning="one"))
    table = Tag.__table__
    with engine.begin() as connection:
        connection.execute(insert(table), [{"name": "d", "meaning": "new"}, {"name": "e", "meaning": "new"}])
        connection.execute(update(table).where(table.c.name == "a"), {"meaning": "two"})
        connection.execute(delete(table).where(table.c.name == "b"))
    diagnosis = app.memory.doctor(engine, repair=True)
    if capture == "trigger":
        assert diagnosis.healthy and diagnosis.unlogged == 0
    else:
        assert diagnosis.unlogged_by_class == {Tag: 2}
        assert (diagnosis.changed, diagnosis.gone) == ([("tag", "a")], [("tag", "b")])
        app.memory.backfill(engine, Tag)
    app.assert_log_is_truth()


def test_repair_logs_and_warns_of_duplicate_unique_values(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Repair logs the row and its page, and warns: the first row has the value, others have none."""
    app = make_app(engine, Tag, text="meaning", unique_by=("meaning",))
    with app.session() as session:
        session.add_all(Tag(name=name, meaning=name) for name in "abcd")
        session.commit()
    with engine.begin() as connection:
        connection.execute(text("UPDATE tag SET meaning = 'a' WHERE name IN ('b', 'c')"))
        connection.execute(text("UPDATE tag SET meaning = 'new' WHERE name = 'd'"))
    with caplog.at_level("WARNING"):
        assert len(app.memory.doctor(engine, repair=True).changed) == 3
    [warning] = [record.getMessage() for record in caplog.records if record.name == "memstate_sa.recorder"]
    assert "the unique_by value of 2 rows already belongs to another row" in warning and '["b"], ["c"]' in warning
    assert app.memory.doctor(engine).healthy
    with engine.connect() as connection:
        assert {row.value: row.key for row in connection.execute(select(unique))} == {
            '["a"]': '["a"]',
            '["new"]': '["d"]',
        }
    with app.session() as session:
        session.get_one(Tag, "b").meaning = "b"
        session.commit()
        assert app.memory.history(session, Tag, "b")[-1].before == {"name": "b", "meaning": "a", "person_id": None}
    app.memory.close()


def test_doctor_walks_all_pages(world: World) -> None:
    """The walks over rows and over keys both resume where a page ended."""
    from memstate_sa.maintenance.doctor import Doctor

    say(world, **{f"t{n:02}": "x" for n in range(25)})
    run(world, "UPDATE tag SET meaning = 'y' WHERE name > 't20'", "DELETE FROM tag WHERE name < 't05'")
    doctor = Doctor(
        world.engine, world.memory._registry, world.memory._capture, world.memory._recorder, {}, page_size=4
    )
    seen: list[int] = []
    found = doctor.run(repair=False, progress=lambda done, total: seen.append(done))
    assert found.changed == [("tag", f"t{n}") for n in range(21, 25)]
    assert found.gone == [("tag", f"t0{n}") for n in range(5)]
    assert seen == [4, 8, 12, 16, 20]


def test_columns_that_came_and_went_are_no_difference(world: World) -> None:
    """The row itself has not changed."""
    say(world, a="x")
    with world.engine.begin() as connection, rewriting(connection):
        connection.execute(update(log).values(image={"name": "a", "meaning": "x", "dropped": 1}))
    assert world.memory.doctor(world.engine).healthy


def test_doctor_reports_gaps_that_let_an_index_drift(engine: Engine) -> None:
    """Our tables, columns and indexes are missing, no Session is attached, a tracked table is missing."""

    class Local(DeclarativeBase):
        pass

    class Nowhere(Local):
        __tablename__ = "nowhere"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(Tag, text="meaning")
    Base.metadata.create_all(engine)
    first = memory.doctor(engine)
    assert {problem.subject for problem in first.problems} > {"memstate_log", "memstate_outbox", "Sessions"}
    memory.create_tables(engine)
    sessions = sessionmaker(engine)
    memory.attach(sessions)
    assert memory.doctor(engine).healthy
    with engine.begin() as connection:
        connection.execute(text("DROP INDEX ix_memstate_log_key"))
        connection.execute(text("ALTER TABLE memstate_outbox DROP COLUMN intent"))
    memory.track(Nowhere, text="text")
    told = {problem.subject: problem.message for problem in memory.doctor(engine).problems}
    assert set(told) == {"memstate_log", "memstate_outbox", "nowhere"}
    assert "lacks the index ix_memstate_log_key" in told["memstate_log"]
    assert "lacks intent" in told["memstate_outbox"]


def test_doctor_reports_missing_and_outdated_triggers(engine: Engine) -> None:
    """doctor reports them, and create_tables repairs them."""
    world = World(engine, capture="trigger")
    assert world.memory.doctor(engine).healthy
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            named = "SELECT tgname FROM pg_trigger WHERE tgrelid = '{}'::regclass AND tgname LIKE 'memstate_{}%'"
            gone = connection.scalar(text(named.format("tag", "delete")))
            off = connection.scalar(text(named.format("note", "insert")))
        run(world, f"DROP TRIGGER {gone} ON tag", f"ALTER TABLE note DISABLE TRIGGER {off}")
    else:
        with engine.connect() as connection:
            names = connection.scalars(
                text("SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name IN ('tag', 'note')")
            ).all()
        run(world, *(f"DROP TRIGGER {name}" for name in names if "after_delete" in name or "after_insert" in name))
    found = world.memory.doctor(engine)
    assert [problem.subject for problem in found.problems] == ["note", "tag"]
    world.memory.create_tables(engine)
    assert world.memory.doctor(engine).healthy


def test_doctor_reports_a_leftover_trigger_context(engine: Engine) -> None:
    """The next writer would be mistaken for that transaction."""
    world = World(engine)
    run(world, "INSERT INTO memstate_trigger_context (name, value) VALUES ('tx', 'x')")
    assert [problem.subject for problem in world.memory.doctor(engine).problems] == ["memstate_trigger_context"]


def test_doctor_reports_triggers_that_miss_a_new_column(engine: Engine) -> None:
    """A new column is not logged until create_tables is called again. doctor says so."""

    def app(*names: str) -> tuple[Memory, Any]:
        class Local(DeclarativeBase):
            pass

        body = {name: mapped_column(default="x") for name in names}
        annotations = {"id": Mapped[int], **dict.fromkeys(names, Mapped[str])}
        keyed = {"__tablename__": "thing", "id": mapped_column(primary_key=True), "__annotations__": annotations}
        model = type("Thing", (Local,), {**keyed, **body})
        memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
        memory.track(model, text="one", capture="trigger")
        return memory, model

    before, old = app("one")
    old.metadata.create_all(engine)
    before.create_tables(engine)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE thing ADD COLUMN two VARCHAR DEFAULT 'x' NOT NULL"))
    after, _ = app("one", "two")
    assert [problem.subject for problem in after.doctor(engine).problems] == ["thing"]
    after.create_tables(engine)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO thing (id, one, two) VALUES (1, 'a', 'b')"))
        image = connection.scalars(select(log.c.image)).one()
    assert image == {"id": 1, "one": "a", "two": "b"}
    assert after.doctor(engine).healthy
