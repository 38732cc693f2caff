"""Operating the relay: waiting for a commit, several workers, retention, wake-ups."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, create_engine, event, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from memstate_sa import DeliveryError, DeliveryRejected, DeliveryRetryable, MemstateError
from memstate_sa.capture.append_only import rewriting
from memstate_sa.db.tables import (
    cursor,
    holder,
    index_state,
    ledger,
    log,
    metadata,
    outbox,
    parked,
    transaction as header,
    utcnow,
)
from memstate_sa.indexes import InMemoryIndex, Point
from memstate_sa.log.positions import slot_of
from memstate_sa.relay import Relay, Retention, RetryPolicy, waiting
from memstate_sa.relay.retention import forget_delivered
from tests.support import Person, Tag, World, assert_index_holds, expire_leases, make_due
from tests.support.relays import Interrupted, Spy, Waits, eventually, holds, say

pytestmark = pytest.mark.sa20


def means(*names: str, meaning: str = "x") -> dict[str, str]:
    return {f'tag["{name}"]': f"{name} means {meaning}" for name in names}


# -- waiting -----------------------------------------------------------------------------------------------------------


def test_wait_returns_when_the_index_has_it(engine: Engine) -> None:
    """An "eventual" search finds the row. It would not find a key that is still in the outbox."""
    world = World(engine)
    with world.memory.relay(engine), world.session() as session:
        for n in range(5):
            session.add(Tag(name=f"t{n}", meaning="something"))
            session.commit()
            world.memory.wait(session)
            hits = world.memory.search(session, f"t{n} means something", Tag, limit=1, consistency="eventual")
            assert [hit.fact.name for hit in hits] == [f"t{n}"]


def test_wait_takes_a_token_of_another_process(engine: Engine) -> None:
    """The token belongs to the transaction. Deletes are waited for, too."""
    world = World(engine)
    say(world, a="x")
    world.relay.drain()
    elsewhere = World(create_engine(engine.url), world.index)
    with world.session() as session:
        session.delete(session.get_one(Tag, "a"))
        session.commit()
        token = world.memory.token(session)
        [change] = [change for change in world.memory.history(session, Tag) if change.op == "delete"]
    assert token == change.tx
    with pytest.raises(DeliveryError, match=r"not reached index 'memory' within 0.05 s. Check that a relay is running"):
        elsewhere.memory.wait(token, timeout=0.05)
    with world.memory.relay(engine):
        elsewhere.memory.wait(token)
    assert world.index.scan(None, 5) == []
    elsewhere.engine.dispose()


def test_wait_names_keys_that_an_index_refused(engine: Engine) -> None:
    """Otherwise it would wait for ever."""
    index = Spy()
    index.refuse = lambda point: DeliveryRejected("no")
    world = World(engine, index)
    relay = world.memory.relay(engine, policy=RetryPolicy(max_attempts=1))
    with world.session() as session:
        session.add(Tag(name="a"))
        session.commit()
        relay.drain()
        with pytest.raises(DeliveryError, match=r"refused tag \[\"a\"\]: DeliveryRejected: no"):
            world.memory.wait(session)


@pytest.mark.deep_on("sqlite")
def test_wait_reads_little_for_a_transaction_of_many_keys(engine: Engine) -> None:
    """For a few keys it reads the ledger, not the backlog. For many it asks whether any of them is still pending."""
    world = World(engine)
    world.relay.drain()
    seen: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda c, d, statement, *rest: seen.append(statement))
    for count in (3, 1001):
        with world.session() as session:
            session.add_all(Tag(name=f"{count}-{n}", meaning="x") for n in range(count))
            session.commit()
            seen.clear()
            with pytest.raises(DeliveryError, match="Check that a relay is running"):
                world.memory.wait(session, timeout=0.0)
            assert any("memstate_outbox" in statement for statement in seen) == (count > 3)
            with world.memory.relay(engine):
                world.memory.wait(session)
            hits = world.memory.search(session, f"{count}-{count - 1} means x", Tag, limit=1, consistency="eventual")
            assert [hit.fact.name for hit in hits] == [f"{count}-{count - 1}"]
    world.assert_in_step()


def test_wait_for_nothing_returns_at_once(world: World) -> None:
    """A Session that committed no tracked row has no token. A token without a known database is an error."""
    with world.session() as session:
        world.memory.wait(session)
        assert world.memory.token(session) is None
    other = create_engine("sqlite://")
    world.memory.relay(other)
    with pytest.raises(MemstateError, match="engine="):
        world.memory.wait("abc")
    other.dispose()


async def test_async_session_waits_for_delivery_in_a_thread(tmp_path: Any) -> None:
    """An AsyncSession's commit is waited for in a thread."""
    pytest.importorskip("aiosqlite")
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

    from memstate_sa import sqlite

    engine = sqlite.configure(create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'facts.db'}"))
    world = World(sqlite.configure(create_engine(f"sqlite:///{tmp_path / 'facts.db'}")))
    sessions = async_sessionmaker(engine)
    world.memory.attach(sessions)
    with world.memory.relay(engine):
        async with sessions() as session:
            session.add(Tag(name="a", meaning="x"))
            await session.commit()
            await asyncio.to_thread(world.memory.wait, session)
    assert_index_holds(world.index, world.embedder, means("a"))
    await engine.dispose()
    world.engine.dispose()


