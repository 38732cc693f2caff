"""Models captured by triggers, through the life of an application: each revision is as autogenerate writes it, or as a
developer would edit it, and `alembic check` is clean after it.
"""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, inspect, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from memstate_sa.db.tables import outbox
from tests.adapters.alembic.application import HAS_PLUGINS, OURS_TOO, Application, contents, routines
from tests.support.older import NEW, OLD, make_older
from tests.support.triggers import images, operations, problems

pytestmark = pytest.mark.sa20


NOTE = """
class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[Optional[str]]
"""


TRACKED = 'memory.track(Note, text="text", capture="trigger")\n'


TITLED = NOTE + "    title: Mapped[Optional[str]]\n"


@pytest.fixture
def app(tmp_path: Path, engine: Engine) -> Application:
    made = Application(tmp_path / "app", engine)
    made.write_env(OURS_TOO)
    return made


@pytest.fixture
def notes(app: Application) -> Application:
    """An application that has notes, which triggers capture."""
    app.write_models(NOTE + TRACKED)
    app.revise("r1")
    app.upgrade()
    assert app.differences() == ""
    return app


def only_ours(app: Application) -> list[str]:
    return [name for name, _ in routines(app.engine) if name.startswith("memstate_") and "append_only" not in name]


def test_first_revision_creates_tables_and_triggers(app: Application) -> None:
    """Tables, triggers and the log's own are made by one revision, which is undone without a trace."""
    before = routines(app.engine)
    app.write_models(NOTE + TRACKED)
    source = app.revise("r1")
    assert operations(source)[-2:] == ["memstate_protect_log", "memstate_track"]
    assert operations(source, "downgrade")[:2] == ["memstate_untrack", "memstate_unprotect_log"]
    assert "memstate_sa" not in source.replace("memstate_sa'", "")  # it imports nothing of ours
    for _ in range(2):
        app.upgrade()
        assert app.differences() == "" and problems(app) == []
        app.execute("INSERT INTO note (id, text) VALUES (1, 'a')", "UPDATE note SET text = 'b'", "DELETE FROM note")
        assert images(app) == [
            ("note", "insert", {"id": 1, "text": "a"}),
            ("note", "update", {"id": 1, "text": "b"}),
            ("note", "delete", None),
        ]
        with pytest.raises(Exception, match="append-only"):
            app.execute("DELETE FROM memstate_log")
        app.downgrade("base")
        assert contents(app.engine, ours=True) == {} and routines(app.engine) == before


def test_tracking_an_existing_model_keeps_its_rows(app: Application) -> None:
    """Its rows stay; the next change of one logs what it was."""
    app.write_models(NOTE)
    app.revise("r1")
    app.upgrade()
    app.execute("INSERT INTO note (id, text) VALUES (1, 'a')")
    app.write_models(NOTE + TRACKED)
    assert "memstate_track" in app.differences()
    assert operations(app.revise("r2")) == ["memstate_track"]
    app.upgrade()
    assert app.differences() == "" and problems(app) == []
    app.execute("UPDATE note SET text = 'b'")
    assert images(app) == [
        ("note", "baseline", {"id": 1, "text": "a"}),
        ("note", "update", {"id": 1, "text": "b"}),
    ]


@pytest.mark.deep
@pytest.mark.deep_on("sqlite")
def test_untracking_a_model_keeps_its_log(notes: Application) -> None:
    """What was logged stays; downgrading captures again."""
    notes.execute("INSERT INTO note (id, text) VALUES (1, 'a')")
    notes.write_models(NOTE)
    assert operations(notes.revise("r2")) == ["memstate_untrack"]
    notes.upgrade()
    assert notes.differences() == "" and only_ours(notes) == []
    notes.execute("UPDATE note SET text = 'b'")
    assert images(notes) == [("note", "insert", {"id": 1, "text": "a"})]
    notes.downgrade("r1")
    notes.write_models(NOTE + TRACKED)
    assert notes.differences() == "" and problems(notes) == []
    notes.execute("UPDATE note SET text = 'c'")
    assert [op for _, op, _ in images(notes)] == ["insert", "update"]


