"""The Memory and the database that a command works on, as its options name them."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote, urlsplit

import typer

from memstate_sa.cli.errors import did_you_mean, exit_on_error, fail, unknown
from memstate_sa.errors import MemstateError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from memstate_sa import Memory
    from memstate_sa.tracking.tracked import Tracked


@contextmanager
def open_memory(
    app: str, url: str | None, *, must_exist: bool = True, must_have_tables: bool = True, default_url: str | None = None
) -> Iterator[tuple[Memory, Engine]]:
    """The Memory of *app*, and an engine on *url*, or the engine of a MemoryStore, or one on *default_url*.

    The command fails unless the database exists (*must_exist*) and has our tables (*must_have_tables*).
    """
    with exit_on_error(), ExitStack() as stack:
        target = load(app, "--app")
        memory = _memory_of(app, target)
        if memory is not target:  # a store's own relay ends with the command
            stack.callback(memory.close)
        if url is None and memory is not target:
            engine: Engine = target.engine
        else:
            engine = _engine(url or default_url)
            stack.callback(engine.dispose)
            if must_exist and url is not None:
                require_database(url)
        if must_have_tables:
            _require_tables(engine)
        yield memory, engine


def _require_tables(engine: Engine) -> None:
    from sqlalchemy import inspect

    if not inspect(engine).has_table("memstate_log"):
        fail("This database has no tables of memstate_sa. Create them with `memstate-sa init` or with Alembic.")


# -- the application -------------------------------------------------------------------------------------------------


def load(path: str, option: str) -> Any:
    """The object at ``module:name``. The working directory and its folder src are searched first."""
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise typer.BadParameter(
            f"{path!r} is not of the form module:name. Write shop.memory:memory.", param_hint=option
        )
    if "/" in module_name or module_name.endswith(".py"):
        module_name = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise typer.BadParameter(f"Give a module, not a file: {module_name}:{name}", param_hint=option)
    module_roots(Path.cwd())
    module = _import(module_name, option)
    try:
        return attrgetter(name)(module)
    except AttributeError as error:
        others = _memory_names(module) if option == "--app" else [other for other in vars(module) if other[0] != "_"]
        hint = did_you_mean(name, others)
        raise typer.BadParameter(
            f"Module {module_name!r} has no attribute {name!r}.{hint}", param_hint=option
        ) from error
    except Exception as error:  # noqa: BLE001  # an object of the application computes its attributes
        fail(f"Cannot read {path!r}. {type(error).__name__}: {error}")


def module_roots(folder: Path) -> list[Path]:
    """Add the folders of the application's modules to ``sys.path``, and return them."""
    roots = [root for root in (folder, folder / "src") if root.is_dir()]
    for root in roots:
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
    return roots


