"""The command line: the demo, and the upkeep of an application's memory."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from difflib import unified_diff
from functools import partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated, Any, NoReturn

import pydantic_core
from sqlalchemy import Engine, create_engine, func, inspect, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from memstate_sa import Change, Memory, __version__, adoption, migrations, sqlite, tables
from memstate_sa.errors import ConflictError, MemstateError, MissingExtra
from memstate_sa.relay import Retention
from memstate_sa.undo import OnConflict, Revocation

try:
    import typer
    from rich.console import Console
    from rich.live import Live
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
    from rich.text import Text
except ImportError as error:  # main() tells: raised here, the hint would be buried in the console script's traceback
    _missing: str | None = str(MissingExtra(error.name or "typer", "cli"))
else:
    _missing = None
    App = Annotated[
        str,
        typer.Option(
            "--app", envvar="MEMSTATE_APP", metavar="MODULE:ATTRIBUTE", help="Your Memory: shop.memory:memory"
        ),
    ]
    Url = Annotated[
        str, typer.Option("--url", envvar="MEMSTATE_URL", help="Your database: postgresql+psycopg://user@host/shop")
    ]
    Indexes = Annotated[list[str] | None, typer.Option("--index", help="Its name; may be repeated. Default: all.")]
    Keys = Annotated[
        list[str] | None,
        typer.Option("--key", help="As in `dead list`, or shop_item[7]; may be repeated. Default: all."),
    ]
    Model = Annotated[
        str, typer.Argument(metavar="MODEL", help="A tracked class: its name in the module of --app, or module:Class")
    ]
    OfModel = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Only facts of this class.")]
    OfSession = Annotated[str | None, typer.Option("--session-id", help="Only what this agent session did.")]
    OfActor = Annotated[str | None, typer.Option("--actor", help="Only what this actor did.")]
    Tries = Annotated[bool, typer.Option("--dry-run", help="Show what would be undone, and undo nothing.")]
    Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]
    AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]

_EXAMPLES = 20  # facts of each kind that verify names
_SHOWN = 120  # characters of a value


def main() -> None:
    """The console script ``memstate-sa``."""
    if _missing:
        sys.exit(_missing)
    application()()


def application() -> typer.Typer:
    app = typer.Typer(
        help="Facts in SQL, their history and their vectors, in one transaction.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,  # they hold database URLs
    )
    app.callback()(options)
    commands = (demo, init, relay, drain, status, pause, resume, verify, doctor, backfill, log, diff, rollback, revoke)
    for command in commands:
        app.command()(command)
    app.command()(reindex)
    app.command("forget-index")(forget_index)
    app.command("export")(export_facts)
    app.command("import")(import_facts)
    app.command("import-checkpoints")(import_langgraph)
    dead = typer.Typer(help="Keys that an index refused too often.", no_args_is_help=True)
    dead.command("list")(dead_list)
    dead.command("retry")(dead_retry)
    dead.command("drop")(dead_drop)
    app.add_typer(dead, name="dead")
    return app


def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


# -- commands --------------------------------------------------------------------------------------------------------


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
    with _explained():
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
    project = adoption.find_alembic(Path.cwd())
    app = app or _the_memory()
    if (dry_run or (project is not None and not create)) and adoption.unmade(url):
        url = "sqlite://"  # as empty, and not made by being looked at
    with _opened(app, url, initialised=False) as (memory, engine):
        if project is not None and apply:
            _edit(project, dry_run=dry_run, yes=yes)
        if not dry_run and (create or not (project is not None or adoption.is_migrated(engine))):
            memory.create_tables(engine)
        console = Console()
        steps = list(adoption.steps(memory, engine, project))
        for step in steps:
            console.print(f"[red]✗[/] {escape(step.title)}" if step.to_do else f"[green]✓[/] {escape(step.title)}")
            for line in step.to_do.splitlines():
                console.print(f"    {escape(line)}", highlight=False, soft_wrap=True)
        missing = sum(bool(step.to_do) for step in steps)
        console.print(f"{missing} of {len(steps)} steps are left." if missing else "There is nothing left to do.")


def _the_memory() -> str:
    with _explained():
        found = adoption.find_memories(Path.cwd())
    if len(found) != 1:
        problem = f"there are several: {', '.join(found)}" if found else "no module of this folder has a Memory"
        raise typer.BadParameter(f"{problem}; say which, as shop.memory:memory", param_hint="--app")
    Console(stderr=True).print(f"--app {escape(found[0])}")
    return found[0]


def _edit(project: adoption.AlembicProject, *, dry_run: bool, yes: bool) -> None:
    new = project.edited(has_plugins=migrations.has_plugins())
    if new == project.source:
        if not (project.knows_tables and project.knows_plugin):
            typer.echo(f"{project.env} is written in a way of its own: nothing can be added to it, but by you")
        return
    old, name = project.source.splitlines(keepends=True), str(project.env)
    typer.echo("".join(unified_diff(old, new.splitlines(keepends=True), name, name)))
    if not dry_run and (yes or typer.confirm(f"Edit {project.env}?")):
        project.env.write_text(new, encoding="utf-8")


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
    with _opened(app, url) as (memory, engine):
        from memstate_sa import worker

        retention = Retention(log=_days(keep_log), ledger=_days(keep_ledger))
        if once:
            courier = memory.relay(engine, lease_s=lease, retention=retention)
            try:
                Console().print(f"{courier.run_once()} keys converged")
            finally:
                courier.stop()  # at once, another relay may go on
            return
        worker.configure_logging(as_json=log_json)
        if workers > 1:
            _require_shared(memory)
            common = ["--lease", str(lease), "--metrics-host", metrics_host, *["--log-json"] * log_json]
            for option, days in (("--keep-log", keep_log), ("--keep-ledger", keep_ledger)):
                common += [] if days is None else [option, str(days)]
            ports = [[] if metrics_port is None else ["--metrics-port", str(metrics_port + n)] for n in range(workers)]
            worker.supervise([[*common, *port] for port in ports], {"MEMSTATE_APP": app, "MEMSTATE_URL": url})
            return
        with ExitStack() as stack:
            interrupted = stack.enter_context(worker.interruption())
            courier = stack.enter_context(memory.relay(engine, lease_s=lease, retention=retention))
            if metrics_port is not None:
                status = partial(memory.status, engine)
                port = stack.enter_context(worker.metrics_server(courier, engine, status, metrics_host, metrics_port))
                worker.logger.info("serving /metrics and /readyz on port %d", port)
            worker.logger.info("delivering to %s; interrupt to stop", ", ".join(memory.indexes))
            interrupted.wait()
            worker.logger.info("stopping after the batch in work")


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
    with _opened(app, url) as (memory, engine):
        console = Console()
        with Progress(console=console, transient=True) as progress:
            update = _progress(progress, "delivering")
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
    with _opened(app, url) as (memory, engine):
        if not watch:
            Console().print(_status(memory, engine))
            return
        from memstate_sa import worker

        with worker.interruption() as interrupted, Live(_status(memory, engine), auto_refresh=False) as live:
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
    with _opened(app, url) as (memory, engine):
        memory.relay(engine).pause(*(index or ()))
        Console().print(f"Paused: {escape(', '.join(index or memory.indexes))}.")


def resume(app: App, url: Url, index: Indexes = None) -> None:
    """Have relays deliver again what was paused."""
    with _opened(app, url) as (memory, engine):
        memory.relay(engine).resume(*(index or ()))
        Console().print(f"Resumed: {escape(', '.join(index or memory.indexes))}.")


def dead_list(
    app: App,
    url: Url,
    index: Indexes = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Show at most N.")] = 100,
) -> None:
    """Show the keys that an index refused too often, and why."""
    with _opened(app, url) as (memory, engine):
        table = Table("index", "fact", "key", "attempts", "error")
        letters = memory.relay(engine).dead(*(index or ()), limit=limit)
        for letter in letters:
            table.add_row(*map(escape, (letter.index, letter.entity, letter.key)), str(letter.attempts), letter.error)
        Console().print(table if letters else "No key is dead.")


def dead_retry(app: App, url: Url, index: Indexes = None, key: Keys = None) -> None:
    """Try dead keys again."""
    with _opened(app, url) as (memory, engine):
        Console().print(f"{memory.relay(engine).retry_dead(*(index or ()), keys=key)} keys are tried again.")


def dead_drop(app: App, url: Url, index: Indexes = None, key: Keys = None) -> None:
    """Forget dead keys. They are tried again when their rows change."""
    with _opened(app, url) as (memory, engine):
        Console().print(f"{memory.relay(engine).drop_dead(*(index or ()), keys=key)} keys are forgotten.")


def verify(
    app: App,
    url: Url,
    repair: Annotated[bool, typer.Option("--repair", help="Deliver again what differs.")] = False,
) -> None:
    """Compare every index with the database, by content. Exits with 1 when one differs and was not repaired."""
    with _opened(app, url) as (memory, engine):
        console = Console()
        with Progress(console=console, transient=True) as progress:
            update = _progress(progress, "comparing")
            report = memory.verify(engine, repair=repair, progress=update)
        kinds = ("missing", "ghost", "stale", "pending")
        found: dict[str, list[tuple[str, object]]] = {kind: getattr(report, kind) for kind in kinds}
        table = Table("rows checked", *kinds)
        table.add_row(str(report.checked), *(str(len(facts)) for facts in found.values()))
        console.print(table)
        _print_facts(found)
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
    with _opened(app, url, initialised=False) as (memory, engine):
        console = Console()
        with Progress(console=console, transient=True) as progress:
            found = memory.doctor(engine, repair=repair, progress=_progress(progress, "comparing"))
        table = Table("rows checked", "changed", "gone", "not in the log")
        table.add_row(str(found.checked), str(len(found.changed)), str(len(found.gone)), str(found.unlogged))
        console.print(table)
        _print_facts({"changed": found.changed, "gone": found.gone})
        for problem in found.problems:
            console.print(f"[red]{escape(problem.subject)}[/] {escape(problem.message)}", highlight=False)
        if found.unlogged:
            console.print(f"{found.unlogged} rows came before tracking, or past it; `backfill` logs and delivers them.")
        if found.healthy:
            console.print("[green]The log tells what is in the tables.[/]")
        elif repair and not found.problems:
            console.print("[green]Reconciled;[/] the relay delivers it.")
        else:
            if found.changed or found.gone:
                console.print("[red]The tables were changed past the log;[/] --repair logs that.")
            raise typer.Exit(1)


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
    with _opened(app, url) as (memory, engine):
        console = Console()
        models = [_model(name, app) for name in model] if model else None
        anew = False if models is None and restart is None else restart
        run = partial(memory.backfill, engine, models, batch_size=batch_size)
        with (
            _interruptible(f"Run it again{', without --restart,' * bool(restart)} to go on where it was."),
            _rows_progress(console) as progress,
        ):
            update = _progress(progress, ", ".join(model or ["rows"]))
            if workers == 1:
                added = run(rate=rate, restart=anew, progress=update)
            else:
                run(limit=0, restart=anew, progress=update)
                before = _backfilled(engine)
                options = ["--no-restart", "--batch-size", str(batch_size)]
                options += [] if rate is None else ["--rate", str(max(0.001, rate / workers))]
                environment = {"MEMSTATE_APP": app, "MEMSTATE_URL": url}
                with _processes(["backfill", *options, "--", *(model or ())], environment, workers) as working:
                    while working():
                        sleep(0.3)
                        run(limit=0, restart=False, progress=update)
                run(rate=rate, restart=False, progress=update)  # what is left, if one has failed, or why
                added = _backfilled(engine) - before
        console.print(f"{added} rows were new to the log; the relay delivers them.")
        if anew is False and not added:
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


@contextmanager
def _processes(arguments: Sequence[str], environment: Mapping[str, str], count: int) -> Iterator[Callable[[], bool]]:
    """*count* processes of this command line, told to end with the context; whether any of them is running."""
    command = [sys.executable, "-m", "memstate_sa.cli", *arguments]
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.extend(
            subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)  # noqa: S603
            for _ in range(count)
        )
        yield lambda: any(process.poll() is None for process in started)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def _rows_progress(console: Console) -> Progress:
    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f} rows/s")

    described = TextColumn("{task.description}")
    return Progress(described, BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(), console=console)


def reindex(
    app: App,
    url: Url,
    index: Annotated[
        str | None, typer.Argument(help="The index to be replaced. Default: the only one that has a successor.")
    ] = None,
    back: Annotated[bool, typer.Option("--back", help="Have searches ask the old index again.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds that it may take. Default: no limit.")] = None,
) -> None:
    """Fill another index beside the old one, with another embedder or not, then have searches ask it, all at once.

    Writes and searches go on meanwhile. Can be interrupted and run again. What replaces what, the Memory says:

    \b
    memory = Memory({"memory": old, "memory_v2": new},
                    embedder={"memory": old_embedder, "memory_v2": new_embedder},
                    successors={"memory": "memory_v2"})

    1. Deploy that, everywhere. 2. memstate-sa reindex. 3. Deploy a Memory with the new index alone.
    4. memstate-sa forget-index memory, and delete the old index by its own tools.
    """
    with _opened(app, url) as (memory, engine):
        console = Console()
        if back:
            console.print(f"Searches ask {escape(memory.reindex_back(engine, index))} again.")
            return
        with Progress(console=console) as progress:
            update = _progress(progress, "delivering")
            other = memory.reindex(engine, index, timeout=math.inf if timeout is None else timeout, progress=update)
        console.print(f"Searches ask {escape(other)} now.")


def forget_index(
    app: App, url: Url, name: Annotated[str, typer.Argument(help="Of an index that --app no longer has.")]
) -> None:
    """Forget what relays know of an index that is no longer in use. What it holds, its own tools delete."""
    with _opened(app, url) as (memory, engine):
        memory.forget_index(engine, name)
        Console().print(f"Index {escape(name)} is forgotten.")


def log(
    app: App,
    url: Url,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Only facts of this class.")] = None,
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="Only this one: its primary key; composite, as a JSON array.")
    ] = None,
    of_model: OfModel = None,
    of_key: Annotated[str | None, typer.Option("--key", metavar="KEY", help="With --model: only this one.")] = None,
    session_id: OfSession = None,
    actor: OfActor = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Show the last N changes.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show what happened: to all facts, to those of a class, or to one.

    \b
    memstate-sa log                       the last changes of all
    memstate-sa log Preference 7          the history of one fact
    memstate-sa log --actor ana --json    what ana did, for a program
    """
    with _opened(app, url) as (memory, engine), _session(memory, engine) as session:
        model, key = model or of_model, key or of_key
        if model is None and key is not None:
            raise typer.BadParameter("of which --model?", param_hint="--key")
        mapped = None if model is None else _model(model, app)
        fact = None if key is None else _key(mapped, key)
        changes = memory.history(session, mapped, fact, actor=actor, session_id=session_id, limit=limit + 1)
        _show_changes(changes[-limit:], as_json=as_json)
        if len(changes) > limit and not as_json:
            Console().print(f"The last {limit} changes; --limit shows more.")