@pytest.mark.deep_on("postgres")
def test_dropping_a_tracked_table_removes_its_triggers_first(notes: Application) -> None:
    """Its triggers first: on PostgreSQL their functions would stay behind."""
    notes.execute("INSERT INTO note (id, text) VALUES (1, 'a')")
    notes.write_models("")
    assert operations(notes.revise("r2")) == ["memstate_untrack", "drop_table"]
    notes.upgrade()
    assert notes.differences() == "" and only_ours(notes) == []
    assert images(notes) == [("note", "insert", {"id": 1, "text": "a"})]
    notes.downgrade("r1")
    notes.write_models(NOTE + TRACKED)
    assert notes.differences() == "" and problems(notes) == []


@pytest.mark.deep_on("sqlite")
def test_adding_a_column_replaces_the_triggers(notes: Application) -> None:
    """The triggers of before go, and those of after come: images hold what the row has. Downwards, the reverse."""
    notes.write_models(TITLED + TRACKED)
    source = notes.revise("r2")
    assert [op for op in operations(source) if op != "batch_alter_table"] == [
        "memstate_untrack", "add_column", "memstate_track",
    ]  # fmt: skip
    notes.upgrade()
    assert notes.differences() == "" and problems(notes) == []
    notes.execute("INSERT INTO note (id, text, title) VALUES (1, 'a', 'A')")
    notes.downgrade("r1")
    notes.write_models(NOTE + TRACKED)
    assert notes.differences() == "" and problems(notes) == []
    notes.execute("UPDATE note SET text = 'b'")
    assert images(notes) == [
        ("note", "insert", {"id": 1, "text": "a", "title": "A"}),
        ("note", "update", {"id": 1, "text": "b"}),
    ]
    notes.upgrade()
    notes.write_models(TITLED + TRACKED)
    assert notes.differences() == "" and problems(notes) == []


@pytest.mark.deep
@pytest.mark.deep_on("postgres")
def test_altering_or_dropping_a_column_keeps_triggers_current(notes: Application) -> None:
    """Whether the database rewrites the table for it or not; SQLite cannot drop a column that a trigger names."""
    required = (model.replace("text: Mapped[Optional[str]]", "text: Mapped[str]") for model in (NOTE, TITLED))
    for number, model in enumerate([*required, NOTE], start=2):
        notes.write_models(model + TRACKED)
        notes.revise(f"r{number}")
        notes.upgrade()
        assert notes.differences() == "" and problems(notes) == []
    notes.execute("INSERT INTO note (id, text) VALUES (1, 'a')")
    notes.downgrade("r1")
    assert notes.differences() == "" and problems(notes) == []
    notes.execute("UPDATE note SET text = NULL")
    assert images(notes) == [
        ("note", "insert", {"id": 1, "text": "a"}),
        ("note", "update", {"id": 1, "text": None}),
    ]


@pytest.mark.deep_on("postgres")
def test_new_index_leaves_the_triggers_as_they_are(notes: Application) -> None:
    """The triggers stay as they are."""
    before = routines(notes.engine)
    notes.write_models(
        NOTE.replace("Mapped[Optional[str]]", "Mapped[Optional[str]] = mapped_column(index=True)") + TRACKED
    )
    assert "memstate_track" not in operations(notes.revise("r2"))
    notes.upgrade()
    assert notes.differences() == "" and routines(notes.engine) == before


