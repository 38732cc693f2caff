"""The Memory, the database and the Alembic project of an application that adopts memstate_sa."""

from __future__ import annotations

import ast
import configparser
import re
import tomllib
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import inspect
from sqlalchemy.engine import Engine

from memstate_sa import Memory
from memstate_sa.cli.opening import import_failure, memory_in, module_roots, tracked_classes
from memstate_sa.errors import MemstateError
from memstate_sa.maintenance.doctor import folded

_METADATA = "memstate_sa.metadata"
_PLUGINS = 'autogenerate_plugins=["alembic.autogenerate.*", "memstate_sa"]'
_LONGEST_LINE = 120
_REGISTER = "memstate_sa.migrations.register()"
_CLASSES = ("Memory", "MemoryStore", "AsyncMemoryStore")
_REGISTERS = (_REGISTER, "migrations.register()")
_LOCATIONS = re.compile(r"^version_locations\s*=.*(?:\n[ \t]+\S.*)*", re.MULTILINE)
_NOT_SOURCES = {"node_modules", "site-packages", "tests", "test", "versions", "build", "dist"}


class ChecklistItem(NamedTuple):
    """A part of adopting memstate_sa. ``to_do`` says how to complete it, and is empty if it is complete."""

    title: str
    to_do: str = ""


class AlembicProject(NamedTuple):
    """The application's own Alembic project: its configuration file and its env.py.

    ``options`` is the module that names the plugins of autogenerate for Flask-Migrate, if there is one.
    """

    config: Path
    env: Path
    options: Path | None = None

    @property
    def source(self) -> str:
        return self.env.read_text(encoding="utf-8") if self.env.is_file() else ""

    @property
    def has_branch(self) -> bool:
        """Whether ``version_locations`` names our own migrations."""
        locations = _LOCATIONS.search(self.config.read_text(encoding="utf-8")) if self.config.is_file() else None
        return locations is not None and "memstate_sa" in locations[0]

    @property
    def knows_tables(self) -> bool:
        return self.has_branch or names_tables(self.source)

    @property
    def knows_plugin(self) -> bool:
        options = self.options.read_text(encoding="utf-8") if self.options else ""
        return any(_names_plugin(_parsed(source)) for source in (self.source, options))

    def edited(self, *, has_plugins: bool) -> str:
        """The source of env.py with the missing parts; see `edited`."""
        has_options = self.options is not None
        return edited(self.source, has_plugins=has_plugins, has_branch=self.has_branch, has_options=has_options)

    @property
    def upgrading(self) -> str:
        """The commands that create the missing tables and triggers."""
        if self.has_branch:
            return "alembic upgrade heads"
        if "flask" in self.source:  # Flask-Migrate's env.py runs only inside the application
            return 'flask db migrate -m "memstate_sa", then flask db upgrade'
        return 'alembic revision --autogenerate -m "memstate_sa", then alembic upgrade head'


def find_alembic(folder: Path) -> AlembicProject | None:
    """The Alembic project of *folder*, with the module that configures Flask-Migrate."""
    project = _find_env(folder)
    if project is None or "configure_args" not in project.source:
        return project
    modules = (path for path in _files(folder, "*.py") if path != project.env)
    passing = (path for path in modules if "autogenerate_plugins" in path.read_text(encoding="utf-8", errors="replace"))
    return project._replace(options=next(passing, None))