# -- several workers ---------------------------------------------------------------------------------------------------


@pytest.mark.deep
def test_workers_share_the_keys(postgres_engine: Engine) -> None:
    """Three relays start one after the other and end with a third each. When one leaves, the others take its keys."""
    world = World(postgres_engine)
    relays = [world.memory.relay(postgres_engine, poll_s=(0.01, 0.05)) for _ in range(3)]

    def shares() -> list[int]:
        return sorted(len(relay._workers[0].delivery.slot_worker.epochs) for relay in relays)

    try:
        for count, relay in enumerate(relays, start=1):
            relay.start()
            expected = {1: [0, 0, 64], 2: [0, 32, 32], 3: [20, 22, 22]}[count]
            eventually(lambda expected=expected: shares() == expected)  # type: ignore[misc]
        say(world, **{f"t{n}": "x" for n in range(200)})
        eventually(lambda: holds(world.index, means(*(f"t{n}" for n in range(200)))))
        eventually(lambda: sum(relay.counters()["memory"].converged for relay in relays) == 200)
        assert all(relay.counters()["memory"].converged for relay in relays)
        relays[0].stop()
        eventually(lambda: shares() == [0, 32, 32])
        say(world, **{f"t{n}": "y" for n in range(50)})
        everything = {**means(*(f"t{n}" for n in range(200))), **means(*(f"t{n}" for n in range(50)), meaning="y")}
        eventually(lambda: holds(world.index, everything))
    finally:
        for relay in relays:
            relay.stop()
    world.assert_in_step()


def test_a_slow_index_does_not_hold_the_others(engine: Engine) -> None:
    """Each index has its own thread and position."""
    from memstate_sa import Memory

    slow, fast, go = Interrupted(), InMemoryIndex(), threading.Event()
    slow.during, slow.meddle = "before upsert", lambda: go.wait(60)
    world = World(engine)
    memory = Memory({"slow": slow, "fast": fast}, embedder=world.embedder)
    memory.track(Tag, text=lambda tag: f"{tag.name} means {tag.meaning}")
    with memory.relay(engine):
        for n in range(3):
            say(world, **{f"t{n}": "x"})
            memory._relays.wake()
            eventually(lambda n=n: holds(fast, means(*(f"t{m}" for m in range(n + 1)))))  # type: ignore[misc]
        assert slow.scan(None, 5) == []
        go.set()
        eventually(lambda: holds(slow, means("t0", "t1", "t2")))


def test_dead_client_of_a_server_is_succeeded_after_its_lease(engine: Engine) -> None:
    """The server may still hold its last request. An index inside the process has died with it."""
    world = World(engine, Interrupted())
    world.index.in_process = False  # type: ignore[attr-defined]
    say(world, a="x")
    world.relay.run_once()
    with engine.begin() as connection:
        for table in (holder, cursor):
            dead = func.replace(table.c.owner, f" {os.getpid()} ", " 999999999 ")
            connection.execute(update(table).values(owner=dead))
    say(world, b="x")
    waiting = world.memory.relay(engine)
    assert waiting.run_once() == 0
    waiting.stop()
    world.index.in_process = True  # type: ignore[attr-defined]
    world.memory.relay(engine).drain()
    assert_index_holds(world.index, world.embedder, means("a", "b"))


