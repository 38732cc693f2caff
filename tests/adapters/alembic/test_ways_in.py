"""An application with 12 models and 20 revisions adopts memstate_sa in each of three ways, and removes it again.

Its own tables do not change: their definitions and rows are compared before, between and after.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.util.exc import CommandError
from sqlalchemy import Engine, create_engine, insert, text
from sqlalchemy.orm import sessionmaker

from memstate_sa.migrations import location
from tests.adapters.alembic.application import KNOW_US, OURS_TOO, Application, contents, routines
from tests.support.triggers import images, operations, problems

pytestmark = pytest.mark.sa20

TYPES = ("Numeric(10, 2)", "Boolean", "Date", "JSON", "LargeBinary", "Text", "Float", "SmallInteger", "String(9)")
MODELS = (
    "Account", "Address", "Author", "Category", "Comment", "Customer", "Invoice", "Order", "Product", "Review", "Tag",
    "Note",
)  # fmt: skip
LATE = MODELS[:8]
"""Models that got a column or an index by a later revision."""
TRACKED = """
memory.track(Note, text="name")
memory.track(Comment, text="name", capture="trigger")
memory.track(Review, text="name", metadata=("parent_id",), entity="a review", capture="trigger")
"""


def table(number: int) -> str:
    return f"{MODELS[number].lower()}s"


def base_columns(number: int) -> list[str]:
    parent = [f"sa.Column('parent_id', sa.Integer, sa.ForeignKey('{table(number - 1)}.id'))"] if number else []
    own = f"sa.Column('own', sa.{TYPES[number % len(TYPES)]})"
    named = "sa.Column('name', sa.String(80), nullable=False)"
    return ["sa.Column('id', sa.Integer, primary_key=True)", named, *parent, own]


def late(number: int) -> tuple[str, str, str]:
    """The late column or index of the model, and the two directions of its revision."""
    name = table(number)
    if number % 2:
        index = f"sa.Index('ix_{name}_name', 'name')"
        return (
            index,
            f"op.create_index('ix_{name}_name', '{name}', ['name'])",
            f"op.drop_index('ix_{name}_name', '{name}')",
        )
    column = "sa.Column('extra', sa.Text, nullable=False, server_default='none')"
    return column, f"op.add_column('{name}', {column})", f"op.drop_column('{name}', 'extra')"


def models() -> str:
    parts = []
    for number, model in enumerate(MODELS):
        came_late = [late(number)[0]] if model in LATE else []
        arguments = ",\n        ".join([*base_columns(number), *came_late])
        parts.append(
            f"class {model}(Base):\n    __table__ = sa.Table('{table(number)}', Base.metadata,\n        {arguments})"
        )
    return "\n".join(parts) + "\n"


@pytest.fixture
def app(tmp_path: Path, engine: Engine) -> Application:
    """The application before it uses memstate_sa, at its twentieth revision, with rows."""
    return grown(Application(tmp_path / "app", engine))


def grown(app: Application) -> Application:
    app.write_models(models())
    app.write_env(knows_us=False)
    revisions = [
        (f"op.create_table('{table(n)}', {', '.join(base_columns(n))})", f"op.drop_table('{table(n)}')")
        for n in range(len(MODELS))
    ]
    revisions += [late(MODELS.index(model))[1:] for model in LATE]
    for number, (up, down) in enumerate(revisions, start=1):
        app.write_revision(f"v{number:02}", f"v{number - 1:02}" if number > 1 else None, up, down)
    assert number == 20
    app.upgrade()
    rows = [{"id": n, "name": f"name {n}"} for n in (1, 2, 3)]
    with app.engine.begin() as connection:
        for each in app.models.Base.metadata.sorted_tables:
            connection.execute(
                insert(each), [{**row, "parent_id": row["id"]} if "parent_id" in each.c else row for row in rows]
            )
    return app


@pytest.fixture
def unharmed(app: Application) -> Iterator[Any]:
    """Check that the application is unchanged: definitions and rows, and no new function or trigger."""
    assert app.differences() == ""
    before = (contents(app.engine), routines(app.engine))

    def check(*, routines_too: bool = True) -> None:
        assert contents(app.engine) == before[0]
        assert not routines_too or routines(app.engine) == before[1]

    check()
    yield check
    check()
    app.upgrade("heads")
    check(routines_too=False)
    assert app.differences() == ""


def write_and_undo(app: Application) -> None:
    """Write, check the log, and undo, for tables made in any way."""
    found = app.models
    sessions = sessionmaker(app.engine)
    found.memory.attach(sessions)
    with sessions() as session:
        session.add(found.Note(id=4, name="a note"))
        session.flush()
        session.execute(text("UPDATE comments SET name = 'changed' WHERE id = 1"))
        session.add(found.Review(id=4, name="a review", parent_id=1))
        session.commit()
        assert [(entity, op) for entity, op, _ in images(app)] == [
            ("notes", "insert"), ("comments", "baseline"), ("comments", "update"), ("a review", "insert"),
        ]  # fmt: skip
        found.memory.rollback(session)
        session.commit()
    assert problems(app) == []
    relay = found.memory.relay(app.engine)
    relay.drain()
    assert found.memory.verify(app.engine).clean
    relay.stop()


@pytest.mark.deep_on("sqlite")
def test_application_adopts_our_tables_in_its_own_migrations(app: Application, unharmed: Any) -> None:
    """The default: ``target_metadata=[Base.metadata, memstate_sa.metadata]``, and an ordinary revision."""
    app.write_models(models() + TRACKED)
    app.write_env(OURS_TOO)
    source = app.revise("adopt")
    made = operations(source)
    assert set(made) == {"create_table", "create_index", "memstate_protect_log", "memstate_track"} | (
        {"batch_alter_table"} if "batch_alter_table" in made else set()
    )
    app.upgrade()
    unharmed(routines_too=False)
    assert app.differences() == ""
    write_and_undo(app)
    app.downgrade("v20")
    assert set(contents(app.engine, ours=True)) == set(contents(app.engine))


@pytest.mark.deep
def test_a_revision_made_on_one_database_runs_on_the_other(
    tmp_path: Path, sqlite_engine: Engine, postgres_engine: Engine
) -> None:
    """Development on SQLite and production on PostgreSQL, or the other way round."""
    for number, (here, there) in enumerate([(sqlite_engine, postgres_engine), (postgres_engine, sqlite_engine)]):
        app = Application(tmp_path / f"app{number}", here)
        app.write_models(models() + TRACKED)
        app.write_env(OURS_TOO)
        app.revise("all")
        app.engine = there
        app.upgrade()
        assert app.differences() == "" and problems(app) == []
        app.downgrade("base")
        assert contents(there, ours=True) == {}
        assert [name for name, _ in routines(there) if name.startswith("memstate")] == []


@pytest.mark.deep
@pytest.mark.deep_on("sqlite")
def test_application_adopts_our_migrations_as_a_branch(app: Application, unharmed: Any) -> None:
    """The alternative: ``version_locations``, ``upgrade heads``, and metadata without our tables."""
    docs = (Path(__file__).parents[3] / "docs" / "how-to" / "migrations.md").read_text()
    way = docs.split("## Our migrations, as a branch of yours")[1].split("\nWithout any Alembic")[0]
    assert KNOW_US in way and "register()" in way, "docs and test must agree"
    app.versions.append(location() / "versions")
    app.write_models(models() + TRACKED)
    app.write_env()
    with pytest.raises(CommandError, match="Multiple head"):
        app.upgrade("head")
    app.upgrade("heads")
    source = app.revise("tracked", head="v20", depends_on="memstate_0001")
    assert operations(source) == ["memstate_track", "memstate_track"]
    app.upgrade("heads")
    unharmed(routines_too=False)
    assert app.differences() == ""
    write_and_undo(app)
    app.downgrade("v20")
    app.downgrade("memstate@base")
    assert set(contents(app.engine, ours=True)) == set(contents(app.engine))


@pytest.mark.deep
@pytest.mark.deep_on("postgres")
def test_prototype_moves_from_create_tables_to_a_revision(
    app: Application, unharmed: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """create_tables makes the tables at once. Later a revision is written against an empty database and stamped."""
    app.write_models(models() + TRACKED)
    app.write_env()
    app.models.memory.create_tables(app.engine)
    unharmed(routines_too=False)
    assert app.differences() == ""
    write_and_undo(app)
    logged = images(app)

    app.write_env(OURS_TOO)
    assert app.differences() == ""
    here, app.engine = app.engine, create_engine(f"sqlite:///{tmp_path / 'empty.db'}")
    app.upgrade()
    source = app.revise("adopt")
    assert operations(source).count("memstate_track") == 2
    app.upgrade()
    assert app.differences() == "" and problems(app)[1:] == []  # the first is about SAVEPOINTs
    app.engine.dispose()
    app.engine = here
    app.stamp("adopt")
    assert app.differences() == "" and problems(app) == []
    assert images(app) == logged
    app.downgrade("v20")
