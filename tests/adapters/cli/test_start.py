"""The start of the command line: it imports little, and `--help` helps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("typer")

import typer
from typer.main import get_command

from memstate_sa import cli
from tests.support.commands import ROOT, invoke

HEAVY = ["alembic", "asyncio", "numpy", "prometheus_client", "pydantic", "pythonjsonlogger", "sqlalchemy"]
CLI_PAGE = ROOT / "docs" / "cli.md"


def commands(group: typer.core.TyperGroup, path: str = "") -> Iterator[tuple[str, typer.core.TyperCommand]]:
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


COMMANDS = dict(commands(get_command(cli.application())))


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], set()),
        (["--version"], set()),
        (["relay", "--help"], {"pydantic"}),  # typer itself imports it for the parameters of a command
        (["dead", "list", "--help"], {"pydantic"}),
    ],
)
def test_help_and_version_import_no_heavy_module(arguments: list[str], allowed: set[str]) -> None:
    program = (
        "import sys, json, atexit\n"
        "atexit.register(lambda: print(json.dumps([*sys.modules]), file=sys.stderr))\n"
        f"sys.argv = ['memstate-sa', *{arguments}]\n"
        "from memstate_sa.cli import main\n"
        "main()"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = json.loads(ran.stderr)
    assert set(HEAVY) & set(modules) <= allowed
    assert {name.split(".")[1] for name in modules if name.startswith("memstate_sa.")} == {"cli", "errors", "runtime"}


def test_module_runs_as_the_command_line() -> None:
    command = [sys.executable, "-m", "memstate_sa", "--version"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == invoke("--version")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_an_example(name: str) -> None:
    assert f"\n memstate-sa {name}" in invoke(*name.split(), "--help")


# -- docs/cli.md -----------------------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    """The sections of the page by the command in their headings."""
    parts = re.split(r"^##+ `(.*)`\n", CLI_PAGE.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def names_of(command: typer.core.TyperCommand) -> set[str]:
    """The options, arguments and environment variables of *command*, as the page names them."""
    names = set()
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        if isinstance(parameter, typer.core.TyperOption):
            names |= {*parameter.opts, *parameter.secondary_opts}
        else:
            names.add(str(parameter.metavar))
        names |= {parameter.envvar} if isinstance(parameter.envvar, str) else set()
    return names


def test_the_page_has_a_section_for_each_command_and_no_other() -> None:
    assert sorted(sections()) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_names_each_option_and_no_other(name: str) -> None:
    common = {"--app", "--url", "MEMSTATE_APP", "MEMSTATE_URL"}
    rows = re.findall(r"^\| (`.*?) \|", sections()[name], re.MULTILINE)
    documented = {item for row in rows for item in re.findall(r"`([^`]+)`", row)}
    assert documented - common == names_of(COMMANDS[name]) - common
    assert common <= set(re.findall(r"`([^` ]+)`", CLI_PAGE.read_text("utf-8").partition("\n## `")[0]))