def diff(
    app: App,
    url: Url,
    a: Annotated[str, typer.Argument(metavar="A", help="A time (UTC, if it does not say), or a transaction.")],
    b: Annotated[str | None, typer.Argument(metavar="B", help="Another. Default: now.")] = None,
    model: OfModel = None,
    as_json: AsJson = False,
) -> None:
    """Show what became of each fact between two moments.

    \b
    memstate-sa diff 2026-03-01                     since the first of March
    memstate-sa diff 2026-03-01 2026-03-01T12:00    on its morning
    """
    with _opened(app, url) as (memory, engine), _session(memory, engine) as session:
        mapped = None if model is None else _model(model, app)
        changes = memory.diff(session, _moment(a), None if b is None else _moment(b), mapped)
        _show_changes(changes, as_json=as_json)


def rollback(
    app: App,
    url: Url,
    steps: Annotated[int, typer.Option(min=1, help="How many transactions to undo, newest first.")] = 1,
    session_id: OfSession = None,
    actor: OfActor = None,
    model: OfModel = None,
    to: Annotated[
        str | None, typer.Option(metavar="TIME|TX", help="Instead: all since a time (UTC), or since a transaction.")
    ] = None,
    tx: Annotated[str | None, typer.Option(help="Instead: this transaction; of a rollback, to redo.")] = None,
    on_conflict: Annotated[
        OnConflict, typer.Option(help="What to do with facts that others have changed since.")
    ] = "raise",
    dry_run: Tries = False,
    yes: Yes = False,
) -> None:
    """Undo the last transactions, as new ones, after showing what that means. The vectors follow through the relay.

    \b
    memstate-sa rollback --steps 3                   the last three
    memstate-sa rollback --actor ana --dry-run       ana's last one; only show it
    memstate-sa rollback --to 2026-03-01T12:00       all since noon
    """

    def undo(memory: Memory, session: Session, *, dry_run: bool) -> Revocation:
        changes = memory.rollback(
            session,
            steps,
            session_id=session_id,
            actor=actor,
            model=None if model is None else _model(model, app),
            to=None if to is None else _moment(to),
            tx=tx,
            on_conflict=on_conflict,
            dry_run=dry_run,
        )
        return Revocation(changes)

    _undo(app, url, undo, dry_run=dry_run, yes=yes)


