"""`backfill`: log and deliver the rows that are older than tracking, with any number of processes."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from time import sleep
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from memstate_sa.cli.display import Console, progress_bar
from memstate_sa.cli.opening import load_models, open_memory
from memstate_sa.cli.options import App, Url
from memstate_sa.runtime.display import counted

if TYPE_CHECKING:
    from sqlalchemy import Engine


def backfill(
    app: App,
    model: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="The classes, as in `log`. Default: all that are not complete."),
    ] = None,
    url: Url = None,
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, help="The number of processes.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, metavar="ROWS", help="Rows in each transaction.")] = 1000,
    rate: Annotated[
        float | None, typer.Option(min=0.001, metavar="ROWS", help="The most rows a second, of all workers together.")
    ] = None,
    restart: Annotated[
        bool | None,
        typer.Option("--restart/--no-restart", help="Go through all rows again, or only through the remaining ones."),
    ] = None,
) -> None:
    """Log and deliver the rows that are older than tracking: they get a history, and vectors.

    It works in batches, alongside live writes, and resumes after a crash.
    It goes through a complete class again if you name the class.

    memstate-sa backfill                              all classes
    memstate-sa backfill Preference --workers 4       one class, with four processes
    memstate-sa backfill Preference --rate 2000       slowly
    """
    with open_memory(app, url) as (memory, engine):
        console = Console()
        models = load_models(model, memory, app) or None
        restarts = False if models is None and restart is None else restart
        run = partial(memory.backfill, engine, models, batch_size=batch_size)
        with (
            _interruptible(f"Run it again{', without --restart,' * bool(restart)} to resume."),
            _rows_progress(", ".join(model or ["rows"])) as update,
        ):
            if workers == 1:
                added = run(rate=rate, restart=restarts, progress=update)
            else:
                from memstate_sa.cli import processes

                run(limit=0, restart=restarts, progress=update)
                added_before = _added(engine)
                options = ["--no-restart", "--batch-size", str(batch_size)]
                options += [] if rate is None else ["--rate", str(max(0.001, rate / workers))]
                environment = {"MEMSTATE_APP": app, **({} if url is None else {"MEMSTATE_URL": url})}
                with processes.child_processes(environment, stdout=subprocess.DEVNULL) as start:
                    children = [start("backfill", *options, "--", *(model or ())) for _ in range(workers)]
                    while any(process.poll() is None for process in children):
                        sleep(0.3)
                        run(limit=0, restart=False, progress=update)
                # Read the rows that failed processes have left, or raise the error that ended them.
                run(rate=rate, restart=False, progress=update)
                added = _added(engine) - added_before
        console.print(f"{counted(added, 'row was', 'rows were')} new to the log. The relay delivers new rows.")
        if restarts is False and not added:
            console.print("--restart goes through complete classes again.")


def _added(engine: Engine) -> int:
    from sqlalchemy import func, select

    from memstate_sa.db import tables

    with engine.connect() as connection:
        return int(connection.scalar(select(func.coalesce(func.sum(tables.backfill.c.added), 0))) or 0)


@contextmanager
def _interruptible(message: str) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the command at once, with *message*."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print(f"Interrupted. {message}")
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _rows_progress(title: str) -> AbstractContextManager[Callable[[int, int | None], None]]:
    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f} rows/s")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    return progress_bar(title, *columns, transient=False)
