"""`dead list`, `dead retry`, `dead drop`: keys that an index refused too often."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memstate_sa.cli.display import Console, cell, fact_name, print_json
from memstate_sa.cli.opening import index_names, open_memory
from memstate_sa.cli.options import App, Indexes, JsonLines, Url
from memstate_sa.runtime.display import counted, written

if TYPE_CHECKING:
    from memstate_sa.relay import DeadLetter, Relay

_ALL = 1_000_000

Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--key", metavar="KEY", help="A key as `dead list` shows it. May be repeated. Default: all dead keys."
    ),
]


def dead_list(
    app: App,
    url: Url = None,
    index: Indexes = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Show at most N keys.")] = 100,
    as_json: JsonLines = False,
) -> None:
    """Show the keys that an index refused too often, and the error.

    memstate-sa dead list --index memory
    """
    with open_memory(app, url) as (memory, engine):
        letters = memory.relay(engine).dead(*index_names(index, memory), limit=limit)
        if as_json:
            for letter in letters:
                fields = {"index": letter.index, "entity": letter.entity, "key": _key(letter)}
                print_json({**fields, "attempts": letter.attempts, "error": letter.error})
            return
        if not letters:
            Console().print("No key is dead.")
        for letter in letters:
            name = cell(fact_name(letter.entity, _key(letter)))
            attempts = counted(letter.attempts, "attempt", "attempts")
            console = Console()
            console.print(f"{cell(letter.index)}  [bold]{name}[/]  {attempts}", highlight=False, soft_wrap=True)
            console.print(f"  {cell(letter.error)}", highlight=False, soft_wrap=True)


def dead_retry(app: App, url: Url = None, index: Indexes = None, key: Keys = None) -> None:
    """Try dead keys again.

    memstate-sa dead retry                  all of them
    memstate-sa dead retry --key 7          one
    """
    with open_memory(app, url) as (memory, engine):
        relay, indexes = memory.relay(engine), index_names(index, memory)
        count = relay.retry_dead(*indexes, keys=_stored(relay, indexes, key))
        Console().print(f"{counted(count, 'key', 'keys')} will be tried again.")


def dead_drop(app: App, url: Url = None, index: Indexes = None, key: Keys = None) -> None:
    """Forget dead keys. Relays deliver such a key again when its row changes.

    memstate-sa dead drop --index memory --key 7
    """
    with open_memory(app, url) as (memory, engine):
        relay, indexes = memory.relay(engine), index_names(index, memory)
        count = relay.drop_dead(*indexes, keys=_stored(relay, indexes, key))
        Console().print(f"{counted(count, 'key is', 'keys are')} forgotten.")


def _key(letter: DeadLetter) -> Any:
    """The primary key, as `Change.key` has it."""
    from memstate_sa.db.codec import decode_key

    values = decode_key(letter.key)
    return values if len(values) > 1 else values[0]


def _stored(relay: Relay, indexes: Collection[str], keys: Collection[str] | None) -> list[str] | None:
    """The stored form, with its entity, of dead *keys* that are written as `dead list` or an error shows them."""
    if keys is None:
        return None
    return [
        letter.entity + letter.key
        for letter in relay.dead(*indexes, limit=_ALL)
        if not {
            written(_key(letter)),
            fact_name(letter.entity, _key(letter)),
            letter.key,
            letter.entity + letter.key,
        }.isdisjoint(keys)
    ]