def revoke(
    app: App,
    url: Url,
    session_id: OfSession = None,
    actor: OfActor = None,
    tx: Annotated[list[str] | None, typer.Option(help="This transaction; may be repeated.")] = None,
    model: OfModel = None,
    on_conflict: Annotated[
        OnConflict, typer.Option(help="What to do with facts that others have changed since.")
    ] = "skip",
    dry_run: Tries = False,
    yes: Yes = False,
) -> None:
    """Take out all that one actor, session or transaction did, from among what others did, after showing it.

    What others have built upon stays, and is told, with the changes that are in the way.

    \b
    memstate-sa revoke --session-id run-17
    memstate-sa revoke --actor importer --on-conflict force --yes
    """

    def undo(memory: Memory, session: Session, *, dry_run: bool) -> Revocation:
        return memory.revoke(
            session,
            session_id=session_id,
            actor=actor,
            tx=tx or (),
            model=None if model is None else _model(model, app),
            on_conflict=on_conflict,
            dry_run=dry_run,
        )

    _undo(app, url, undo, dry_run=dry_run, yes=yes)


def _undo(app: str, url: str, undo: Callable[..., Revocation], *, dry_run: bool, yes: bool) -> None:
    """Plan, ask, do: nothing is locked while somebody makes up his mind."""
    with _opened(app, url) as (memory, engine), _session(memory, engine) as session:
        plan = None if yes and not dry_run else undo(memory, session, dry_run=True)
        session.rollback()
        if plan is not None:
            _print_revocation(plan)
            if dry_run or not plan.reverted:
                Console().print("Nothing was changed (--dry-run)." if dry_run else "There is nothing to undo.")
                return
            typer.confirm(f"Undo {len(plan.reverted)} changes?", abort=True)
        done = undo(memory, session, dry_run=False)
        if plan is not None and _facts(plan.reverted) != _facts(done.reverted):
            session.rollback()
            _fail("others have changed these facts meanwhile, so nothing was undone: look again")
        session.commit()
        if plan is None:
            _print_revocation(done)
        Console().print(f"{len(done.reverted)} changes undone.")


