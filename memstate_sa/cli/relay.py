"""`relay`, `drain`, `status`, `pause`, `resume`: delivery to the indexes."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import Annotated

import typer
from rich.live import Live
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from sqlalchemy import Engine

from memstate_sa.cli.display import Console, progress_of
from memstate_sa.cli.opening import App, Indexes, Url, open_memory
from memstate_sa.errors import MemstateError
from memstate_sa.memory import Memory
from memstate_sa.relay import Retention


def relay(
    app: App,
    url: Url,
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, help="How many processes.")] = 1,
    once: Annotated[bool, typer.Option("--once", help="Deliver one page of what is due, then exit.")] = False,
    lease: Annotated[float, typer.Option(min=0.5, help="Seconds after which a worker that died is succeeded.")] = 30.0,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve /metrics and /readyz here; each further worker on the next port.")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="The address to serve them on.")] = "127.0.0.1",
    log_json: Annotated[bool, typer.Option("--log-json", help="One JSON object a line, on stderr.")] = False,
    keep_log: Annotated[
        int | None, typer.Option(min=1, metavar="DAYS", help="Fold older changes of the log into one. Default: never.")
    ] = None,
    keep_ledger: Annotated[
        int | None, typer.Option(min=1, metavar="DAYS", help="Forget rows deleted longer ago. Default: never.")
    ] = None,
) -> None:
    """Deliver what commits to the indexes, until interrupted.

    Any number of these may run, on any number of machines: on PostgreSQL they share the work; on SQLite one of them
    delivers. SIGTERM ends the batch in work, and lets the others take over at once.
    """
    if once and workers > 1:
        raise typer.BadParameter("--once is for one worker")
    with open_memory(app, url) as (memory, engine):
        from memstate_sa.cli import processes

        retention = Retention(log=_days(keep_log), ledger=_days(keep_ledger))
        if once:
            worker = memory.relay(engine, lease_s=lease, retention=retention)
            try:
                Console().print(f"{worker.run_once()} keys converged")
            finally:
                worker.stop()  # at once, another relay may go on
            return
        processes.configure_logging(as_json=log_json)
        if workers > 1:
            _require_shared(memory)
            common = ["--lease", str(lease), "--metrics-host", metrics_host, *["--log-json"] * log_json]
            for option, days in (("--keep-log", keep_log), ("--keep-ledger", keep_ledger)):
                common += [] if days is None else [option, str(days)]
            ports = [[] if metrics_port is None else ["--metrics-port", str(metrics_port + n)] for n in range(workers)]
            processes.supervise([[*common, *port] for port in ports], {"MEMSTATE_APP": app, "MEMSTATE_URL": url})
            return
        with ExitStack() as stack:
            interrupted = stack.enter_context(processes.interruption())
            worker = stack.enter_context(memory.relay(engine, lease_s=lease, retention=retention))
            if metrics_port is not None:
                status = partial(memory.status, engine)
                port = stack.enter_context(processes.metrics_server(worker, engine, status, metrics_host, metrics_port))
                processes.logger.info("serving /metrics and /readyz on port %d", port)
            processes.logger.info("delivering to %s; interrupt to stop", ", ".join(memory.indexes))
            interrupted.wait()
            processes.logger.info("stopping after the batch in work")


def _days(count: int | None) -> timedelta | None:
    return None if count is None else timedelta(days=count)


def _require_shared(memory: Memory) -> None:
    for name, index in memory.indexes.items():
        if getattr(index, "in_process", False):
            raise MemstateError(
                f"index {name!r} lives in one process, so it has one worker: leave --workers out, or use a server (for "
                "Chroma: chroma run, and chromadb.HttpClient in the application)"
            )


def drain(
    app: App,
    url: Url,
    timeout: Annotated[float, typer.Option(help="Seconds that it may take.")] = 300.0,
) -> None:
    """Deliver until nothing is pending. Beside running relays, wait until they have."""
    with open_memory(app, url) as (memory, engine):
        console = Console()
        with Progress(console=console, transient=True) as progress:
            update = progress_of(progress, "delivering")
            before = sum(backlog.pending for backlog in memory.status(engine).values())
            show_at = monotonic()

            def show(_: int) -> None:  # what is left is counted: other relays may be delivering, too
                nonlocal show_at
                began = monotonic()
                if began >= show_at:
                    pending = sum(backlog.pending for backlog in memory.status(engine).values())
                    update(max(0, before - pending), before)
                    show_at = monotonic() + max(0.5, 10 * (monotonic() - began))  # a long backlog takes its time

            memory.relay(engine).drain(timeout, progress=show)
        console.print("Nothing is pending.")


def status(
    app: App,
    url: Url,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every second, until interrupted.")] = False,
) -> None:
    """Show what each index has not been given yet."""
    with open_memory(app, url) as (memory, engine):
        if not watch:
            Console().print(_status(memory, engine))
            return
        from memstate_sa.cli import processes

        with processes.interruption() as interrupted, Live(_status(memory, engine), auto_refresh=False) as live:
            while not interrupted.wait(1.0):
                live.update(_status(memory, engine), refresh=True)


def _status(memory: Memory, engine: Engine) -> Table:
    table = Table("index", "pending", "oldest", "parked", "dead", "")
    for name, backlog in memory.status(engine).items():
        oldest = "" if backlog.oldest_s is None else f"{backlog.oldest_s:.1f} s"
        numbers = (str(backlog.pending), oldest, str(backlog.parked), str(backlog.dead))
        notes = ["paused"] * backlog.paused + ["being filled"] * backlog.refilling
        if backlog.replaced_by is not None:
            notes.append(f"searches ask {escape(backlog.replaced_by)}")
        table.add_row(escape(name), *numbers, ", ".join(notes))
    return table


def pause(app: App, url: Url, index: Indexes = None) -> None:
    """Have every relay leave indexes alone, in all processes, until `resume`. Commits go on."""
    with open_memory(app, url) as (memory, engine):
        memory.relay(engine).pause(*(index or ()))
        Console().print(f"Paused: {escape(', '.join(index or memory.indexes))}.")


def resume(app: App, url: Url, index: Indexes = None) -> None:
    """Have relays deliver again what was paused."""
    with open_memory(app, url) as (memory, engine):
        memory.relay(engine).resume(*(index or ()))
        Console().print(f"Resumed: {escape(', '.join(index or memory.indexes))}.")
