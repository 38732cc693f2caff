"""`verify` and `doctor`: whether indexes, log and tables say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from memstate_sa.cli.display import Console, progress_of
from memstate_sa.cli.opening import App, Url, name_of, open_memory
from memstate_sa.maintenance.doctor import folded

_EXAMPLES = 20  # facts of each kind that are named


def verify(
    app: App,
    url: Url,
    repair: Annotated[bool, typer.Option("--repair", help="Deliver again what differs.")] = False,
) -> None:
    """Compare every index with the database, by content. Exits with 1 when one differs and was not repaired."""
    with open_memory(app, url) as (memory, engine):
        console = Console()
        with Progress(console=console, transient=True) as progress:
            update = progress_of(progress, "comparing")
            report = memory.verify(engine, repair=repair, progress=update)
        kinds = ("missing", "ghost", "stale", "pending")
        facts_by_kind: dict[str, list[tuple[str, object]]] = {kind: getattr(report, kind) for kind in kinds}
        table = Table("rows checked", *kinds)
        table.add_row(str(report.checked), *(str(len(facts)) for facts in facts_by_kind.values()))
        console.print(table)
        _print_facts(facts_by_kind)
        if report.clean:
            console.print("[green]Nothing has drifted.[/]")
        elif repair:
            waiting = sum(backlog.parked + backlog.dead for backlog in memory.status(engine).values())
            console.print(f"{waiting} facts wait for the relay that is running." if waiting else "[green]Repaired.[/]")
        else:
            console.print("[red]There is drift;[/] --repair delivers these facts again.")
            raise typer.Exit(1)


def doctor(
    app: App,
    url: Url,
    repair: Annotated[
        bool, typer.Option("--repair", help="Log what was changed past the log, and deliver it.")
    ] = False,
) -> None:
    """Compare the log with the tables, and look for what makes them differ. Exits with 1 when something is wrong."""
    with open_memory(app, url, must_have_tables=False) as (memory, engine):
        console = Console()
        with Progress(console=console, transient=True) as progress:
            diagnosis = memory.doctor(engine, repair=repair, progress=progress_of(progress, "comparing"))
        table = Table("rows checked", "changed", "gone", "not in the log")
        table.add_row(
            str(diagnosis.checked), str(len(diagnosis.changed)), str(len(diagnosis.gone)), str(diagnosis.unlogged)
        )
        console.print(table)
        _print_facts({"changed": diagnosis.changed, "gone": diagnosis.gone})
        for problem in folded(diagnosis.problems):
            console.print(f"[red]{escape(problem.subject)}[/] {escape(problem.message)}", highlight=False)
        if diagnosis.unlogged:
            console.print(f"{diagnosis.unlogged} rows came before tracking, or past it. This logs and delivers them:")
            names = [name_of(model, app) or "" for model in diagnosis.unlogged_by_class]
            arguments = " ".join(names) if all(names) else "--restart"
            console.print(f"memstate-sa backfill {arguments}", markup=False, highlight=False, soft_wrap=True)
        if diagnosis.healthy:
            console.print("[green]The log tells what is in the tables.[/]")
        elif repair and not diagnosis.has_problems:
            console.print("[green]Reconciled;[/] the relay delivers it.")
        else:
            if diagnosis.changed or diagnosis.gone:
                console.print("[red]The tables were changed past the log;[/] --repair logs that.")
            raise typer.Exit(1)


def _print_facts(by_kind: Mapping[str, Sequence[tuple[str, object]]]) -> None:
    console = Console()
    for kind, facts in by_kind.items():
        for entity, key in facts[:_EXAMPLES]:
            console.print(f"{kind}: {escape(entity)} {escape(repr(key))}", highlight=False)
        if len(facts) > _EXAMPLES:
            console.print(f"{kind}: {len(facts) - _EXAMPLES} more")
