"""`reindex` and `forget-index`: replace an index, and forget an index that is no longer used."""

from __future__ import annotations

import math
from typing import Annotated

import typer
from rich.markup import escape

from memstate_sa.cli.display import Console, progress_bar
from memstate_sa.cli.errors import unknown
from memstate_sa.cli.opening import open_memory
from memstate_sa.cli.options import App, Url


def reindex(
    app: App,
    url: Url = None,
    index: Annotated[
        str | None,
        typer.Argument(metavar="INDEX", help="The index to be replaced. Default: the only one with a successor."),
    ] = None,
    back: Annotated[bool, typer.Option("--back", help="Let searches ask the old index again.")] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Give up after this time. Default: no limit.")
    ] = None,
) -> None:
    """Fill the successor of an index, then let all searches ask the successor.

    Writes and searches go on all the time. After an interruption, run the command again.
    The successor may have another embedder. Your Memory names it:

    memory = Memory({"memory": old, "memory_v2": new},
                    embedder={"memory": old_embedder, "memory_v2": new_embedder},
                    successors={"memory": "memory_v2"})

    Deploy this Memory everywhere. Then run:

    memstate-sa reindex

    Then deploy a Memory with the new index alone, and forget the old one:

    memstate-sa forget-index memory
    """
    with open_memory(app, url) as (memory, engine):
        if index is not None and index not in memory.indexes:
            unknown("index", index, memory.indexes, "INDEX")
        if back:
            Console().print(f"Searches ask {escape(memory.reindex_back(engine, index))} again.")
            return
        limit = math.inf if timeout is None else timeout
        with progress_bar("delivering") as update:
            successor = memory.reindex(engine, index, timeout=limit, progress=update)
        Console().print(f"Searches ask {escape(successor)} now.")


def forget_index(
    app: App,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of an index that your Memory no longer has.")],
    url: Url = None,
) -> None:
    """Forget the relays' notes about an index that is no longer used. Its own tools delete its content.

    memstate-sa forget-index memory
    """
    with open_memory(app, url) as (memory, engine):
        memory.forget_index(engine, name)
        Console().print(f"Index {escape(name)} is forgotten.")
