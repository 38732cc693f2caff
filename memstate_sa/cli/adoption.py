"""`demo` and `init`: what memstate_sa is worth, and what an application still needs to have it."""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from memstate_sa import migrations
from memstate_sa.cli import alembic_project
from memstate_sa.cli.display import Console
from memstate_sa.cli.opening import Url, explained, opened
from memstate_sa.errors import MissingExtra


def demo(
    input_path: Annotated[
        Path | None,
        typer.Option("--input", exists=True, dir_okay=False, help="A conversation (JSON lines) or a MemoryBank file."),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(file_okay=False, help="Keep databases, indexes and logs in this new or empty folder.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which index calls fail.")] = 7,
) -> None:
    """Play one agent memory twice, by hand and with memstate_sa, through failures and a crash.

    Needs no network and no database server; takes under a minute.
    """
    with explained():
        try:
            from memstate_sa.demo.script import run
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "chromadb", "chroma") from error
        run(input_path, directory=keep, console=Console(), seed=seed)


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

    Alembic is told by alembic.ini or pyproject.toml, an env.py below this folder, or alembic_version in the database.

    memstate-sa init --dry-run     the checklist, and nothing else
    memstate-sa init               and create tables and triggers, without Alembic
    memstate-sa init --apply       and edit env.py, with it
    """
    project = alembic_project.find_alembic(Path.cwd())
    app = app or _the_memory()
    if (dry_run or (project is not None and not create)) and alembic_project.unmade(url):
        url = "sqlite://"  # as empty, and not made by being looked at
    with opened(app, url, made=False, initialised=False) as (memory, engine):
        if project is not None and apply:
            _edit(project, dry_run=dry_run, yes=yes)
        if not dry_run and (create or not (project is not None or alembic_project.is_migrated(engine))):
            memory.create_tables(engine)
        console = Console()
        steps = list(alembic_project.steps(memory, engine, project))
        for step in steps:
            console.print(f"[red]✗[/] {escape(step.title)}" if step.to_do else f"[green]✓[/] {escape(step.title)}")
            for line in step.to_do.splitlines():
                console.print(f"    {escape(line)}", highlight=False, soft_wrap=True)
        missing = sum(bool(step.to_do) for step in steps)
        console.print(f"{missing} of {len(steps)} steps are left." if missing else "There is nothing left to do.")


def _the_memory() -> str:
    with explained():
        found = alembic_project.find_memories(Path.cwd())
    if len(found) != 1:
        problem = f"there are several: {', '.join(found)}" if found else "no module of this folder has a Memory"
        raise typer.BadParameter(f"{problem}; say which, as shop.memory:memory", param_hint="--app")
    Console(stderr=True).print(f"--app {escape(found[0])}")
    return found[0]


def _edit(project: alembic_project.AlembicProject, *, dry_run: bool, yes: bool) -> None:
    new = project.edited(has_plugins=migrations.has_plugins())
    if new == project.source:
        if not (project.knows_tables and project.knows_plugin):
            typer.echo(f"{project.env} is written in a way of its own: nothing can be added to it, but by you")
        return
    old, name = project.source.splitlines(keepends=True), str(project.env)
    typer.echo("".join(unified_diff(old, new.splitlines(keepends=True), name, name)))
    if not dry_run and (yes or typer.confirm(f"Edit {project.env}?")):
        project.env.write_text(new, encoding="utf-8")