def _import(name: str, option: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            fail(import_failure(name, error))  # the application imports a module that is missing
        raise typer.BadParameter(
            f"Cannot find the module {error.name!r} in {Path.cwd()} or among the installed packages. "
            "Run the command in the folder of your project.",
            param_hint=option,
        ) from error
    except (Exception, SystemExit) as error:  # noqa: BLE001  # the application's own code runs here
        fail(import_failure(name, error))


def import_failure(name: str, error: BaseException) -> str:
    """The application's error and its line, without the traceback."""
    message = f"Cannot import {name!r}. {type(error).__name__}: {getattr(error, 'msg', '') or error}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{message}\n  {error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    frames = [frame for frame in frames if Path(frame.filename) != Path(__file__)]
    here = [frame for frame in frames if _is_application_file(frame.filename)] or frames
    return f"{message}\n  {here[-1].filename}:{here[-1].lineno}: {here[-1].line}" if here else message


def _is_application_file(name: str) -> bool:
    path = Path(name)
    return path.is_relative_to(Path.cwd()) and "site-packages" not in path.parts


def _memory_of(path: str, target: Any) -> Memory:
    """*target* itself if it is a Memory, or the Memory of *target* if it is a MemoryStore."""
    if (memory := memory_in(target)) is not None:
        return memory
    module = sys.modules[path.partition(":")[0]]
    names = [f"{module.__name__}:{name}" for name in _memory_names(module)]
    if names:
        hint = f"Did you mean {' or '.join(names)}?"
    else:
        hint = "Name one at the top level of your module, for example memory = Memory(…)."
    kind = "it is a class" if issubclass(type(target), type) else "it is a function" if callable(target) else None
    kind = kind or f"its type is {type(target).__name__}"
    raise typer.BadParameter(f"{path} is not a Memory or a MemoryStore ({kind}). {hint}", param_hint="--app")


def _memory_names(module: ModuleType) -> list[str]:
    """The names of the Memory and MemoryStore objects at the top level of *module*."""
    return [name for name, value in vars(module).items() if memory_in(value) is not None]


def memory_in(value: Any) -> Memory | None:
    """The Memory that *value* is, or that it has as its attribute ``memory``. None for other objects.

    No code of *value* runs. Flask's ``request``, for example, raises at each question outside of a request.
    """
    from memstate_sa import Memory
    from memstate_sa.store import AsyncMemoryStore

    if issubclass(type(value), AsyncMemoryStore):
        value = value.memory
    memory = value if issubclass(type(value), Memory) else inspect.getattr_static(value, "memory", None)
    return memory if issubclass(type(memory), Memory) else None


# -- names of classes and indexes ------------------------------------------------------------------------------------


def tracked_classes(memory: Memory) -> Mapping[str, Tracked]:
    """The tracked classes by entity."""
    return memory._registry.by_entity  # noqa: SLF001  # the registry belongs to this package


def load_model(name: str, memory: Memory, app: str) -> Any:
    """The class of that entity or class name, or the class at ``module:Class``."""
    if ":" in name:
        return load(name, "MODEL")
    classes = tracked_classes(memory)
    if name in classes:
        return classes[name].model
    by_name = {tracked.model.__name__: tracked.model for tracked in classes.values()}
    model = by_name.get(name) or getattr(sys.modules.get(app.partition(":")[0]), name, None)
    return model or unknown("class", name, [*by_name, *(set(classes) - set(by_name))], "MODEL")


def load_models(names: Iterable[str] | None, memory: Memory, app: str) -> list[Any]:
    return [load_model(name, memory, app) for name in names or ()]


def index_names(names: list[str] | None, memory: Memory) -> list[str]:
    """*names*. The command fails if the Memory has no index of such a name."""
    for name in names or ():
        if name not in memory.indexes:
            unknown("index", name, memory.indexes, "--index")
    return names or []


# -- the database ----------------------------------------------------------------------------------------------------


def require_database(url: str) -> None:
    """Fail if *url* names a SQLite file that does not exist. Connecting would create it."""
    if file := missing_file(url):
        fail(f"There is no such database: {file.absolute()} does not exist. Check --url.")


def missing_file(url: str) -> Path | None:
    """The SQLite file that connecting to *url* would create."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    from memstate_sa.db.dialects import BY_NAME, SQLITE

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # `_engine` reports it
        return None
    name = parsed.database or ":memory:"
    if BY_NAME.get(parsed.get_backend_name()) is not SQLITE or parsed.query.get("mode") == "memory":
        return None
    path = unquote(urlsplit(name).path) if name.startswith("file:") else name
    return None if path == ":memory:" or Path(path).exists() else Path(path)


def _engine(url: str | None) -> Engine:
    from memstate_sa.db.engines import URL_EXAMPLES, engine_of

    if url is None:
        _refuse(f"There is no URL, and a Memory has no database of its own. {URL_EXAMPLES}")
    try:
        return engine_of(url)
    except MemstateError as error:
        _refuse(str(error))


def _refuse(problem: str) -> NoReturn:
    raise typer.BadParameter(problem, param_hint="--url")
