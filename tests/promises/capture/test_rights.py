"""Roles of PostgreSQL: who may run our functions, and the rights that an application and a relay need."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import pytest
from sqlalchemy import Engine, ForeignKey, delete, select, text, update
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from memstate_sa import Memory, MemstateError
from memstate_sa.capture import triggers
from memstate_sa.capture.append_only import rewriting
from memstate_sa.capture.captured_tables import CapturedTable, captured_in
from memstate_sa.db import functions
from memstate_sa.db.tables import log, outbox, transaction as transactions, trigger_context
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.migrations import VERSION_TABLE, __main__
from memstate_sa.testing import HashEmbedder
from tests.support import Note, Person, Tag, World
from tests.support.apps import make_app
from tests.support.roles import Role, database, name_of, role, sql, values

__all__ = ["role"]

pytestmark = pytest.mark.sa20


SECURITY = Path(__file__).parents[3] / "docs" / "how-to" / "roles.md"


OURS = "FROM pg_proc WHERE proname LIKE 'memstate\\_%' AND pronamespace = 'public'::regnamespace"


def contents(engine: Engine) -> Any:
    with engine.connect() as connection:
        return [connection.execute(select(table).order_by(table.c.id)).all() for table in (log, outbox)]


@pytest.fixture
def world(postgres_engine: Engine) -> Iterator[World]:
    made = World(postgres_engine, capture="trigger")
    with made.session() as session:
        session.add_all([Tag(name="a", meaning="one"), Person(name="Ann", about="of Ghent")])
        session.commit()
    yield made
    made.memory.close()


def problems(world: World) -> list[tuple[str, str]]:
    return [(each.subject, each.message) for each in world.memory.doctor(world.engine).problems]


# -- functions ---------------------------------------------------------------------------------------------------------

BAIT = "CREATE TEMP TABLE tag (name text, meaning text, person_id int)"


def trigger_on(function: str, table: str = "tag") -> str:
    """A trigger that shows the function the tables that it expects."""
    event = function.split("_")[1]
    if event == "append":
        return f"CREATE TRIGGER bait BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION public.{function}()"
    rows = {"insert": "NEW TABLE AS new_rows", "delete": "OLD TABLE AS old_rows"}
    rows["update"] = "OLD TABLE AS old_rows NEW TABLE AS new_rows"
    when = f"AFTER {event} ON {table} REFERENCING {rows[event]}" if event in rows else f"BEFORE {event} ON {table}"
    return f"CREATE TRIGGER bait {when} FOR EACH STATEMENT EXECUTE FUNCTION public.{function}()"


WRITES = {
    "insert": "INSERT INTO tag (name, meaning) VALUES ('b', 'forged')",
    "update": "UPDATE tag SET meaning = 'forged'",
    "delete": "DELETE FROM tag",
    "truncate": "TRUNCATE tag",
    "append": "INSERT INTO tag (name, meaning) VALUES ('b', 'forged')",
}


def test_no_other_role_may_attach_a_function_of_ours(world: World, role: Role) -> None:
    """This covers the functions of tracked tables, by event, and the functions that protect the log."""
    functions_ = values(world.engine, f"SELECT proname {OURS}")
    assert {name.split("_")[1] for name in functions_} == set(WRITES)
    before = contents(world.engine)
    mallory = role(f"TEMPORARY ON DATABASE {database(world)}")
    for function in functions_:
        with pytest.raises(ProgrammingError, match="permission denied for function"):
            sql(mallory, BAIT, trigger_on(function))
    assert contents(world.engine) == before


@pytest.mark.parametrize("place", ["a temporary table", "a table of another schema"])
def test_a_function_that_others_may_attach_still_knows_its_table(world: World, role: Role, place: str) -> None:
    """ALTER DEFAULT PRIVILEGES, or a dump without privileges, may have granted it.

    The same kind: a renamed table, a partition, a table of another database's dump.
    """
    functions_ = [name for name in values(world.engine, f"SELECT proname {OURS}") if "append_only" not in name]
    mallory = role(f"CREATE ON DATABASE {database(world)}")
    sql(world.engine, *(f"GRANT EXECUTE ON FUNCTION {name}() TO PUBLIC" for name in functions_))
    before = contents(world.engine)
    schema = f"s{uuid4().hex[:8]}"
    bait = BAIT if place == "a temporary table" else f"{BAIT.replace('TEMP ', '').replace('tag', f'{schema}.tag')}"
    first = [] if place == "a temporary table" else [f"CREATE SCHEMA {schema}", f"SET LOCAL search_path = {schema}"]
    for function in functions_:
        with pytest.raises(DBAPIError, match="This function captures"):
            sql(mallory, *first, bait, trigger_on(function), WRITES["insert"], WRITES[function.split("_")[1]])
    assert contents(world.engine) == before


def test_a_function_of_the_log_knows_its_table(world: World, role: Role) -> None:
    """It would move the sequence for an id of the future."""
    mallory = role(f"TEMPORARY ON DATABASE {database(world)}")
    sql(world.engine, "GRANT EXECUTE ON FUNCTION memstate_append_only_insert() TO PUBLIC")
    with pytest.raises(DBAPIError, match="append-only"):
        sql(
            mallory,
            "CREATE TEMP TABLE tag (id bigint)",
            trigger_on("memstate_append_only_insert"),
            "INSERT INTO tag VALUES (9)",
        )


@pytest.mark.parametrize("id_", [-5, 0, 2**62 + 1, 2**63 - 1])
def test_role_that_adds_entries_cannot_choose_their_place(world: World, role: Role, id_: int) -> None:
    """It cannot write before other entries, even with `rewriting`'s setting, nor so far ahead that no id is left.

    The same kind: the id of a gap, a deleted id, one such row among several.
    """
    app = role("SELECT, INSERT ON memstate_log")
    before = contents(world.engine)
    names = "id, tx, entity, key, op, version, step, at"
    with pytest.raises(DBAPIError, match="append-only"), app.begin() as connection:
        functions.set_transaction_setting(connection, "rewrite", "on")
        connection.exec_driver_sql(
            f"INSERT INTO memstate_log ({names}) VALUES ({id_}, 'x', 'tag', '[1]', 'delete', 1, true, now())"
        )
    assert contents(world.engine) == before
    sql(world.engine, WRITES["update"])
    assert [(row.key, row.op) for row in contents(world.engine)[0][len(before[0]) :]] == [('["a"]', "update")]


def test_a_function_runs_for_its_event_only(world: World) -> None:
    """It does not run for each row or before the event, even if the owner attaches it like that by mistake."""
    [insert_] = [name for name in triggers_of(world, "tag") if "insert" in name]
    before = contents(world.engine)
    for trigger in (
        f"BEFORE UPDATE ON tag FOR EACH STATEMENT EXECUTE FUNCTION {insert_}()",
        f"AFTER INSERT ON tag FOR EACH ROW EXECUTE FUNCTION {insert_}()",
        f"AFTER INSERT ON note REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION {insert_}()",
    ):
        with pytest.raises(DBAPIError, match="This function captures INSERT"):
            sql(
                world.engine,
                f"CREATE TRIGGER another {trigger}",
                WRITES["update"],
                "INSERT INTO tag (name, meaning) VALUES ('b', 'x')",
                "INSERT INTO note (topic, number, person_id, content) VALUES ('x', 1, 1, 'x')",
            )
    assert contents(world.engine) == before


def triggers_of(world: World, table: str) -> list[str]:
    return values(
        world.engine, f"SELECT tgname FROM pg_trigger WHERE tgrelid = '{table}'::regclass AND tgname LIKE 'memstate%'"
    )


def test_no_cast_of_another_role_runs_as_the_owner(world: World, role: Role) -> None:
    """A role makes a table whose column type has its own casts. The function refuses before any cast runs."""
    mallory = role(f"CREATE ON DATABASE {database(world)}")
    name = name_of(mallory)
    [insert_] = [each for each in triggers_of(world, "tag") if "insert" in each]
    sql(world.engine, f"GRANT EXECUTE ON FUNCTION {insert_}() TO PUBLIC")
    with pytest.raises(DBAPIError, match="This function captures"):
        sql(
            mallory,
            "CREATE TYPE pg_temp.evil AS (x int)",
            f"CREATE FUNCTION pg_temp.run(pg_temp.evil) RETURNS text LANGUAGE plpgsql AS "
            f"$$BEGIN EXECUTE 'ALTER ROLE {name} SUPERUSER'; RETURN '1'; END$$",
            "CREATE CAST (pg_temp.evil AS text) WITH FUNCTION pg_temp.run(pg_temp.evil) AS IMPLICIT",
            "CREATE TEMP TABLE tag (name pg_temp.evil, meaning pg_temp.evil, person_id int)",
            trigger_on(insert_),
            "INSERT INTO tag VALUES (ROW(1), ROW(2), 3)",
        )
    assert values(world.engine, f"SELECT rolsuper FROM pg_roles WHERE rolname = '{name}'") == [False]


def test_renamed_table_is_written_only_after_it_is_tracked_again(world: World) -> None:
    """Otherwise the log would mistake another table of the old name for it. A table dropped and created again is the
    same.
    """
    sql(world.engine, "ALTER TABLE tag RENAME TO label", "CREATE TABLE tag (LIKE label INCLUDING ALL)")
    with pytest.raises(DBAPIError, match=r"captures INSERT of public.tag, not of public\.label"):
        sql(world.engine, "INSERT INTO label (name, meaning) VALUES ('b', 'x')")
    sql(world.engine, "DROP TABLE label CASCADE", "DELETE FROM memstate_outbox")
    world.memory.create_tables(world.engine)
    sql(world.engine, "INSERT INTO tag (name, meaning) VALUES ('b', 'x')")
    assert [row.key for row in contents(world.engine)[1]] == ['["b"]']


def open_up(world: World) -> None:
    """Restore the functions of an earlier version: no check, and PUBLIC may attach them."""
    for name, source in sources(world):
        start, end = source.index(f"  {functions.CHECK}"), source.index("  END IF;\n") + len("  END IF;\n")
        body = functions.dollar_quoted(source[:start] + source[end:])
        sql(
            world.engine,
            f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER "
            f"SET search_path = pg_catalog, pg_temp AS {body}",
            f"GRANT EXECUTE ON FUNCTION {name}() TO PUBLIC",
        )


def sources(world: World) -> list[tuple[str, str]]:
    with world.engine.connect() as connection:
        found = connection.exec_driver_sql(f"SELECT proname, prosrc {OURS}", execution_options={"no_parameters": True})
        return [(name, source) for name, source in found if "append_only" not in name]


def mend_by_another_memory(world: World) -> None:
    """Create the tables by another application's Memory, which does not track these tables."""
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.create_tables(world.engine)