def _find_env(folder: Path) -> AlembicProject | None:
    """The Alembic project of *folder*, found by its alembic.ini or pyproject.toml, or else by its env.py.

    The env.py is the only sign of Flask-Migrate, and of an alembic.ini with another name.
    """
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
    configured = AlembicProject(ini, _resolved(folder, location) / "env.py") if location else None
    if configured and configured.env.is_file():
        return configured
    for env in _files(folder, "env.py"):
        if re.search(r"^\s*(?:import|from) alembic\b", env.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
            beside, above = env.with_name("alembic.ini"), env.parent.with_name("alembic.ini")
            return AlembicProject(above if above.is_file() and not beside.is_file() else beside, env)
    return configured  # the env.py is missing, but the project uses Alembic


def _resolved(folder: Path, location: str) -> Path:
    """The path that Alembic's *location* names: a path, or ``package:path``. No package is imported."""
    package, colon, path = location.partition(":")
    if not colon or Path(location).is_absolute():
        return folder / location
    module_roots(folder)
    top, *inner = package.split(".")
    spec = find_spec(top)
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(*roots[:1] or [str(folder / top)], *inner, *path.split(":"))


def is_migrated(engine: Engine) -> bool:
    """Whether any Alembic project has migrated this database."""
    return inspect(engine).has_table("alembic_version")


# -- env.py ----------------------------------------------------------------------------------------------------------


def edited(source: str, *, has_plugins: bool, has_branch: bool = False, has_options: bool = False) -> str:
    """*source*, an env.py, with our tables in its metadata and our plugin in its call, where they are missing.

    *has_plugins*: Alembic is 1.18 or later. An older one needs a call of `register`. *has_branch*: our own migrations
    create the tables. *has_options*: another module names the plugins, and `configure` accepts them only once. Code of
    an unusual form stays as it is.
    """
    tree = _parsed(source)
    calls = _configure_calls(tree)
    edits: list[tuple[int, str]] = []  # each edit is an offset, and the text to insert there
    text = _Text(source)
    imports = []
    if not (has_branch or names_tables(source)):
        for value in _metadata(tree, calls):
            edits += _listed(text, value, _METADATA)
        if edits and not any(
            isinstance(node, ast.Import) and any(name.name.startswith("memstate_sa") for name in node.names)
            for node in tree.body
        ):
            imports.append("import memstate_sa\n")
    if not (_names_plugin(tree) or has_options):
        if has_plugins:
            for call in calls:
                edits += _with_plugin(text, call)
        elif calls:
            imports = [f"import memstate_sa.migrations\n\n{_REGISTER}\n"]
    if imports:
        edits.append((_after_imports(text, tree), imports[0]))
    new = source.encode()
    for at, inserted in sorted(edits, reverse=True):
        new = new[:at] + inserted.encode() + new[at:]
    return _with_short_lines(new.decode()) if _parsed(new.decode()).body else source


def _configure_calls(tree: ast.Module) -> list[ast.Call]:
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "context.configure"
    ]


def _with_short_lines(source: str) -> str:
    """*source* with one argument a line in calls of `configure` that name our plugin in a long line."""
    lines = source.splitlines(keepends=True)
    for call in _configure_calls(_parsed(source)):
        line = lines[call.lineno - 1]
        if call.lineno != call.end_lineno or len(line) <= _LONGEST_LINE or not _names_plugin(_parsed(line.strip())):
            continue
        start, end = (len(line.encode()[:offset].decode()) for offset in (call.col_offset, call.end_col_offset or 0))
        indent = line[: len(line) - len(line.lstrip())]
        arguments = [ast.get_source_segment(source, part) for part in (*call.args, *call.keywords)]
        broken = "".join(f"{indent}    {argument},\n" for argument in arguments)
        lines[call.lineno - 1] = f"{line[:start]}context.configure(\n{broken}{indent}){line[end:]}"
    return "".join(lines)


class _Text:
    """A source text with offsets for the nodes of `ast`, which count lines from 1 and bytes of UTF-8."""

    def __init__(self, source: str) -> None:
        self.content = source.encode()
        self._lines = [0]
        for line in self.content.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def start(self, node: ast.expr | ast.keyword) -> int:
        return self._lines[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr) -> int:
        return self._lines[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)

    def after(self, statement: ast.stmt) -> int:
        """The start of the next line."""
        return self._lines[min(statement.end_lineno or statement.lineno, len(self._lines) - 1)]


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.Module([], [])


def names_tables(source: str) -> bool:
    """Whether *source*, an env.py, names our tables."""
    tree = _parsed(source)
    return _imports(tree, "memstate_sa", "metadata") or any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == _METADATA for node in ast.walk(tree)
    )


def _names_plugin(tree: ast.Module) -> bool:
    """Whether a list of plugins names ours, in a call, a variable or a dictionary of options."""
    if _imports(tree, "memstate_sa.migrations", "register"):
        return True
    lists = "autogenerate_plugins" in ast.unparse(tree)
    return any(
        (lists and isinstance(node, ast.List | ast.Tuple) and any(_is_plugin(item) for item in node.elts))
        or (isinstance(node, ast.Call) and f"{ast.unparse(node.func)}()" in _REGISTERS)
        for node in ast.walk(tree)
    )


def _imports(tree: ast.Module, module: str, name: str) -> bool:
    return any(
        isinstance(node, ast.ImportFrom) and node.module == module and any(alias.name == name for alias in node.names)
        for node in ast.walk(tree)
    )


def _is_plugin(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == "memstate_sa"


def _metadata(tree: ast.Module, calls: Sequence[ast.Call]) -> list[ast.expr]:
    """The application's metadata: the value of ``target_metadata = …``, or else the argument of `configure`."""
    assigned = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == "target_metadata" for target in node.targets)
    ]
    arguments = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "target_metadata"]
    return assigned[-1:] or [value for value in arguments if not isinstance(value, ast.Name)]


