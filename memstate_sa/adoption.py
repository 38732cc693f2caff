"""What an application still needs to adopt memstate_sa: its Memory, database and Alembic, looked at as they are."""

from __future__ import annotations

import configparser
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from sqlalchemy.engine import Engine

from memstate_sa.errors import MemstateError
from memstate_sa.memory import Memory

_PLUGIN = 'autogenerate_plugins=["alembic.autogenerate.*", "memstate_sa"],'
_REGISTER = "memstate_sa.migrations.register()"
_LOCATIONS = re.compile(r"^version_locations\s*=.*(?:\n[ \t]+\S.*)*", re.MULTILINE)
_METADATA = re.compile(r"^target_metadata\s*=\s*(?!None\b)([^\s#][^\n#]*?)[ \t]*$", re.MULTILINE)
_CONFIGURE = re.compile(r"\bcontext\.configure\((\s*\n\s*)?")
_NOT_SOURCES = {"node_modules", "site-packages", "tests", "test", "versions", "build", "dist"}


class Step(NamedTuple):
    """A part of adopting memstate_sa, and what to do about it; nothing where it is done."""

    title: str
    to_do: str = ""


class AlembicProject(NamedTuple):
    """The application's own: where it is configured, and its env.py."""

    config: Path
    env: Path

    @property
    def source(self) -> str:
        return self.env.read_text(encoding="utf-8")

    @property
    def has_branch(self) -> bool:
        """Whether our own migrations are among its versions."""
        found = _LOCATIONS.search(self.config.read_text(encoding="utf-8"))
        return found is not None and "memstate_sa" in found[0]

    @property
    def knows_tables(self) -> bool:
        return "memstate_sa.metadata" in self.source or self.has_branch

    @property
    def knows_plugin(self) -> bool:
        return bool(re.search(r"autogenerate_plugins[^\n]*memstate_sa", self.source)) or _REGISTER in self.source


def find_alembic(folder: Path) -> AlembicProject | None:
    """The Alembic of the application in *folder*, by its alembic.ini or its pyproject.toml."""
    ini, toml = folder / "alembic.ini", folder / "pyproject.toml"
    location = None
    if ini.is_file():
        parser = configparser.ConfigParser({"here": str(folder)})
        parser.read(ini, encoding="utf-8")
        location = parser.get("alembic", "script_location", fallback=None)
    if location is None and toml.is_file():
        table = tomllib.loads(toml.read_text(encoding="utf-8")).get("tool", {}).get("alembic", {})
        location, ini = table.get("script_location"), toml
        location = location and location.replace("%(here)s", str(folder))
    env = folder / (location or "") / "env.py"
    return AlembicProject(ini, env) if location and env.is_file() else None


def edited(source: str, *, has_plugins: bool) -> str:
    """*source*, an env.py, with our tables in its metadata and our plugin named, as far as they are not.

    *has_plugins*: of Alembic 1.18 and later; before, `register` is called. What is not found is left to the reader.
    """
    new = source
    if "memstate_sa.metadata" not in new:
        new = _METADATA.sub(lambda found: f"target_metadata = {_with_ours(found[1])}", new, count=1)
    if _PLUGIN not in new and _REGISTER not in new:
        if has_plugins:
            new = _CONFIGURE.sub(lambda found: f"context.configure({found[1] or ''}{_PLUGIN}{found[1] or ' '}", new)
        else:
            new = _after_imports(new, f"import memstate_sa.migrations\n\n{_REGISTER}")
    if "memstate_sa.metadata" in new and not re.search(r"^import memstate_sa\b", new, re.MULTILINE):
        new = _after_imports(new, "import memstate_sa")
    try:
        compile(new, "env.py", "exec")
    except SyntaxError:  # it is written in a way of its own
        return source
    return new


def _with_ours(metadata: str) -> str:
    listed = metadata.removeprefix("[").removesuffix("]").rstrip(", ") if metadata.startswith("[") else metadata
    return f"[{listed}, memstate_sa.metadata]"


def _after_imports(source: str, line: str) -> str:
    """*line* after the last import at the top level."""
    ends = [
        found.end() for found in re.finditer(r"^(?:import|from) [^\n(]*(?:\([^)]*\))?[^\n]*\n", source, re.MULTILINE)
    ]
    at = ends[-1] if ends else 0
    return f"{source[:at]}{line}\n{source[at:]}"


def steps(memory: Memory, engine: Engine, project: AlembicProject | None) -> Iterator[Step]:
    """The checklist, in the order in which its steps are to be taken."""
    problems = memory.doctor(engine, rows=False).problems
    sessions = [message for subject, message in problems if subject == "Sessions"]
    entities = list(memory._registry.by_entity)  # noqa: SLF001  # of the same package
    yield Step(
        f"a Memory that tracks {', '.join(entities)}" if entities else "a tracked model",
        "" if entities else "memory.track(Model, text=…), where the models are",
    )
    yield Step(
        "Sessions that are captured",
        f"{sessions[0]} (nothing to do if a module that was not imported here does)" if sessions else "",
    )
    if project is not None:
        yield Step(
            f"our tables in {project.env.name}",
            "" if project.knows_tables else "target_metadata = [..., memstate_sa.metadata]",
        )
        yield Step(
            f"our plugin in {project.env.name}",
            "" if project.knows_plugin else f"context.configure(..., {_PLUGIN[:-1]}); before Alembic 1.18: {_REGISTER}",
        )
    missing = [f"{subject} {message}" for subject, message in problems if subject != "Sessions"]
    if project is not None and missing:
        revise = "" if project.has_branch else 'alembic revision --autogenerate -m "memstate_sa", then '
        missing.append(f"{revise}alembic upgrade {'heads' if project.has_branch else 'head'}")
    yield Step("tables and triggers in the database", "\n".join(missing))


def find_memories(folder: Path) -> list[str]:
    """Each Memory at the top of a module below *folder*, as ``module:attribute``.

    Only modules that name memstate_sa and make a Memory are imported.
    """
    found: dict[int, str] = {}
    for root in (folder, folder / "src"):
        if not root.is_dir():
            continue
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
        for path in sorted(root.rglob("*.py"), key=lambda path: (len(path.parts), path)):
            parts = path.relative_to(root).with_suffix("").parts
            if not all(part.isidentifier() for part in parts) or _NOT_SOURCES & set(parts) or parts[0] == "src":
                continue
            source = path.read_text(encoding="utf-8", errors="replace")
            if "memstate_sa" not in source or not re.search(r"\bMemory\(", source):
                continue
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            try:
                module = import_module(name)
            except Exception as error:
                raise MemstateError(f"looking for a Memory, {name} cannot be imported: {error!r}") from error
            for attribute, value in vars(module).items():
                if isinstance(value, Memory):
                    found.setdefault(id(value), f"{name}:{attribute}")
    return list(found.values())