def mend_by_migration(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMSTATE_URL", world.engine.url.render_as_string(hide_password=False))
        __main__.main(["stamp", "memstate_0002"])
        __main__.main(["upgrade", "memstate_0003"])
    sql(world.engine, f"DROP TABLE {VERSION_TABLE}")


@pytest.mark.parametrize(
    "mend", [lambda world: world.memory.create_tables(world.engine), mend_by_another_memory, mend_by_migration]
)
def test_functions_that_are_installed_are_closed(world: World, role: Role, mend: Callable[[World], None]) -> None:
    """Functions of tracked tables are closed: other roles' triggers on them fail. Functions of dropped tables go."""
    open_up(world)
    mallory = role(f"CREATE ON DATABASE {database(world)}")
    [truncate] = [name for name in triggers_of(world, "tag") if "truncate" in name]
    schema = f"s{uuid4().hex[:8]}"
    sql(
        mallory, f"CREATE SCHEMA {schema}", f"CREATE TABLE {schema}.tag (id int)", trigger_on(truncate, f"{schema}.tag")
    )
    source = functions.dollar_quoted(dict(sources(world))[truncate])
    of_dropped = "CREATE FUNCTION memstate_truncate_gone() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS"
    sql(world.engine, f"{of_dropped} {source}")
    named = {subject.removesuffix("()") for subject, message in problems(world) if "attach" in message}
    assert named == {name for name, _ in sources(world)}
    mend(world)
    assert [each for each in problems(world) if "attach" in each[1]] == []
    in_use = [name for table in ("tag", "person", "note") for name in triggers_of(world, table)]
    assert {name for name, _ in sources(world)} == set(in_use)
    assert not any(values(world.engine, f"SELECT has_function_privilege('public', oid, 'EXECUTE') {OURS}"))
    with pytest.raises(DBAPIError, match=r"captures TRUNCATE of public\.tag, not of"):
        sql(mallory, f"TRUNCATE {schema}.tag")
    logged = len(contents(world.engine)[0])
    sql(world.engine, *(WRITES[write] for write in ("insert", "update", "delete", "insert", "truncate")))
    entries = [(row.key, row.op) for row in contents(world.engine)[0][logged:]]
    assert entries[:2] == [('["b"]', "insert"), ('["a"]', "update")]
    assert sorted(entries[2:4]) == [('["a"]', "delete"), ('["b"]', "delete")]
    assert entries[4:] == [('["b"]', "insert"), ('["b"]', "delete")]


def test_dump_without_privileges_is_reported_and_mended(world: World) -> None:
    """A function that PUBLIC may execute is reported, although its source is right."""
    for name in values(world.engine, f"SELECT proname {OURS}"):
        sql(world.engine, f"GRANT EXECUTE ON FUNCTION {name}() TO PUBLIC")
    assert {"memstate_log", "tag", "note", "person"} <= {subject for subject, _ in problems(world)}
    world.memory.create_tables(world.engine)
    assert problems(world) == []


def test_table_of_another_owner_is_reported(world: World, role: Role) -> None:
    """The owner of a table can give a column a type whose casts run as the owner of the functions."""
    owner = name_of(role())
    sql(world.engine, f"ALTER TABLE tag OWNER TO {owner}")
    [(subject, message)] = problems(world)
    assert subject == "tag" and owner in message and "one owner" in message


@pytest.mark.parametrize("kind", ["a partition", "a child", "a parent"])
def test_table_with_partitions_or_children_is_refused(postgres_engine: Engine, kind: str) -> None:
    """Writes to the other tables fire no trigger of it. A table that has its triggers already may get children."""
    world = World(postgres_engine, capture="trigger")
    statements = {
        "a partition": (
            "CREATE TABLE tags (LIKE tag INCLUDING ALL) PARTITION BY RANGE (name)",
            "ALTER TABLE tags ATTACH PARTITION tag DEFAULT",
        ),
        "a child": ("CREATE TABLE tags (LIKE tag)", "ALTER TABLE tag INHERIT tags"),
        "a parent": ("CREATE TABLE tags () INHERITS (tag)",),
    }
    sql(postgres_engine, *statements[kind])
    [(subject, message)] = problems(world)
    assert subject == "tag" and "partitions or children" in message
    with pytest.raises(MemstateError, match="partitions or children"):
        world.memory.create_tables(postgres_engine)
    [offline] = triggers.creating(captured_in(Tag.__table__)["tag"], postgres_engine.dialect)
    with pytest.raises(DBAPIError, match="Cannot create triggers on"):
        sql(postgres_engine, offline)
    world.memory.close()


@pytest.mark.parametrize("left_by", ["SET", "a role"])
def test_leftover_settings_are_ignored(world: World, role: Role, left_by: str) -> None:
    """SET on a pooled connection, or ALTER ROLE … SET, changes no transaction, no step and no permission."""
    app = role("SELECT, INSERT, UPDATE, DELETE ON tag, memstate_log, memstate_trigger_context")
    settings = {"tx": "forged", "step": "off", "skip": "on", "rewrite": "on"}
    if left_by == "a role":  # the role that logs in
        me = values(world.engine, "SELECT session_user")[0]
        for name, value in settings.items():
            sql(world.engine, f"ALTER ROLE {me} SET memstate.{name} = '{value}'")
    try:
        with app.connect() as connection:
            if left_by == "SET":
                for name, value in settings.items():
                    connection.exec_driver_sql(f"SET memstate.{name} = '{value}'")
                connection.commit()
            assert connection.scalar(text("SELECT current_setting('memstate.rewrite')")) == "on"
            connection.exec_driver_sql("INSERT INTO memstate_trigger_context (name) VALUES ('skip tag[\"b\"]')")
            connection.exec_driver_sql("INSERT INTO tag (name, meaning) VALUES ('b', 'x')")
            connection.exec_driver_sql("DELETE FROM memstate_trigger_context")
            connection.commit()
            with pytest.raises(DBAPIError, match="append-only"):
                connection.exec_driver_sql("DELETE FROM memstate_log")
    finally:
        for name in settings:
            sql(world.engine, f"ALTER ROLE {values(world.engine, 'SELECT session_user')[0]} RESET memstate.{name}")
    [entry] = [row for row in contents(world.engine)[0] if row.key == '["b"]']
    assert entry.tx != "forged" and entry.step and entry.op == "insert"


LABELS = [
    "memstate.skip=on",
    "on",
    "'; SELECT set_config('memstate.skip', 'on', true); --",
    'skip tag["b"]',
    "tx",
    "rewrite",
    "$memstate$",
    "%(tx)s %s :name",
]


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_no_label_keeps_a_change_from_the_log(engine: Engine, capture: Any) -> None:
    """Any label is stored as it is: actor, reason and session alike."""
    world = World(engine, capture=capture)
    for number, label in enumerate(LABELS):
        with world.session() as session:
            world.memory.annotate(session, actor=label, reason=label, session_id=label)
            session.add(Tag(name=str(number)))
            session.commit()
    with world.session() as session:
        changes = world.memory.history(session, Tag)
        assert [(change.key, change.actor, change.reason, change.session_id) for change in changes] == [
            (str(number), label, label, label) for number, label in enumerate(LABELS)
        ]
        assert session.execute(select(trigger_context)).all() == []
        assert len(session.execute(select(transactions)).all()) == len(LABELS)
    world.assert_in_step()
    world.memory.close()


# -- names -------------------------------------------------------------------------------------------------------------

NAMES = [
    "do$memstate$llar",
    "$memstate_$",
    "$memstate",
    "@its schema@",
    "it's",
    "\nBEGIN\n",
    "%I %s {0}",
    "a\\'b",
    "$$",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_captured(postgres_engine: Engine, name: str) -> None:
    """Names of schemas, tables, columns and entities, online and in a script that needs no database.

    The same kind: quotes, dollar quotes, placeholders of the template, the check that is added to older functions.
    """
    import sqlalchemy as sa

    metadata = sa.MetaData()
    key, value = sa.Column(f"k{name}", sa.Integer, primary_key=True), sa.Column(name, sa.String)
    table = sa.Table(name, metadata, key, value, schema=f"{name}s")
    captured = CapturedTable(table, name)
    with postgres_engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema(f"{name}s"))
        metadata.create_all(connection)
    Memory(InMemoryIndex(), embedder=HashEmbedder()).create_tables(postgres_engine)
    try:
        [script] = triggers.creating(captured, postgres_engine.dialect)
        sql(postgres_engine, script)
        with postgres_engine.begin() as connection:
            offline = triggers.installed(connection, table)
            assert offline == {each.name: each.source for each in triggers.triggers(connection, captured)}
            for statement in (sa.insert(table).values({key: 1, value: name}), sa.update(table).values({value: None})):
                connection.execute(statement)
            assert connection.execute(select(log.c.entity, log.c.op, log.c.image).order_by(log.c.id)).all() == [
                (name, "insert", {f"k{name}": 1, name: name}),
                (name, "update", {f"k{name}": 1, name: None}),
            ]
    finally:
        with postgres_engine.begin() as connection:
            connection.execute(sa.schema.DropSchema(f"{name}s", cascade=True))


def documented_grants(to: str, role: str) -> str:
    """The GRANT statements of docs/how-to/roles.md, for *role*."""
    blocks = re.findall(r"^```sql\n(.*?)^```$", SECURITY.read_text(), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if f"TO {to};" in block]
    return block.replace(f"TO {to};", f"TO {role};")


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_the_documented_grants_are_enough(postgres_engine: Engine, role: Role, capture: Any) -> None:
    """The application writes, labels, searches, reads history and undoes. Another role delivers. No other right is
    granted.
    """
    world = World(postgres_engine, capture=capture)
    app, relay = role(), role()
    sql(postgres_engine, documented_grants("app", name_of(app)), documented_grants("relay", name_of(relay)))
    sessions = sessionmaker(app)
    world.memory.attach(sessions)
    with sessions() as session:
        world.memory.annotate(session, actor="agent", session_id="s1")
        ann = Person(name="Ann", about="cycles")
        session.add_all([ann, Tag(name="a", meaning="one"), Note(topic="t", number=1, person=ann, content="tea")])
        session.commit()
        ann.about = "swims"
        session.commit()
        session.execute(update(Tag).values(meaning="two"))
        session.delete(session.get(Note, ("t", 1)))
        session.commit()
        world.memory.rollback(session)
        session.commit()
        assert [hit.fact for hit in world.memory.search(session, "swims", Person)] == [ann]
        assert [change.op for change in world.memory.history(session, ann)] == ["insert", "update"]
        assert session.get(Tag, "a").meaning == "one"
    world.memory.relay(relay).drain()
    with sessions() as session:
        assert world.memory.search(session, "swims", Person, limit=1).complete
    assert world.memory.doctor(app, rows=False).problems == []
    world.assert_in_step()
    for statement in ("DELETE FROM memstate_log", "UPDATE memstate_log SET op = 'delete'", "TRUNCATE memstate_log"):
        with pytest.raises(ProgrammingError, match="permission denied"):
            sql(app, statement)
    with pytest.raises(ProgrammingError, match="permission denied"):
        sql(relay, "INSERT INTO tag (name, meaning) VALUES ('b', 'x')")
    world.memory.close()


class Vehicles(DeclarativeBase):
    pass


class Vehicle(Vehicles):
    __tablename__ = "vehicle"
    __mapper_args__: ClassVar[Any] = {"polymorphic_on": "kind", "polymorphic_identity": "vehicle"}
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    text: Mapped[str]


class Car(Vehicle):
    __tablename__ = "car"
    __mapper_args__: ClassVar[Any] = {"polymorphic_identity": "car"}
    id: Mapped[int] = mapped_column(ForeignKey("vehicle.id"), primary_key=True)
    doors: Mapped[int]


class Bike(Vehicles):
    __tablename__ = "bike"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


def delete_object(session: Session, model: type[Any]) -> None:
    session.delete(session.get_one(model, 1))


DELETES: dict[str, Callable[[Session, type[Any]], Any]] = {
    "of an object": delete_object,
    "by a WHERE": lambda session, model: session.execute(delete(model).where(model.text == "one")),
    "of a table": lambda session, model: session.execute(delete(model.__table__)),
    "by a WHERE, with results": lambda session, model: session.scalars(delete(model).returning(model.text)).all(),
}


@pytest.mark.parametrize(
    ("model", "capture", "kind"),
    [(Bike, capture, kind) for capture in ("session", "trigger") for kind in DELETES]
    + [(Car, "session", "of an object")],
)
@pytest.mark.parametrize("is_known", [True, False])
def test_a_role_that_may_not_update_can_delete(
    postgres_engine: Engine, role: Role, model: type[Any], capture: Any, kind: str, is_known: bool
) -> None:
    """PostgreSQL lets a role lock only rows that it may update. *is_known*: the log has an entry of the row."""
    app = make_app(postgres_engine, Vehicle if model is Car else Bike, capture=capture)
    values = {"id": 1, "text": "one", **({"doors": 3} if model is Car else {})}
    with app.session() if is_known else Session(postgres_engine) as session:
        session.add(model(**values))
        session.commit()
    if not is_known:
        with postgres_engine.begin() as connection, rewriting(connection):
            connection.execute(delete(log))
    engine = role()
    sql(postgres_engine, re.sub("GRANT .* person.*;\n", "", documented_grants("app", name_of(engine))))
    sql(postgres_engine, f"GRANT SELECT, DELETE ON vehicle, car, bike TO {name_of(engine)}")
    with app.sessions(bind=engine) as session:
        DELETES[kind](session, model)
        session.commit()
    with app.session() as session:
        operations = [change.op for change in app.memory.history(session, app.models[0])]
    assert operations == ["insert" if is_known else "baseline", "delete"]
    app.assert_log_is_truth()


def test_a_program_that_only_writes_tables_needs_no_right_on_ours(world: World, role: Role) -> None:
    """It can neither invent entries nor keep its own changes out of the log."""
    app = role("INSERT, UPDATE, DELETE, SELECT ON tag")
    sql(app, WRITES["insert"], "UPDATE tag SET meaning = 'x' WHERE name = 'b'")
    for table in (log, outbox, trigger_context, transactions):
        with pytest.raises(ProgrammingError, match="permission denied"):
            sql(app, f"INSERT INTO {table.name} DEFAULT VALUES")
    world.assert_in_step()
