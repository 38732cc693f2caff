"""The log replays to the table, and the index converges to it, after any use of a Session."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, insert

from tests.support import PATIENCE_S, Person, Tag, World, explore, sizes
from tests.support.programs import STEPS, Play, programs, small, wipe

pytestmark = pytest.mark.sa20


def check(world: World, steps: list[tuple[str, tuple[Any, ...]]], untracked: int) -> None:
    wipe(world.engine)
    world.index.delete([entry.id for entry in world.index.scan(None, 10_000)])
    world.relay.stop()
    with world.engine.begin() as connection:  # rows from before tracking
        for n in range(untracked):
            connection.execute(insert(Person.__table__), {"name": f"old{n}", "about": f"was here {n}"})
            connection.execute(insert(Tag.__table__), {"name": f"tag{n}", "meaning": f"was here {n}"})
    for model in (Person, Tag) if untracked == 3 else ():
        world.memory.backfill(world.engine, model)
    with world.session() as session:
        Play(world, session).run(steps)
    for model in (Person, Tag) if untracked else ():
        world.memory.backfill(world.engine, model)
    world.assert_in_step()


def explore_histories(engine: Engine, histories: int) -> None:
    world = World(engine)

    @explore(histories, steps=programs(STEPS), untracked=small)
    def _converges(steps: Any, untracked: int) -> None:
        check(world, steps, untracked)


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("histories", sizes(15, 300))
def test_random_histories_converge_on_sqlite(sqlite_engine: Engine, histories: int) -> None:
    """replay(log) == tables, and index == tables."""
    explore_histories(sqlite_engine, histories)


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("histories", sizes(8, 100))
def test_random_histories_converge_on_postgres(postgres_engine: Engine, histories: int) -> None:
    explore_histories(postgres_engine, histories)
