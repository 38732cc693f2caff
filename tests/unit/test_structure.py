"""The package's own structure: use of names, length of files, and the import paths that users write."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "memstate_sa"
MOST_LINES = 500
CATALOGUES = {"memstate_sa/testing/conformance.py"}
"""Lists of cases, which are not read from top to bottom."""

PUBLIC = {
    "memstate_sa": (
        "AsyncMemoryStore BackfillOptions Backlog Change Changes ConflictError DeadLetter DeliveryError "
        "DeliveryRejected DeliveryRetryable Diagnosis DriftReport Embedder Fact HistoryMissing HistoryOptions Hit "
        "Hits Incomplete IndexBroken IndexMismatch Labels Memory MemoryOptions MemoryStore MemstateError MissingExtra "
        "NotFound PastSession Relay RelayOptions Retention RetryPolicy Revocation RevokeOptions RollbackOptions "
        "SearchOptions StoreOptions TrackOptions UntrackedWrite UntrackedWriteWarning ValidationFailed VectorIndex "
        "metadata sqlite"
    ),
    "memstate_sa.indexes": (
        "ChromaIndex Entry FaissIndex FencedIndex Filter InMemoryIndex MarkedIndex Match PgVectorIndex Point "
        "PurgeableIndex QdrantIndex RedisIndex Stored VectorIndex canonical matches matrix storable"
    ),
    "memstate_sa.embedders": "ChromaEmbedder Embedder WordLlamaEmbedder",
    "memstate_sa.relay": "DeadLetter Relay Retention RetryPolicy",
    "memstate_sa.integrations.langgraph": (
        "InvalidItem InvalidThread MemStateCheckpointer MemStateStore StaleRun StateSerializer"
    ),
    "memstate_sa.migrations": "location register",
    "memstate_sa.testing": "FlakyFencedIndex FlakyIndex HashEmbedder IndexConformance",
    "memstate_sa.sqlite": "SavepointWarning configure",
}
NEEDS = {"memstate_sa.integrations.langgraph": "langgraph"}


def _name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
FOLDERS = sorted(folder.name for folder in PACKAGE.iterdir() if folder.is_dir() and folder.name != "__pycache__")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _private_names(module: str) -> Iterator[str]:
    """The private names of other modules that *module* imports, or reaches through one. Modules count in a folder."""
    folder = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(FILES[module].read_text())
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [(alias.name, alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            imported = [(f"{node.module}.{alias.name}", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        for name, local_name in imported:
            if not name.startswith("memstate_sa"):
                continue
            if name in FILES:
                modules[local_name] = name
            path, _, last = name.rpartition(".")
            is_sibling = name in FILES and path == folder
            if _is_private(last) and not is_sibling:
                yield f"{module}:{node.lineno}: {name}"
            home, _, name_of_home = path.rpartition(".")
            if _is_private(name_of_home) and home != folder:
                yield f"{module}:{node.lineno}: {path}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and ast.unparse(node.value) in modules:
            yield f"{module}:{node.lineno}: {modules[ast.unparse(node.value)]}.{node.attr}"


def test_no_module_uses_a_private_name_of_another() -> None:
    private_names = [name for module in FILES for name in _private_names(module)]
    assert not private_names, "\n".join(private_names)


def test_no_file_is_too_long() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES.values()}
    too_long = [f"{name}: {n} lines" for name, n in lengths.items() if n > MOST_LINES and name not in CATALOGUES]
    assert not too_long, "\n".join(too_long)


def test_the_package_shows_few_files_beside_its_folders() -> None:
    assert len([file for file in PACKAGE.iterdir() if file.is_file()]) <= 10


def test_the_documented_folders_are_those_of_the_package() -> None:
    """The folders are in the first column of the table in docs/explanation/architecture.md."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/explanation/architecture.md").read_text(), re.MULTILINE)
    assert sorted({name for row in rows for name in re.findall(r"`(\w+)/[\w/]*`", row)}) == FOLDERS


def test_one_file_looks_at_the_name_of_a_dialect() -> None:
    """All others call `dialects.database_of`, so that a new database needs a change in one place only."""
    look = re.compile(r"dialect\.name\b|dialect_name\b|get_backend_name\(\) *[!=]=")
    files = {name for name, file in FILES.items() if look.search(file.read_text())}
    assert files == {"memstate_sa.db.dialects"}


@pytest.mark.parametrize("path", PUBLIC)
def test_a_public_import_path_gives_its_names(path: str) -> None:
    if path in NEEDS and find_spec(NEEDS[path]) is None:
        pytest.skip(f"{NEEDS[path]} is not installed")
    module, names = import_module(path), PUBLIC[path].split()
    assert [name for name in names if not hasattr(module, name)] == []
    if hasattr(module, "__all__"):
        assert sorted(module.__all__) == sorted(names)
