"""SQL as text: the templates in ``sql/``, and the literals for them."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from sqlalchemy.engine import Dialect

from memstate_sa.db.dialects import Database

_NAME = "-- name: "
_FOR_READERS = "---"


class Templates:
    """The templates of one file, by name. The values of their placeholders must be SQL already."""

    def __init__(self, source: str) -> None:
        self._by_name: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in source.splitlines():
            if line.startswith(_NAME):
                lines = self._by_name[line.removeprefix(_NAME)] = []
            elif not line.startswith(_FOR_READERS):
                lines.append(line)

    def block(self, template: str, **places: object) -> str:
        """The template as it is in the file, without the empty lines around it."""
        return "\n".join(self._by_name[template]).strip("\n").format(**places)

    def line(self, template: str, **places: object) -> str:
        """The template with each of its statements on one line."""
        lines = [line.strip() for line in self._by_name[template] if line.strip()]
        joined = "".join(line + ("\n" if line.endswith(";") else " ") for line in lines)
        return joined.strip().format(**places)


@cache
def templates(database: Database) -> Templates:
    """The templates for *database*."""
    file = files("memstate_sa.capture") / "sql" / f"{database.name}.sql"
    return Templates(file.read_text(encoding="utf-8"))


def literal(value: str) -> str:
    """*value* as a string constant."""
    return "'" + value.replace("'", "''") + "'"


def as_sent(compiled: str, dialect: Dialect) -> str:
    """*compiled* SQL for sending without parameters: a doubled percent sign becomes a single one."""
    return compiled.replace("%%", "%") if dialect.paramstyle in ("format", "pyformat") else compiled
