"""`verify` and `doctor`: compare indexes, log and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from memstate_sa.cli.display import Console, cell, fact_name, facts_json, print_json, progress_bar
from memstate_sa.cli.errors import fail
from memstate_sa.cli.opening import open_memory, tracked_classes
from memstate_sa.cli.options import App, JsonDocument, Url
from memstate_sa.cli.relay import FILLING
from memstate_sa.runtime.display import counted

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from memstate_sa import Diagnosis, Memory

_EXAMPLES = 20  # the most facts of each kind that are shown
_DRIFT = ("missing", "ghost", "stale", "pending")


def verify(
    app: App,
    url: Url = None,
    repair: Annotated[bool, typer.Option("--repair", help="Deliver the facts that differ again.")] = False,
    as_json: JsonDocument = False,
) -> None:
    """Compare the content of every index with the database.

    The exit code is 1 if an index differs and was not repaired.
    An index in memory can only be compared by the process that has it.

    memstate-sa verify
    memstate-sa verify --repair
    """
    with open_memory(app, url) as (memory, engine):
        with progress_bar("comparing") as update:
            report = memory.verify(engine, repair=repair, progress=update)
        facts_by_kind = {kind: getattr(report, kind) for kind in _DRIFT}
        is_right = report.clean or repair
        if as_json:
            facts = {kind: facts_json(pairs) for kind, pairs in facts_by_kind.items()}
            print_json({"checked": report.checked, **facts, "clean": report.clean})
            raise typer.Exit(0 if is_right else 1)
        console = Console()
        table = Table("rows checked", *_DRIFT)
        table.add_row(str(report.checked), *(str(len(facts)) for facts in facts_by_kind.values()))
        console.print(table)
        unfilled = [name for name, backlog in memory.status(engine).items() if backlog.refilling]
        if report.missing and unfilled:
            fail(
                f"{', '.join(unfilled)}: not filled yet. {FILLING} An index in memory is filled only in the process of "
                "its relay: call memory.verify(engine) there."
            )
        _print_facts(console, facts_by_kind)
        if report.clean:
            console.print("[green]Nothing has drifted.[/]")
        elif repair:
            waiting = sum(backlog.parked + backlog.dead for backlog in memory.status(engine).values())
            waiting_facts = counted(waiting, "fact waits", "facts wait")
            console.print(f"{waiting_facts} for the running relay." if waiting else "[green]Repaired.[/]")
        else:
            console.print("[red]The index has drifted.[/] --repair delivers these facts again.")
            raise typer.Exit(1)


def doctor(
    app: App,
    url: Url = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Log the changes that bypassed the log, and deliver them.")
    ] = False,
    as_json: JsonDocument = False,
) -> None:
    """Compare the log with the tables, and look for the causes of a difference. Open the indexes that have a server.

    The exit code is 1 if something is wrong, and with --repair if something is still wrong.

    memstate-sa doctor
    memstate-sa doctor --repair
    """
    with open_memory(app, url, must_have_tables=False) as (memory, engine):
        with progress_bar("comparing") as update:
            diagnosis = memory.doctor(engine, repair=repair, progress=update)
            differs = bool(diagnosis.changed or diagnosis.gone)
            left = memory.doctor(engine, progress=update) if repair and differs else diagnosis
        if as_json:
            _print_document(diagnosis, memory)
            raise typer.Exit(0 if left.healthy else 1)
        console = Console()
        table = Table("rows checked", "changed", "gone", "not in the log")
        counts = (diagnosis.checked, len(diagnosis.changed), len(diagnosis.gone), diagnosis.unlogged)
        table.add_row(*map(str, counts))
        console.print(table)
        _print_facts(console, {"changed": diagnosis.changed, "gone": diagnosis.gone})
        _print_problems(console, diagnosis)
        print_id_note(console, memory, engine)
        if diagnosis.unlogged:
            console.print(f"{counted(diagnosis.unlogged, 'row has', 'rows have')} no entry in the log. Run:")
            command = f"memstate-sa backfill {' '.join(_unlogged(diagnosis, memory))}"
            console.print(command, markup=False, highlight=False, soft_wrap=True)
        if diagnosis.healthy:
            rows = "all other rows" if diagnosis.unlogged else "the tables"
            console.print(f"[green]The log agrees with {rows}.[/]")
        elif left.changed or left.gone:
            advice = (
                "Not all of these changes could be logged. Try again." if repair else "--repair logs these changes."
            )
            console.print(f"[red]The tables were changed without the log.[/] {advice}")
        elif differs:
            console.print("[green]Reconciled.[/] The log has these changes now, and the relay delivers them.")
        if not left.healthy:
            raise typer.Exit(1)


def _print_problems(console: Console, diagnosis: Diagnosis) -> None:
    from memstate_sa.maintenance.doctor import folded

    for problem in folded(diagnosis.problems):
        console.print(f"[red]{escape(problem.subject)}[/] {escape(problem.message)}", highlight=False, soft_wrap=True)


def print_id_note(console: Console, memory: Memory, engine: Engine) -> None:
    """Warn of tables in which two rows may have the same id, one after the other."""
    from memstate_sa.db.sqlite import gives_ids_again

    tables = dict.fromkeys(table for tracked in tracked_classes(memory).values() for table in tracked.tables)
    names = ", ".join(table.fullname for table in tables if gives_ids_again(engine, table))
    if names:
        console.print(
            f"[yellow]Note:[/] SQLite may give the id of a deleted row to a new row in {escape(names)}.\n"
            "    Both rows then have one history. Use sqlite_autoincrement=True (docs: existing data).",
            highlight=False,
            soft_wrap=True,
        )


def _unlogged(diagnosis: Diagnosis, memory: Memory) -> dict[str, int]:
    """The number of rows that the log has not seen, by entity."""
    counts = diagnosis.unlogged_by_class
    return {name: counts[item.model] for name, item in tracked_classes(memory).items() if item.model in counts}


def _print_document(diagnosis: Diagnosis, memory: Memory) -> None:
    from memstate_sa.maintenance.doctor import Risk

    problems = [
        {"subject": problem.subject, "message": problem.message, "risk": isinstance(problem, Risk)}
        for problem in diagnosis.problems
    ]
    print_json(
        {
            "checked": diagnosis.checked,
            "changed": facts_json(diagnosis.changed),
            "gone": facts_json(diagnosis.gone),
            "unlogged": diagnosis.unlogged,
            "unlogged_by_entity": _unlogged(diagnosis, memory),
            "problems": problems,
            "healthy": diagnosis.healthy,
        }
    )


def _print_facts(console: Console, by_kind: Mapping[str, Sequence[tuple[str, object]]]) -> None:
    for kind, facts in by_kind.items():
        for entity, key in facts[:_EXAMPLES]:
            console.print(f"{kind}: {cell(fact_name(entity, key))}", highlight=False, soft_wrap=True)
        if len(facts) > _EXAMPLES:
            console.print(f"{kind}: {len(facts) - _EXAMPLES} more")
