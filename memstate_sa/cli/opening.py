"""The Memory and the database that a command works on, as its options name them, and its errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import unquote, urlsplit

import typer
from rich.markup import escape
from sqlalchemy import Engine, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from memstate_sa.cli.display import Console, changes_table
from memstate_sa.db.dialects import BY_NAME, SQLITE
from memstate_sa.db.engines import make_engine
from memstate_sa.errors import ConflictError, MemstateError
from memstate_sa.log.changes import Change
from memstate_sa.memory import Memory

App = Annotated[
    str,
    typer.Option("--app", envvar="MEMSTATE_APP", metavar="MODULE:ATTRIBUTE", help="Your Memory: shop.memory:memory"),
]
Url = Annotated[
    str, typer.Option("--url", envvar="MEMSTATE_URL", help="Your database: postgresql+psycopg://user@host/shop")
]
Indexes = Annotated[list[str] | None, typer.Option("--index", help="Its name; may be repeated. Default: all.")]


@contextmanager
def open_memory(
    app: str, url: str, *, must_exist: bool = True, must_have_tables: bool = True
) -> Iterator[tuple[Memory, Engine]]:
    """The Memory of *app*, and an engine on *url*.

    The command fails unless the database exists (*must_exist*) and has our tables (*must_have_tables*).
    """
    memory = _load(app, "--app")
    if not isinstance(memory, Memory):
        raise typer.BadParameter(f"{app} is a {type(memory).__name__}, not a Memory", param_hint="--app")
    engine = _engine(memory, url)
    try:
        with exit_on_error():
            if must_exist:
                require_database(url)
            if must_have_tables and not inspect(engine).has_table("memstate_log"):
                fail("the tables of memstate_sa are not in this database; `memstate-sa init` or Alembic creates them")
            yield memory, engine
    finally:
        engine.dispose()


def require_database(url: str) -> None:
    """Fail where *url* names no SQLite file: to look into one that is not there would make it."""
    if file := missing_file(url):
        fail(f"there is no such database: {file.absolute()} does not exist")


def missing_file(url: str) -> Path | None:
    """The SQLite file that connecting to *url* would create."""
    try:
        parsed = make_url(url)
    except ArgumentError:  # it is said where the URL is used
        return None
    name = parsed.database or ":memory:"
    if BY_NAME.get(parsed.get_backend_name()) is not SQLITE or parsed.query.get("mode") == "memory":
        return None
    path = unquote(urlsplit(name).path) if name.startswith("file:") else name
    return None if path == ":memory:" or Path(path).exists() else Path(path)


def _engine(memory: Memory, url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_dialect().is_async:
            from sqlalchemy.ext.asyncio import create_async_engine

            return memory.sync_engine(create_async_engine(parsed))
        return make_engine(parsed)
    except NoSuchModuleError as error:
        problem = str(error)
    except ArgumentError:  # its message may quote the URL, and that its password
        problem = "not a SQLAlchemy URL, which looks like sqlite:///app.db or postgresql+psycopg://user@host/app"
    except ModuleNotFoundError as error:
        problem = f"its driver {error.name} is not installed"
    raise typer.BadParameter(problem, param_hint="--url")


def _load(path: str, option: str) -> Any:
    """The object at ``module:attribute``, looked for in the working directory first, as uvicorn does."""
    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute):
        raise typer.BadParameter(f"{path!r} is not of the form module:attribute", param_hint=option)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return attrgetter(attribute)(import_module(module))
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"cannot import {module!r}: {error}", param_hint=option) from error
    except AttributeError as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint=option) from error


def load_model(name: str, app: str) -> Any:
    return _load(name if ":" in name else f"{app.partition(':')[0]}:{name}", "MODEL")


def name_of(model: type[Any], app: str) -> str | None:
    """The shortest name by which `load_model` finds *model*; None of a class that is in a function."""
    for name in (model.__qualname__, f"{model.__module__}:{model.__qualname__}"):
        with suppress(typer.BadParameter):
            if load_model(name, app) is model:
                return name
    return None


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Show an error that a user can act on as a message, and exit with code 1."""
    try:
        yield
    except ConflictError as error:
        fail(str(error), error.changes)
    except MemstateError as error:
        fail(str(error))
    except DBAPIError as error:
        fail(f"the database answered: {error.orig}")
    except SQLAlchemyError as error:
        fail(str(error))


def fail(message: str, conflicts: Sequence[Change] = ()) -> NoReturn:
    console = Console(stderr=True)
    console.print(f"[bold red]Error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    if conflicts:
        console.print(changes_table(conflicts, "in the way"))
    raise typer.Exit(1)
