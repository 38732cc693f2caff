"""Objects in a terminal and in a notebook. Displaying an object sends no SQL."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html import unescape
from io import StringIO
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from memstate_sa import Change, Diagnosis, DriftReport, Fact, Hit, Hits, Memory, MissingExtra, sqlite
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.log.changes import Changes
from memstate_sa.maintenance.doctor import Problem
from memstate_sa.relay.backlog import Backlog
from memstate_sa.relay.progress import reporting
from memstate_sa.search.hits import Incomplete
from memstate_sa.testing import HashEmbedder
from memstate_sa.undo.undo import Revocation
from tests.support.apps import App

SCRIPT = "<script>alert(1)</script>"


class Base(DeclarativeBase):
    pass


class Tip(Base):
    __tablename__ = "tip"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


def change(before: Any = None, after: Any = None, **values: Any) -> Change:
    op = "delete" if after is None else "insert" if before is None else "update"
    return Change(12, "tx", "tip", 7, op, before, after, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), **values)


UPDATE = change({"text": "old", "n": 1, "same": 0}, {"text": "new", "n": None, "same": 0}, actor="ann", reverts="first")


def test_changed_is_the_columns_that_differ() -> None:
    assert UPDATE.changed == {"text": ("old", "new"), "n": (1, None)}
    assert change(None, {"text": "new"}).changed == {"text": (None, "new")}
    assert change({"text": "old", "n": None}).changed == {"text": ("old", None), "n": (None, None)}
    assert change({"text": "old"}, {"text": "old", "added": None}).changed == {"added": (None, None)}


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        (UPDATE, "<Change [update tip 7 | text='old' → 'new', n=1 → None | by ann | undoes first]>"),
        (change(None, {"text": "new"}), "<Change [insert tip 7 | text='new']>"),
        (change({"text": "x" * 100}), f"<Change [delete tip 7 | text='{'x' * 58}…]>"),
        (Hit(Tip(id=7, text="green tea"), 0.1234), "<Hit [0.123 | Tip id=7, text='green tea']>"),
        (Hits(), "<Hits [0 hits | complete]>"),
        (
            Hits([Hit("fact", 0.5)], [Incomplete.FILLING, Incomplete.UNAVAILABLE]),
            f"<Hits [1 hit | incomplete: {Incomplete.FILLING}, {Incomplete.UNAVAILABLE} | <Hit [0.500 | 'fact']>]>",
        ),
        (
            Backlog(3, 61.2, 1, 0, 2, refilling=True),
            "<Backlog [3 pending, the oldest for 61 s | 1 parked, 0 due, 2 dead | refilling]>",
        ),
        (Backlog(0, None, 0, 0, 0, refilling=False), "<Backlog [0 pending | 0 parked, 0 due, 0 dead]>"),
        (DriftReport(checked=9), "<DriftReport [clean | 9 checked]>"),
        (
            DriftReport(9, ghost=[("tip", 1)], pending=[("tip", 2)]),
            "<DriftReport [not clean | 9 checked | 1 ghost, 1 pending]>",
        ),
        (Diagnosis(checked=9), "<Diagnosis [healthy | 9 checked]>"),
        (Diagnosis(9, {Tip: 3}, [("tip", 1)]), "<Diagnosis [not healthy | 9 checked | 1 changed, 3 unlogged]>"),
        (Revocation([UPDATE], [UPDATE, UPDATE]), "<Revocation [1 reverted | 2 kept, 0 in conflict]>"),
        (Memory(), "<Memory [no index]>"),
        (Memory(InMemoryIndex(), embedder=HashEmbedder()), "<Memory [memory: InMemoryIndex]>"),
        (InMemoryIndex(), "<InMemoryIndex [0 points | not open]>"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_a_repr_is_one_line_that_sums_up(subject: object, text: str) -> None:
    assert repr(subject) == text


def make_engine() -> Engine:
    engine = create_engine("sqlite://")
    sqlite.configure(engine)
    return engine


@pytest.fixture
def app() -> Iterator[App]:
    app = App(make_engine(), Tip)
    app.write(Tip(id=1, text="green tea"))
    yield app
    app.memory.close()


def test_reprs_of_memory_relay_and_index_tell_their_state(app: App) -> None:
    app.relay.drain()
    assert repr(app.memory) == "<Memory [memory: InMemoryIndex | tracks Tip]>"
    assert repr(app.relay) == "<Relay [not running | memory: 1 delivered]>"
    embedder = f"{app.embedder.dimension} dimensions by {app.embedder.fingerprint}"
    assert repr(app.index) == f"<InMemoryIndex [1 point | {embedder}]>"


def test_a_look_at_hits_loads_nothing() -> None:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        tip = Tip(id=1, text="green tea")
        session.add(tip)
        session.commit()
        hits = Hits([Hit(tip, 0.5)])
        engine.dispose()  # this drops the in-memory database: a SELECT would fail
        assert repr(hits[0]) == "<Hit [0.500 | Tip]>"
        assert "Tip" in hits._repr_html_()


@pytest.mark.parametrize(
    "subject",
    [
        Changes([change(None, {SCRIPT: SCRIPT}, actor=SCRIPT, reason=SCRIPT, session_id=SCRIPT)]),
        Hits([Hit(Tip(id=1, text=SCRIPT), 0.5)]),
        DriftReport(missing=[(SCRIPT, SCRIPT)]),
        Diagnosis(gone=[(SCRIPT, SCRIPT)], problems=[Problem(SCRIPT, SCRIPT)]),
        Revocation(reverted=[change(None, {"text": SCRIPT})]),
        Backlog(1, None, 0, 0, 0, refilling=False, problem=SCRIPT),
    ],
    ids=lambda value: type(value).__name__,
)
def test_html_tables_escape_values(subject: Any) -> None:
    html = subject._repr_html_()
    assert "&lt;script&gt;" in html
    assert set(re.findall(r"</?(\w+)", html)) <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}


def cells(subject: Any) -> list[list[str]]:
    """The cells of its table, by row."""
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in subject._repr_html_().split("<tr>")[1:]]


PAYLOAD = {"user": "ana", "topic": "a city, and " * 20, "text": "lives in Porto", "address": {"zip": 1, "city": "Rome"}}
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_table_of_hits_shows_the_columns_of_a_fact_as_people_write_them() -> None:
    fact = Fact(id="7", type="note", payload={"likes": "tea", "n": None}, created_at=AT, ephemeral=False)
    payload = "{&quot;likes&quot;: &quot;tea&quot;, &quot;n&quot;: null}"
    assert cells(Hits([Hit(fact, 0.25)])) == [["distance", "id", "type", "payload"], ["0.250", "7", "note", payload]]
    [_, row] = cells(Hits([Hit(Fact(id="7", type="note", payload=PAYLOAD), 0.25)]))
    assert row[-1].endswith("…") and len(unescape(row[-1])) == 120
    tip = Tip(id=1, text="green tea")
    assert cells(Hits([Hit(tip, 0.25)])) == [["distance", "fact", "id", "text"], ["0.250", "Tip", "1", "green tea"]]


def test_change_of_a_json_object_shows_the_members_that_differ() -> None:
    """The time of a `Fact`'s change is shown once."""
    later = {**PAYLOAD, "text": "lives in Rome", "address": {"zip": 1, "city": "Porto"}, "new": True}
    del later["user"]
    one = replace(
        change({"payload": PAYLOAD, "updated_at": AT}, {"payload": later, "updated_at": AT + timedelta(days=1)}),
        entity="memstate_fact",
    )
    assert repr(one) == (
        "<Change [update memstate_fact 7 | payload.user='ana' → (absent), "
        "payload.text='lives in Porto' → 'lives in Rome', payload.address.city='Rome' → 'Porto', "
        "payload.new=(absent) → True]>"
    )
    [_, row] = cells(Changes([one]))
    assert row[:4] == ["2026-01-02 03:04:05", "tx", "memstate_fact 7", "update"]
    assert row[4] == (
        "payload.user: ana → (absent), payload.text: lives in Porto → lives in Rome, "
        "payload.address.city: Rome → Porto, payload.new: (absent) → true"
    )


