"""The statements that a block sends."""

from __future__ import annotations

import threading

from sqlalchemy import Engine, event


def statements(engine: Engine) -> list[str]:
    seen: list[str] = []
    mine = threading.get_ident()

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if threading.get_ident() == mine:  # another thread wakes relays after a commit
            seen.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    return seen
