"""`demo`: show the difference that memstate_sa makes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memstate_sa.cli.display import Console
from memstate_sa.cli.errors import exit_on_error
from memstate_sa.errors import MissingExtra


def demo(
    input_path: Annotated[
        Path | None,
        typer.Option("--input", exists=True, dir_okay=False, help="A conversation (JSON lines) or a MemoryBank file."),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(file_okay=False, help="Keep databases, indexes and logs in this new or empty folder.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed that chooses the failing index calls.")] = 7,
) -> None:
    """Play one agent memory twice, by hand and with memstate_sa, through failures and a crash.

    It needs no network and no database server, and takes less than a minute.

    memstate-sa demo
    """
    with exit_on_error():
        try:
            from memstate_sa.demo.script import run
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "chromadb", "chroma") from error
        run(input_path, directory=keep, console=Console(), seed=seed)
