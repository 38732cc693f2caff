"""Mistakes of a user: each has a message and an exit code, and none shows a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.commands import Application, app, bare, flat, invoke

__all__ = ["app", "bare"]

pytest.importorskip("typer")

BROKEN = {
    "raises": (
        "def half(n):\n    return 1 / 0\n\n\nhalf(3)\n",
        "ZeroDivisionError: division by zero",
        2,
        "return 1 / 0",
    ),
    "syntax": ("x = (\n", "SyntaxError: '(' was never closed", 1, ""),
    "needs": (
        "import no_such_package_here\n",
        "No module named 'no_such_package_here'",
        1,
        "import no_such_package_here",
    ),
    "quits": ("import sys\nsys.exit(3)\n", "SystemExit: 3", 2, "sys.exit(3)"),
    "nested": ("import json\njson.loads('{')\n", "JSONDecodeError", 2, "json.loads('{')"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_application_that_fails_on_import_shows_its_error_and_line(bare: Application, name: str) -> None:
    source, error, line, text = BROKEN[name]
    module = f"{name}_{bare.name}"
    file = Path(f"{module}.py").absolute()
    file.write_text(source)
    output = invoke("status", "--app", f"{module}:memory", "--url", bare.url, exit_code=1)
    assert f"Cannot import '{module}'" in output and error in output
    assert f"\n  {file}:{line}{f': {text}' if text else ''}\n" in output


def test_application_is_found_in_the_folder_src(app: Application) -> None:
    Path("src").mkdir()
    Path("src", f"inner_{app.name}.py").write_text(f"from {app.name} import memory\n")
    assert "pending" in invoke("status", "--app", f"inner_{app.name}:memory", "--url", app.url)


def test_application_without_a_memory_gets_an_example(bare: Application) -> None:
    Path("empty_module_here.py").write_text("number = 3\n")
    output = flat(invoke("status", "--app", "empty_module_here:number", "--url", bare.url, exit_code=2))
    assert "empty_module_here:number is not a Memory or a MemoryStore (its type is int)" in output
    assert "memory = Memory(…)" in output


def test_missing_url_is_explained(bare: Application) -> None:
    output = flat(invoke("status", "--app", f"{bare.name}:memory", exit_code=2))
    assert "There is no URL, and a Memory has no database of its own" in output


def test_unreachable_database_is_explained(bare: Application) -> None:
    pytest.importorskip("psycopg")
    url = "postgresql+psycopg://ana:secret@localhost:1/shop"
    output = invoke("status", "--app", f"{bare.name}:memory", "--url", url, exit_code=1)
    assert output.startswith("Error: Cannot use the database: ") and "Check --url" in output and "secret" not in output


def test_file_that_is_no_database_is_explained(bare: Application) -> None:
    Path("letter.txt").write_text("Dear database, " * 100)
    output = invoke("status", "--app", f"{bare.name}:memory", "--url", "sqlite:///letter.txt", exit_code=1)
    assert "file is not a database" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metrics-port", "80000"), "less than or equal to 65535"),
        (("--metrics-port", "65535", "--workers", "3"), "3 workers need ports above 65535"),
        (("--log-level", "loud"), "'loud'"),
        (("--lease", "0"), "greater than or equal to 0.5"),
        (("--workers", "many"), "valid integer"),
    ],
)
def test_wrong_option_of_relay_is_explained(app: Application, arguments: tuple[str, ...], message: str) -> None:
    assert message in flat(app.run("relay", *arguments, exit_code=2))


def test_address_that_cannot_be_served_is_explained(app: Application) -> None:
    output = app.run("relay", "--metrics-port", "0", "--metrics-host", "nowhere.invalid", exit_code=1)
    assert "Error: Cannot serve metrics on nowhere.invalid:0" in output and "--metrics-host" in output


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("prometheus_client", ("--metrics-port", "0")), ("pythonjsonlogger.json", ("--log-json",))],
)
def test_missing_package_of_the_extra_is_named(
    app: Application, module: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "memstate_sa.cli.metrics", raising=False)
    monkeypatch.delattr("memstate_sa.cli.metrics", raising=False)
    assert "pip install 'memstate-sa[cli]'" in app.run("relay", *arguments, exit_code=1)


def test_missing_driver_is_explained_with_its_extra(bare: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    url = "postgresql+psycopg://ana@host/shop"
    output = flat(invoke("status", "--app", f"{bare.name}:memory", "--url", url, exit_code=2))
    assert "psycopg is not installed. Run: pip install 'memstate-sa[postgres]'" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("log", "Nots"), "Unknown class 'Nots'. Did you mean Note or note?"),
        (("log", "zebra"), "Unknown class 'zebra'. There is: Note, Pair, "),
        (("log", "note", "x"), "Invalid key 'x'. A key of Note is id (int)."),
        (("log", "pair", "[1]"), "Invalid key '[1]'. A key of Pair is a JSON array of left (int), right (str)."),
        (("export", "-", "--model", "Nots"), "Unknown class 'Nots'"),
        (("reindex", "memori"), "Unknown index 'memori'. Did you mean memory?"),
        (("status", "--watch", "--json"), "Cannot use --json with --watch"),
        (("drain", "--timeout", "-1"), "greater than or equal to 0"),
        (("statu",), "No such command 'statu'. Did you mean 'status'?"),
    ],
)
def test_wrong_name_is_answered_with_close_names(app: Application, arguments: tuple[str, ...], message: str) -> None:
    assert message in flat(app.run(*arguments, exit_code=2))


def test_input_that_cannot_be_read_is_explained(app: Application) -> None:
    """The input is binary, or a folder."""
    Path("binary").write_bytes(b"\xff\xfe\x00" * 20)
    assert "not UTF-8" in app.run("import", "binary", exit_code=1)
    assert "Is a directory" in flat(app.run("import", ".", exit_code=2))
    assert "Is a directory" in flat(app.run("export", ".", exit_code=1))