def _facts(changes: Iterable[Change]) -> list[Any]:
    return [(c.entity, c.key, c.op, c.before, c.after, c.reverts) for c in changes]


def export_facts(
    app: App,
    url: Url,
    file: Annotated[
        typer.FileTextWrite, typer.Argument(metavar="FILE|-", encoding="utf-8", help="To be written; - is stdout.")
    ],
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="MODEL", help="Only facts of this class; may be repeated.")
    ] = None,
) -> None:
    """Write facts with their history to a file of JSON lines, all of it as at one moment.

    \b
    memstate-sa export facts.jsonl
    memstate-sa export - --model Preference | gzip > preferences.jsonl.gz
    """
    with _opened(app, url) as (memory, engine):
        console = Console(stderr=True)
        with Progress(console=console) as progress:
            models = [_model(name, app) for name in model or ()]
            count = memory.export_facts(engine, file, models, progress=_progress(progress, "exporting"))
        console.print(f"{count} changes exported.")


def import_facts(
    app: App,
    url: Url,
    file: Annotated[
        typer.FileText, typer.Argument(metavar="FILE|-", encoding="utf-8", help="Of `export`; - is stdin.")
    ],
) -> None:
    """Take in facts with their history, from a file of `export`: all of them, or nothing when anything is wrong.

    The database may be another one, or of another kind. The relay delivers what comes in.

    \b
    memstate-sa import facts.jsonl
    zcat facts.jsonl.gz | memstate-sa import -
    """
    with _opened(app, url) as (memory, engine):
        console = Console(stderr=True)
        with Progress(console=console) as progress:
            count = memory.import_facts(engine, file, progress=_progress(progress, "importing"))
        console.print(f"{count} changes imported; the relay delivers what they end with.")


