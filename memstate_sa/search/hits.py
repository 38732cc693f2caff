"""The hits of a search, and the distance that orders them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, SupportsIndex, TypeVar, overload

import numpy as np
from sqlalchemy import inspect

from memstate_sa.fact import Fact
from memstate_sa.indexes.base import Vector
from memstate_sa.runtime.display import counted, html_table, shortened, shown, summary

F = TypeVar("F")
_SHOWN_HITS = 5
_FACT_COLUMNS = ["id", "type", "payload"]


@dataclass(frozen=True, slots=True, repr=False)
class Hit(Generic[F]):
    """A fact that SQL holds, and its cosine distance from the query: 0 is identical, 2 is opposite."""

    fact: F
    distance: float

    @property
    def score(self) -> float:
        return 1.0 - self.distance

    def __repr__(self) -> str:
        name, values = _loaded(self.fact)
        texts = ", ".join(f"{column}={shortened(value, 40)}" for column, value in values.items())
        return summary(self, f"{self.distance:.3f}", f"{name} {texts}".rstrip())


class Incomplete(StrEnum):
    """Why a search could not consider some rows."""

    FILLING = "the index is still being filled"
    TOO_MANY = "more changes are undelivered than one search embeds"
    IMPOSSIBLE_KEY = "no row can have an undelivered key"
    TEXT_FAILED = "the text of a row could not be read"
    REFUSED = "the embedder refused a text"
    UNAVAILABLE = "the embedder is unavailable"
    OTHER_CONTENT = "the index has other content than the rows"
    OLD_SNAPSHOT = "the transaction may see older rows than the index has"


class Hits(list[Hit[F]]):
    """Hits, best first. A slice of them has the same reasons.

    ``reasons`` says why the search could not consider some rows. Without a reason, the hits are ``complete``.
    """

    def __init__(self, hits: Iterable[Hit[F]] = (), reasons: Iterable[Incomplete] = ()) -> None:
        super().__init__(hits)
        self.reasons = list(reasons)

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Hit[F]: ...

    @overload
    def __getitem__(self, index: slice, /) -> Hits[F]: ...

    def __getitem__(self, index: Any, /) -> Any:
        chosen = super().__getitem__(index)
        return Hits(chosen, self.reasons) if isinstance(index, slice) else chosen

    @property
    def complete(self) -> bool:
        return not self.reasons

    def _count(self) -> str:
        return counted(len(self), "hit", "hits")

    def _state(self) -> str:
        return f"incomplete: {', '.join(self.reasons)}" if self.reasons else "complete"

    def __repr__(self) -> str:
        rest = [f"{len(self) - _SHOWN_HITS} more"] if len(self) > _SHOWN_HITS else []
        return summary(self, self._count(), self._state(), *map(repr, self[:_SHOWN_HITS]), *rest)

    def _repr_html_(self) -> str:
        rows = [{"distance": f"{hit.distance:.3f}", **_shown_values(hit.fact)} for hit in self]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = (map(row.get, columns) for row in rows)
        return html_table(f"{self._count()} ({self._state()})", columns, map(list, cells))


def _shown_values(fact: object) -> dict[str, str]:
    """The columns of *fact* in a table. A `Fact` needs no name of its class."""
    name, values = _loaded(fact)
    texts = {column: "" if value is None else shown(value) for column, value in values.items()}
    return texts if isinstance(fact, Fact) else {"fact": name, **texts}


def _loaded(fact: object) -> tuple[str, dict[str, Any]]:
    """The class and the column values of *fact* that are in memory, because a repr must not query the database."""
    state: Any = inspect(fact, raiseerr=False)
    if state is None or not hasattr(state, "mapper"):
        return shortened(fact), {}
    names = _FACT_COLUMNS if isinstance(fact, Fact) else [attribute.key for attribute in state.mapper.column_attrs]
    return type(fact).__name__, {name: state.dict[name] for name in names if name in state.dict}


def cosine_distance(a: Vector, b: Vector) -> float:
    """1 − cosine similarity; 1 when either vector is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return 1.0 - float(a @ b) / norm if norm else 1.0
