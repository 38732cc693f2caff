"""An application's Memory and database, as the command line names them; and what is wrong with them, explained."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from sqlalchemy import Engine, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from memstate_sa.cli import alembic_project
from memstate_sa.cli.display import Console, changes_table
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
def opened(app: str, url: str, *, made: bool = True, initialised: bool = True) -> Iterator[tuple[Memory, Engine]]:
    """Unless they need not be there: the database is *made*, and *initialised* with our tables."""
    memory = _load(app, "--app")
    if not isinstance(memory, Memory):
        raise typer.BadParameter(f"{app} is a {type(memory).__name__}, not a Memory", param_hint="--app")
    engine = _engine(memory, url)
    try:
        with explained():
            if made:
                require_made(url)
            if initialised and not inspect(engine).has_table("memstate_log"):
                fail("the tables of memstate_sa are not in this database; `memstate-sa init` or Alembic creates them")
            yield memory, engine
    finally:
        engine.dispose()


def require_made(url: str) -> None:
    """Looking into an SQLite file that is not there would make it."""
    if file := alembic_project.unmade(url):
        fail(f"there is no such database: {file.absolute()} does not exist")


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
    """What `load_model` finds *model* by, the shorter the better; None of a class that is in a function."""
    for name in (model.__qualname__, f"{model.__module__}:{model.__qualname__}"):
        with suppress(typer.BadParameter):
            if load_model(name, app) is model:
                return name
    return None


@contextmanager
def explained() -> Iterator[None]:
    """Errors that a user can act on, as a message and exit code 1."""
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


def fail(message: str, in_the_way: Sequence[Change] = ()) -> NoReturn:
    console = Console(stderr=True)
    console.print(f"[bold red]Error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    if in_the_way:
        console.print(changes_table(in_the_way, "in the way"))
    raise typer.Exit(1)