def import_langgraph(
    app: App,
    url: Url,
    source: Annotated[str, typer.Argument(metavar="URL", help="Of the database that LangGraph's own saver has used.")],
    threads: Annotated[
        list[str] | None, typer.Option("--thread", help="Only this thread; may be repeated. Default: all.")
    ] = None,
) -> None:
    r"""Copy the checkpoints that LangGraph's PostgresSaver or SqliteSaver has stored; what is there stays as it is.

    It may be run again, for what has come since. Nothing is unpickled: where a saver pickled, or encrypted, use
    memstate_sa.integrations.import_checkpoints with the serializer.

    \b
    memstate-sa import-checkpoints postgresql://app@db/shop
    memstate-sa import-checkpoints sqlite:///checkpoints.db --thread 17 --thread 18
    """
    with _opened(app, url) as (memory, engine):
        from memstate_sa.integrations.import_checkpoints import import_checkpoints
        from memstate_sa.integrations.langgraph import MemStateCheckpointer

        console = Console(stderr=True)
        with MemStateCheckpointer(engine, memory=memory) as checkpointer, Progress(console=console) as progress:
            count = import_checkpoints(
                source, checkpointer, threads=threads or (), progress=_progress(progress, "importing")
            )
        console.print(f"{count} checkpoints imported.")


