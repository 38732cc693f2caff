"""The moment after a transaction is its own view, with its changes. Later commits do not change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, delete, func, select, text, update
from sqlalchemy.orm import Session

from memstate_sa.capture.append_only import rewriting
from memstate_sa.db.dialects import POSTGRESQL
from memstate_sa.db.tables import log, utcnow
from memstate_sa.integrations.langgraph.checkpoint_inserts import log_position
from memstate_sa.log.history import SNAPSHOT_MARK
from memstate_sa.undo import selection
from tests.support import Tag, World

pytestmark = pytest.mark.sa20
both_ways = pytest.mark.parametrize("capture", ["session", "trigger"])


def tags(world: World, **meanings: str) -> str:
    with world.session() as session:
        for name, meaning in meanings.items():
            session.merge(Tag(name=name, meaning=meaning))
        session.commit()
        return str(world.memory.token(session))


def tags_at(world: World, moment: str) -> dict[str, str]:
    """The tags at *moment*. All ways to ask must agree."""
    with world.memory.as_of_session(world.engine, moment) as past:
        found = {tag.name: tag.meaning for tag in past.scalars(select(Tag))}
    with world.session() as session:
        for name in ("a", "b", "c"):
            image = world.memory.as_of(session, Tag, name, moment)
            assert found.get(name) == (image and image["meaning"])
    return found


def undo_to(world: World, moment: str, **scope: Any) -> set[str]:
    with world.session() as session:
        changed = {change.key for change in world.memory.rollback(session, to=moment, **scope)}
        session.commit()
    return changed


def changing(name: str, meaning: str) -> Callable[[Session], Any]:
    return lambda session: session.execute(update(Tag).where(Tag.name == name).values(meaning=meaning))


@pytest.mark.deep_on("delete", "insert")
@both_ways
@pytest.mark.parametrize(
    ("write", "outcome"),
    [
        (changing("a", "late"), {"a": "late", "b": "2"}),
        (lambda session: session.execute(delete(Tag).where(Tag.name == "a")), {"b": "2"}),
        (lambda session: session.add(Tag(name="c", meaning="late")), {"a": "1", "b": "2", "c": "late"}),
    ],
    ids=["update", "delete", "insert"],
)
def test_a_moment_leaves_out_later_commits(
    postgres_engine: Engine, capture: Any, write: Callable[[Session], Any], outcome: dict[str, str]
) -> None:
    """Its ids are lower. The same kind: several statements, SAVEPOINTs, with labels or without."""
    world = World(postgres_engine, capture=capture)
    tags(world, a="1", b="1")
    with world.session() as late:
        write(late)
        late.flush()
        moment = tags(world, b="2")
        assert tags_at(world, moment) == {"a": "1", "b": "2"}
        late.commit()
    assert tags_at(world, moment) == {"a": "1", "b": "2"}
    with world.session() as session:
        assert {tag.name: tag.meaning for tag in session.scalars(select(Tag))} == outcome
        [difference] = world.memory.diff(session, moment, utcnow())
        assert difference.key in {"a", "c"}
    assert undo_to(world, moment) == {difference.key}
    assert tags_at(world, moment) == {"a": "1", "b": "2"}
    with world.session() as session:
        assert {tag.name: tag.meaning for tag in session.scalars(select(Tag))} == {"a": "1", "b": "2"}
    world.assert_in_step()


@both_ways
def test_a_baseline_of_a_late_transaction_shows_the_row_before_it(postgres_engine: Engine, capture: Any) -> None:
    """The row is older than tracking, or was written without the log. Its baseline shows it before its first change."""
    world = World(postgres_engine, capture=capture)
    with postgres_engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql("INSERT INTO tag (name, meaning) VALUES ('a', 'old')")
    with world.session() as late:
        changing("a", "late")(late)
        moment = tags(world, b="1")
        late.commit()
    assert tags_at(world, moment) == {"a": "old", "b": "1"}
    assert undo_to(world, moment) == {"a"}
    assert tags_at(world, moment) == {"a": "old", "b": "1"}


def test_concurrent_transactions_have_different_moments(postgres_engine: Engine) -> None:
    """Neither saw the other, so each one's moment lacks the other, and the two differ."""
    world = World(postgres_engine)
    with world.session() as one, world.session() as other:
        for session, name in ((one, "a"), (other, "b")):
            session.add(Tag(name=name, meaning=name))
            session.flush()
        one.commit()
        other.commit()
        first, second = world.memory.token(one), world.memory.token(other)
    assert (tags_at(world, str(first)), tags_at(world, str(second))) == ({"a": "a"}, {"b": "b"})
    with world.session() as session:
        found = world.memory.diff(session, str(first), str(second))
    assert {(change.op, change.key) for change in found} == {("delete", "a"), ("insert", "b")}