def _listed(text: _Text, value: ast.expr, added: str) -> Iterator[tuple[int, str]]:
    """The insertions that make *value*, a list or a single item, a list with *added*."""
    if isinstance(value, ast.List | ast.Tuple) and value.elts:
        end = text.end(value.elts[-1])
        comma = re.match(rb"\s*,", text.content[end : text.end(value)])
        yield end + (comma.end() if comma else 0), f" {added}" if comma else f", {added}"
    elif isinstance(value, ast.Name | ast.Attribute | ast.Subscript) or (
        isinstance(value, ast.Call) and not (value.args or value.keywords)
    ):
        yield text.start(value), "["
        yield text.end(value), f", {added}]"


def _with_plugin(text: _Text, call: ast.Call) -> Iterator[tuple[int, str]]:
    for keyword in call.keywords:
        if keyword.arg == "autogenerate_plugins":
            if isinstance(keyword.value, ast.List | ast.Tuple):
                yield from _listed(text, keyword.value, '"memstate_sa"')
            return
    if call.keywords:
        at = text.start(call.keywords[0])
        indent = re.search(rb"\n[ \t]*$", text.content[:at])
        yield at, f"{_PLUGINS},{indent[0].decode() if indent else ' '}"


def _after_imports(text: _Text, tree: ast.Module) -> int:
    """The offset after the imports at the top of the file."""
    at = 0
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            at = text.after(node)
        elif isinstance(node, ast.Assign) and any(ast.unparse(target) == "target_metadata" for target in node.targets):
            break
    return at


# -- the checklist ---------------------------------------------------------------------------------------------------


def checklist(
    memory: Memory, engine: Engine, project: AlembicProject | None, *, database_is_known: bool
) -> Iterator[ChecklistItem]:
    """The parts of adopting memstate_sa, in the order in which to complete them."""
    problems = memory.doctor(engine, rows=False).problems
    sessions = [message for subject, message in problems if subject == "Sessions"]
    entities = list(tracked_classes(memory))
    yield ChecklistItem(
        f"a Memory that tracks {', '.join(entities)}" if entities else "a tracked class",
        "" if entities else "Call memory.track(Model, text=…) where the models are.",
    )
    yield ChecklistItem(
        "captured Sessions",
        f"Sessions {sessions[0]}\nThere is nothing to do if another module of yours attaches them." if sessions else "",
    )
    if project is not None:
        yield ChecklistItem(
            f"our tables in {project.env.name}",
            "" if project.knows_tables else f"target_metadata = [..., {_METADATA}]",
        )
        call = "context.configure" if project.options is None else "Migrate"
        yield ChecklistItem(
            f"our plugin in {(project.options or project.env).name}",
            "" if project.knows_plugin else f"{call}(..., {_PLUGINS}); before Alembic 1.18: {_REGISTER}",
        )
    if not database_is_known:
        yield ChecklistItem("tables and triggers in the database", "Not checked. Give --url to check the database.")
        return
    others = [problem for problem in problems if problem.subject != "Sessions"]
    missing = [f"{subject} {message}" for subject, message in folded(others)]
    if missing and project is not None:
        missing.append(project.upgrading)
    elif missing and is_migrated(engine):
        missing.append(
            "Alembic migrates this database, but this folder has no Alembic project. Run the command in the project's "
            "folder, or with --create-tables."
        )
    yield ChecklistItem("tables and triggers in the database", "\n".join(missing))


def find_memories(folder: Path) -> list[str]:
    """Each Memory and MemoryStore at the top level of a module below *folder*, as ``module:name``.

    Only modules with ``name = Memory(…)`` or ``name = MemoryStore(…)`` at their top level are imported.
    """
    names: dict[int, str] = {}
    for root in module_roots(folder):
        for path in _files(root, "*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if not all(part.isidentifier() for part in parts) or parts[0] == "src":
                continue
            attributes = _memories(path.read_text(encoding="utf-8", errors="replace"))
            if not attributes:
                continue
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            try:
                module = import_module(name)
            except Exception as error:
                raise MemstateError(import_failure(name, error)) from error
            for attribute in attributes:
                value = getattr(module, attribute, None)
                if memory_in(value) is not None:
                    names.setdefault(id(value), f"{name}:{attribute}")
    return list(names.values())


def _memories(source: str) -> list[str]:
    """The names of the Memory and MemoryStore objects that a module makes at its top level."""
    if "memstate_sa" not in source:
        return []
    tree = _parsed(source)
    ours = set(_CLASSES) | {
        name.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("memstate_sa")
        for name in node.names
        if name.name in _CLASSES and name.asname
    }
    return [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call)
        if ast.unparse(node.value.func).rpartition(".")[2] in ours
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    ]


def _files(root: Path, pattern: str) -> Iterator[Path]:
    """The application's own files that match *pattern*, beginning with the files nearest to *root*."""
    for path in sorted(root.rglob(pattern), key=lambda path: (len(path.parts), path)):
        folders = path.relative_to(root).parts[:-1]
        if not (_NOT_SOURCES & set(folders) or any(name.startswith(".") for name in folders)):
            yield path