@pytest.mark.deep
@pytest.mark.deep_on("sqlite")
def test_renaming_a_column_keeps_its_history(notes: Application) -> None:
    """Autogenerate sees one go and one come: its lines become one. ``upgrade=`` shows old history by the new name."""
    notes.execute("INSERT INTO note (id, text) VALUES (1, 'a')")
    renamed = NOTE.replace("text: ", "body: ")
    notes.write_models(
        renamed + 'memory.track(Note, text="body", capture="trigger", version=2,\n'
        '    upgrade={1: lambda row: {("body" if k == "text" else k): v for k, v in row.items()}})\n'
    )

    def rename(source: str) -> str:
        up, down = source.split("def downgrade():")
        parts = []
        for part, old, new in ((up, "text", "body"), (down, "body", "text")):
            line = f"batch_op.alter_column({old!r}, new_column_name={new!r})\n"
            part = re.sub(r"batch_op\.add_column\(.*\n", line, part)
            parts.append(re.sub(r" *batch_op\.drop_column\(.*\n", "", part))
        return "def downgrade():".join(parts)

    source = notes.revise("r2", rename)
    assert operations(source) == ["memstate_untrack", "batch_alter_table", "alter_column", "memstate_track"]
    assert "version=1" in source and "version=2" in source
    notes.upgrade()
    assert notes.differences() == "" and problems(notes) == []
    notes.execute("UPDATE note SET body = 'b'")
    assert images(notes)[-1] == ("note", "update", {"id": 1, "body": "b"})
    models = notes.models
    with Session(notes.engine) as session:
        changes = models.memory.history(session, models.Note)
    assert [(change.before, change.after) for change in changes] == [
        (None, {"id": 1, "body": "a"}),
        ({"id": 1, "body": "a"}, {"id": 1, "body": "b"}),
    ]
    notes.downgrade("r1")
    notes.write_models(NOTE + TRACKED)
    assert notes.differences() == "" and problems(notes) == []
    notes.execute("UPDATE note SET text = 'c'")
    assert images(notes)[-1] == ("note", "update", {"id": 1, "text": "c"})


@pytest.mark.deep_on("postgres")
def test_renaming_a_table_keeps_its_history(notes: Application) -> None:
    """With ``entity=`` of its old name, history goes on under it."""
    notes.execute("INSERT INTO note (id, text) VALUES (1, 'a')")
    notes.write_models(
        NOTE.replace('"note"', '"memo"') + 'memory.track(Note, text="text", entity="note", capture="trigger")\n'
    )

    def rename(source: str) -> str:
        up, down = source.split("def downgrade():")
        parts = []
        for part, old, new in ((up, "note", "memo"), (down, "memo", "note")):
            line = f"    op.rename_table({old!r}, {new!r})\n"
            part = re.sub(r"    op\.create_table\((?:.*\n)*?    \)\n", line, part)
            parts.append(re.sub(r"    op\.drop_table\(.*\n", "", part))
        return "def downgrade():".join(parts)

    assert operations(notes.revise("r2", rename)) == ["memstate_untrack", "rename_table", "memstate_track"]
    notes.upgrade()
    assert notes.differences() == "" and problems(notes) == []
    notes.execute("UPDATE memo SET text = 'b'")
    models = notes.models
    with Session(notes.engine) as session:
        changes = models.memory.history(session, models.Note, 1)
    assert [(change.op, change.after["text"]) for change in changes] == [("insert", "a"), ("update", "b")]
    notes.downgrade("r1")
    notes.write_models(NOTE + TRACKED)
    assert notes.differences() == "" and problems(notes) == []
    notes.execute("DELETE FROM note")
    assert [op for _, op, _ in images(notes)] == ["insert", "update", "delete"]


@pytest.mark.deep_on("sqlite")
def test_renaming_without_triggers_keeps_history_and_undo(app: Application) -> None:
    """No triggers: history goes on by ``entity=`` and ``upgrade=``, and what was done before can be undone."""
    app.write_models(NOTE + 'memory.track(Note, text="text")\n')
    app.revise("r1")
    app.upgrade()

    def in_session(work: Any) -> list[Any]:
        models = app.models
        sessions = sessionmaker(app.engine)
        models.memory.attach(sessions)
        with sessions() as session:
            work(session, models)
            session.commit()
            return [(change.op, change.after) for change in models.memory.history(session, models.Note)]

    in_session(lambda session, models: session.add(models.Note(id=1, text="a")))
    app.write_models(
        NOTE.replace('"note"', '"memo"').replace("text: ", "body: ") + 'memory.track(Note, text="body", entity="note", '
        'version=2, upgrade={1: lambda row: {"id": row["id"], "body": row["text"]}})\n'
    )
    app.write_revision(
        "r2",
        "r1",
        "op.rename_table('note', 'memo'); op.alter_column('memo', 'text', new_column_name='body')",
        "op.alter_column('memo', 'body', new_column_name='text'); op.rename_table('memo', 'note')",
    )
    app.upgrade()
    assert app.differences() == "" and problems(app) == []

    def change(session: Session, models: Any) -> None:
        session.get_one(models.Note, 1).body = "b"

    before = [("insert", {"id": 1, "body": "a"}), ("update", {"id": 1, "body": "b"})]
    assert in_session(change) == before
    undone = [("update", {"id": 1, "body": "a"}), ("delete", None)]
    assert in_session(lambda session, models: models.memory.rollback(session, steps=2)) == before + undone
    assert problems(app) == [] and contents(app.engine)["memo"]["rows"] == []