# -- parts -----------------------------------------------------------------------------------------------------------


@contextmanager
def _explained() -> Iterator[None]:
    """Errors that a user can act on, as a message and exit code 1."""
    try:
        yield
    except ConflictError as error:
        _fail(str(error), error.changes)
    except MemstateError as error:
        _fail(str(error))
    except DBAPIError as error:
        _fail(f"the database answered: {error.orig}")
    except SQLAlchemyError as error:
        _fail(str(error))


def _fail(message: str, in_the_way: Sequence[Change] = ()) -> NoReturn:
    console = Console(stderr=True)
    console.print(f"[bold red]Error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    if in_the_way:
        console.print(_changes_table(in_the_way, "in the way"))
    raise typer.Exit(1)


@contextmanager
def _opened(app: str, url: str, *, initialised: bool = True) -> Iterator[tuple[Memory, Engine]]:
    memory = _load(app, "--app")
    if not isinstance(memory, Memory):
        raise typer.BadParameter(f"{app} is a {type(memory).__name__}, not a Memory", param_hint="--app")
    engine = _engine(memory, url)
    try:
        with _explained():
            if initialised and not inspect(engine).has_table("memstate_log"):
                _fail("the tables of memstate_sa are not in this database; `memstate-sa init` or Alembic creates them")
            yield memory, engine
    finally:
        engine.dispose()


def _engine(memory: Memory, url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_dialect().is_async:
            from sqlalchemy.ext.asyncio import create_async_engine

            return memory.sync_engine(create_async_engine(parsed))
        engine = create_engine(parsed)
        sqlite.configure(engine)
        return engine
    except NoSuchModuleError as error:
        problem = str(error)
    except ArgumentError:  # its message may quote the URL, and that its password
        problem = "not a SQLAlchemy URL, which looks like sqlite:///app.db or postgresql+psycopg://user@host/app"
    except ModuleNotFoundError as error:
        problem = f"its driver {error.name} is not installed"
    raise typer.BadParameter(problem, param_hint="--url")


def _load(path: str, option: str) -> Any:
    """The object at ``module:attribute``, looked for in the working directory first, as uvicorn does."""
    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute):
        raise typer.BadParameter(f"{path!r} is not of the form module:attribute", param_hint=option)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return attrgetter(attribute)(import_module(module))
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"cannot import {module!r}: {error}", param_hint=option) from error
    except AttributeError as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint=option) from error


