"""The documentation is true: its blocks run, in order, as a reader would run them, and its links lead somewhere."""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pytest
from sqlalchemy import Engine, make_url

import memstate_sa
from memstate_sa import options

ROOT = Path(__file__).parents[1]
DOCS = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))
PAGES = [
    Path("README.md"),
    *DOCS,
    *(Path(name) for name in ("CONTRIBUTING.md", "SECURITY.md") if (ROOT / name).exists()),
]
RUN_ELSEWHERE = {"docs/how-to/indexes.md": "tests/adapters/indexes/test_own_index.py"}
SET_UP_BY = {"docs/cli.md": "docs/how-to/operations.md"}
"""Pages whose commands work on the application at the beginning of another page."""
ONLY_POSTGRES = {"docs/how-to/asyncio.md"}

OURS = {"memstate-sa": None, "alembic": "alembic", "python": None, "pytest": "pytest", "flask": "flask"}
"""Commands that a console block runs, and the module that each of them is."""
OTHERS = {
    "curl",
    "docker",
    "git",
    "gunicorn",
    "journalctl",
    "make",
    "pg_dump",
    "pg_restore",
    "pip",
    "sqlite3",
    "systemctl",
    "uvicorn",
}
"""Commands of other programs, which are shown and not run: they install something, or need a server."""
NOT_RUN = "Not run by the tests: "
"""A paragraph in front of a block that cannot run begins with this, and gives the reader the reason."""

BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)

PRELUDE = """\
import subprocess, sys
from pathlib import Path


def _memstate_sa(*arguments):
    # In this process, which has imported everything already.
    from memstate_sa.cli import main

    sys.argv = ["memstate-sa", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, f"memstate-sa {arguments} exited with {end.code}"


def _write(name, code):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(code)


def _run(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited with {done.returncode}\\n{done.stdout}\\n{done.stderr}"
    print(done.stdout)


"""


@dataclass(frozen=True)
class Block:
    """A block of code of a page; with a *title* it is a file of that name."""

    language: str
    title: str | None
    code: str
    runs: bool


def blocks(text: str) -> Iterator[Block]:
    for match in BLOCK.finditer(text):
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        before = text[: match.start()].rstrip().rpartition("\n\n")[2]
        yield Block(match["language"], match["title"], code, NOT_RUN not in before)


def commands(console: str) -> Iterator[list[str]]:
    """The commands of a console block. Its other lines are output."""
    for line in re.sub(r"\\\n\s*", "", console).splitlines():
        if line.startswith("$ "):
            yield shlex.split(line[2:], comments=True)


def lines(block: Block) -> Iterator[str]:
    """Python lines that follow *block* as a reader would."""
    if not block.runs:
        return
    if block.title is not None:
        yield f"_write({block.title!r}, {block.code!r})\n"
    elif block.language == "python":
        yield block.code
    elif block.language == "console":
        for program, *arguments in commands(block.code):
            assert program in OURS or program in OTHERS, f"the tests do not know the command {program}"
            if program == "memstate-sa":
                yield f"_memstate_sa(*{arguments!r})\n"
            elif program in OURS:
                module = OURS[program]
                yield f"_run(*{['-m', module, *arguments] if module else arguments!r})\n"


def script(page: Path, url: str) -> str:
    """A page as one program, on the database of *url*; empty when nothing of it runs."""
    steps = [step for block in blocks((ROOT / page).read_text()) for step in lines(block)]
    if steps and str(page) in SET_UP_BY:
        other = takewhile(lambda block: block.language == "python", blocks((ROOT / SET_UP_BY[str(page)]).read_text()))
        steps = [step for block in other for step in lines(block)] + steps
    code = "\n".join(steps)
    if not url.startswith("sqlite"):
        code = re.sub(r"(sqlite|postgresql)(\+\w+)?://[/\w@.:-]+", lambda match: _with_driver(url, match[2]), code)
    return f"{PRELUDE}{code}" if steps else ""


def _with_driver(url: str, driver: str | None) -> str:
    name = "postgresql+asyncpg" if driver == "+asyncpg" else "postgresql+psycopg"
    return make_url(url).set(drivername=name).render_as_string(hide_password=False)


RUN = [str(page) for page in PAGES if str(page) not in RUN_ELSEWHERE and script(page, "sqlite")]


@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page: str, engine: Engine, tmp_path: Path) -> None:
    """All blocks of a page, one after the other, in an empty folder; a warning is an error."""
    for package in ("chromadb", "wordllama", "langgraph.graph", "fastapi", "flask", "sqlmodel", "asyncpg", "httpx"):
        pytest.importorskip(package)
    if page in ONLY_POSTGRES and engine.dialect.name == "sqlite":
        pytest.skip("the page is about PostgreSQL")
    url = engine.url.render_as_string(hide_password=False)
    program = tmp_path / "document.py"
    program.write_text(script(Path(page), url))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, program.name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", [*map(str, PAGES)])
def test_blocks_are_in_known_languages(page: str) -> None:
    """Blocks in another spelling of the language would be passed over in silence."""
    languages = {block.language for block in blocks((ROOT / page).read_text())}
    assert languages <= {
        "python",
        "console",
        "text",
        "sql",
        "ini",
        "toml",
        "yaml",
        "diff",
        "json",
        "dockerfile",
        "promql",
    }


