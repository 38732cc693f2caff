"""Row-level security of PostgreSQL: policies that hide rows from triggers, from Sessions, or from the doctor."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import sessionmaker

from memstate_sa import UntrackedWrite
from memstate_sa.db.tables import log
from tests.support import Tag, World
from tests.support.roles import Role, name_of, role, sql

pytestmark = pytest.mark.sa20

__all__ = ["role"]

ON = ("ALTER TABLE tag ENABLE ROW LEVEL SECURITY", "ALTER TABLE tag FORCE ROW LEVEL SECURITY")
POLICIES = {
    "by current_user": ["CREATE POLICY mine ON tag USING (meaning = current_user)"],
    "restrictive": [
        "CREATE POLICY everyone ON tag USING (true)",
        "CREATE POLICY mine ON tag AS RESTRICTIVE USING (meaning = current_user)",
    ],
    "for each command": [
        f"CREATE POLICY on_{command} ON tag FOR {command} {clause}"
        for command, clause in {
            "SELECT": "USING (meaning = current_user)",
            "INSERT": "WITH CHECK (meaning = current_user)",
            "UPDATE": "USING (meaning = current_user)",
            "DELETE": "USING (meaning = current_user)",
        }.items()
    ],
    "by a setting": ["CREATE POLICY mine ON tag USING (meaning = current_setting('app.tenant', true))"],
}


def owned(engine: Engine, role: Role, *, capture: Any, before: bool, policies: list[str]) -> tuple[World, Engine, str]:
    """A world whose tables and functions a plain role owns, and an application with rights on one table."""
    owner = role("CREATE ON SCHEMA public")
    if before:
        World(owner).memory.close()
        sql(owner, "DROP TABLE memstate_log CASCADE", *ON, *policies)
    world = World(owner, capture=capture)
    if not before:
        sql(owner, *ON, *policies)
    app = role("SELECT, INSERT, UPDATE, DELETE ON tag, memstate_log, memstate_outbox, memstate_transaction")
    return world, app, name_of(app)


def seen_by(world: World, engine: Engine) -> World:
    """The same world, read as a superuser."""
    other = object.__new__(World)
    others = {"engine": engine, "sessions": sessionmaker(engine), "relay": world.memory.relay(engine)}
    other.__dict__ |= {**world.__dict__, **others}
    world.memory.attach(other.sessions)
    return other


@pytest.mark.parametrize(("policy", "before"), [("by current_user", True), *((name, False) for name in POLICIES)])
def test_triggers_log_rows_that_their_owner_cannot_see(
    postgres_engine: Engine, role: Role, policy: str, before: bool
) -> None:
    """This covers each event, on one row and on many. *before*: policies are created before the triggers.

    The same kind: a policy by membership, by a sub-select, by a tenant, for one role, for one command.
    """
    world, app, me = owned(postgres_engine, role, capture="trigger", before=before, policies=POLICIES[policy])
    both = f"VALUES ('a', '{me}'), ('{{}}', '{me}')"
    expected = {
        f"INSERT INTO tag (name, meaning) {both.format('b')}": ["a insert", "b insert"],
        "UPDATE tag SET person_id = NULL": [],
        "UPDATE tag SET name = 'c' WHERE name = 'b'": ["b delete", "c insert"],
        f"INSERT INTO tag (name, meaning) {both.format('d')} ON CONFLICT (name) DO UPDATE SET name = 'e'": [
            "a delete", "d insert", "e insert"
        ],
        "DELETE FROM tag WHERE name = 'c'": ["c delete"],
    }  # fmt: skip
    last = 0
    for statement, changes in expected.items():
        sql(app, f"SET LOCAL app.tenant = '{me}'", statement)
        with postgres_engine.connect() as connection:
            entries = connection.execute(select(log).where(log.c.id > last)).all()
        last = max([last, *(entry.id for entry in entries)])
        assert sorted(f"{entry.key[2:-2]} {entry.op}" for entry in entries) == changes
    seen_by(world, postgres_engine).assert_in_step()
    [(subject, message)] = world.memory.doctor(postgres_engine).problems
    assert subject == "tag" and name_of(world.engine) in message and "row-level security" in message
    with pytest.raises(DBAPIError, match="TRUNCATE would remove rows that row-level security hides"):
        sql(world.engine, "TRUNCATE tag")
    world.memory.close()


def test_the_last_of_several_changes_of_a_hidden_row_is_logged(postgres_engine: Engine, role: Role) -> None:
    """One statement changes a row several times, through foreign keys that cascade."""
    world, app, me = owned(postgres_engine, role, capture="trigger", before=False, policies=POLICIES["by current_user"])
    sql(
        postgres_engine,
        "ALTER TABLE tag ADD COLUMN other_id int",
        "ALTER TABLE tag ADD FOREIGN KEY (other_id) REFERENCES person ON DELETE SET NULL",
        "ALTER TABLE tag DROP CONSTRAINT tag_person_id_fkey",
        "ALTER TABLE tag ADD FOREIGN KEY (person_id) REFERENCES person ON DELETE SET NULL",
        "INSERT INTO person (id, name) VALUES (1, 'Ann')",
    )
    sql(app, f"INSERT INTO tag (name, meaning, person_id, other_id) VALUES ('a', '{me}', 1, 1)")
    sql(postgres_engine, "DELETE FROM person")
    seen_by(world, postgres_engine).assert_in_step()
    world.memory.close()


def test_policies_that_hide_nothing_from_the_owner_are_no_problem(postgres_engine: Engine, role: Role) -> None:
    """Without FORCE, a policy does not apply to the owner of the table."""
    world, app, me = owned(postgres_engine, role, capture="trigger", before=False, policies=POLICIES["by current_user"])
    sql(world.engine, "ALTER TABLE tag NO FORCE ROW LEVEL SECURITY")
    sql(app, f"INSERT INTO tag (name, meaning) VALUES ('a', '{me}')", "UPDATE tag SET person_id = NULL")
    assert world.memory.doctor(world.engine).problems == []
    sql(world.engine, "TRUNCATE tag")
    world.assert_in_step()
    world.memory.close()


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_the_doctor_does_not_take_hidden_rows_for_deleted_ones(
    postgres_engine: Engine, role: Role, capture: Any
) -> None:
    """doctor names the tables whose rows it may not see in full, and repairs none of them."""
    world, app, me = owned(postgres_engine, role, capture=capture, before=False, policies=POLICIES["by current_user"])
    sql(app, f"INSERT INTO tag (name, meaning) VALUES ('a', '{me}')")
    everything = seen_by(world, postgres_engine)
    world.memory.backfill(postgres_engine, Tag)
    found = world.memory.doctor(world.engine, repair=True)
    assert (found.changed, found.gone) == ([], [])
    assert [each.subject for each in found.problems if "role of this connection" in each.message] == ["tag"]
    everything.assert_in_step()
    world.memory.close()


@pytest.mark.parametrize("way", ["an object", "an UPDATE"])
def test_a_session_does_not_take_a_row_that_it_hides_for_a_deleted_one(
    postgres_engine: Engine, role: Role, way: str
) -> None:
    """The write fails with the reason. A policy allows writing the row, but not reading it.

    The same kind: a moderation queue that only grows, a row that moves to another tenant.
    """
    policies = [
        "CREATE POLICY reading ON tag FOR SELECT USING (meaning <> 'secret')",
        "CREATE POLICY adding ON tag FOR INSERT WITH CHECK (true)",
        "CREATE POLICY changing ON tag FOR UPDATE USING (true) WITH CHECK (true)",
    ]
    world, app, _ = owned(postgres_engine, role, capture="session", before=False, policies=policies)
    sessions = sessionmaker(app)
    world.memory.attach(sessions)
    with sessions() as session:
        session.add(Tag(name="a", meaning="open"))
        session.commit()
        with pytest.raises((UntrackedWrite, DBAPIError), match="row-level security"):
            if way == "an object":
                session.add(Tag(name="b", meaning="secret"))
                session.commit()
            else:
                session.execute(update(Tag).values(meaning="secret"), execution_options={"synchronize_session": False})
        session.rollback()
    with postgres_engine.connect() as connection:
        assert connection.execute(select(Tag.name, Tag.meaning)).all() == [("a", "open")]
    seen_by(world, postgres_engine).assert_in_step()
    world.memory.close()