# -- calls that land late ----------------------------------------------------------------------------------------------


def test_a_call_that_timed_out_may_land_after_the_retry(engine: Engine) -> None:
    """A fence allows it, because the claim is the same. The key is delivered again once the call cannot land."""
    index = Interrupted()
    world = World(engine, index)
    relay = world.memory.relay(engine, policy=RetryPolicy(delay_s=0.01))
    say(world, a="first")
    relay.drain()
    late: list[Sequence[Point]] = []
    upsert = index.upsert

    def time_out(points: Sequence[Point]) -> None:
        index.upsert = upsert  # type: ignore[method-assign]
        late.append(points)
        raise TimeoutError

    index.upsert = time_out  # type: ignore[method-assign]
    say(world, a="second")
    _, failure = relay._deliver_once()  # like a relay's thread: run_once() would release the claim
    assert isinstance(failure, DeliveryRetryable)
    say(world, a="third")
    assert relay.run_once() == 1
    assert_index_holds(index, world.embedder, means("a", meaning="third"))
    index.upsert(late[0])
    assert_index_holds(index, world.embedder, means("a", meaning="second"))
    assert relay.run_once() == 0
    make_due(engine)
    assert relay.run_once() == 1
    assert_index_holds(index, world.embedder, means("a", meaning="third"))
    relay.stop()
    world.assert_in_step()


@pytest.mark.deep_on("sqlite")
def test_an_answer_is_not_waited_for_again(engine: Engine) -> None:
    """A provider that refused, or was not reached, has no call in progress."""
    index = Spy()
    world = World(engine, index)
    world.relay.drain()
    failures: list[Exception] = [ConnectionRefusedError(), DeliveryRetryable("429", may_land=False)]
    index.refuse = lambda point: failures.pop() if failures else None
    say(world, a="x")
    world.relay.drain()
    with engine.connect() as connection:
        assert connection.execute(select(parked)).all() == []


def test_settling_does_not_embed_again(engine: Engine) -> None:
    """The dead owner's point exists, so it is written again with its own vector."""
    world = World(engine)
    say(world, a="x")
    world.relay.drain()
    embedded: list[str] = []
    embed = world.embedder.embed
    world.embedder.embed = lambda texts: embedded.extend(texts) or embed(texts)  # type: ignore[method-assign,assignment,func-returns-value]
    say(world, b="y", c="z")
    dying = world.memory.relay(engine)
    dying._workers[0].deliver()
    dying._workers[0].delivery.slot_worker.reset()
    with engine.begin() as connection:  # the position was not recorded
        first = connection.scalar(select(func.min(outbox.c.id)))
        connection.execute(update(cursor).values(position=0 if engine.dialect.name == "sqlite" else first))
        if engine.dialect.name == "postgresql":
            connection.execute(update(cursor).values(snapshot="3:3:", xid=0, position=0))
    expire_leases(engine)
    world.relay.drain()
    del world.embedder.embed
    assert sorted(embedded) == ["b means y", "c means z"]
    world.assert_in_step()


# -- intents of strict transactions ------------------------------------------------------------------------------------


def add_intent(session: Session, engine: Engine, key: str) -> None:
    """Write an intent durably on another connection, under the xid of the transaction that *session* has open."""
    xid = session.connection().exec_driver_sql("SELECT pg_current_xact_id()::text").scalar_one()
    with engine.begin() as connection:
        connection.execute(
            insert(outbox).values(
                xid=int(xid),
                slot=slot_of("tag", key),
                entity="tag",
                key=key,
                tx="intent",
                created_at=utcnow(),
                intent=True,
            )
        )


