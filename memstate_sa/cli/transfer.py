"""`export`, `import`, `import-checkpoints`: move facts and LangGraph's checkpoints between databases."""

from __future__ import annotations

from typing import Annotated

import typer

from memstate_sa.cli.display import Console, progress_bar
from memstate_sa.cli.opening import load_models, open_memory, require_database
from memstate_sa.cli.options import App, Url
from memstate_sa.runtime.display import counted


def export_facts(
    app: App,
    file: Annotated[
        typer.FileTextWrite, typer.Argument(metavar="FILE", encoding="utf-8", help="The new file, or - for stdout.")
    ],
    url: Url = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="MODEL", help="Only facts of this class. May be repeated.")
    ] = None,
) -> None:
    """Write facts and their history to a file of JSON lines. The file shows one moment of the database.

    memstate-sa export facts.jsonl
    memstate-sa export - --model Preference | gzip > preferences.jsonl.gz
    """
    with open_memory(app, url) as (memory, engine):
        models = load_models(model, memory, app)
        with progress_bar("exporting") as update:
            count = memory.export_facts(engine, file, models, progress=update)
        Console(stderr=True).print(f"{counted(count, 'change', 'changes')} exported.")


def import_facts(
    app: App,
    file: Annotated[
        typer.FileText, typer.Argument(metavar="FILE", encoding="utf-8", help="A file of `export`, or - for stdin.")
    ],
    url: Url = None,
) -> None:
    """Read facts and their history from a file of `export`. An error imports nothing.

    The database may be another one, and of another kind.
    The relay delivers the new facts.

    memstate-sa import facts.jsonl
    zcat facts.jsonl.gz | memstate-sa import -
    """
    with open_memory(app, url) as (memory, engine):
        with progress_bar("importing") as update:
            count = memory.import_facts(engine, file, progress=update)
        Console(stderr=True).print(f"{counted(count, 'change', 'changes')} imported. The relay delivers the facts.")


def import_langgraph(
    app: App,
    source: Annotated[str, typer.Argument(metavar="URL", help="The database of LangGraph's own saver.")],
    url: Url = None,
    threads: Annotated[
        list[str] | None, typer.Option("--thread", metavar="ID", help="Only this thread. May be repeated.")
    ] = None,
) -> None:
    """Copy the checkpoints of LangGraph's PostgresSaver or SqliteSaver. Existing checkpoints stay as they are.

    Run it again to copy newer checkpoints. It unpickles nothing.
    If checkpoints are pickled or encrypted, call import_checkpoints with your
    serializer, from memstate_sa.integrations.langgraph.import_checkpoints.

    memstate-sa import-checkpoints postgresql://app@db/shop
    memstate-sa import-checkpoints sqlite:///checkpoints.db --thread 17 --thread 18
    """
    with open_memory(app, url) as (memory, engine):
        require_database(source)
        from memstate_sa.integrations.langgraph.checkpointer import MemStateCheckpointer
        from memstate_sa.integrations.langgraph.import_checkpoints import import_checkpoints

        with MemStateCheckpointer(engine, memory=memory) as checkpointer, progress_bar("importing") as update:
            count = import_checkpoints(source, checkpointer, threads=threads or (), progress=update)
        Console(stderr=True).print(f"{counted(count, 'checkpoint', 'checkpoints')} imported.")
