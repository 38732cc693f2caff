"""Errors as messages. A user's mistake never ends in a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.markup import escape

from memstate_sa.cli.display import Console, print_changes
from memstate_sa.errors import ConflictError, MemstateError

if TYPE_CHECKING:
    from memstate_sa.log.changes import Change


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Show an error that a user can act on as a message, and exit with code 1."""
    from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

    try:
        yield
    except ConflictError as error:
        fail(str(error), error.changes)
    except MemstateError as error:
        fail(str(error))
    except OperationalError as error:
        is_connecting = not error.statement
        hint = "\nCheck --url, and that the database runs." if is_connecting else ""
        fail(f"Cannot use the database: {_reason(error.orig)}{hint}")
    except DBAPIError as error:
        fail(f"The database reports an error: {_reason(error.orig)}")
    except SQLAlchemyError as error:
        fail(str(error))
    except UnicodeDecodeError as error:
        fail(f"Cannot read the input: it is not text in UTF-8 ({error.reason} at byte {error.start}).")
    except BrokenPipeError:  # `memstate-sa log | head`: typer ends the command quietly
        raise
    except OSError as error:
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")


def _reason(error: BaseException | None) -> str:
    return str(error).strip()


def fail(message: str, conflicts: Sequence[Change] = ()) -> NoReturn:
    """Show *message*, and the changes that are in the way. Exit with code 1."""
    console = Console(stderr=True)
    console.print(f"[bold red]Error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    if conflicts:
        print_changes(console, conflicts, "in the way")
    raise typer.Exit(1)


def unknown(kind: str, name: str, known: Iterable[str], hint: str) -> NoReturn:
    """Refuse *name*, which is not among *known*. Show the names that are close, or else all names. Exit with code 2."""
    names = list(known)
    suggestion = did_you_mean(name, names) or f" There is: {', '.join(names) or 'none'}."
    raise typer.BadParameter(f"Unknown {kind} {name!r}.{suggestion}", param_hint=hint)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), cutoff=0.5)
    return f" Did you mean {' or '.join(matches)}?" if matches else ""