def test_no_window_passes_an_intent_before_its_transaction_ends(postgres_engine: Engine) -> None:
    """Afterwards its key is settled: the index was written, whether the transaction committed or not."""
    index = Interrupted(fenced=False)
    world = World(postgres_engine, index)
    relay = world.memory.relay(postgres_engine)
    say(world, a="truth")
    relay.drain()
    with world.session() as session:
        session.get_one(Tag, "a").meaning = "never committed"
        session.flush()
        add_intent(session, postgres_engine, '["a"]')
        [vector] = world.embedder.embed(["a means never committed"])
        index.upsert([Point('tag["a"]', vector, "f")])
        say(world, b="truth")
        relay.drain()
        assert_index_holds(
            index, world.embedder, {**means("a", meaning="never committed"), **means("b", meaning="truth")}
        )
        session.rollback()
    assert relay.run_once() == 1
    assert_index_holds(index, world.embedder, means("a", "b", meaning="truth"))
    # The application may have died during its call, which lands only now.
    index.upsert([Point('tag["a"]', vector, "f")])
    assert relay.run_once() == 0
    make_due(postgres_engine)
    assert relay.run_once() == 1
    relay.stop()
    world.assert_in_step()


# -- a younger cluster -------------------------------------------------------------------------------------------------


def test_a_dump_restored_into_a_younger_cluster_is_noticed(postgres_engine: Engine) -> None:
    """Its snapshots are in the future and would hide every entry. The index is compared in full."""
    world = World(postgres_engine)
    say(world, a="x", b="x")
    world.relay.drain()
    with postgres_engine.begin() as connection:
        connection.execute(update(cursor).values(snapshot="900000000:900000000:"))
        connection.execute(text("UPDATE tag SET meaning = 'y' WHERE name = 'b'"))  # as in the dump
        connection.execute(text("UPDATE memstate_outbox SET xid = '3'"))
    say(world, c="x")
    world.relay.drain()
    assert_index_holds(world.index, world.embedder, {**means("a", "c"), **means("b", meaning="y")})


def test_a_dump_restored_into_another_cluster_is_noticed(postgres_engine: Engine) -> None:
    """This includes a cluster that is older than the dump's snapshots, which would include later local commits."""
    world = World(postgres_engine)
    say(world, a="x", b="x")
    world.relay.drain()
    say(world, c="x")
    with postgres_engine.begin() as connection:
        connection.execute(text("DELETE FROM tag WHERE name = 'b'"))  # as in the dump
        connection.execute(text("UPDATE memstate_cursor SET snapshot = pg_current_snapshot()::text"))
        connection.execute(text("UPDATE memstate_index SET cluster = '7/00000001'"))
    world.relay.drain()
    assert_index_holds(world.index, world.embedder, means("a", "c"))
    world.relay.drain()
    with postgres_engine.connect() as connection:
        assert connection.scalar(text("SELECT cluster FROM memstate_index")) != "7/00000001"