@pytest.mark.deep_on("postgres")
def test_check_and_doctor_find_triggers_dropped_by_batch_mode(notes: Application) -> None:
    """SQLite's batch mode makes the table anew, without a word of its triggers: check and doctor say so."""
    notes.write_revision("r2", "r1", "pass", "pass")
    alter = "with op.batch_alter_table('note', recreate='always') as b: b.alter_column('text', nullable=True)"
    if notes.engine.dialect.name == "postgresql":
        names = [name for name, source in routines(notes.engine) if source.startswith("CREATE TRIGGER memstate_update")]
        alter = f"op.execute('DROP TRIGGER {names[0]} ON note')"
    notes.write_revision("r2", "r1", alter, "pass")
    notes.upgrade()
    assert "memstate_track" in notes.differences()
    missed = "has none of its triggers" if notes.engine.dialect.name == "sqlite" else "trigger memstate_"
    assert any(missed in problem for problem in problems(notes))
    notes.revise("r3")
    notes.upgrade()
    assert notes.differences() == "" and problems(notes) == []


@pytest.mark.deep_on("postgres")
def test_check_and_doctor_find_an_unprotected_log(notes: Application) -> None:
    """By check as by the doctor."""
    notes.write_revision("r2", "r1", "op.memstate_unprotect_log()", "op.memstate_protect_log()")
    notes.upgrade()
    assert "memstate_protect_log" in notes.differences()
    assert any("may be rewritten" in problem for problem in problems(notes))
    assert operations(notes.revise("r3")) == ["memstate_protect_log"]
    notes.upgrade()
    assert notes.differences() == "" and problems(notes) == []
    notes.downgrade("r1")
    assert notes.differences() == "" and problems(notes) == []


