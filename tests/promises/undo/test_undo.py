"""Undo in scopes, revoking a run, conflicts, and history across migrations."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import strategies as st
from sqlalchemy import Engine, ForeignKey, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memstate_sa import ConflictError, Memory, MemstateError, NotFound
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.log.changes import replay
from memstate_sa.testing import HashEmbedder
from memstate_sa.undo import undo as undo_module
from tests.support import PATIENCE_S, apps, assert_index_holds, explore, sizes
from tests.support.statements import statements

pytestmark = pytest.mark.sa20


class Base(DeclarativeBase):
    pass


class Team(Base):
    __tablename__ = "team"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="team")
    captain_id: Mapped[int | None] = mapped_column(ForeignKey("player.id", use_alter=True, name="captain"))


class Player(Base):
    __tablename__ = "player"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="player")
    number: Mapped[int] = mapped_column(unique=True)
    nick: Mapped[str] = mapped_column(sa.String(12), unique=True)
    team_id: Mapped[int | None] = mapped_column(ForeignKey("team.id"))
    mentor_id: Mapped[int | None] = mapped_column(ForeignKey("player.id"))


MODELS = (Team, Player)


class App(apps.App):
    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, *MODELS, foreign_keys=True)

    def write(self, *rows: Any, actor: str | None = None, session_id: str | None = None, **changes: Any) -> str:
        """Write one transaction, and return its id. *changes*: ``player_1={"text": "x"}``, or None to delete."""
        with self.sessions() as session:
            self.memory.annotate(session, actor=actor, session_id=session_id)
            session.add_all(rows)
            for name, values in changes.items():
                kind, key = name.split("_")
                fact = session.get_one({"team": Team, "player": Player}[kind], int(key))
                if values is None:
                    session.delete(fact)
                for attribute, value in (values or {}).items():
                    setattr(fact, attribute, value)
            session.commit()
            return self.memory.token(session) or ""

    def rollback(self, *args: Any, **options: Any) -> list[Any]:
        with self.sessions() as session:
            changes = self.memory.rollback(session, *args, **options)
            session.commit()
        return changes

    def facts(self) -> dict[tuple[str, Any], dict[str, Any]]:
        return {(model.__tablename__, key): row for model in MODELS for key, row in self.rows(model).items()}

    def texts(self) -> dict[tuple[str, Any], str]:
        return {fact: row["text"] for fact, row in self.facts().items()}

    def check(self) -> None:
        """Assert replay(log) == tables, and index == f(tables)."""
        self.assert_log_is_truth()
        self.memory.relay(self.engine).drain()
        expected = {f"{entity}[{key}]": words for (entity, key), words in self.texts().items() if words}
        assert_index_holds(self.index, self.embedder, expected)


@pytest.fixture
def app(engine: Engine) -> Iterator[App]:
    made = App(engine)
    yield made
    made.memory.close()


def player(n: int, **values: Any) -> Player:
    return Player(id=n, **{"number": n, "nick": f"nick {n}", **values})


# -- scopes ------------------------------------------------------------------------------------------------------------


def test_undo_of_one_class_leaves_the_others(app: App) -> None:
    """The transaction changed two classes. One is undone, and the other can be undone later."""
    app.write(Team(id=1), player(1))
    app.write(team_1={"text": "both"}, player_1={"text": "both"})
    app.write(team_1={"text": "later"})
    changes = app.rollback(model=Player)
    assert [(change.entity, change.op) for change in changes] == [("player", "update")]
    assert app.texts() == {("team", 1): "later", ("player", 1): "player"}
    app.rollback(2)
    assert app.texts() == {("team", 1): "team", ("player", 1): "player"}
    app.check()


def test_rollback_goes_back_to_a_transaction_or_a_time(app: App) -> None:
    app.write(player(1))
    kept = app.write(player_1={"text": "kept"})
    at = datetime.now(UTC)
    states = [app.facts()]
    for n in range(3):
        app.write(player_1={"text": f"later {n}"}, actor="me" if n == 1 else None)
    assert [c.before["text"] for c in app.rollback(to=kept)] == ["later 2", "later 1", "later 0"]
    assert app.facts() == states[0]
    redo = app.rollback(to=at)  # undone transactions do not count
    assert redo == []
    app.write(player_1={"text": "again"})
    app.rollback(to=at)
    assert app.facts() == states[0]
    app.check()


def test_dry_run_shows_the_entries_and_writes_nothing(app: App) -> None:
    app.write(player(1), player(2))
    app.write(player_1={"text": "new"}, player_2=None)
    before = app.facts()
    with app.sessions() as session:
        planned = app.memory.rollback(session, dry_run=True)
        assert session.get_one(Player, 1).text == "new"
        session.commit()
    assert app.facts() == before
    app.check()
    done = app.rollback()
    assert [(c.entity, c.key, c.op, c.before, c.after, c.reverts) for c in planned] == [
        (c.entity, c.key, c.op, c.before, c.after, c.reverts) for c in done
    ]


def test_redo_is_a_rollback_of_the_rollback_also_of_a_part(app: App) -> None:
    app.write(player(1), Team(id=1))
    app.write(player_1={"text": "b"}, team_1={"text": "b"})
    part = app.rollback(model=Player)
    app.rollback(tx=part[0].tx)
    assert app.texts() == {("team", 1): "b", ("player", 1): "b"}
    app.rollback()
    assert app.texts() == {("team", 1): "team", ("player", 1): "player"}
    with pytest.raises(ConflictError, match="already undone"):
        app.rollback(tx=part[0].tx)
    app.check()


def test_bad_arguments_are_refused(app: App) -> None:
    app.write(player(1))
    with app.sessions() as session:
        with pytest.raises(NotFound):
            app.memory.rollback(session, to="no such transaction")
        with pytest.raises(MemstateError, match="aware datetime"):
            app.memory.rollback(session, to=datetime(2024, 1, 1))
        with pytest.raises(MemstateError, match="aware datetime"):
            app.memory.rollback(session, to=5)  # type: ignore[arg-type]
        with pytest.raises(MemstateError, match="both tx= and to="):
            app.memory.rollback(session, to="a", tx="b")
        with pytest.raises(MemstateError, match="on_conflict"):
            app.memory.rollback(session, on_conflict="ignore")  # type: ignore[arg-type]
        with pytest.raises(MemstateError, match="Cannot revoke: choose the changes"):
            app.memory.revoke(session)
        with pytest.raises(MemstateError, match="Cannot revoke: choose the changes"):
            app.memory.revoke(session, actor="a", tx=["b"])
        with pytest.raises(NotFound):
            app.memory.revoke(session, tx=["no such transaction"])
    app.check()


def test_update_without_a_change_is_no_step(app: App) -> None:
    """An UPDATE writes the existing values, of an object that was not loaded, or in bulk."""
    app.write(player(1))
    with app.sessions() as session:
        fact = session.get_one(Player, 1)
        session.expire(fact)
        fact.text = "player"
        session.commit()
        session.execute(update(Player).values(text="player"))
        session.commit()
        assert [change.op for change in app.memory.history(session, Player)] == ["insert"]
    app.rollback()
    assert app.facts() == {}
    app.check()


# -- conflicts ---------------------------------------------------------------------------------------------------------


def test_conflicts_can_be_skipped_or_forced(app: App) -> None:
    app.write(player(1), player(2))
    app.write(player_1={"text": "mine"}, player_2={"text": "mine"}, actor="me")
    theirs = app.write(player_1={"text": "theirs"}, actor="you")
    with pytest.raises(ConflictError) as refused:
        app.rollback(actor="me")
    assert [(change.key, change.actor, change.tx) for change in refused.value.changes] == [(1, "you", theirs)]
    assert 'Keep these facts with on_conflict="skip", or overwrite them with "force".' in str(refused.value)
    assert [change.key for change in app.rollback(actor="me", on_conflict="skip")] == [2]
    assert app.texts() == {("player", 1): "theirs", ("player", 2): "player"}
    app.rollback(actor="me", on_conflict="force")
    assert app.texts() == {("player", 1): "player", ("player", 2): "player"}
    app.check()


def test_undo_of_a_row_that_others_refer_to_is_a_conflict(app: App) -> None:
    app.write(Team(id=1), actor="me")
    theirs = app.write(player(1, team_id=1), actor="you")
    for on_conflict in ("raise", "force"):
        with pytest.raises(ConflictError) as refused:
            app.rollback(actor="me", on_conflict=on_conflict)
        assert [(change.entity, change.tx) for change in refused.value.changes] == [("player", theirs)]
        assert 'leave the blocked facts out with on_conflict="skip"' in str(refused.value)
    assert app.rollback(actor="me", on_conflict="skip") == []
    app.write(player_1={"team_id": None}, actor="you")
    app.rollback(actor="me")
    assert list(app.facts()) == [("player", 1)]
    app.check()


def test_undo_of_a_row_without_its_parent_is_a_conflict(app: App) -> None:
    app.write(Team(id=1))
    app.write(player(1, team_id=1))
    app.write(player_1=None, actor="me")
    gone = app.write(team_1=None, actor="you")
    with pytest.raises(ConflictError) as refused:
        app.rollback(actor="me")
    assert [(change.entity, change.op, change.tx) for change in refused.value.changes] == [("team", "delete", gone)]
    app.rollback(2)
    assert set(app.facts()) == {("team", 1), ("player", 1)}
    app.check()


def test_undo_to_a_taken_unique_value_is_a_conflict(app: App) -> None:
    app.write(player(1))
    app.write(player_1={"number": 2}, actor="me")
    taken = app.write(player(3, number=1), actor="you")
    with pytest.raises(ConflictError) as refused:
        app.rollback(actor="me")
    assert [(change.key, change.tx) for change in refused.value.changes] == [(3, taken)]
    app.check()


def test_child_is_skipped_with_its_parent(app: App) -> None:
    """The parent cannot come back, so the child cannot either."""
    app.write(Team(id=1), player(1))
    app.write(player(2, team_id=1, mentor_id=1))
    app.write(player_2=None, player_1=None, actor="me")
    app.write(player(1, text="theirs"), actor="you")
    with app.sessions() as session:
        result = app.memory.revoke(session, actor="me")
        session.commit()
    assert [change.key for change in result.reverted] == [2]
    assert [change.key for change in result.kept] == [1]
    assert [(change.key, change.actor) for change in result.conflicts] == [(1, "you")]
    app.check()


# -- constraints that need an unusual order ----------------------------------------------------------------------------


def test_swapped_unique_values_are_undone(app: App) -> None:
    app.write(player(1), player(2), player(3))
    before = app.facts()
    with app.sessions() as session:
        one, two, three = (session.get_one(Player, n) for n in (1, 2, 3))
        for fact, number, nick in ((one, -1, "x"), (two, -2, "y"), (three, -3, "z")):
            fact.number, fact.nick = number, nick
        session.flush()
        (one.number, one.nick), (two.number, two.nick) = (2, "nick 3"), (3, "nick 1")
        three.number, three.nick = 1, "nick 2"
        session.commit()
    app.check()
    app.rollback()
    assert app.facts() == before
    app.check()


def test_rows_that_refer_to_each_other_come_back(app: App) -> None:
    """A team and its captain, and players who mentor each other in a circle."""
    app.write(Team(id=1), player(1), player(2))
    app.write(team_1={"captain_id": 1}, player_1={"team_id": 1, "mentor_id": 2}, player_2={"mentor_id": 1})
    before = app.facts()
    with app.sessions() as session:
        session.get_one(Team, 1).captain_id = None
        session.get_one(Player, 2).mentor_id = None
        session.flush()
        for fact in (session.get_one(Player, 1), session.get_one(Player, 2), session.get_one(Team, 1)):
            session.delete(fact)
            session.flush()
        session.commit()
    assert app.facts() == {}
    app.rollback()
    assert app.facts() == before
    app.check()
    app.rollback(2)
    assert app.facts() == {}
    app.check()


# -- revoke ------------------------------------------------------------------------------------------------------------


def test_revoke_undoes_one_run_among_others(app: App) -> None:
    app.write(player(1), player(2), session_id="a")
    app.write(player(3), session_id="b")
    app.write(player_1={"text": "b was here"}, session_id="b")
    app.write(player_2={"text": "a was here"}, session_id="a")
    app.write(player_3={"text": "a too"}, session_id="a")
    with app.sessions() as session:
        planned = app.memory.revoke(session, session_id="a", dry_run=True)
        result = app.memory.revoke(session, session_id="a")
        session.commit()
    assert [(c.key, c.op) for c in planned.reverted] == [(c.key, c.op) for c in result.reverted]
    assert app.texts() == {("player", 1): "b was here", ("player", 3): "player"}
    assert {(c.key, c.op) for c in result.kept} == {(1, "insert")}
    assert [(c.key, c.session_id) for c in result.conflicts] == [(1, "b")]
    app.check()
    app.rollback(tx=result.reverted[0].tx)
    assert app.texts()["player", 3] == "a too"
    app.check()


ACTORS = ("ann", "ben", "cid")
_steps = st.lists(
    st.tuples(st.sampled_from(ACTORS), st.sampled_from(["put", "cut"]), st.integers(1, 4), st.integers(1, 9)),
    min_size=1,
    max_size=10,
)


def play(app: App, steps: Any) -> tuple[list[Any], list[dict[Any, Any]]]:
    """Run one transaction per step. Returns the effective steps, and the rows before and after each of them."""
    states, effective = [app.facts()], []
    for actor, op, key, value in steps:
        with app.sessions() as session:
            app.memory.annotate(session, actor=actor)
            found = session.get(Player, key)
            if op == "cut" and found is not None:
                session.delete(found)
            elif op == "put" and found is None:
                session.add(player(key, text=f"{actor} {value}"))
            elif op == "put" and found is not None:
                found.text = f"{actor} {value}"
            session.commit()
        if app.facts() != states[-1]:
            states.append(app.facts())
            effective.append((actor, op, key, value))
    return effective, states


def clear(app: App) -> None:
    with app.sessions() as session:
        for fact in session.scalars(select(Player)).all():
            session.delete(fact)
        session.commit()


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("examples", sizes(8, 80))
def test_rollback_restores_the_state_n_transactions_ago(app: App, examples: int) -> None:
    @explore(examples, steps=_steps, back=st.integers(1, 10), again=st.integers(1, 3))
    def _holds(steps: Any, back: int, again: int) -> None:
        clear(app)
        _, states = play(app, steps)
        for _ in range(again):
            back = min(back, len(states) - 1)
            if back == 0:
                return
            app.rollback(back)
            del states[len(states) - back :]
            assert app.facts() == states[-1]
        app.check()


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("examples", sizes(8, 80))
def test_revoking_one_is_replaying_the_others(app: App, examples: int) -> None:
    """This holds if no conflict is reported."""

    @explore(examples, steps=_steps, who=st.sampled_from(ACTORS))
    def _holds(steps: Any, who: str) -> None:
        clear(app)
        since = datetime.now(UTC)
        effective, _ = play(app, steps)  # a step that another step made ineffective is in no log
        with app.sessions() as session:
            mine = {c.tx for c in app.memory.history(session, Player) if c.at >= since and c.actor == who}
            if not mine:
                return
            result = app.memory.revoke(session, tx=sorted(mine))
            session.commit()
        app.check()
        after = app.facts()
        if result.conflicts or result.kept:
            touched = {("player", change.key) for change in result.kept}
            assert touched
            return
        clear(app)
        play(app, [step for step in effective if step[0] != who])
        assert after == app.facts()


# -- time travel -------------------------------------------------------------------------------------------------------


def test_as_of_takes_a_time_or_a_transaction(app: App) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=1)
    first = app.write(player(1))
    between = datetime.now(UTC)
    second = app.write(player_1={"text": "new"})
    third = app.write(player_1=None)
    with app.sessions() as session:

        def words(at: Any) -> str | None:
            found = app.memory.as_of(session, Player, 1, at)
            return None if found is None else found["text"]

        assert [words(at) for at in (long_ago, first, between, second, third, datetime.now(UTC))] == [
            None, "player", "player", "new", None, None
        ]  # fmt: skip
        with pytest.raises(NotFound):
            words("nothing")
        with pytest.raises(MemstateError, match=r"the primary key of .* is id"):
            app.memory.as_of(session, Player, (1, 2), first)


def test_as_of_shows_a_row_older_than_its_history(app: App) -> None:
    with app.engine.begin() as connection:
        connection.execute(sa.insert(Player.__table__), {"id": 1, "number": 1, "nick": "a", "text": "old"})
        connection.execute(sa.insert(Player.__table__), {"id": 2, "number": 2, "nick": "b", "text": "never touched"})
    before = datetime.now(UTC)
    app.write(player_1={"text": "new"})
    with app.sessions() as session:
        for key, words in ((1, "old"), (2, "never touched")):
            found = app.memory.as_of(session, Player, key, before)
            assert found is not None
            assert found["text"] == words


def test_diff_is_one_change_a_fact(app: App) -> None:
    a = app.write(player(1), player(2), player(3))
    app.write(player_1={"text": "x"}, player_2={"text": "x"})
    app.write(player_1={"text": "y"}, player_2={"text": "player"}, player_3=None)
    b = app.write(player(4))
    app.write(player_4={"text": "after b"})
    with app.sessions() as session:
        found = app.memory.diff(session, a, b)
        shown = {c.key: (c.op, c.before and c.before["text"], c.after and c.after["text"]) for c in found}
        assert shown == {
            1: ("update", "player", "y"),
            3: ("delete", "player", None),
            4: ("insert", None, "player"),
        }
        assert {c.key for c in app.memory.diff(session, b)} == {4}
        assert app.memory.diff(session, a, b, Team) == []


# -- history that survives migrations ----------------------------------------------------------------------------------


def thing(*columns: Any) -> Any:
    class Own(DeclarativeBase):
        pass

    class Thing(Own):
        __table__ = sa.Table("thing", Own.metadata, sa.Column("id", sa.Integer, primary_key=True), *columns)

    return Thing


def first_shape() -> Any:
    return thing(
        sa.Column("title", sa.String(50), nullable=False),
        sa.Column("price", sa.Integer, nullable=False),
        sa.Column("junk", sa.String(50)),
    )


def second_shape() -> Any:
    """A rename, a type change, a dropped column and a new NOT NULL column."""
    return thing(
        sa.Column("name", sa.String(50), nullable=False),
        sa.Column("price", sa.Numeric(8, 2), nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
    )


def upgrade(old: dict[str, Any]) -> dict[str, Any]:
    return {"id": old["id"], "name": old["title"], "price": Decimal(old["price"]) / 100, "state": "was"}


MIGRATION = {
    "sqlite": [
        "CREATE TABLE new (id INTEGER PRIMARY KEY, name TEXT NOT NULL, price NUMERIC NOT NULL, state TEXT NOT NULL)",
        "INSERT INTO new SELECT id, title, price / 100.0, 'was' FROM thing",
        "DROP TABLE thing",
        "ALTER TABLE new RENAME TO thing",
    ],
    "postgresql": [
        "ALTER TABLE thing RENAME title TO name",
        "ALTER TABLE thing ALTER price TYPE NUMERIC(8, 2) USING price / 100.0",
        "ALTER TABLE thing DROP junk",
        "ALTER TABLE thing ADD state VARCHAR(10) NOT NULL DEFAULT 'was'",
        "ALTER TABLE thing ALTER state DROP DEFAULT",
    ],
}


def test_an_old_fact_is_shown_and_undone_in_todays_shape(engine: Engine) -> None:
    model = first_shape()
    app = apps.make_app(engine, model, text="title")
    with app.session() as session:
        session.add_all([model(id=1, title="one", price=150, junk="j"), model(id=2, title="two", price=200)])
        session.commit()
        session.get_one(model, 1).title = "changed"
        session.delete(session.get_one(model, 2))
        session.commit()
    with engine.begin() as connection:
        for statement in MIGRATION[engine.dialect.name]:
            connection.execute(text(statement))
    model = second_shape()
    with pytest.raises(MemstateError, match="upgrade=2"):
        Memory(InMemoryIndex(), embedder=HashEmbedder()).track(model, text="name", version=2, upgrade={2: upgrade})
    app = apps.make_app(engine, model, text="name", version=2, upgrade={1: upgrade})
    assert app.memory.doctor(engine).healthy
    with app.session() as session:
        first = app.memory.history(session, model, 1)[0]
        assert first.after == {"id": 1, "name": "one", "price": Decimal("1.50"), "state": "was"}
        assert app.memory.as_of(session, model, 2, first.tx) == {
            "id": 2, "name": "two", "price": Decimal("2.00"), "state": "was"
        }  # fmt: skip
        session.add(model(id=3, name="three", price=Decimal("3.00"), state="new"))
        session.commit()
        app.memory.rollback(session, 2)
        session.commit()
        rows = session.execute(sa.select(model.__table__).order_by("id")).all()
        assert [tuple(row) for row in rows] == [(1, "one", Decimal("1.50"), "was"), (2, "two", Decimal("2.00"), "was")]
        replayed = replay(app.memory.history(session, model))
        assert {key: row["name"] for (_, key), row in replayed.items()} == {1: "one", 2: "two"}
    assert app.memory.doctor(engine).healthy


# -- cost --------------------------------------------------------------------------------------------------------------


def test_a_thousand_steps_take_as_many_statements_as_one_for_each_kind(app: App) -> None:
    """Rows are written in batches, not one by one."""
    for n in range(30):
        app.write(player(n))
    app.rollback(1)
    sent = statements(app.engine)
    app.rollback(1)
    few = len(sent)
    sent.clear()
    app.rollback(25)
    assert len(sent) == few
    app.check()


def test_undo_returns_the_changes_that_the_history_shows(app: App) -> None:
    """Inserts, updates of one fact and a delete are undone together, redone, and undone around others' changes."""
    app.write(player(1), player(2))
    start = app.write(player(3))
    app.write(player_1={"text": "one"})
    app.write(player_1={"text": "two"}, player_2=None)
    app.write(player(4))

    def undo(**options: Any) -> str:
        changes = app.rollback(**options)
        with app.sessions() as session:
            history = [change for model in MODELS for change in app.memory.history(session, model)]
        [tx] = {change.tx for change in changes}
        assert changes == sorted((c for c in history if c.tx == tx), key=lambda change: change.id)
        return tx

    undone = undo(to=start)
    undo(tx=undone)
    app.write(player_3={"text": "later"})
    undo(tx=start, on_conflict="force")
    app.check()


def test_writers_wait_while_an_undo_reads_and_writes_a_fact(
    postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others must wait, because the undo would overwrite their commits unseen."""
    app = App(postgres_engine)
    app.write(player(1), player(2))
    app.write(player_1={"text": "mine"})
    look = undo_module.later_entries

    def interrupted(*args: Any) -> Any:
        found = look(*args)
        with app.engine.begin() as other:
            other.execute(text("SET LOCAL lock_timeout = '50ms'"))
            with pytest.raises(OperationalError, match="lock timeout"), other.begin_nested():
                other.execute(update(Player).where(Player.id == 1).values(text="theirs"))
            other.execute(update(Player).where(Player.id == 2).values(text="of another fact"))
            other.rollback()
        return found

    monkeypatch.setattr(undo_module, "later_entries", interrupted)
    [change] = app.rollback(1)
    assert change.before["text"] == "mine" and change.after["text"] == "player"
    app.check()
