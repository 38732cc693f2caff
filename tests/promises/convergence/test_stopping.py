"""A relay that stops while the embedder hangs, and leases of relays that are gone."""

from __future__ import annotations

import gc
import os
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Engine, select

from memstate_sa.db import leases
from memstate_sa.db.tables import holder
from memstate_sa.errors import DeliveryRetryable
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import Tag, World, assert_index_holds
from tests.support.relays import eventually

pytestmark = pytest.mark.sa20


class Hanging(HashEmbedder):
    """Answers only when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.answer = threading.Event(), threading.Event()

    def embed(self, texts: Sequence[str]) -> Any:
        self.called.set()
        assert self.answer.wait(60)
        return super().embed(texts)


class Closing(InMemoryIndex):
    closed = False

    def close(self) -> None:
        self.closed = True


def say(world: World, name: str) -> None:
    with world.session() as session:
        session.add(Tag(name=name, meaning="x"))
        session.commit()


def owners(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(select(holder.c.owner)))


def hang(world: World) -> Hanging:
    """Let a background relay wait for the embedder."""
    embedder = Hanging()
    for destination in world.memory._destinations.values():
        destination.vectors.embedder = embedder
    world.relay = world.memory.relay(world.engine).start()
    say(world, "a")
    assert embedder.called.wait(60)
    return embedder


def test_close_does_not_wait_for_an_embedder_that_hangs(engine: Engine) -> None:
    """The remaining thread finishes its batch, releases the lease, and then closes the index.

    The same kind: an index or a database that hangs, run_once() in another thread, stop() twice, a relay in a context.
    """
    index = Closing()
    world = World(engine, index)
    embedder = hang(world)
    world.memory.close(timeout=0.01)
    assert not index.closed
    assert len(owners(engine)) == 1
    embedder.answer.set()
    eventually(lambda: index.closed)
    assert owners(engine) == []
    assert [entry.id for entry in index.scan(None, 9)] == ['tag["a"]']


def test_restarted_relay_goes_on_beside_its_old_thread(engine: Engine) -> None:
    """The old thread does not release the lease of the new one."""
    world = World(engine)
    embedder = hang(world)
    world.relay.stop(timeout=0.01)
    left = world.relay._workers[0]._unjoined_thread
    world.relay.start()
    embedder.answer.set()
    assert left is not None
    eventually(lambda: left.is_over)
    say(world, "b")
    eventually(lambda: len(world.index.scan(None, 9)) == 2)
    world.memory.close()
    assert owners(engine) == []


@pytest.mark.parametrize("failing", [True, False])
def test_relay_that_was_dropped_keeps_no_lease(engine: Engine, failing: bool) -> None:
    """The next relay of this process delivers at once. The same kind: a relay in a cycle, a relay that raised."""
    world = World(engine)
    world.relay.drain()
    relay = world.memory.relay(engine, lease_s=3600)
    say(world, "a")
    if failing:
        upsert = world.index.upsert
        world.index.upsert = _refuse  # type: ignore[method-assign]
        with pytest.raises(DeliveryRetryable):
            relay.run_once()
        world.index.upsert = upsert  # type: ignore[method-assign]
    else:
        relay.run_once()
        say(world, "b")
        del relay
        gc.collect()
    world.memory.relay(engine).run_once()
    assert_index_holds(world.index, world.embedder, {f'tag["{n}"]': f"{n} means x" for n in ("a" if failing else "ab")})
    world.memory.close()


def _refuse(points: Any) -> None:
    raise ConnectionError


# -- owners that may be gone -------------------------------------------------------------------------------------------


def ended() -> str:
    """The owner name of a process that has ended."""
    process = subprocess.Popen(["sleep", "60"])
    owner = f"{leases._machine()} {process.pid} {leases._started(process.pid)} x"
    assert not leases.is_gone(owner)
    process.kill()
    process.wait()
    return owner


def test_process_of_this_boot_that_has_ended_is_gone() -> None:
    owner = ended()
    assert leases.is_gone(owner) is (" ? " not in owner)


def test_zombie_is_gone() -> None:
    """A killed process keeps its id until its parent asks for its exit code."""
    with subprocess.Popen(["sleep", "60"]) as process:
        owner = f"{leases._machine()} {process.pid} {leases._started(process.pid)} x"
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # leaves the zombie
        os.kill(process.pid, 0)
        assert leases.is_gone(owner) is (" ? " not in owner)


@pytest.mark.parametrize(
    "owner",
    [
        "{host}/4026531836 999999999 ab",
        "{host}/4026531836 999999999 1 ab",
        "00000000-0000-0000-0000-000000000000/4026531836 999999999 1 ab",
        "{machine} 999999999 ab",
        "? 999999999 ? ab",
        "{machine} 999999999 ? ab",
        "{machine} {pid} {started} ab",
        "{machine} one 1 ab",
        "",
    ],
)
def test_owner_that_may_live_elsewhere_is_not_gone(owner: str) -> None:
    """The same kind: clones with one host name, containers with one hostname and namespace.

    Also owners of an older version, and systems that do not show the current boot.
    """
    pid = os.getpid()
    values = {"host": os.uname().nodename, "machine": leases._machine(), "pid": pid, "started": leases._started(pid)}
    assert not leases.is_gone(owner.format(**values))


def test_process_id_that_was_given_again_is_another_process() -> None:
    if leases._machine() == "?":
        pytest.skip("this system does not identify its boot")
    assert leases.is_gone(f"{leases._machine()} {os.getpid()} 1 ab")
