"""`log`, `diff`, `rollback`, `revoke`: what happened to facts, shown and undone."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

import pydantic_core
import typer
from sqlalchemy import Engine, inspect
from sqlalchemy.orm import Session, sessionmaker

from memstate_sa.cli.display import Console, changes_table
from memstate_sa.cli.opening import App, Url, fail, load_model, open_memory
from memstate_sa.log.changes import Change
from memstate_sa.memory import Memory
from memstate_sa.runtime.printable import printable
from memstate_sa.undo.undo import OnConflict, Revocation

OfModel = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Only facts of this class.")]
OfSession = Annotated[str | None, typer.Option("--session-id", help="Only what this agent session did.")]
OfActor = Annotated[str | None, typer.Option("--actor", help="Only what this actor did.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be undone, and undo nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


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
    with open_memory(app, url) as (memory, engine), _session(memory, engine) as session:
        model, key = model or of_model, key or of_key
        if model is None and key is not None:
            raise typer.BadParameter("of which --model?", param_hint="--key")
        model_class = None if model is None else load_model(model, app)
        fact = None if key is None else _key(model_class, key)
        changes = memory.history(session, model_class, fact, actor=actor, session_id=session_id, limit=limit + 1)
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
    with open_memory(app, url) as (memory, engine), _session(memory, engine) as session:
        model_class = None if model is None else load_model(model, app)
        changes = memory.diff(session, _moment(a), None if b is None else _moment(b), model_class)
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
    dry_run: DryRun = False,
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
            model=None if model is None else load_model(model, app),
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
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Take out all that one actor, session or transaction did, from among what others did, after showing it.

    Changes that others have built upon stay. They are shown, with the changes that are in the way.

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
            model=None if model is None else load_model(model, app),
            on_conflict=on_conflict,
            dry_run=dry_run,
        )

    _undo(app, url, undo, dry_run=dry_run, yes=yes)


def _undo(app: str, url: str, undo: Callable[..., Revocation], *, dry_run: bool, yes: bool) -> None:
    """Plan, ask, do: nothing is locked while somebody makes up his mind."""
    with open_memory(app, url) as (memory, engine), _session(memory, engine) as session:
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
            fail("others have changed these facts meanwhile, so nothing was undone: look again")
        session.commit()
        if plan is None:
            _print_revocation(done)
        Console().print(f"{len(done.reverted)} changes undone.")


def _facts(changes: Iterable[Change]) -> list[Any]:
    return [(c.entity, c.key, c.op, c.before, c.after, c.reverts) for c in changes]


@contextmanager
def _session(memory: Memory, engine: Engine) -> Iterator[Session]:
    sessions = sessionmaker(engine)
    memory.attach(sessions)
    with sessions() as session:
        yield session


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


def _show_changes(changes: Collection[Change], *, as_json: bool) -> None:
    if as_json:
        for change in changes:
            line = pydantic_core.to_json(change, bytes_mode="hex", inf_nan_mode="strings", fallback=str)
            typer.echo(printable(line.decode()))
    else:
        Console().print(changes_table(changes))


def _print_revocation(done: Revocation) -> None:
    console = Console()
    for title, changes in (("", done.reverted), ("kept", done.kept), ("in the way", done.conflicts)):
        if changes or not title:
            console.print(changes_table(changes, title))
