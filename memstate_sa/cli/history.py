"""`log`, `diff`, `rollback`, `revoke`: show what happened to facts, and undo it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich.markup import escape

from memstate_sa.cli.display import Console, print_changes, print_json
from memstate_sa.cli.errors import fail
from memstate_sa.cli.opening import load_model, open_memory
from memstate_sa.cli.options import App, DryRun, JsonLines, OfActor, OfModel, OfSession, Url, Yes
from memstate_sa.runtime.display import counted

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from memstate_sa import Change, Memory
    from memstate_sa.undo.undo import Revocation

OnConflict = Annotated[
    Literal["raise", "skip", "force"],
    typer.Option(help="If others changed a fact later: stop, leave that fact alone, or overwrite their change."),
]


def log(
    app: App,
    url: Url = None,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Only facts of this class: its name or its entity.")
    ] = None,
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="Only the fact with this primary key. Composite: a JSON array.")
    ] = None,
    of_model: OfModel = None,
    of_key: Annotated[str | None, typer.Option("--key", metavar="KEY", help="The same as KEY, with --model.")] = None,
    session_id: OfSession = None,
    actor: OfActor = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Show the last N changes.")] = 20,
    as_json: JsonLines = False,
) -> None:
    """Show what happened to all facts, to the facts of a class, or to one fact.

    memstate-sa log                        all facts
    memstate-sa log Preference 7           one fact
    memstate-sa log --actor ana --json     one actor, for a program
    """
    with open_memory(app, url) as (memory, engine), _session(memory, engine) as session:
        model, key = model or of_model, key or of_key
        if model is None and key is not None:
            raise typer.BadParameter("A key needs a class. Give --model too.", param_hint="--key")
        model_class = None if model is None else load_model(model, memory, app)
        fact = None if key is None else _key(model_class, key)
        changes = memory.history(session, model_class, fact, actor=actor, session_id=session_id, limit=limit + 1)
        _show_changes(changes[-limit:], as_json=as_json)
        if len(changes) > limit:
            Console(stderr=True).print("There are older changes. --limit shows more.")


def diff(
    app: App,
    a: Annotated[str, typer.Argument(metavar="A", help="A time (UTC, unless it names a zone) or a transaction.")],
    b: Annotated[str | None, typer.Argument(metavar="B", help="A later time or transaction. Default: now.")] = None,
    url: Url = None,
    model: OfModel = None,
    as_json: JsonLines = False,
) -> None:
    """Show what became of each fact between two moments.

    memstate-sa diff 2026-03-01                      since the first of March
    memstate-sa diff 2026-03-01 2026-03-01T12:00     on its morning
    """
    with open_memory(app, url) as (memory, engine), _session(memory, engine) as session:
        model_class = None if model is None else load_model(model, memory, app)
        changes = memory.diff(session, _moment(a), None if b is None else _moment(b), model_class)
        _show_changes(changes, as_json=as_json)


def rollback(
    app: App,
    url: Url = None,
    steps: Annotated[int, typer.Option(min=1, help="Undo this number of transactions, newest first.")] = 1,
    session_id: OfSession = None,
    actor: OfActor = None,
    model: OfModel = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="TIME|TX", help="Instead of --steps: undo everything since this time (UTC) or transaction."
        ),
    ] = None,
    tx: Annotated[
        str | None, typer.Option(metavar="TX", help="Undo this transaction. If it is a rollback, that is a redo.")
    ] = None,
    on_conflict: OnConflict = "raise",
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Undo the last transactions, after showing their changes. The relay updates the indexes.

    memstate-sa rollback --steps 3                   the last three
    memstate-sa rollback --actor ana --dry-run       only show ana's last one
    memstate-sa rollback --to 2026-03-01T12:00       everything since noon
    """
    if tx is not None and to is not None:
        raise typer.BadParameter("Give --tx or --to, not both.", param_hint="--tx")

    def undo(memory: Memory, session: Session, *, dry_run: bool) -> Revocation:
        from memstate_sa.undo.undo import Revocation

        changes = memory.rollback(
            session,
            steps,
            session_id=session_id,
            actor=actor,
            model=None if model is None else load_model(model, memory, app),
            to=None if to is None else _moment(to),
            tx=tx,
            on_conflict=on_conflict,
            dry_run=dry_run,
        )
        return Revocation(changes)

    is_of_steps = to is None and tx is None and on_conflict != "skip"  # a skipped step has no changes
    labels = {"actor": actor, "session id": session_id, "class": model}
    _undo(app, url, _Request(undo, labels, steps if is_of_steps else None), dry_run=dry_run, yes=yes)


