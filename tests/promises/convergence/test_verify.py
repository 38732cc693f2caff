"""verify compares contents, and repair corrects the differences."""

from __future__ import annotations

import pytest

from memstate_sa.indexes import Point
from memstate_sa.maintenance.verify import Verify
from tests.support import Person, Tag, World

pytestmark = pytest.mark.sa20


@pytest.fixture
def drifted(world: World) -> World:
    """A world with a missing vector, a ghost and a stale vector. The counts agree."""
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
    """It is named by entity and key, although there are as many vectors as rows."""
    report = drifted.memory.verify(drifted.engine)
    assert (report.missing, report.ghost, report.stale) == ([("person", 3)], [("person", 99)], [("tag", "t")])
    assert (report.checked, report.pending, report.clean) == (13, [], False)


def test_repair_mends_every_kind_of_drift(drifted: World) -> None:
    """Every kind of drift is repaired, although the ledger says that all was delivered."""
    found = drifted.memory.verify(drifted.engine, repair=True)
    assert not found.clean
    assert drifted.memory.verify(drifted.engine).clean
    drifted.assert_in_step()


@pytest.mark.deep_on("postgres")
def test_repair_waits_for_the_relay_that_holds_the_lease(drifted: World) -> None:
    """The relay that holds the lease delivers, and repair waits for it."""
    with drifted.memory.relay(drifted.engine, lease_s=3):
        drifted.memory.verify(drifted.engine, repair=True)
        assert drifted.memory.verify(drifted.engine).clean


def test_undelivered_change_is_not_drift(world: World) -> None:
    """Undelivered changes are pending, not missing."""
    world.relay.drain()
    with world.session() as session:
        session.add(Tag(name="t"))
        session.commit()
    report = world.memory.verify(world.engine)
    assert report.clean and report.pending == [("tag", "t")]


def test_verify_works_in_pages(drifted: World) -> None:
    """Pages smaller than the table find the same drift in constant memory."""
    from memstate_sa import DriftReport

    report = DriftReport()
    tracked = drifted.memory._registry.by_entity
    seen: list[int] = []
    verify = Verify(drifted.engine, "memory", drifted.memory._destinations["memory"], tracked, page_size=3)
    verify.run(report, repair=False, progress=lambda done, total: seen.append(done))
    assert (report.missing, report.ghost, report.stale) == ([("person", 3)], [("person", 99)], [("tag", "t")])
    assert seen == [3, 6, 9, 12, 13]


def test_status_describes_each_index(world: World) -> None:
    """The figures that an operator needs, per index."""
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
