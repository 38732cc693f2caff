"""`relay`, `drain`, `status`, `pause`, `resume`: delivery to the indexes."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from time import monotonic
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table

from memstate_sa.cli.display import Console, print_json, progress_bar
from memstate_sa.cli.opening import index_names, open_memory
from memstate_sa.cli.options import App, Indexes, JsonDocument, Timeout, Url
from memstate_sa.errors import MemstateError, MissingExtra
from memstate_sa.runtime.display import counted

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from memstate_sa import Memory

_LAST_PORT = 65535
FILLING = "Start a relay, or run `memstate-sa drain`."


def relay(
    context: typer.Context,
    app: App,
    url: Url = None,
    workers: Annotated[
        int, typer.Option("--workers", "-w", min=1, envvar="MEMSTATE_WORKERS", help="The number of processes.")
    ] = 1,
    once: Annotated[bool, typer.Option("--once", help="Deliver one page, then exit.")] = False,
    lease: Annotated[
        float,
        typer.Option(
            min=0.5,
            envvar="MEMSTATE_LEASE",
            metavar="SECONDS",
            help="Take over the work of a relay that was silent for this time.",
        ),
    ] = 30.0,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=_LAST_PORT,
            envvar="MEMSTATE_METRICS_PORT",
            metavar="PORT",
            help="Serve /metrics and /readyz on this port, and for each further worker on the next one.",
        ),
    ] = None,
    metrics_host: Annotated[
        str, typer.Option(envvar="MEMSTATE_METRICS_HOST", metavar="ADDRESS", help="Serve them on this address.")
    ] = "127.0.0.1",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(envvar="MEMSTATE_LOG_LEVEL", help="Log records of this level and above, on stderr."),
    ] = "info",
    log_json: Annotated[
        bool, typer.Option("--log-json", envvar="MEMSTATE_LOG_JSON", help="Log one JSON object a line.")
    ] = False,
    keep_log: Annotated[
        int | None,
        typer.Option(
            min=1,
            envvar="MEMSTATE_KEEP_LOG",
            metavar="DAYS",
            help="Fold the older changes of a fact into one. Default: never.",
        ),
    ] = None,
    keep_ledger: Annotated[
        int | None,
        typer.Option(
            min=1,
            envvar="MEMSTATE_KEEP_LEDGER",
            metavar="DAYS",
            help="Forget rows that were deleted longer ago. Default: never.",
        ),
    ] = None,
    worker: Annotated[int, typer.Option(hidden=True)] = 1,
) -> None:
    """Deliver committed changes to the indexes, until interrupted.

    Run any number of relays, on any number of machines.
    On PostgreSQL they share the work. On SQLite one delivers, and the others wait.
    On SIGTERM a relay completes its batch and exits.

    memstate-sa relay --app shop.memory:memory --url sqlite:///shop.db
    memstate-sa relay --workers 4 --metrics-port 9000 --log-json
    """
    if once and workers > 1:
        raise typer.BadParameter("--once works with one worker only.", param_hint="--workers")
    if metrics_port is not None and metrics_port + workers - 1 > _LAST_PORT:
        raise typer.BadParameter(f"{workers} workers need ports above {_LAST_PORT}.", param_hint="--metrics-port")
    with open_memory(app, url) as (memory, engine):
        from memstate_sa.cli import processes
        from memstate_sa.relay import Retention

        retention = Retention(log=_days(keep_log), ledger=_days(keep_ledger))
        if once:
            delivery = memory.relay(engine, lease_s=lease, retention=retention)
            try:
                Console().print(f"{counted(delivery.run_once(), 'key', 'keys')} converged.")
            finally:
                delivery.stop()  # this releases the lease, so another relay need not wait
            if unfilled := [name for name, backlog in memory.status(engine).items() if backlog.refilling]:
                Console().print(f"{escape(', '.join(unfilled))}: not filled yet. {FILLING}", soft_wrap=True)
            return
        processes.configure_logging(level=log_level, as_json=log_json, worker=worker)
        if workers > 1:
            _require_shared(memory)
            ports = [metrics_port and metrics_port + n for n in range(workers)]
            arguments = [[] if port is None else ["--metrics-port", str(port)] for port in ports]
            processes.supervise(arguments, {**_environment(context), "MEMSTATE_WORKERS": "1"})
            return
        with ExitStack() as stack:
            interrupted = stack.enter_context(processes.interruption())
            delivery = stack.enter_context(memory.relay(engine, lease_s=lease, retention=retention))
            if metrics_port is not None:
                server = _metrics().metrics_server
                status = partial(memory.status, engine)
                port = stack.enter_context(server(delivery, engine, status, metrics_host, metrics_port))
                processes.logger.info("serving /metrics and /readyz on port %d", port)
            processes.logger.info("delivering to %s; interrupt to stop", ", ".join(memory.indexes) or "no index")
            interrupted.wait()
            processes.logger.info("stopping after the current batch")


def _environment(context: typer.Context) -> dict[str, str]:
    """The options of this command as environment variables. A list of processes shows no password then."""
    options = ((option.envvar, context.params.get(option.name or "")) for option in context.command.params)
    return {name: str(value) for name, value in options if isinstance(name, str) and value is not None}


def _days(count: int | None) -> timedelta | None:
    return None if count is None else timedelta(days=count)


def _metrics() -> ModuleType:
    try:
        from memstate_sa.cli import metrics
    except ModuleNotFoundError as error:
        raise MissingExtra("prometheus-client", "cli") from error
    return metrics


def _require_shared(memory: Memory) -> None:
    for name, index in memory.indexes.items():
        if getattr(index, "in_process", False):
            raise MemstateError(
                f"Cannot use several workers: index {name!r} lives in one process. Leave --workers out, or use an "
                "index server. For Chroma, that is `chroma run` and chromadb.HttpClient in your application."
            )


def drain(
    app: App,
    url: Url = None,
    timeout: Timeout = 300.0,
) -> None:
    """Deliver until nothing is pending. If relays are running, wait until they have delivered.

    memstate-sa drain --timeout 60
    """
    with open_memory(app, url) as (memory, engine), progress_bar("delivering") as update:
        pending_before = _pending(memory, engine)
        show_at = monotonic()

        def show(_: int) -> None:  # other relays may deliver too, so the pending keys are counted
            nonlocal show_at
            began = monotonic()
            if began >= show_at:
                update(max(0, pending_before - _pending(memory, engine)), pending_before)
                show_at = monotonic() + max(0.5, 10 * (monotonic() - began))  # counting a long backlog is slow

        memory.relay(engine).drain(timeout, progress=show)
        console = Console()
        console.print("Nothing is pending.")
        refused = sum(backlog.parked + backlog.dead for backlog in memory.status(engine).values())
        if refused:
            message = f"{counted(refused, 'key was', 'keys were')} refused. `memstate-sa status` shows an error."
            console.print(message, highlight=False)


def _pending(memory: Memory, engine: Engine) -> int:
    return sum(backlog.pending for backlog in memory.status(engine).values())


def status(
    app: App,
    url: Url = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it every second, until interrupted.")] = False,
    as_json: JsonDocument = False,
) -> None:
    """Show the undelivered changes of each index.

    memstate-sa status
    memstate-sa status --json
    """
    if watch and as_json:
        raise typer.BadParameter("Cannot use --json with --watch. Leave one of them out.", param_hint="--json")
    with open_memory(app, url) as (memory, engine):
        if as_json:
            print_json(memory.status(engine))
        elif not watch:
            Console().print(_status(memory, engine))
        else:
            from memstate_sa.cli import processes

            with processes.interruption() as interrupted, Live(_status(memory, engine), auto_refresh=False) as live:
                while not interrupted.wait(1.0):
                    live.update(_status(memory, engine), refresh=True)


def _status(memory: Memory, engine: Engine) -> Group:
    table = Table(Column("index", overflow="fold"), "pending", "oldest", "parked", "dead", "")
    problems = []
    for name, backlog in memory.status(engine).items():
        oldest = "" if backlog.oldest_s is None else f"{backlog.oldest_s:.1f} s"
        numbers = (str(backlog.pending), oldest, str(backlog.parked), str(backlog.dead))
        notes = ["paused"] * backlog.paused + ["being filled"] * backlog.refilling
        if backlog.replaced_by is not None:
            notes.append(f"searches ask {escape(backlog.replaced_by)}")
        table.add_row(escape(name), *numbers, ", ".join(notes))
        if backlog.problem:
            problems.append(f"[red]{escape(name)}[/]: {escape(backlog.problem)}")
    return Group(table, *problems)


def pause(app: App, url: Url = None, index: Indexes = None) -> None:
    """Stop all deliveries to indexes, in all processes, until `resume`. Commits go on.

    memstate-sa pause --index memory
    """
    with open_memory(app, url) as (memory, engine):
        memory.relay(engine).pause(*index_names(index, memory))
        Console().print(f"Paused: {escape(', '.join(index or memory.indexes))}.")


def resume(app: App, url: Url = None, index: Indexes = None) -> None:
    """Let relays deliver to paused indexes again.

    memstate-sa resume --index memory
    """
    with open_memory(app, url) as (memory, engine):
        memory.relay(engine).resume(*index_names(index, memory))
        Console().print(f"Resumed: {escape(', '.join(index or memory.indexes))}.")