def test_a_position_includes_earlier_commits(postgres_engine: Engine) -> None:
    """Its last transaction did not see all of it, because two steps of a graph ran at once."""
    world = World(postgres_engine)
    with world.session() as one, world.session() as other, world.session() as late:
        for session, name in ((late, "c"), (one, "a"), (other, "b")):
            session.add(Tag(name=name, meaning=name))
            session.flush()
        other.commit()
        one.commit()
        with postgres_engine.connect() as connection:
            position = SNAPSHOT_MARK.join(connection.execute(select(*log_position(POSTGRESQL).values())).one())
        late.commit()
    assert tags_at(world, position) == {"a": "a", "b": "b"}
    assert undo_to(world, position) == {"c"}


def test_rollback_to_a_moment_finds_a_transaction_begun_long_before(
    postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entries are pages before the moment's."""
    monkeypatch.setattr(selection, "_PAGES", (2, 2))
    world = World(postgres_engine)
    tags(world, a="1", b="1")
    with world.session() as late:
        changing("a", "late")(late)
        for meaning in "23456789":
            tags(world, c=meaning)
        moment = tags(world, b="2")
        for meaning in "23456789":
            tags(world, d=meaning)
        late.commit()
    assert undo_to(world, moment) == {"a", "d"}
    assert tags_at(world, moment) == {"a": "1", "b": "2", "c": "9"}
    world.assert_in_step()


def test_a_moment_is_a_transaction_with_its_undos(engine: Engine) -> None:
    """Two transactions of the log are in one transaction of the database. The moment of the second has both."""
    world = World(engine)
    tags(world, a="1")
    tags(world, a="2")
    with world.session() as session:
        session.add(Tag(name="b", meaning="1"))
        world.memory.rollback(session, steps=1)
        session.commit()
        moment = world.memory.token(session)
    assert tags_at(world, str(moment)) == {"a": "1", "b": "1"}


def test_moments_survive_a_restore_into_another_cluster(postgres_engine: Engine) -> None:
    """The other cluster's transaction ids are greater or smaller than this cluster's."""
    world = World(postgres_engine)
    for ahead in (10**9, -(10**3)):
        world = World(postgres_engine)
        with postgres_engine.begin() as connection:
            connection.execute(text("TRUNCATE tag"))
        old = tags(world, a=f"old {ahead}")
        with world.session() as session:
            changed = world.memory.history(session, Tag)[-1].id
        with postgres_engine.begin() as connection, rewriting(connection):
            snapshot = func.concat(log.c.xid + ahead, ":", log.c.xid + ahead + 1, ":", log.c.xid + ahead)
            moved = {"xid": log.c.xid + ahead, "snapshot": snapshot}
            connection.execute(update(log).where(log.c.id <= changed).values(moved))
        new = tags(world, b="new")
        assert tags_at(world, old)["a"] == f"old {ahead}"
        assert tags_at(world, new) == {"a": f"old {ahead}", "b": "new"}
        with world.session() as session:
            session.execute(delete(Tag))
            session.commit()


def test_a_log_of_the_version_before_gets_its_columns(engine: Engine) -> None:
    """Old entries have moments by id, as before. New entries have real moments."""
    world = World(engine)
    before = tags(world, a="1")
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE memstate_log DROP COLUMN snapshot")
        connection.exec_driver_sql("ALTER TABLE memstate_log DROP COLUMN xid")
        connection.exec_driver_sql("ALTER TABLE memstate_checkpoint DROP COLUMN snapshot")
    assert not world.memory.doctor(engine).healthy
    world.memory.create_tables(engine)
    assert world.memory.doctor(engine).healthy
    after = tags(world, b="2")
    assert tags_at(world, before) == {"a": "1"}
    assert tags_at(world, after) == {"a": "1", "b": "2"}
    world.assert_in_step()
