"""Tables and triggers that a migration made."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import sessionmaker

from memstate_sa.db.tables import log
from tests.adapters.alembic.application import Application


def images(app: Application) -> list[tuple[str, str, Any]]:
    with app.engine.connect() as connection:
        return [
            tuple(row) for row in connection.execute(select(log.c.entity, log.c.op, log.c.image).order_by(log.c.id))
        ]


def problems(app: Application) -> list[str]:
    """The doctor's report on the application as it is written now."""
    memory = app.models.memory
    sessions = sessionmaker(app.engine)
    memory.attach(sessions)
    return [f"{subject} {message}" for subject, message in memory.doctor(app.engine).problems]


def operations(source: str, of: str = "upgrade") -> list[str]:
    """The names of a revision's operations, in order."""
    body = source.split(f"def {of}():")[1].split("\ndef ", maxsplit=1)[0]
    return re.findall(r"(?:batch_)?op\.(\w+)\(", re.sub(r"op\.f\(", "", body))