def test_table_of_a_revocation_is_a_table_of_changes() -> None:
    one = change(None, {"at": AT, "text": "green tea"}, actor="run-4", reverts="first")
    revocation = Revocation([one], [one])
    assert "<caption>Revocation [1 reverted | 1 kept, 0 in conflict]</caption>" in revocation._repr_html_()
    [head, *rows] = cells(revocation)
    assert head[1:] == cells(Changes())[0] and [row[0] for row in rows] == ["reverted", "kept"]
    assert rows[0][5] == "at: 2026-01-02T03:04:05Z, text: green tea" and rows[0][6] == "run-4"


def test_value_that_json_cannot_express_is_shown_by_its_repr() -> None:
    assert "\\ud800" in Changes([change(None, {"text": "\ud800"})])._repr_html_()


def test_slices_keep_their_class_and_reasons() -> None:
    hits = Hits([Hit("a", 0.1), Hit("b", 0.2)], [Incomplete.FILLING])
    assert isinstance(hits[:1], Hits) and hits[:1].reasons == [Incomplete.FILLING] and not hits[:1].complete
    assert hits[0] == Hit("a", 0.1) and list(hits[1:]) == [Hit("b", 0.2)]
    assert isinstance(Changes([UPDATE])[-1:], Changes) and Changes([UPDATE])[-1] is UPDATE


def test_table_of_changes_counts_them() -> None:
    assert "<caption>1 change<" in Changes([UPDATE])._repr_html_()
    assert "<caption>0 changes<" in Changes()._repr_html_()


def test_html_tables_cut_long_texts_and_many_rows() -> None:
    html = Changes([change(None, {"text": "x" * 10_000})] * 1000)._repr_html_()
    assert len(html) < 100_000
    assert "… and 900 more" in html


def test_every_long_call_shows_a_bar(app: App, capsys: pytest.CaptureFixture[str]) -> None:
    memory, engine, file = app.memory, app.engine, StringIO()
    app.relay.drain(progress=True)
    assert "delivering" in capsys.readouterr().out
    memory.verify(engine, progress=True)
    assert "comparing memory" in capsys.readouterr().out
    memory.doctor(engine, progress=True)
    assert "comparing" in capsys.readouterr().out
    memory.backfill(engine, progress=True)
    assert "logging baselines" in capsys.readouterr().out
    memory.export_facts(engine, file, progress=True)
    assert "exporting" in capsys.readouterr().out
    other = App(make_engine(), Tip)
    assert other.memory.import_facts(other.engine, file.getvalue().splitlines(keepends=True), progress=True) == 1
    assert "importing" in capsys.readouterr().out
    other.memory.close()


def test_progress_is_a_bar_a_function_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with reporting(False, "comparing") as report:
        assert report is None
    with reporting(print, "comparing") as report:
        assert report is print
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(MissingExtra, match=r"pip install 'memstate-sa\[cli\]'"), reporting(True, "comparing"):
        pass
