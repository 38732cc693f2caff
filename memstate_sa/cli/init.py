"""`init`: show and do the remaining work of adopting memstate_sa."""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from memstate_sa.cli.display import Console
from memstate_sa.cli.errors import exit_on_error
from memstate_sa.cli.health import print_id_note
from memstate_sa.cli.opening import missing_file, open_memory
from memstate_sa.cli.options import Url

if TYPE_CHECKING:
    from memstate_sa.cli.alembic_project import AlembicProject

_EMPTY = "sqlite://"


def init(
    url: Url = None,
    app: Annotated[
        str,
        typer.Option(
            "--app",
            envvar="MEMSTATE_APP",
            metavar="MODULE:NAME",
            help="Your Memory or MemoryStore: shop.memory:memory. Default: the only one in this folder.",
        ),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the checklist. Needs no --url.")] = False,
    apply: Annotated[
        bool, typer.Option("--apply", help="Add the missing parts to Alembic's env.py, after showing them.")
    ] = False,
    create: Annotated[
        bool, typer.Option("--create-tables", help="Create tables and triggers, even if the project uses Alembic.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Edit env.py without asking.")] = False,
) -> None:
    """Show what this application still needs, and do it where possible.

    Without Alembic, the command creates tables and triggers.
    With Alembic, your own migration creates them. The command looks for Alembic
    in alembic.ini, pyproject.toml, env.py and the table alembic_version.

    memstate-sa init --dry-run     only show the checklist
    memstate-sa init               create tables and triggers
    memstate-sa init --apply       edit Alembic's env.py
    """
    from memstate_sa.cli import alembic_project

    project = alembic_project.find_alembic(Path.cwd())
    app = app or _only_memory()
    changes_no_table = dry_run or (project is not None and not create)
    if changes_no_table and url is not None and missing_file(url):
        url = _EMPTY  # opening the missing file would create it
    default_url = _EMPTY if changes_no_table else None
    with open_memory(app, url, must_exist=False, must_have_tables=False, default_url=default_url) as (memory, engine):
        if project is not None and apply:
            _edit(project, dry_run=dry_run, yes=yes)
        if not dry_run and (create or not (project is not None or alembic_project.is_migrated(engine))):
            memory.create_tables(engine)
        console = Console()
        is_known = url is not None or str(engine.url) != _EMPTY
        items = list(alembic_project.checklist(memory, engine, project, database_is_known=is_known))
        for item in items:
            console.print(f"[red]✗[/] {escape(item.title)}" if item.to_do else f"[green]✓[/] {escape(item.title)}")
            for line in item.to_do.splitlines():
                console.print(f"    {escape(line)}", highlight=False, soft_wrap=True)
        if is_known:
            print_id_note(console, memory, engine)
        missing = sum(bool(item.to_do) for item in items) - (not is_known)
        unchecked = "" if is_known else " The database was not checked."
        console.print(
            (f"To do: {missing} of {len(items)} items." if missing else "There is nothing left to do.") + unchecked
        )


def _only_memory() -> str:
    from memstate_sa.cli import alembic_project

    with exit_on_error():
        names = alembic_project.find_memories(Path.cwd())
    if len(names) != 1:
        problem = f"This folder has several: {', '.join(names)}." if names else "No module of this folder has a Memory."
        raise typer.BadParameter(f"{problem} Give one, for example shop.memory:memory.", param_hint="--app")
    Console(stderr=True).print(f"--app {escape(names[0])}")
    return names[0]


def _edit(project: AlembicProject, *, dry_run: bool, yes: bool) -> None:
    from memstate_sa import migrations
    from memstate_sa.cli.alembic_project import names_tables

    new = project.edited(has_plugins=migrations.has_plugins())
    if new == project.source:
        if not (project.knows_tables and (project.knows_plugin or project.options)):
            typer.echo(f"Cannot edit {project.env}: it has an unusual form. Edit it by hand, as the checklist says.")
        return
    if not (project.has_branch or names_tables(new)):
        typer.echo(
            "Cannot edit target_metadata: its value names no metadata of yours. Edit it by hand, as the checklist says."
        )
    old, name = project.source.splitlines(keepends=True), str(project.env)
    typer.echo("".join(unified_diff(old, new.splitlines(keepends=True), name, name)))
    if not dry_run and (yes or typer.confirm(f"Edit {project.env}?")):
        project.env.write_text(new, encoding="utf-8")