def _model(name: str, app: str) -> Any:
    return _load(name if ":" in name else f"{app.partition(':')[0]}:{name}", "MODEL")


def _moment(text: str) -> datetime | str:
    """A time; what is none is taken for a transaction. UTC, as `log` shows it."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return text
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at


def _key(model: Any, text: str) -> Any:
    columns = inspect(model).primary_key
    try:
        if len(columns) > 1:
            return tuple(json.loads(text))
        kind = columns[0].type.python_type
        return text if kind is str else kind(text)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise typer.BadParameter(f"{text!r} is not a key of {model.__name__}: {error}", param_hint="KEY") from error


@contextmanager
def _session(memory: Memory, engine: Engine) -> Iterator[Session]:
    sessions = sessionmaker(engine)
    memory.attach(sessions)
    with sessions() as session:
        yield session


def _progress(progress: Progress, title: str) -> Callable[[int, int | None], None]:
    task = progress.add_task(escape(title), total=None)

    def update(done: int, total: int | None) -> None:
        progress.update(task, completed=done, total=total)

    return update


def _print_facts(by_kind: Mapping[str, Sequence[tuple[str, object]]]) -> None:
    console = Console()
    for kind, facts in by_kind.items():
        for entity, key in facts[:_EXAMPLES]:
            console.print(f"{kind}: {escape(entity)} {escape(repr(key))}", highlight=False)
        if len(facts) > _EXAMPLES:
            console.print(f"{kind}: {len(facts) - _EXAMPLES} more")


def _show_changes(changes: Collection[Change], *, as_json: bool) -> None:
    if as_json:
        for change in changes:
            typer.echo(pydantic_core.to_json(change, bytes_mode="hex", inf_nan_mode="strings", fallback=str))
    else:
        Console().print(_changes_table(changes))


def _print_revocation(done: Revocation) -> None:
    console = Console()
    for title, changes in (("", done.reverted), ("kept", done.kept), ("in the way", done.conflicts)):
        if changes or not title:
            console.print(_changes_table(changes, title))


def _changes_table(changes: Iterable[Change], title: str = "") -> Table:
    columns = ("at (UTC)", "transaction", "fact", "what", "changed", "by", "why")
    table = Table(*columns, title=title or None, title_justify="left")
    for change in changes:
        session = change.session_id and f"in {change.session_id}"
        table.add_row(
            f"{change.at:%Y-%m-%d %H:%M:%S}",
            change.tx,
            escape(f"{change.entity} {change.key}"),
            change.op + (" (undo)" if change.reverts else ""),
            escape(_changed(change)),
            escape(" ".join(filter(None, (change.actor, session)))),
            escape(change.reason or ""),
        )
    return table


def _changed(change: Change) -> str:
    """What a change made of a row: of an update, the columns that differ."""
    before, after = change.before or {}, change.after or {}
    if not (before and after):
        return ", ".join(f"{name}={_shortened(value)}" for name, value in (after or before).items())
    return ", ".join(
        f"{name}={_shortened(before.get(name))} → {_shortened(value)}"
        for name, value in after.items()
        if name not in before or before[name] != value
    )


def _shortened(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"


if __name__ == "__main__":
    main()
