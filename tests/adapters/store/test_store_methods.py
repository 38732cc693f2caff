"""MemoryStore: the past, the state of its indexes, repair, undo and erasure."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine

from memstate_sa import DeliveryError, Fact, HistoryMissing, MemoryStore, MemstateError, NotFound
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import FlakyIndex, HashEmbedder
from tests.adapters.store.facts import contents, note, opened

pytestmark = pytest.mark.sa20


class Profile(BaseModel):
    user: str
    city: str | None = None


@pytest.fixture
def store(engine: Engine) -> Iterator[MemoryStore]:
    with opened(engine) as made:
        yield made


def found(store: MemoryStore, query: str, **options: Any) -> list[str]:
    return [hit.fact.payload["content"] for hit in store.search(query, **options)]


# -- the past ----------------------------------------------------------------------------------------------------------


def test_history_without_an_id_has_all_facts(store: MemoryStore) -> None:
    """The filters by actor and session_id, and the limit, are those of Memory.history."""
    a = store.commit(note("a"), actor="ada")
    b = store.commit(note("b"), session_id="s1")
    store.delete(a, actor="bob")
    assert [(c.key, c.op) for c in store.history()] == [(a, "insert"), (b, "insert"), (a, "delete")]
    assert [(c.key, c.op) for c in store.history(actor="ada")] == [(a, "insert")]
    assert [(c.key, c.op) for c in store.history(session_id="s1")] == [(b, "insert")]
    assert [(c.key, c.op) for c in store.history(limit=1)] == [(a, "delete")]
    assert [c.op for c in store.history(a, limit=1)] == ["delete"]


def test_as_of_returns_a_copy_of_the_fact(store: MemoryStore) -> None:
    """A moment is a transaction or a time. The copy is a Fact that no Session knows."""
    id_ = store.commit(note("tea"), session_id="s1")
    [first] = store.history(id_)
    store.update(id_, {"payload": {"content": "coffee"}})
    now = store.get(id_)
    past = store.as_of(id_, first.tx)
    assert past is not None and now is not None
    assert (past.id, past.type, past.payload, past.session_id) == (id_, "note", {"content": "tea"}, "s1")
    assert (past.created_at, past.ephemeral, past.expires_at) == (now.created_at, False, None)
    assert now.payload == {"content": "coffee"}
    present = store.as_of(id_, datetime.now(UTC))
    assert present is not None and present.payload == now.payload
    store.delete(id_)
    assert store.as_of(id_, store.history(id_)[-1].tx) is None
    assert store.as_of("nope", first.tx) is None


def test_diff_has_one_change_for_each_fact(store: MemoryStore) -> None:
    """A fact that is the same at both moments is left out."""
    a = store.commit(note("a1"))
    start = store.history(a)[-1].tx
    store.update(a, {"payload": {"content": "a2"}})
    b = store.commit(note("b"))
    middle = store.history(b)[-1].tx
    store.update(a, {"payload": {"content": "a3"}})
    store.delete(b)
    [change] = store.diff(start)
    assert change.before and change.after
    assert (change.key, change.before["payload"], change.after["payload"]) == (a, {"content": "a1"}, {"content": "a3"})
    assert [(c.key, c.op) for c in store.diff(start, middle)] == [(a, "update"), (b, "insert")]


def test_search_as_of_finds_the_facts_of_then(store: MemoryStore) -> None:
    """The filters apply to the past facts, too."""
    id_ = store.commit(note("green tea", user="u1"))
    store.commit(note("green tea with milk", user="u2"))
    then = store.history(limit=1)[0].tx
    store.update(id_, {"payload": {"content": "blue bicycle"}})
    assert sorted(found(store, "green tea", as_of=then)) == ["green tea", "green tea with milk"]
    assert found(store, "green tea", as_of=then, filters={"user": "u2"}) == ["green tea with milk"]
    assert found(store, "green tea", as_of=then, max_distance=0.01) == []
    assert sorted(found(store, "green tea")) == ["blue bicycle", "green tea with milk"]


def test_search_takes_the_name_of_an_index(engine: Engine) -> None:
    indexes = {"one": InMemoryIndex(), "two": InMemoryIndex()}
    with MemoryStore(engine, indexes, embedder=HashEmbedder(), background=False) as store:
        store.commit(note("green tea"))
        assert found(store, "green tea", index="two") == ["green tea"]
        with pytest.raises(MemstateError, match="three"):
            store.search("green tea", index="three")


# -- the index ---------------------------------------------------------------------------------------------------------


def test_wait_returns_when_the_index_has_the_transaction(engine: Engine) -> None:
    """The token is the transaction that changed the fact last. A fact that never was has none."""
    with opened(engine, background=True) as store:
        store.wait(store.token("nope"))
        for content in ("green tea", "black tea", "mint tea"):
            id_ = store.commit(note(content))
            assert store.token(id_) == store.history(id_)[-1].tx
            store.wait(store.token(id_))
            assert found(store, content, limit=1, consistency="eventual") == [content]


def test_wait_without_a_relay_raises(store: MemoryStore) -> None:
    token = store.token(store.commit(note("green tea")))
    with pytest.raises(DeliveryError, match="relay"):
        store.wait(token, timeout=0.01)


def test_wait_on_an_in_memory_database_delivers(caplog: pytest.LogCaptureFixture) -> None:
    """No relay runs there. A commit that could not deliver has left the change pending."""
    index = FlakyIndex(InMemoryIndex(), rate=0, partial=False)
    with opened("sqlite://", index, background=True) as store:
        store.relay.pause()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("memstate_sa.store.parts.DRAIN_TIMEOUT_S", 0.0)
            token = store.token(store.commit(note("green tea")))
        assert store.status()["memory"].pending == 1 and "not delivered yet" in caplog.text
        store.relay.resume()
        store.wait(token)
        assert store.status()["memory"].pending == 0


def test_status_counts_undelivered_facts(store: MemoryStore) -> None:
    store.commit(note("green tea"))
    assert store.status()["memory"].pending == 1
    store.relay.drain()
    assert store.status()["memory"].pending == 0


def test_verify_repairs_an_index_that_lost_a_fact(engine: Engine) -> None:
    index = InMemoryIndex()
    with opened(engine, index) as store:
        id_ = store.commit(note("green tea"))
        store.relay.drain()
        index.delete([entry.id for entry in index.scan(None, 9)])
        assert store.verify().missing == [(Fact.__tablename__, id_)]
        seen: list[int] = []
        report = store.verify(repair=True, progress=lambda done, total: seen.append(done))
        assert (report.clean, seen != [], store.verify().clean) == (False, True, True)


def test_doctor_repairs_a_row_that_was_changed_past_the_log(store: MemoryStore) -> None:
    id_ = store.commit(note("green tea"))
    assert store.doctor().healthy
    with store.engine.begin() as connection:
        connection.execute(Fact.__table__.update().values(payload={"content": "changed by hand"}))  # type: ignore[attr-defined]
    assert store.doctor(rows=False).healthy
    assert store.doctor(repair=True).changed == [(Fact.__tablename__, id_)]
    assert store.doctor().healthy
    assert store.history(id_)[-1].reason == "reconciled"


def test_backfill_takes_in_the_unique_values_of_older_facts(store: MemoryStore) -> None:
    id_ = store.commit(Fact(type="profile", payload={"user": "u1"}))
    store.register_schema("profile", Profile, unique_by="user")
    assert store.backfill(batch_size=10) == 0
    assert store.commit(Fact(type="profile", payload={"user": "u1", "city": "Graz"})) == id_


def test_reindex_has_searches_use_the_successor(engine: Engine) -> None:
    indexes = {"one": InMemoryIndex(), "two": InMemoryIndex()}
    with MemoryStore(engine, indexes, embedder=HashEmbedder(), background=False, successors={"one": "two"}) as store:
        store.commit(note("green tea"))
        assert store.reindex(timeout=120) == "two"
        assert store.status()["one"].replaced_by == "two"
        assert found(store, "green tea") == ["green tea"]
        assert store.reindex_back() == "one"
        assert store.status()["one"].replaced_by is None


def test_sweep_deletes_expired_facts(store: MemoryStore) -> None:
    store.commit(Fact(type="note", payload={"content": "old"}, expires_at=datetime(2000, 1, 1, tzinfo=UTC)))
    store.commit(note("kept"))
    assert store.sweep() == 1
    assert contents(store) == ["kept"]


def test_changes_by_engine_are_delivered_in_memory() -> None:
    """On an in-memory SQLite no relay runs: the call itself delivers."""
    index = InMemoryIndex()
    with opened("sqlite://", index, background=True) as store:
        store.commit(Fact(type="note", payload={"content": "old"}, expires_at=datetime(2000, 1, 1, tzinfo=UTC)))
        store.sweep()
        assert index.scan(None, 9) == []


# -- undo and erasure --------------------------------------------------------------------------------------------------


def test_revoke_keeps_the_changes_of_others(store: MemoryStore) -> None:
    kept = store.commit(note("ada's"), actor="ada")
    gone = store.commit(note("bob's"), actor="bob")
    store.update(kept, {"payload": {"content": "bob was here"}}, actor="bob")
    assert {change.key for change in store.revoke(actor="bob").reverted} == {kept, gone}
    assert contents(store) == ["ada's"]


def test_rollback_passes_its_options_on(store: MemoryStore) -> None:
    id_ = store.commit(note("tea"), actor="ada")
    store.update(id_, {"payload": {"content": "coffee"}}, actor="bob")
    assert len(store.rollback(1, actor="bob", dry_run=True)) == 1
    assert contents(store) == ["coffee"]
    store.rollback(tx=store.token(id_))
    assert contents(store) == ["tea"]


def test_erase_leaves_no_image(store: MemoryStore) -> None:
    """The number of redacted entries is returned, and purge rewrites the files."""
    id_ = store.commit(note("a secret"))
    first = store.history(id_)[0].tx
    store.update(id_, {"payload": {"content": "another secret"}})
    assert store.erase(id_, reason="asked for") == 2
    assert all(change.before is None and change.after is None for change in store.history(id_))
    with pytest.raises(HistoryMissing):
        store.as_of(id_, first)
    store.purge()
    with pytest.raises(NotFound):
        store.erase("nope")


def test_export_is_imported_with_its_history(store: MemoryStore) -> None:
    """Another database then has the same facts and the same changes."""
    id_ = store.commit(note("tea"), actor="ada")
    store.update(id_, {"payload": {"content": "coffee"}})
    file = io.StringIO()
    assert store.export_facts(file) == 2
    file.seek(0)
    with opened("sqlite://") as copy:
        assert copy.import_facts(file) == 2
        assert contents(copy) == ["coffee"]
        changes = [(c.op, c.actor, c.after) for c in store.history()]
        assert [(c.op, c.actor, c.after) for c in copy.history()] == changes


def test_closed_store_refuses_every_method(engine: Engine) -> None:
    store = opened(engine)
    store.close()
    for call in (store.history, store.status, store.verify, store.doctor, store.sweep, store.purge, store.rollback):
        with pytest.raises(MemstateError, match="This MemoryStore is closed"):
            call()


@pytest.mark.parametrize("method", ["status", "verify", "doctor", "sweep", "purge", "backfill", "reindex"])
def test_calls_with_own_connections_are_refused_in_a_transaction(store: MemoryStore, method: str) -> None:
    """On SQLite they would wait for the locks of the caller itself."""
    with store.transaction():
        id_ = store.commit(note("tea"))
        with pytest.raises(MemstateError, match="Cannot call this inside a transaction"):
            getattr(store, method)()
        with pytest.raises(MemstateError, match="Cannot call this inside a transaction"):
            store.wait(store.token(id_))
    assert contents(store) == ["tea"]


# -- repr --------------------------------------------------------------------------------------------------------------


def test_repr_shows_database_index_and_relay(engine: Engine) -> None:
    """Passwords are left out, those in the query of a URL too."""
    shown = engine.url.set(query={}).render_as_string()
    with opened(engine, background=True) as store:
        assert repr(store) == f"<MemoryStore [{shown} | index: memory | relay: running]>"
        store.relay.stop()
        assert repr(store) == f"<MemoryStore [{shown} | index: memory | relay: stopped]>"
    assert repr(store) == f"<MemoryStore [{shown} | index: memory | closed]>"


def test_repr_of_an_in_memory_store() -> None:
    with opened("sqlite://", background=True) as store:
        assert repr(store) == "<MemoryStore [sqlite:// | index: memory | relay: after each commit]>"


def test_store_without_an_index_keeps_history_and_undo(engine: Engine) -> None:
    with MemoryStore(engine) as store:
        assert "index: none | relay: running" in repr(store)
        id_ = store.commit(note("tea"))
        store.update(id_, {"payload": {"content": "coffee"}})
        store.rollback()
        assert contents(store) == ["tea"]
        assert [change.op for change in store.history(id_)] == ["insert", "update", "update"]
        assert (store.status(), store.verify().clean, store.doctor().healthy) == ({}, True, True)
        store.wait(store.token(id_))
        with pytest.raises(MemstateError, match="index"):
            store.search("tea")


# -- facts -------------------------------------------------------------------------------------------------------------


def test_fact_refuses_unknown_arguments() -> None:
    with pytest.raises(TypeError, match="typ"):
        Fact(typ="note", payload={})  # type: ignore[call-arg]