@pytest.mark.deep_on("sqlite")
def test_triggers_of_an_older_version_of_ours_are_replaced(notes: Application) -> None:
    """What is there is not what this version would make."""
    before = routines(notes.engine)
    if notes.engine.dialect.name == "sqlite":
        [(name, source)] = [pair for pair in before if "after_delete" in pair[0]]
        notes.execute(f"DROP TRIGGER {name}", "\n".join(line for line in source.splitlines() if "-- " not in line))
    else:
        [(name, source)] = [pair for pair in before if pair[0].startswith("memstate_delete") and "DECLARE" in pair[1]]
        changed = source.replace("  RETURN NULL;", "  -- of before\n  RETURN NULL;")
        notes.execute(f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $x${changed}$x$")
    assert "memstate_track" in notes.differences()
    notes.revise("r2")
    notes.upgrade()
    assert notes.differences() == ""
    assert [source for _, source in routines(notes.engine)] == [source for _, source in before]


# -- what is rendered --------------------------------------------------------------------------------------------------

EVERYTHING = """
from sqlalchemy.dialects.postgresql import ARRAY

class Kind(enum.Enum):
    memo = "m"
    idea = "i"
    other = "o"

class Upper(sa.types.TypeDecorator):
    impl = sa.String(20)
    cache_ok = True
    def process_bind_param(self, value, dialect):
        return value.upper()

class Guid(sa.types.TypeDecorator):
    impl = sa.CHAR(32)
    cache_ok = True
    def load_dialect_impl(self, dialect):
        return dialect.type_descriptor(sa.Uuid() if dialect.name == "postgresql" else sa.CHAR(32))

class Opaque(sa.types.UserDefinedType):
    # As those of pgvector.
    cache_ok = True
    def __init__(self, dimensions=3):
        self.dimensions = dimensions
    def get_col_spec(self, **_):
        return "TEXT"

class Packed(sa.types.TypeDecorator):
    impl = Opaque
    cache_ok = True

class Email(sa.String):
    pass

class Item(Base):
    __tablename__ = "an item's"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": Kind.other}
    __table_args__ = (sa.PrimaryKeyConstraint("second", "first"),)
    first: Mapped[str] = mapped_column(sa.String(20))
    second: Mapped[int]
    kind: Mapped[Kind]
    upper: Mapped[Optional[str]] = mapped_column(Upper)
    guid: Mapped[Optional[Any]] = mapped_column(Guid)
    opaque: Mapped[Optional[str]] = mapped_column(Opaque(3))
    packed: Mapped[Optional[str]] = mapped_column(Packed)
    email: Mapped[Optional[str]] = mapped_column(Email(50))
    here: Mapped[Optional[str]] = mapped_column(sa.Text().with_variant(Opaque(3), "postgresql"))
    there: Mapped[Optional[str]] = mapped_column(Upper().with_variant(sa.Text(), "sqlite"))
    tags: Mapped[Optional[Any]] = mapped_column(sa.JSON().with_variant(ARRAY(sa.String(9)), "postgresql"))
    uuid: Mapped[Optional[uuid.UUID]]
    price: Mapped[Optional[decimal.Decimal]] = mapped_column(sa.Numeric(10, 2))
    at: Mapped[Optional[datetime.datetime]] = mapped_column(sa.DateTime(timezone=True))
    took: Mapped[Optional[datetime.timedelta]]
    data: Mapped[Optional[dict[str, Any]]] = mapped_column(sa.JSON)
    raw: Mapped[Optional[bytes]]
    double: Mapped[Optional[int]] = mapped_column(sa.Computed("second * 2", persisted=True))

class Memo(Item):
    __mapper_args__ = {"polymorphic_identity": Kind.memo}

class Idea(Memo):
    __mapper_args__ = {"polymorphic_identity": Kind.idea}

memory.track(Memo, text="upper", entity="a 'memo': of 100%", capture="trigger", version=3)
"""


def import_types(source: str) -> str:
    """For Alembic's own create_table."""
    return source.replace(
        "import sqlalchemy as sa\n", "import sqlalchemy as sa\nimport models\nfrom sqlalchemy import String\n"
    )


@pytest.mark.deep_on("postgres")
def test_revision_renders_every_kind_of_mapping(app: Application) -> None:
    """Types of the application, a key in another order, single-table inheritance, names that need care: rendered so
    that the revision needs no import of the application's, and makes the very triggers that create_tables makes.
    """
    app.write_models(EVERYTHING)
    source = app.revise("r1", import_types)
    tracks = source.split("op.memstate_track(")[1:2]
    assert not re.search("models|Upper|Opaque", tracks[0])
    assert "sa.PrimaryKeyConstraint('second', 'first')" in tracks[0]
    app.upgrade()
    assert app.differences() == "" and problems(app) == []
    migrated = routines(app.engine)
    app.models.memory.create_tables(app.engine)
    assert routines(app.engine) == migrated
    item = '"an item\'s"'
    columns = f"INSERT INTO {item} (first, second, kind, upper) VALUES"
    app.execute(f"{columns} ('a', 1, 'memo', 'A'), ('b', 2, 'idea', 'B'), ('c', 3, 'other', 'C')")
    logged = [(entity, op, image["upper"], image["double"]) for entity, op, image in images(app)]
    assert sorted(logged) == [("a 'memo': of 100%", "insert", "A", 2), ("a 'memo': of 100%", "insert", "B", 4)]
    app.downgrade("base")
    assert contents(app.engine, ours=True) == {}


def test_offline_script_makes_the_same_triggers(app: Application) -> None:
    """`--sql` asks no database, and what it prints makes the same triggers."""
    app.write_models(EVERYTHING)
    app.revise("r1", import_types)
    printed = app.offline("head")
    app.upgrade()
    online = (contents(app.engine, ours=True), routines(app.engine))
    app.downgrade("base")
    connection: Any = app.engine.raw_connection()
    if app.engine.dialect.name == "sqlite":
        connection.driver_connection.executescript("DROP TABLE alembic_version;" + printed)
    else:
        connection.cursor().execute("DROP TABLE alembic_version; DROP TYPE kind;" + printed)
    connection.commit()
    connection.close()
    assert (contents(app.engine, ours=True), routines(app.engine)) == online
    assert app.differences() == "" and problems(app) == []


def test_a_type_that_reads_by_an_expression_is_logged_as_it_is_stored(app: Application) -> None:
    reads_otherwise = """
class Shown(sa.String):
    def column_expression(self, column):
        return sa.func.upper(column)
"""
    app.write_models(reads_otherwise + NOTE + "    shown: Mapped[Optional[str]] = mapped_column(Shown)\n" + TRACKED)
    _, tracking, *_ = app.revise("r1").split("op.memstate_track(")
    assert "sa.Column('shown', sa.String())" in tracking


def test_offline_script_stops_at_a_missing_table(tmp_path: Path, postgres_engine: Engine) -> None:
    """Where the script finds no table, it stops."""
    app = Application(tmp_path / "app", postgres_engine)
    app.write_env(OURS_TOO)
    app.write_models("")
    columns = "sa.Column('id', sa.Integer()), sa.PrimaryKeyConstraint('id')"
    app.write_revision("r1", None, f"op.memstate_track('note', {columns}, entity='note')", "pass")
    with pytest.raises(DBAPIError, match="is it there"):
        app.execute(app.offline("head"))


@pytest.mark.deep
@pytest.mark.deep_on("sqlite")
def test_autogenerate_does_not_drop_our_tables(notes: Application) -> None:
    """An application whose metadata has never heard of them; without the plugin it would drop them all."""
    notes.write_env(knows_us=False)
    if HAS_PLUGINS:  # of an older Alembic, all of this process knows us by now
        assert "remove_table" in notes.differences() and "memstate_log" in notes.differences()
    notes.write_env()
    assert notes.differences() == ""
    before = contents(notes.engine, ours=True)
    assert operations(notes.revise("r2")) == []
    notes.upgrade()
    assert contents(notes.engine, ours=True) == before
    assert inspect(notes.engine).has_table("memstate_log")


OLDER = {
    "memstate_log": ("'tx', sa.String(length=32)", "'tx', sa.String(length=64)"),
    "memstate_outbox": ("'tx', sa.String(length=32)", "'tx', sa.String(length=64)"),
    "memstate_trigger_context": ("'value', sa.Text()", "'value', sa.String(length=64)"),
}


def made_older(source: str, name: str) -> str:
    """*source*, which makes the tables, as a version of ours would have had it when *name* was another one."""
    head, tail = source.split(f"op.create_table('{name}'")
    old, new = OLDER[name]
    assert old in tail.split("create_table", maxsplit=1)[0]
    return f"{head}op.create_table('{name}'{tail.replace(old, new, 1)}"


@pytest.mark.deep_on("postgres")
@pytest.mark.deep_on("memstate_log", "memstate_outbox")
@pytest.mark.parametrize("name", OLDER)
def test_new_version_changes_our_tables_despite_triggers(app: Application, name: str) -> None:
    """Triggers name these tables: SQLite's batch mode cannot make them anew while there is one, on whatever table."""
    hidden = NOTE.replace("Note", "Hidden").replace('"note"', '"hidden"')
    tracked = TRACKED + TRACKED.replace("Note", "Hidden")
    app.write_models(NOTE + hidden + tracked)
    app.revise("r1", lambda source: made_older(source, name))
    app.upgrade()
    app.execute("INSERT INTO note (id, text) VALUES (1, 'a')", "INSERT INTO hidden (id, text) VALUES (1, 'a')")
    env = (app.folder / "env.py").read_text()
    hides = "include_object=lambda o, name, type_, *_: name != 'hidden', "
    (app.folder / "env.py").write_text(env.replace("render_as_batch", hides + "render_as_batch"))

    def made() -> tuple[Any, Any]:
        return contents(app.engine, ours=True), routines(app.engine)

    app.revise("r2")
    app.execute("DELETE FROM memstate_outbox")  # a relay has delivered them
    old = made()
    app.upgrade()
    new = made()
    assert {name: old[0][name]["rows"] for name in old[0]} == {name: new[0][name]["rows"] for name in new[0]}
    assert app.differences() == "" and problems(app) == []
    assert old[1] == new[1], "every trigger is there again"
    app.downgrade("r1")
    assert made() == old
    app.upgrade()
    assert made() == new
    app.execute("UPDATE note SET text = 'b'", "UPDATE hidden SET text = 'b'")
    assert sorted(images(app)[2:]) == [
        ("hidden", "update", {"id": 1, "text": "b"}),
        ("note", "update", {"id": 1, "text": "b"}),
    ]
    with app.engine.connect() as connection:
        assert connection.scalars(select(outbox.c.id)).all() > [2], "no id comes again"
    app.execute("DELETE FROM memstate_outbox", "UPDATE note SET text = 'c'")
    with app.engine.connect() as connection:
        assert connection.scalars(select(outbox.c.id)).all() > [4], "nor does any later"
    with pytest.raises(Exception, match="append-only"):
        app.execute("DELETE FROM memstate_log")


@pytest.mark.deep_on("postgres")
def test_a_table_of_ours_that_has_another_name_now(app: Application) -> None:
    """One revision makes the new table and drops the old one; every trigger follows, of hidden tables too."""
    hidden = NOTE.replace("Note", "Hidden").replace('"note"', '"hidden"')
    app.write_models(NOTE + hidden + TRACKED + TRACKED.replace("Note", "Hidden"))
    app.revise("r1")
    app.upgrade()
    before = (contents(app.engine, ours=True), routines(app.engine))
    make_older(app.engine)
    env = (app.folder / "env.py").read_text()
    hides = "include_object=lambda o, name, type_, *_: name != 'hidden', "
    (app.folder / "env.py").write_text(env.replace("render_as_batch", hides + "render_as_batch"))
    source = app.revise("r2")
    assert operations(source).count("memstate_track") == 2
    assert f"op.drop_table('{OLD}')" in source and f"op.create_table('{NEW}'" in source
    app.upgrade()
    assert (contents(app.engine, ours=True), routines(app.engine)) == before
    assert app.differences() == "" and problems(app) == []
    app.execute("INSERT INTO note (id, text) VALUES (1, 'a')", "INSERT INTO hidden (id, text) VALUES (1, 'a')")
    assert len(images(app)) == 2


def test_an_old_table_of_ours_is_nobody_s_to_drop(notes: Application) -> None:
    """An application whose metadata does not have our tables: our own migration renames it."""
    make_older(notes.engine)
    notes.write_env()
    assert "memstate_current" not in notes.differences()


@pytest.mark.deep
def test_revision_of_one_database_upgrades_our_tables_on_the_other(
    tmp_path: Path, sqlite_engine: Engine, postgres_engine: Engine
) -> None:
    """What one of them needs is in the revision, whichever it was written on."""
    for number, (here, there) in enumerate([(postgres_engine, sqlite_engine), (sqlite_engine, postgres_engine)]):
        app = Application(tmp_path / f"app{number}", here)
        app.write_env(OURS_TOO)
        app.write_models(NOTE + TRACKED)
        app.revise("r1", lambda source: reduce(made_older, OLDER, source))
        app.upgrade()
        app.revise("r2")
        app.engine = there
        app.upgrade("r1")
        app.execute("INSERT INTO note (id, text) VALUES (1, 'a')")
        app.upgrade()
        assert app.differences() == "" and problems(app) == []
        app.execute("UPDATE note SET text = 'b'")
        assert [(op, image["text"]) for _, op, image in images(app)] == [("insert", "a"), ("update", "b")]
        for app.engine in (here, there):
            app.downgrade("base")


@pytest.mark.deep
def test_autogenerate_does_not_drop_our_tables_in_another_schema(tmp_path: Path, postgres_engine: Engine) -> None:
    """By a search_path that env.py does not know of, which includes all schemas: they are nobody's to drop, too."""
    app = Application(tmp_path / "app", postgres_engine)
    app.write_models(NOTE + TRACKED.replace(', capture="trigger"', ""))
    app.write_env()
    env = (app.folder / "env.py").read_text()
    (app.folder / "env.py").write_text(env.replace("render_as_batch", "include_schemas=True, render_as_batch"))
    app.execute("CREATE SCHEMA ai")
    elsewhere = create_engine(postgres_engine.url, connect_args={"options": "-csearch_path=ai,public"})
    try:
        app.revise("r1")
        app.upgrade()
        app.models.memory.create_tables(elsewhere)
        assert app.differences() == ""
        assert operations(app.revise("r2")) == []
        assert inspect(elsewhere).has_table("memstate_log", schema="ai")
    finally:
        elsewhere.dispose()
        app.execute("DROP SCHEMA ai CASCADE")


@pytest.mark.deep
def test_tracked_table_in_another_schema_gets_its_triggers(tmp_path: Path, postgres_engine: Engine) -> None:
    """Where env.py includes schemas; our tables are in the default one."""
    app = Application(tmp_path / "app", postgres_engine)
    app.execute("CREATE SCHEMA IF NOT EXISTS crm")
    app.write_env(OURS_TOO)
    env = (app.folder / "env.py").read_text()
    only = 'include_schemas=True, include_name=lambda name, type_, _: type_ != "schema" or name in (None, "crm"), '
    (app.folder / "env.py").write_text(env.replace("render_as_batch", only + "render_as_batch"))
    try:
        for number, model in enumerate((NOTE, TITLED)):
            app.write_models(model.replace('"note"', '"note"\n    __table_args__ = {"schema": "crm"}') + TRACKED)
            app.revise(f"r{number}")
            app.upgrade()
            assert app.differences() == "" and problems(app) == []
        app.execute("INSERT INTO crm.note (id, text, title) VALUES (1, 'a', 'A')")
        assert images(app) == [("crm.note", "insert", {"id": 1, "text": "a", "title": "A"})]
        app.downgrade("r0")
        app.execute("DELETE FROM crm.note")
        app.downgrade("base")
        assert [name for name, _ in routines(app.engine) if name.startswith("memstate")] == []
    finally:
        app.execute("DROP SCHEMA crm CASCADE")


def test_tables_excluded_by_env_py_get_no_triggers(app: Application) -> None:
    """include_object and include_name are of the application's making."""
    app.write_models(NOTE + TRACKED)
    env = (app.folder / "env.py").read_text()
    hides = "include_object=lambda o, name, type_, *_: name != 'note', "
    (app.folder / "env.py").write_text(env.replace("render_as_batch", hides + "render_as_batch"))
    source = app.revise("r1")
    assert "memstate_protect_log" in operations(source) and "memstate_track" not in operations(source)


def test_log_excluded_by_env_py_is_left_alone(app: Application) -> None:
    """Where it is not made, nothing protects it; where it is, that is another's business."""
    app.write_models(NOTE)
    env = (app.folder / "env.py").read_text()
    hides = "include_object=lambda o, name, type_, *_: not name.startswith('memstate_'), "
    (app.folder / "env.py").write_text(env.replace("render_as_batch", hides + "render_as_batch"))
    assert operations(app.revise("r1")) == ["create_table"]
    app.upgrade()
    assert app.differences() == ""
    app.models.memory.create_tables(app.engine)
    app.write_revision("r2", "r1", "op.memstate_unprotect_log()", "pass")
    app.upgrade()
    assert app.differences() == ""
    (app.folder / "env.py").write_text(env)
    assert "memstate_protect_log" in app.differences()


def test_a_revision_excludes_columns(notes: Application) -> None:
    """A change of exclude= is a revision, and undoing it brings back the triggers of before."""
    assert app_images(notes, "INSERT INTO note (id, text) VALUES (1, 'a')") == [{"id": 1, "text": "a"}]
    notes.write_models(TITLED + TRACKED.replace('text="text"', 'text="text", exclude=("title",)'))
    source = notes.revise("r2")
    assert "exclude=['title']" in source
    notes.upgrade()
    assert notes.differences() == "" and problems(notes) == []
    assert app_images(notes, "UPDATE note SET title = 't'") == []
    notes.write_models(TITLED + TRACKED)
    notes.revise("r3")
    notes.upgrade()
    assert app_images(notes, "UPDATE note SET title = 'u'") == [{"id": 1, "text": "a", "title": "u"}]
    notes.downgrade("-1")
    assert app_images(notes, "UPDATE note SET text = 'b'") == [{"id": 1, "text": "b"}]
    assert app_images(notes, "UPDATE note SET title = 'v'") == []


def app_images(app: Application, statement: str) -> list[Any]:
    """What *statement* has logged."""
    before = len(images(app))
    app.execute(statement)
    return [image for _, _, image in images(app)[before:]]