def revoke(
    app: App,
    url: Url = None,
    session_id: OfSession = None,
    actor: OfActor = None,
    tx: Annotated[list[str] | None, typer.Option(metavar="TX", help="Undo this transaction. May be repeated.")] = None,
    model: OfModel = None,
    on_conflict: OnConflict = "skip",
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Undo everything that one actor, session or transaction did, after showing it. The work of others stays.

    Changes that others have built upon are kept.
    The command shows them, with the changes that are in the way.

    memstate-sa revoke --session-id run-17
    memstate-sa revoke --actor importer --on-conflict force --yes
    """
    if session_id is None and actor is None and not tx:
        raise typer.BadParameter(
            "Give one of these options. It says whose changes to undo.", param_hint="--actor, --session-id or --tx"
        )

    def undo(memory: Memory, session: Session, *, dry_run: bool) -> Revocation:
        return memory.revoke(
            session,
            session_id=session_id,
            actor=actor,
            tx=tx or (),
            model=None if model is None else load_model(model, memory, app),
            on_conflict=on_conflict,
            dry_run=dry_run,
        )

    labels = {"actor": actor, "session id": session_id, "class": model}
    _undo(app, url, _Request(undo, labels), dry_run=dry_run, yes=yes)


class _Request(NamedTuple):
    """A rollback or a revocation, as the command asks for it."""

    undo: Callable[..., Revocation]
    labels: Mapping[str, str | None]
    steps: int | None = None

    def note(self, result: Revocation) -> str:
        """A sentence for a result with fewer changes than expected. It may be empty."""
        if not result.reverted:
            labels = " and ".join(f"{name} {value!r}" for name, value in self.labels.items() if value is not None)
            return f"There is nothing to undo{f' for {labels}' if labels else ''}."
        count = len({change.reverts for change in result.reverted})
        return "" if self.steps is None or count >= self.steps else f"Only {count} of the {self.steps} steps exist."


def _undo(app: str, url: str | None, request: _Request, *, dry_run: bool, yes: bool) -> None:
    """Plan the undo, ask for confirmation, then undo. No row is locked while the command waits for the answer."""
    with open_memory(app, url) as (memory, engine), _session(memory, engine) as session:
        plan = None if yes and not dry_run else request.undo(memory, session, dry_run=True)
        session.rollback()
        if plan is not None:
            _print_revocation(plan, request.note(plan))
            if dry_run:
                Console().print("Nothing was changed (--dry-run).")
            if dry_run or not plan.reverted:
                return
            typer.confirm(f"Undo {counted(len(plan.reverted), 'change', 'changes')}?", abort=True)
        result = request.undo(memory, session, dry_run=False)
        if plan is not None and _facts(plan.reverted) != _facts(result.reverted):
            session.rollback()
            fail("Nothing was undone: another transaction has just changed these facts. Run the command again.")
        session.commit()
        if plan is None:
            _print_revocation(result, request.note(result))
        Console().print(f"{counted(len(result.reverted), 'change', 'changes')} undone.")


def _facts(changes: Iterable[Change]) -> list[Any]:
    return [(c.entity, c.key, c.op, c.before, c.after, c.reverts) for c in changes]


@contextmanager
def _session(memory: Memory, engine: Engine) -> Iterator[Session]:
    from sqlalchemy.orm import sessionmaker

    sessions = sessionmaker(engine)
    memory.attach(sessions)
    with sessions() as session:
        yield session


def _moment(text: str) -> datetime | str:
    """The time that *text* names, in UTC by default as `log` shows it. Other text names a transaction."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return text
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at


def _key(model: Any, text: str) -> Any:
    """The primary key in *text*, which has the form that `log` shows. A composite key is a JSON array."""
    from pydantic import ConfigDict, TypeAdapter
    from sqlalchemy import inspect

    columns = inspect(model).primary_key
    types: Any = tuple(map(_python_type, columns))
    adapter: TypeAdapter[Any] = TypeAdapter(tuple[types], config=ConfigDict(val_json_bytes="hex"))
    try:
        values = json.loads(text) if len(columns) > 1 else [text]
        key = adapter.validate_json(json.dumps(values))
    except ValueError as error:
        names = ", ".join(f"{column.name} ({_python_type(column).__name__})" for column in columns)
        form = "a JSON array of " if len(columns) > 1 else ""
        message = f"Invalid key {text!r}. A key of {model.__name__} is {form}{names}."
        raise typer.BadParameter(message, param_hint="KEY") from error
    return key if len(columns) > 1 else key[0]


def _python_type(column: Any) -> type[Any]:
    try:
        python_type: type[Any] = column.type.python_type
    except NotImplementedError:
        return str
    return python_type


def _show_changes(changes: Sequence[Change], *, as_json: bool) -> None:
    if as_json:
        for change in changes:
            print_json(change)
    elif changes:
        print_changes(Console(), changes)
    else:
        Console(stderr=True).print("There are no such changes.")


def _print_revocation(revocation: Revocation, note: str) -> None:
    console = Console()
    for title, changes in (("", revocation.reverted), ("kept", revocation.kept), ("in the way", revocation.conflicts)):
        if changes:
            print_changes(console, changes, title)
    if note:
        console.print(escape(note), highlight=False, soft_wrap=True)
