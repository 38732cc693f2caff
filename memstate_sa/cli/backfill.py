"""`backfill`: rows taken in that are older than tracking, by any number of processes."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import sleep
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from sqlalchemy import Engine, func, select

from memstate_sa.cli.display import Console, progress_of
from memstate_sa.cli.opening import App, Url, load_model, open_memory
from memstate_sa.db import tables


def backfill(
    app: App,
    url: Url,
    model: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="As in `log`. Default: all that are not done with.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, help="How many processes.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per transaction.")] = 1000,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Rows a second, at most, of all workers.")] = None,
    restart: Annotated[
        bool | None,
        typer.Option("--restart/--no-restart", help="Go through all rows again; or not even those of a class named."),
    ] = None,
) -> None:
    """Take in the rows that were there before their class was tracked: they get a history, and vectors.

    The application may go on meanwhile. Interrupted or killed, it goes on where it was when it is run again; several
    of these share the work, on any number of machines. A class that is done with is gone through again when it is
    named, for rows that came past the log.

    \b
    memstate-sa backfill                                    all classes
    memstate-sa backfill Preference --workers 4             one, by four processes
    memstate-sa backfill Preference --rate 2000             gently
    """
    with open_memory(app, url) as (memory, engine):
        console = Console()
        models = [load_model(name, app) for name in model] if model else None
        restarts = False if models is None and restart is None else restart
        run = partial(memory.backfill, engine, models, batch_size=batch_size)
        with (
            _interruptible(f"Run it again{', without --restart,' * bool(restart)} to go on where it was."),
            _rows_progress(console) as progress,
        ):
            update = progress_of(progress, ", ".join(model or ["rows"]))
            if workers == 1:
                added = run(rate=rate, restart=restarts, progress=update)
            else:
                from memstate_sa.cli import processes

                run(limit=0, restart=restarts, progress=update)
                before = _backfilled(engine)
                options = ["--no-restart", "--batch-size", str(batch_size)]
                options += [] if rate is None else ["--rate", str(max(0.001, rate / workers))]
                environment = {"MEMSTATE_APP": app, "MEMSTATE_URL": url}
                with processes.child_processes(environment, stdout=subprocess.DEVNULL) as start:
                    children = [start("backfill", *options, "--", *(model or ())) for _ in range(workers)]
                    while any(process.poll() is None for process in children):
                        sleep(0.3)
                        run(limit=0, restart=False, progress=update)
                run(rate=rate, restart=False, progress=update)  # what is left, if one has failed, or why
                added = _backfilled(engine) - before
        console.print(f"{added} rows were new to the log; the relay delivers them.")
        if restarts is False and not added:
            console.print("Classes that are done with are gone through again with --restart.")


def _backfilled(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(select(func.coalesce(func.sum(tables.backfill.c.added), 0))) or 0)


@contextmanager
def _interruptible(message: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the command at once, with *message*."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print(f"Interrupted. {message}")
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _rows_progress(console: Console) -> Progress:
    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f} rows/s")

    described = TextColumn("{task.description}")
    return Progress(described, BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(), console=console)
