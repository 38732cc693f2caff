"""verify compares contents, repair puts right what differs, backfill brings what was there before."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, insert, select

from memstate_sa import MemstateError
from memstate_sa.indexes import Point
from memstate_sa.tables import log
from memstate_sa.verify import Verify
from tests.support import Person, Tag, World

pytestmark = pytest.mark.sa20


@pytest.fixture
def drifted(world: World) -> World:
    """One of each: a row without a vector, a vector without a row, a vector of another content; counts agree."""
    with world.session() as session:
        session.add_all([Person(name=f"p{n}", about=f"about {n}") for n in range(12)])
        session.add(Tag(name="t"))
        session.commit()
    world.relay.drain()
    vectors = world.embedder.embed(["ghost", "other"])
    world.index.delete(["person[3]"])
    world.index.upsert([Point("person[99]", vectors[0], "0" * 32), Point('tag["t"]', vectors[1], "1" * 32)])
    return world


def test_drift_is_named(drifted: World) -> None:
    """By entity and key, although there are as many vectors as rows."""
    report = drifted.memory.verify(drifted.engine)
    assert (report.missing, report.ghost, report.stale) == ([("person", 3)], [("person", 99)], [("tag", "t")])
    assert (report.checked, report.pending, report.clean) == (13, [], False)


def test_repair(drifted: World) -> None:
    """Every kind of drift is put right, though the ledger says that all was delivered."""
    found = drifted.memory.verify(drifted.engine, repair=True)
    assert not found.clean
    assert drifted.memory.verify(drifted.engine).clean
    drifted.assert_in_step()


def test_repair_while_another_relay_holds_the_lease(drifted: World) -> None:
    """Whoever holds it delivers; repair waits for that."""
    with drifted.memory.relay(drifted.engine):
        drifted.memory.verify(drifted.engine, repair=True)
        assert drifted.memory.verify(drifted.engine).clean


def test_what_is_on_its_way_is_not_drift(world: World) -> None:
    """Undelivered changes are pending, not missing."""
    world.relay.drain()
    with world.session() as session:
        session.add(Tag(name="t"))
        session.commit()
    report = world.memory.verify(world.engine)
    assert report.clean and report.pending == [("tag", "t")]


def test_verify_works_in_pages(drifted: World) -> None:
    """Constant memory: pages smaller than the table find the same drift."""
    from memstate_sa import DriftReport

    report = DriftReport()
    tracked = drifted.memory._registry.by_entity
    seen: list[int] = []
    verify = Verify(drifted.engine, "memory", drifted.memory._destinations["memory"], tracked, page_size=3)
    verify.run(report, repair=False, progress=lambda done, total: seen.append(done))
    assert (report.missing, report.ghost, report.stale) == ([("person", 3)], [("person", 99)], [("tag", "t")])
    assert seen == [3, 6, 9, 12, 13]


def test_backfill_logs_what_was_there_before(engine: Engine) -> None:
    """A baseline and a vector for every row; running it again adds nothing; an interrupted run goes on."""
    world = World(engine)
    world.relay.drain()
    with engine.begin() as connection:
        connection.execute(insert(Tag.__table__), [{"name": f"t{n:02}", "meaning": str(n)} for n in range(25)])

    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int | None) -> None:
        if done >= 10:
            raise Interrupted

    with pytest.raises(Interrupted):
        world.memory.backfill(engine, Tag, batch_size=5, progress=interrupt)
    progress: list[tuple[int, int | None]] = []
    added = world.memory.backfill(engine, Tag, batch_size=10, progress=lambda d, t: progress.append((d, t)))
    assert added == 15
    assert progress == [(10, 25), (20, 25), (25, 25)]
    assert world.memory.backfill(engine, Tag) == 0
    with engine.connect() as connection:
        logged = connection.execute(select(log.c.op, log.c.key).order_by(log.c.key)).all()
    assert [tuple(row) for row in logged] == [("baseline", f'["t{n:02}"]') for n in range(25)]
    world.assert_in_step()


def test_backfill_beside_a_live_write(engine: Engine) -> None:
    """A row that changed between the look and the lock is not logged as it was."""
    world = World(engine)
    with engine.begin() as connection:
        connection.execute(insert(Tag.__table__), [{"name": "a", "meaning": "old"}, {"name": "b", "meaning": "old"}])
    baselines: Any = world.memory._capture.log_baselines

    def meddle(connection: Any, tracked: Any, keys: Any) -> int:
        if engine.dialect.name == "postgresql":  # SQLite: this transaction has begun, others wait
            with world.session() as session:
                session.get_one(Tag, "a").meaning = "new"
                session.commit()
        return int(baselines(connection, tracked, keys))

    world.memory._capture.log_baselines = meddle  # type: ignore[method-assign]
    world.memory.backfill(engine, Tag)
    world.assert_in_step()


def test_status(world: World) -> None:
    """What an operator wants to know, per index."""
    world.relay.drain()
    with world.session() as session:
        session.add_all([Tag(name="a"), Tag(name="b")])
        session.commit()
        session.get_one(Tag, "a").meaning = "again"
        session.commit()
    status = world.memory.status(world.engine)["memory"]
    assert (status.pending, status.parked, status.dead, status.refilling) == (2, 0, 0, False)
    assert status.oldest_s is not None and status.oldest_s >= 0
    world.relay.drain()
    assert world.memory.status(world.engine)["memory"].pending == 0


def test_backfill_of_an_untracked_class(world: World) -> None:
    """A clear error."""
    with pytest.raises(MemstateError, match="int is not tracked"):
        world.memory.backfill(world.engine, int)