# -- links -------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    titles = HEADING.findall(FENCED.sub("", page.read_text()))
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", [*map(str, PAGES)])
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link, to a file and to a heading in it."""
    document = ROOT / page
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)", FENCED.sub("", document.read_text())):
        target, _, anchor = link.partition("#")
        file = document.parent / target if target else document
        assert file.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(file), f"{page}: {link}"


def test_the_package_page_has_absolute_links() -> None:
    """The README as the package shows it: every link leads below a URL that pyproject.toml declares."""
    pytest.importorskip("hatch_fancy_pypi_readme")
    metadata = pytest.importorskip("hatchling.metadata.core")
    project = metadata.ProjectMetadata(str(ROOT), pytest.importorskip("hatchling.plugin.manager").PluginManager()).core
    source = project.urls["Source"]
    links = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", project.readme))
    assert len(links) > 20
    for link in links:
        assert link.startswith(("https://img.shields.io/badge/", source)), link
        if link.startswith(source):
            assert (ROOT / link.removeprefix(source).partition("#")[0]).exists(), link


# -- the reference -----------------------------------------------------------------------------------------------------

REFERENCE = ROOT / "docs" / "reference"


def documented() -> set[str]:
    """The objects that the reference shows, by their full names."""
    pages = [page.read_text() for page in REFERENCE.glob("*.md")]
    return {name for text in pages for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}


def test_the_reference_has_each_public_name() -> None:
    names = {f"memstate_sa.{name}" for name in memstate_sa.__all__} - {"memstate_sa.metadata", "memstate_sa.sqlite"}
    page = (REFERENCE / "errors.md").read_text()
    assert "memstate_sa.options" in documented()
    names -= {f"memstate_sa.{name}" for name in dir(options)}
    shown = {name.rpartition(".")[2] for name in documented()} | set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert {name.rpartition(".")[2] for name in names} - shown == {"UntrackedWriteWarning"}
    assert "`UntrackedWriteWarning`" in page


@pytest.mark.parametrize("page", sorted(page.stem for page in REFERENCE.glob("*.md")))
def test_the_reference_names_the_files_of_its_docstrings(page: str) -> None:
    """A reader of the repository sees no docstrings there."""
    text = (REFERENCE / f"{page}.md").read_text()
    names = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    files = {str(Path(inspect.getfile(pkgutil.resolve_name(name))).relative_to(ROOT)) for name in names}
    source = "https://memstate-sa.example/source/"
    assert set(re.findall(rf"\[(\S+)\]\({source}\1\)", text)) == files


@pytest.mark.parametrize(
    ("page", "documented_class"), [("memory", memstate_sa.Memory), ("store", memstate_sa.MemoryStore)]
)
def test_the_reference_has_each_method(page: str, documented_class: type) -> None:
    listed = re.findall(r"^        - (\w+)$", (REFERENCE / f"{page}.md").read_text(), re.MULTILINE)
    methods = [name for name, value in inspect.getmembers(documented_class, callable) if not name.startswith("_")]
    assert set(methods) <= set(listed)
    assert not [name for name in listed if not hasattr(documented_class, name)]


def test_the_reference_has_each_table() -> None:
    listed = re.findall(r"^\| `(memstate_\w+)` \|", (REFERENCE / "tables.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(memstate_sa.metadata.tables)


def test_the_reference_has_each_metric() -> None:
    metrics = pytest.importorskip("memstate_sa.cli.metrics")
    listed = re.findall(r"^\| `(memstate_\w+)` \|", (REFERENCE / "metrics.md").read_text(), re.MULTILINE)
    gauges, counters = vars(metrics)["_GAUGES"], vars(metrics)["_COUNTERS"]
    assert listed == [*(f"memstate_{name}" for name in gauges), *(f"memstate_{name}_total" for name in counters)]


def test_the_navigation_has_each_page() -> None:
    pages = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert pages == {str(page.relative_to("docs")) for page in DOCS}


# -- the README --------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(FENCED.sub("", (ROOT / "README.md").read_text()).split()) <= 900


def test_the_badges_are_true() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme = (ROOT / "README.md").read_text()
    assert f"![Python {project['requires-python'].removeprefix('>=')} or later]" in readme
    assert f"![License: {project['license']}]" in readme
    assert "![SQLAlchemy 2.0 and 2.1]" in readme
    assert any(requirement.startswith("sqlalchemy>=2.0") for requirement in project["dependencies"])


def test_each_guarantee_links_to_its_tests() -> None:
    """A folder with tests in it, and a section about limits, for each row of the README's table."""
    table = (ROOT / "README.md").read_text().split("| guarantee | in short | tests |\n")[1].split("\n\n")[0]
    rows = table.splitlines()[1:]
    assert len(rows) >= 12
    for row in rows:
        link = re.match(
            r"\| \[[^]]+\]\(docs/explanation/guarantees.md#[a-z-]+\) \| .+ \| \[\w+\]\((tests/[^)]+)\) \|", row
        )
        assert link, f"no link to tests: {row[:60]}"
        assert any((ROOT / link.group(1)).glob("test_*.py")), link.group(1)
