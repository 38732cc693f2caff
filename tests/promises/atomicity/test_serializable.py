"""SERIALIZABLE on PostgreSQL: triggers read as little as possible, so that few transactions fail because of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.orm import sessionmaker

from tests.support import Person, Tag, World

pytestmark = pytest.mark.sa20


@pytest.fixture
def serializable(postgres_engine: Engine) -> Iterator[Engine]:
    made = create_engine(postgres_engine.url, isolation_level="SERIALIZABLE")
    yield made
    made.dispose()


@pytest.fixture
def world(postgres_engine: Engine) -> Iterator[World]:
    made = World(postgres_engine, capture="trigger")
    yield made
    made.memory.close()


def predicate_locks(connection: Connection) -> dict[str, set[str]]:
    """This transaction's predicate locks: the kinds (tuple, page, relation) by table or index."""
    found: dict[str, set[str]] = {}
    of_mine = "FROM pg_locks WHERE mode = 'SIReadLock' AND pid = pg_backend_pid()"
    for name, kind in connection.execute(text(f"SELECT relation::regclass::text, locktype {of_mine}")):
        found.setdefault(name, set()).add(kind)
    return found


def test_new_rows_are_no_conflict(world: World, serializable: Engine) -> None:
    """Two transactions that add different rows both commit, by SQL and by Sessions with labels, at any size of the log.

    The same kind: upserts of new rows, INSERT … SELECT, COPY.
    """
    for rows in (1, 500):
        with serializable.connect() as one, serializable.connect() as other:
            for number, connection in enumerate((one, other)):
                new = f"SELECT '{rows} {number} ' || n, 'x' FROM generate_series(1, {rows}) n"
                connection.execute(text(f"INSERT INTO tag (name, meaning) {new}"))
                assert predicate_locks(connection).keys() == set()
            one.commit()
            other.commit()
    sessions = sessionmaker(serializable)
    world.memory.attach(sessions)
    with sessions() as one_session, sessions() as other_session:
        for number, session in enumerate((one_session, other_session)):
            world.memory.annotate(session, actor=f"agent {number}")
            session.add(Tag(name=f"of {number}"))
            session.flush()
        one_session.commit()
        other_session.commit()
        labels = [change.actor for change in world.memory.history(one_session, Tag)][-2:]
    assert labels == ["agent 0", "agent 1"]
    world.assert_in_step()


@pytest.mark.parametrize(("rows", "analyzed"), [(3, True), (300, True), (300, False)])
def test_a_change_reads_only_the_entries_of_its_row(
    world: World, serializable: Engine, postgres_engine: Engine, rows: int, analyzed: bool
) -> None:
    """With any statistics, neither the whole log nor all entries of the class are read."""
    with postgres_engine.begin() as connection:
        values = f"SELECT 'tag ' || n, 'x' FROM generate_series(1, {rows}) n"
        connection.execute(text(f"INSERT INTO tag (name, meaning) {values}"))
    if analyzed:
        with postgres_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
    for statement in ("UPDATE tag SET meaning = 'y' WHERE name = 'tag 2'", "DELETE FROM tag WHERE name = 'tag 2'"):
        with serializable.begin() as connection:
            connection.execute(text(statement))
            found = predicate_locks(connection)
            assert "relation" not in {kind for name in ("memstate_log", "ix_memstate_log_key") for kind in found[name]}
            assert not found.keys() & {"memstate_outbox", "memstate_transaction", "memstate_trigger_context"}
            pages = (
                "SELECT count(*) FROM pg_locks WHERE mode = 'SIReadLock' AND relation = 'ix_memstate_log_key'::regclass"
            )
            assert connection.scalar(text(f"{pages} AND pid = pg_backend_pid()")) == 1
    world.assert_in_step()


def test_transaction_without_tracked_writes_does_not_read_the_log(world: World, serializable: Engine) -> None:
    """Before its COMMIT, a Session asks whether triggers have logged anything."""
    with serializable.begin() as connection:
        connection.execute(text("CREATE TABLE other (id int)"))
    sessions = sessionmaker(serializable)
    world.memory.attach(sessions)
    with sessions() as session:
        session.execute(text("INSERT INTO other VALUES (1)"))
        world.memory._capture._before_commit(session)
        assert predicate_locks(session.connection()).keys() == set()
        session.commit()


def test_changes_by_application_triggers_are_logged(
    world: World, serializable: Engine, postgres_engine: Engine
) -> None:
    """The application's triggers change the same row again within the statement. In this case the table is read.

    The same kind: a trigger that deletes the inserted row, a trigger on another table, a trigger that changes a key.
    """
    body = """
    BEGIN
      IF NEW.meaning = 'twice' THEN UPDATE tag SET meaning = 'changed' WHERE name = NEW.name;
      ELSIF NEW.meaning = 'gone' THEN DELETE FROM tag WHERE name = NEW.name;
      ELSIF NEW.meaning = 'moved' THEN UPDATE tag SET name = name || '!', meaning = 'x' WHERE name = NEW.name;
      END IF;
      RETURN NULL;
    END"""
    with postgres_engine.begin() as connection:
        connection.execute(text(f"CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $${body}$$"))
        after = "AFTER INSERT OR UPDATE ON tag FOR EACH ROW EXECUTE FUNCTION again()"
        connection.execute(text(f"CREATE TRIGGER again {after}"))
    for statement in (
        "INSERT INTO tag (name, meaning) VALUES ('a', 'twice'), ('b', 'gone'), ('c', 'moved'), ('d', 'one')",
        "UPDATE tag SET meaning = CASE name WHEN 'a' THEN 'moved' WHEN 'd' THEN 'gone' ELSE 'twice' END",
    ):
        with serializable.begin() as connection:
            connection.execute(text(statement))
        world.assert_in_step()
    with world.session() as session:
        assert {tag.name: tag.meaning for tag in session.query(Tag)} == {"a!": "x", "c!": "changed"}


def test_cascades_are_logged_with_their_results(world: World, serializable: Engine) -> None:
    """One statement deletes some rows and changes others, several times."""
    with serializable.begin() as connection:
        tags = "('a', 'x', 1, 1), ('b', 'x', 2, 1), ('c', 'x', 1, 2), ('d', 'x', NULL, 1)"
        for statement in (
            "ALTER TABLE tag ADD other_id int REFERENCES person ON DELETE SET NULL",
            "ALTER TABLE tag DROP CONSTRAINT tag_person_id_fkey",
            "ALTER TABLE tag ADD FOREIGN KEY (person_id) REFERENCES person ON DELETE CASCADE",
            "INSERT INTO person (id, name) VALUES (1, 'Ann'), (2, 'Bob')",
            f"INSERT INTO tag (name, meaning, person_id, other_id) VALUES {tags}",
        ):
            connection.execute(text(statement))
    with serializable.begin() as connection:
        connection.execute(text("DELETE FROM person WHERE id = 1"))
    world.assert_in_step()
    with world.session() as session:
        assert sorted(tag.name for tag in session.query(Tag)) == ["b", "d"]
        assert [person.name for person in session.query(Person)] == ["Bob"]
