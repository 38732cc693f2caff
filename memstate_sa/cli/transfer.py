"""`export`, `import`, `import-checkpoints`: facts, and LangGraph's checkpoints, from one database to another."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import Progress

from memstate_sa.cli.display import Console, progress_of
from memstate_sa.cli.opening import App, Url, load_model, open_memory, require_database


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
    with open_memory(app, url) as (memory, engine):
        console = Console(stderr=True)
        with Progress(console=console) as progress:
            models = [load_model(name, app) for name in model or ()]
            count = memory.export_facts(engine, file, models, progress=progress_of(progress, "exporting"))
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
    with open_memory(app, url) as (memory, engine):
        console = Console(stderr=True)
        with Progress(console=console) as progress:
            count = memory.import_facts(engine, file, progress=progress_of(progress, "importing"))
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
    memstate_sa.integrations.langgraph.import_checkpoints with the serializer.

    \b
    memstate-sa import-checkpoints postgresql://app@db/shop
    memstate-sa import-checkpoints sqlite:///checkpoints.db --thread 17 --thread 18
    """
    with open_memory(app, url) as (memory, engine):
        require_database(source)
        from memstate_sa.integrations.langgraph.checkpointer import MemStateCheckpointer
        from memstate_sa.integrations.langgraph.import_checkpoints import import_checkpoints

        console = Console(stderr=True)
        with MemStateCheckpointer(engine, memory=memory) as checkpointer, Progress(console=console) as progress:
            count = import_checkpoints(
                source, checkpointer, threads=threads or (), progress=progress_of(progress, "importing")
            )
        console.print(f"{count} checkpoints imported.")
