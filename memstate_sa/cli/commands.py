"""All commands, in the order in which `--help` lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from memstate_sa import __version__
from memstate_sa.cli import backfill, deadletters, demo, health, history, indexes, init, relay, transfer


def application() -> typer.Typer:
    app = typer.Typer(
        help="Facts in SQL, their history and their vectors, in one transaction.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,  # local variables may hold database URLs
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(options)
    for command in (
        *(demo.demo, init.init),
        *(relay.relay, relay.drain, relay.status, relay.pause, relay.resume),
        *(health.verify, health.doctor),
        backfill.backfill,
        *(history.log, history.diff, history.rollback, history.revoke),
        indexes.reindex,
    ):
        app.command()(command)
    app.command("forget-index")(indexes.forget_index)
    app.command("export")(transfer.export_facts)
    app.command("import")(transfer.import_facts)
    app.command("import-checkpoints")(transfer.import_langgraph)
    dead = typer.Typer(help="Show, retry or drop keys that an index refused too often.", no_args_is_help=True)
    dead.command("list")(deadletters.dead_list)
    dead.command("retry")(deadletters.dead_retry)
    dead.command("drop")(deadletters.dead_drop)
    app.add_typer(dead, name="dead")
    return app


def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit
