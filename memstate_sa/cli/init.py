"""`init`: what an application still needs to adopt memstate_sa."""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from memstate_sa import migrations
from memstate_sa.cli import alembic_project
from memstate_sa.cli.display import Console
from memstate_sa.cli.opening import Url, exit_on_error, missing_file, open_memory


def init(
    url: Url,
    app: Annotated[
        str,
        typer.Option(
            "--app",
            envvar="MEMSTATE_APP",
            metavar="MODULE:ATTRIBUTE",
            help="Your Memory: shop.memory:memory. Default: the one that is found in the modules of this folder.",
        ),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is to be done, and change no file and no table.")
    ] = False,
    apply: Annotated[
        bool, typer.Option("--apply", help="Add to Alembic's env.py what it lacks, after showing it.")
    ] = False,
    create: Annotated[
        bool, typer.Option("--create-tables", help="Create tables and triggers even where there is Alembic.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Edit env.py without asking.")] = False,
) -> None:
    """Show what this application still needs, and do what can be done.

    Without Alembic, tables and triggers are created at once. With Alembic, a migration of yours is to create them.

    Signs of Alembic: alembic.ini or pyproject.toml, an env.py below this folder, alembic_version in the database.

    memstate-sa init --dry-run     the checklist, and nothing else
    memstate-sa init               and create tables and triggers, without Alembic
    memstate-sa init --apply       and edit env.py, with it
    """
    project = alembic_project.find_alembic(Path.cwd())
    app = app or _only_memory()
    if (dry_run or (project is not None and not create)) and missing_file(url):
        url = "sqlite://"  # as empty, and not made by being looked at
    with open_memory(app, url, must_exist=False, must_have_tables=False) as (memory, engine):
        if project is not None and apply:
            _edit(project, dry_run=dry_run, yes=yes)
        if not dry_run and (create or not (project is not None or alembic_project.is_migrated(engine))):
            memory.create_tables(engine)
        console = Console()
        items = list(alembic_project.checklist(memory, engine, project))
        for item in items:
            console.print(f"[red]✗[/] {escape(item.title)}" if item.to_do else f"[green]✓[/] {escape(item.title)}")
            for line in item.to_do.splitlines():
                console.print(f"    {escape(line)}", highlight=False, soft_wrap=True)
        missing = sum(bool(item.to_do) for item in items)
        console.print(f"{missing} of {len(items)} steps are left." if missing else "There is nothing left to do.")


def _only_memory() -> str:
    with exit_on_error():
        names = alembic_project.find_memories(Path.cwd())
    if len(names) != 1:
        problem = f"there are several: {', '.join(names)}" if names else "no module of this folder has a Memory"
        raise typer.BadParameter(f"{problem}; say which, as shop.memory:memory", param_hint="--app")
    Console(stderr=True).print(f"--app {escape(names[0])}")
    return names[0]


def _edit(project: alembic_project.AlembicProject, *, dry_run: bool, yes: bool) -> None:
    new = project.edited(has_plugins=migrations.has_plugins())
    if new == project.source:
        if not (project.knows_tables and (project.knows_plugin or project.options)):
            typer.echo(f"{project.env} is written in a way of its own: nothing can be added to it, but by you")
        return
    old, name = project.source.splitlines(keepends=True), str(project.env)
    typer.echo("".join(unified_diff(old, new.splitlines(keepends=True), name, name)))
    if not dry_run and (yes or typer.confirm(f"Edit {project.env}?")):
        project.env.write_text(new, encoding="utf-8")