def test_role_without_pg_control_system_is_served(postgres_engine: Engine) -> None:
    """A hosting provider may not grant that function."""
    world = World(postgres_engine)
    role = f"role_{uuid4().hex}"
    with postgres_engine.begin() as connection:
        connection.execute(text("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC"))
        connection.execute(text(f"CREATE ROLE {role}"))
        connection.execute(text(f"GRANT USAGE ON SCHEMA public TO {role}"))
        connection.execute(text(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}"))
        connection.execute(text(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}"))
    say(world, a="x")
    plain = create_engine(postgres_engine.url)
    event.listen(plain, "begin", lambda connection: connection.exec_driver_sql(f"SET LOCAL ROLE {role}"))
    world.memory.relay(plain).drain()
    assert_index_holds(world.index, world.embedder, means("a"))
    with postgres_engine.begin() as connection:
        assert connection.scalar(text("SELECT cluster FROM memstate_index")) is None
        connection.execute(text("GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC"))
        connection.execute(text(f"DROP OWNED BY {role}"))
        connection.execute(text(f"DROP ROLE {role}"))
    plain.dispose()


# -- wake-ups ----------------------------------------------------------------------------------------------------------


def test_commit_of_another_process_is_notified(postgres_engine: Engine) -> None:
    """NOTIFY wakes the relay long before its next poll, on a connection of its own."""
    world = World(postgres_engine)
    other = World(create_engine(postgres_engine.url))
    with world.memory.relay(postgres_engine, poll_s=(600.0, 600.0), lease_s=1200.0):
        time.sleep(0.3)  # idle, with ten minutes until the next look
        say(other, a="x")
        eventually(lambda: holds(world.index, means("a")))
    other.memory.close()
    other.engine.dispose()


def test_process_with_an_empty_pool_still_notifies(postgres_engine: Engine) -> None:
    """Otherwise NOTIFY would wait for a connection of the application, and `Memory.close` for NOTIFY."""
    world = World(postgres_engine)
    narrow = World(create_engine(postgres_engine.url, pool_size=1, max_overflow=0, pool_timeout=600))
    with world.memory.relay(postgres_engine, poll_s=(600.0, 600.0), lease_s=1200.0):
        time.sleep(0.3)  # idle, with ten minutes until the next look
        with narrow.session() as session:
            session.add(Tag(name="a", meaning="x"))
            session.commit()
            session.connection()  # takes the only connection
            eventually(lambda: holds(world.index, means("a")))
            narrow.memory.close()
    narrow.engine.dispose()


def test_transaction_of_the_application_sends_no_notify(postgres_engine: Engine) -> None:
    """Commits with a NOTIFY wait for each other in the whole cluster."""
    world = World(postgres_engine)
    seen: list[tuple[int, str]] = []
    event.listen(
        postgres_engine,
        "before_cursor_execute",
        lambda connection, dbapi, statement, *rest: seen.append((threading.get_ident(), statement)),
    )
    say(world, a="x")
    eventually(lambda: any("pg_notify" in statement for _, statement in seen))
    assert not any("notify" in statement.lower() for thread, statement in seen if thread == threading.get_ident())
    world.memory.close()


def test_an_idle_relay_costs_next_to_nothing(postgres_engine: Engine) -> None:
    """It sends at most one query every two seconds, five in two looks."""
    world = World(postgres_engine)
    say(world, a="x")
    statements: list[str] = []

    def note(connection: Any, dbapi_cursor: Any, statement: str, *rest: Any) -> None:
        if threading.current_thread().name == "memstate-relay-memory":
            statements.append(statement)

    def cost(looks: int) -> int:
        before, asked = len(statements), len(waits.asked)
        eventually(lambda: len(waits.asked) >= asked + looks)
        return len(statements) - before

    relay = world.memory.relay(postgres_engine, poll_s=(5.0, 5.0))
    relay._workers[0].woken = waits = Waits(short_s=6.0)
    event.listen(postgres_engine, "before_cursor_execute", note)
    with relay:
        eventually(lambda: holds(world.index, means("a")))
        eventually(lambda: cost(looks=20) <= 50)  # once the delivered rows are recorded


# -- retention ---------------------------------------------------------------------------------------------------------


def test_the_outbox_does_not_grow_behind_an_idle_index(engine: Engine) -> None:
    """The idle index has nothing to do, but its position still moves."""
    from memstate_sa import Memory

    world = World(engine)
    memory = Memory({"busy": InMemoryIndex(), "idle": InMemoryIndex()}, embedder=world.embedder)
    memory.track(Tag, text="meaning", index="busy")
    memory.track(Person, text="about", index="idle")
    relay = memory.relay(engine)
    relay.drain()
    say(world, a="x", b="y")
    relay.drain()
    with engine.begin() as connection:
        forget_delivered(connection)
        assert connection.scalars(select(outbox.c.key)).all() == []


def test_an_index_that_nobody_delivers_to_is_forgotten(engine: Engine) -> None:
    """It no longer keeps outbox rows. When it returns it catches up, without embedding rows that it already has."""
    from memstate_sa import Memory

    world = World(engine)
    lasting = InMemoryIndex()
    memory = Memory({"old": lasting}, embedder=world.embedder)
    memory.track(Tag, text=lambda tag: f"{tag.name} means {tag.meaning}")
    say(world, a="x", b="x")
    memory.relay(engine).drain()
    say(world, b="y", c="x")
    with world.session() as session:
        session.delete(session.get_one(Tag, "a"))
        session.commit()
    with engine.begin() as connection:
        connection.execute(update(index_state).values(active_at=utcnow() - timedelta(days=8)))
    relay = world.memory.relay(engine, retention=Retention(index=timedelta(days=7)))
    relay.drain()
    with engine.connect() as connection:
        assert connection.scalars(select(cursor.c.index).distinct()).all() == ["memory"]
    relay._clean_up_at = 0.0
    relay.run_once()
    with engine.connect() as connection:
        assert connection.scalars(select(outbox.c.key)).all() == []
    relay.stop()
    memory.relay(engine).drain()
    assert_index_holds(lasting, world.embedder, {**means("b", meaning="y"), **means("c")})


def test_old_changes_become_one_baseline(engine: Engine) -> None:
    """This needs a retention of the log. Without one nothing is deleted. The rest replays to the table."""
    world = World(engine)
    for meaning in ("one", "two", "three"):
        say(world, a=meaning, b=meaning)
    with world.session() as session:
        world.memory.annotate(session, actor="ada")
        session.delete(session.get_one(Tag, "b"))
        session.commit()
    world.relay.drain()
    with engine.begin() as connection:
        everything = connection.scalar(select(func.count()).select_from(log))
        assert everything == 7
        with rewriting(connection):
            connection.execute(update(log).values(at=utcnow() - timedelta(days=31)))
        connection.execute(update(header).values(at=utcnow() - timedelta(days=31)))
    say(world, a="four", c="new")
    relay = world.memory.relay(engine, page_size=2, retention=Retention(log=timedelta(days=30)))
    relay.drain()
    with world.session() as session:
        changes = [(change.key, change.op) for change in world.memory.history(session, Tag)]
        assert changes == [("a", "baseline"), ("a", "update"), ("c", "insert")]
        [undone] = [c for c in world.memory.rollback(session, steps=5) if c.key == "a"]
        assert undone.after is not None and undone.after["meaning"] == "three"
        session.commit()
    with engine.connect() as connection:
        assert "ada" not in connection.scalars(select(header.c.actor)).all()
    world.assert_in_step()


def test_a_transaction_is_folded_as_a_whole(engine: Engine) -> None:
    """Half a transaction could not be undone."""
    world = World(engine)
    say(world, a="one", b="one")
    with engine.begin() as connection, rewriting(connection):
        connection.execute(update(log).where(log.c.key == '["a"]').values(at=utcnow() - timedelta(days=31)))
    world.memory.relay(engine, retention=Retention(log=timedelta(days=30))).drain()
    with world.session() as session:
        assert {change.op for change in world.memory.history(session, Tag)} == {"insert"}
        assert len(world.memory.rollback(session)) == 2
        session.commit()
    world.assert_in_step()


def test_the_ledger_forgets_deleted_rows(engine: Engine) -> None:
    """It forgets them only with a retention, and after its time."""
    world = World(engine)
    say(world, a="x", b="x")
    world.relay.drain()
    with world.session() as session:
        session.delete(session.get_one(Tag, "a"))
        session.commit()
    world.relay.drain()
    for keep, left in ((timedelta(days=1), {'["a"]', '["b"]'}), (timedelta(), {'["b"]'})):
        world.memory.relay(engine, retention=Retention(ledger=keep)).drain()
        with engine.connect() as connection:
            assert set(connection.scalars(select(ledger.c.key))) == left
    world.assert_in_step()


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_stopping_ends_after_the_current_batch(engine: Engine) -> None:
    """Written points are recorded. The next owner can have the rest at once."""
    index = Spy(max_batch=5)
    world = World(engine, index)
    world.relay.drain()
    say(world, **{f"t{n:02}": "x" for n in range(50)})
    writing = threading.Event()

    relay = world.memory.relay(engine)

    def slow(point: Point) -> None:
        writing.set()
        eventually(lambda: relay._workers[0].delivery.slot_worker.stopping)

    index.refuse = slow
    relay.start()
    assert writing.wait(60)
    relay.stop()
    written = sum(map(len, index.batches))
    assert written == 5
    index.refuse = lambda point: None
    index.batches.clear()
    world.assert_in_step()
    assert sum(map(len, index.batches)) == 50 - written


class Killed(BaseException):
    """The process has ended."""


def test_relay_with_unsettled_keys_does_not_leave_cleanly(engine: Engine) -> None:
    """One relay dies between index and ledger. The next takes over, and leaves before it reaches that key."""
    index = Spy()
    world = World(engine, index)
    world.relay.drain()
    say(world, a="x")
    say(world, b="x")
    dying = world.memory.relay(engine)
    upsert = index.upsert

    def write_and_die(points: Sequence[Point]) -> None:
        upsert(points)
        raise Killed

    index.upsert = write_and_die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        dying.run_once()
    index.upsert = upsert  # type: ignore[method-assign]
    expire_leases(engine)
    with world.session() as session:
        session.delete(session.get_one(Tag, "b"))
        session.commit()
    second = world.memory.relay(engine, page_size=1)
    second.run_once()
    second.stop()
    world.assert_in_step()


def test_a_relay_frozen_in_a_transaction_blocks_nobody(postgres_engine: Engine) -> None:
    """It holds the rows of its slots. The server ends its transaction when its lease expires."""
    world = World(postgres_engine)
    say(world, a="x")
    world.relay.drain()
    frozen = create_engine(postgres_engine.url)
    connection = frozen.connect()
    from memstate_sa.db.dialects import POSTGRESQL

    connection.execute(select(cursor).with_for_update()).all()
    POSTGRESQL.limit_transaction(connection, 0.3)
    say(world, b="x")
    world.memory.relay(postgres_engine).drain()
    assert_index_holds(world.index, world.embedder, means("a", "b"))
    with pytest.raises(DBAPIError):
        connection.execute(select(cursor))
    connection.invalidate()
    frozen.dispose()


@pytest.mark.deep_on("sqlite")
@pytest.mark.deep_on("postgres")
def test_a_database_that_is_away_is_not_hammered(engine: Engine) -> None:
    """The log is not flooded either, and the relay returns soon after the database."""
    world = World(engine)
    world.relay.drain()
    relay = world.memory.relay(engine, lease_s=0.2, policy=RetryPolicy(delay_s=0.05))
    worker = relay._workers[0]
    do, asked = worker.delivery._do, list[float]()
    away = threading.Event()

    def fail(request: Any) -> Any:
        if away.is_set():
            asked.append(time.monotonic())
            raise OperationalError("SELECT 1", {}, Exception("gone"))
        return do(request)

    worker.delivery._do = fail  # type: ignore[method-assign]
    with relay:
        eventually(lambda: bool(worker.delivery.slot_worker.epochs))
        began = time.monotonic()
        away.set()
        say(world, a="x")
        time.sleep(1.5)
        eventually(lambda: len(asked) >= 2)
        assert len(asked) <= 10 * (time.monotonic() - began)
        away.clear()
        eventually(lambda: holds(world.index, means("a")))


# -- defects that a review found ---------------------------------------------------------------------------------------


def test_a_relay_that_could_not_be_released_can_be_started_again(engine: Engine) -> None:
    """The database was away when the relay was stopped."""
    world = World(engine)
    relay = world.memory.relay(engine)
    relay.run_once()
    delivery = relay._workers[0].delivery
    do = delivery._do

    def away(request: Any) -> Any:
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    delivery._do = away  # type: ignore[method-assign]
    relay.stop()
    delivery._do = do  # type: ignore[method-assign]
    expire_leases(engine)
    say(world, a="x")
    with relay:
        eventually(lambda: holds(world.index, means("a")))
    world.assert_in_step()


@pytest.mark.deep
def test_relays_that_leave_and_claim_do_not_deadlock(postgres_engine: Engine) -> None:
    """They lock the same rows in the same order."""
    world = World(postgres_engine)
    world.relay.drain()
    stop, errors = time.monotonic() + 3, list[BaseException]()

    def come_and_go() -> None:
        try:
            while time.monotonic() < stop:
                relay = world.memory.relay(postgres_engine)
                relay.run_once()
                relay.stop()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=come_and_go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    say(world, a="x")
    world.assert_in_step()


def test_page_begun_before_a_second_entity_is_delivered_again(engine: Engine) -> None:
    """The page lacks the entity mark that points need from then on, so it is not acknowledged."""
    from memstate_sa import Memory

    world, index = World(engine), Interrupted(fenced=False)
    old, new = (Memory({"shared": index}, embedder=world.embedder) for _ in range(2))
    for memory in (old, new):
        memory.track(Tag, text=lambda tag: f"{tag.name} means {tag.meaning}")
    new.track(Person, text="about")
    relay = old.relay(engine)
    relay.drain()
    say(world, a="x")
    index.during, index.meddle = "before upsert", lambda: new.relay(engine).run_once()
    relay.run_once()
    relay.stop()
    expire_leases(engine)
    new.relay(engine).drain()
    [vector] = world.embedder.embed(["a means x"])
    assert [m.id for m in index.query(vector, 1, where={"memstate_entity": {"$eq": "tag"}})] == ['tag["a"]']


def test_relay_works_with_an_engine_in_autocommit_or_serializable(postgres_engine: Engine) -> None:
    """The relay sets the isolation level that it needs."""
    for level in ("AUTOCOMMIT", "SERIALIZABLE"):
        world = World(postgres_engine)
        engine = postgres_engine.execution_options(isolation_level=level)
        relays = [world.memory.relay(engine) for _ in range(2)]
        say(world, **{f"{level}{n}": "x" for n in range(20)})
        eventually(lambda relays=relays: sum(relay.run_once() for relay in relays) == 0)  # type: ignore[misc]
        slots = [set(relay._workers[0].delivery.slot_worker.epochs) for relay in relays]
        assert not slots[0] & slots[1]
        for relay in relays:
            relay.stop()
        world.assert_in_step()


def test_a_transaction_longer_than_a_page_is_folded_as_a_whole(engine: Engine) -> None:
    """A page grows until it holds the whole transaction."""
    from memstate_sa.relay.retention import fold_log

    world = World(engine)
    say(world, **{f"t{n}": "one" for n in range(10)})
    with world.session() as session:
        session.execute(update(Tag).values(meaning="two"))
        session.commit()
    place, kinds = 0, [10]
    for _ in range(2):
        with engine.begin() as connection:
            place = fold_log(connection, timedelta(), place, limit=3)
            kinds.append(connection.scalar(select(func.count()).where(log.c.op != "baseline")) or 0)
    assert kinds == [10, 10, 0]
    with world.session() as session:
        assert world.memory.rollback(session) == []
    world.assert_in_step()


def dead_and_mended(engine: Engine) -> tuple[World, Relay]:
    """The index has refused the tag "a", and would accept it now."""
    index = Spy()
    index.refuse = lambda point: DeliveryRejected("no")
    world = World(engine, index)
    relay = world.memory.relay(engine, policy=RetryPolicy(max_attempts=1))
    say(world, a="odd")
    relay.drain()
    index.refuse = lambda point: None
    return world, relay


def test_wait_waits_for_a_mended_dead_key(engine: Engine) -> None:
    """Its row has changed, so it is pending, not refused."""
    world, relay = dead_and_mended(engine)
    with world.session() as session:
        session.get_one(Tag, "a").meaning = "fine"
        session.commit()
        with pytest.raises(DeliveryError, match="Check that a relay is running"):
            world.memory.wait(session, timeout=0.05)
        with relay:
            world.memory.wait(session)
    world.assert_in_step()


def test_wait_succeeds_while_a_dead_key_is_delivered(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is delivered between the look at refused keys and the look at pending keys."""
    world, relay = dead_and_mended(engine)
    asked, is_pending = [], waiting._IndexWait._is_pending

    def deliver_first(*args: Any) -> bool:
        relay.drain()
        asked.append(is_pending(*args))
        return asked[-1]

    monkeypatch.setattr(waiting._IndexWait, "_is_pending", deliver_first)
    with world.session() as session:
        session.get_one(Tag, "a").meaning = "fine"
        session.commit()
        world.memory.wait(session)
    assert asked == [False]
    world.assert_in_step()


def test_attaching_a_scoped_session_makes_no_session(engine: Engine) -> None:
    """The Session is made on first use, with the configuration of that time."""
    registry = scoped_session(sessionmaker())
    World(engine).memory.attach(registry)
    assert not registry.registry.has()
    registry.configure(bind=engine)
    registry.add(Tag(name="a"))
    registry.commit()
    registry.remove()


async def test_commits_succeed_on_an_in_memory_async_sqlite() -> None:
    """No other connection can see this database, and none is opened."""
    pytest.importorskip("aiosqlite")
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

    from memstate_sa import Memory, sqlite
    from memstate_sa.testing import HashEmbedder
    from tests.support import Base

    engine = sqlite.configure(create_async_engine("sqlite+aiosqlite://"))
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(Tag, text="meaning")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.run_sync(metadata.create_all)
    sessions = async_sessionmaker(engine)
    memory.attach(sessions)
    async with sessions() as session:
        session.add(Tag(name="a"))
        await session.commit()
    await engine.dispose()
