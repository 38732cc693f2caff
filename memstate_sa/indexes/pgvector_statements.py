"""The statements of a pgvector index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    DateTime,
    Double,
    Index,
    LargeBinary,
    MetaData,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    func,
    literal,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, JSONB, insert
from sqlalchemy.types import UserDefinedType

from memstate_sa.db.codec import encode
from memstate_sa.db.json_params import as_json
from memstate_sa.indexes.base import Scalar

_PREFIX = 500
"""The index on ids holds this many characters of an id: a B-tree entry has at most 2,700 bytes."""
_MOST_OF_VECTOR, _MOST_OF_HALFVEC = 2_000, 4_000
"""The largest dimensions for an HNSW graph. Points with more dimensions are compared one by one."""
EXACT_UP_TO = 5_000
"""Up to this number of points, a query compares all of them by default."""
_STATE = b""
"""The key of the row with the table's state. It is in the same table, so it disappears together with the points."""
_BETWEEN = ";"
_OPERATORS = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_KEYS: Any = bindparam("keys", type_=ARRAY(LargeBinary))

ONE_AT_A_TIME = select(func.pg_advisory_xact_lock(func.hashtextextended(bindparam("name", type_=Text), 0)))


class _Vector(UserDefinedType[Any]):
    """pgvector's ``vector`` or ``halfvec``, as text: ``[1,0.5]``."""

    cache_ok = True

    def __init__(self, dimension: int, name: str = "vector") -> None:
        self.dimension = dimension
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        return f"{self.name}({self.dimension})"


COLUMNS = {"key", "id", "epoch", "fingerprint", "unit", "norm", "metadata", "deleted_at"}
"""The Alembic plugin recognises a table of points, under any name, by these columns."""


class Statements:
    """All statements for one table."""

    def __init__(self, name: str, schema: str | None, dimension: int) -> None:
        self.dimension = dimension
        self.points = points = Table(
            name,
            MetaData(),
            Column("key", LargeBinary, primary_key=True),  # a hash of the id: the id may be too long for a B-tree
            Column("id", Text(collation="C")),  # NULL for the state, and for the epoch of a deleted point
            Column("epoch", BigInteger, nullable=False),
            Column("fingerprint", Text),
            Column("unit", _Vector(dimension)),
            Column("norm", Double),
            Column("metadata", JSONB),
            Column("deleted_at", DateTime(timezone=True)),
            schema=schema,
        )
        assert {column.name for column in points.columns} == COLUMNS
        # Shorten by bytes: PostgreSQL cuts a name after 63 bytes, and would lose the ending.
        stem = f"{name.encode()[:40].decode(errors='ignore')}_{sha256(name.encode()).hexdigest()[:8]}"
        self.prefix = func.substr(points.c.id, 1, literal(_PREFIX, literal_execute=True))
        self.has_content = points.c.id.is_not(None)
        self.named = points.c.key == func.any(_KEYS)
        self.indexes = [
            Index(f"{stem}_ids", self.prefix, postgresql_where=self.has_content),
            Index(
                f"{stem}_metadata",
                points.c.metadata,
                postgresql_using="gin",
                postgresql_ops={"metadata": "jsonb_path_ops"},
                postgresql_where=self.has_content,
            ),
            Index(f"{stem}_deleted", points.c.deleted_at, postgresql_where=points.c.deleted_at.is_not(None)),
        ]
        self._kind = "vector" if dimension <= _MOST_OF_VECTOR else "halfvec"
        self.graph: Index | None = None
        if dimension <= _MOST_OF_HALFVEC:
            self.graph = Index(
                f"{stem}_graph",
                self._drawn(points.c.unit).label("drawn"),
                postgresql_using="hnsw",
                postgresql_ops={"drawn": f"{self._kind}_ip_ops"},
            )

    def _drawn(self, vector: ColumnElement[Any]) -> ColumnElement[Any]:
        return vector if self._kind == "vector" else cast(vector, _Vector(self.dimension, self._kind))

    @property
    def _query(self) -> ColumnElement[Any]:
        return cast(bindparam("query", type_=Text), _Vector(self.dimension))

    @property
    def _distance(self) -> ColumnElement[Any]:
        """The distance of the full vectors. The subquery parses the query vector once, but no index can sort by it."""
        query = select(self._query).scalar_subquery()
        return (1 + self.points.c.unit.op("<#>", return_type=Double())(query)).label("distance")

    def _among(self, columns: Sequence[ColumnElement[Any]], conditions: Sequence[ColumnElement[bool]]) -> Select[Any]:
        return select(*columns).where(self.has_content, *conditions)

    def nearest(self, conditions: Sequence[ColumnElement[bool]]) -> Select[Any]:
        """The nearest points by the graph. The graph may use half precision, and its order is only nearly right.

        The statement first changes the settings of the graph search, for itself only. This saves round trips.
        """
        c = self.points.c
        setting = [func.set_config("hnsw.ef_search", bindparam("explored", type_=Text), True).label("explored")]
        setting.append(func.set_config("hnsw.iterative_scan", "relaxed_order", True).label("iterative"))
        settings = select(*setting).cte("settings")
        nearness = self._drawn(c.unit).op("<#>")(self._drawn(self._query))
        # PostgreSQL evaluates a lateral join's left side first. This condition makes the right side depend on it.
        points = self._among([c.id, self._distance, c.fingerprint], [*conditions, settings.c.iterative.is_not(None)])
        nearest = points.order_by(nearness).limit(bindparam("limit")).lateral("nearest")
        return select(nearest).select_from(settings.join(nearest, true())).order_by(nearest.c.distance, nearest.c.id)

    @cached_property
    def nearest_of_all(self) -> Select[Any]:
        """`nearest` without a condition. It is cached, because building it takes longer than executing it."""
        return self.nearest([])

    @cached_property
    def count_some(self) -> Select[Any]:
        """The number of points, counted only up to `EXACT_UP_TO` + 1."""
        first_points = select(literal(1)).select_from(self.points).where(self.has_content).limit(EXACT_UP_TO + 1)
        return select(func.count()).select_from(first_points.subquery())

    @cached_property
    def compared_by_name(self) -> Select[Any]:
        return self.compared([self.named])

    def compared(self, conditions: Sequence[ColumnElement[bool]]) -> Select[Any]:
        c, distance = self.points.c, self._distance
        points = self._among([c.id, distance, c.fingerprint], conditions)
        return points.order_by(distance, c.id).limit(bindparam("limit"))

    def matches(self, where: Mapping[str, Any]) -> ColumnElement[bool]:
        """The canonical filter *where* as a condition. jsonb compares numbers by value, and never equates types."""
        [(key, condition)] = where.items()
        if key in ("$and", "$or"):
            parts = [self.matches(part) for part in condition]
            return and_(*parts) if key == "$and" else or_(*parts)
        [(name, operand)] = condition.items()
        if name in ("$eq", "$in"):
            equal = operand if name == "$in" else [operand]
            return or_(*(self.points.c.metadata.contains({key: value_of(value)}) for value in equal))
        value = self.points.c.metadata[key]
        compared = value.op(_OPERATORS[name], return_type=Boolean())(literal(value_of(operand), JSONB))
        return and_(func.jsonb_typeof(value) == "number", compared)

    @cached_property
    def state(self) -> Select[Any]:
        return select(self.points.c.metadata).where(self.points.c.key == _STATE)

    @cached_property
    def stamp(self) -> Any:
        row = {"key": _STATE, "epoch": 0, "metadata": bindparam("state", type_=JSONB)}
        return insert(self.points).values(row).on_conflict_do_nothing()

    @cached_property
    def mark(self) -> Any:
        kept = self.points.c.metadata.op("||")(func.jsonb_build_object("mark", bindparam("mark", type_=Text)))
        return update(self.points).where(self.points.c.key == _STATE).values(metadata=kept)

    @cached_property
    def upsert(self) -> Any:
        """Insert or replace points. The parameters are one array for a column, and `vectors_text` for the vectors."""
        types = {
            "key": LargeBinary, "id": Text, "epoch": BigInteger, "fingerprint": Text, "unit": Text, "norm": Double,
            "metadata": Text,
        }  # fmt: skip
        arrays: dict[str, Any] = {name: bindparam(name, type_=ARRAY(kind)) for name, kind in types.items()}
        arrays["unit"] = func.string_to_array(bindparam("unit", type_=Text), _BETWEEN)
        rows = func.unnest(*arrays.values()).table_valued(*types, name="rows").render_derived()
        to = {"unit": _Vector(self.dimension), "metadata": JSONB()}
        columns = [cast(rows.c[name], to[name]) if name in to else rows.c[name] for name in types]
        put = insert(self.points).from_select([*types, "deleted_at"], select(*columns, null()))
        return self._fenced(put, [*types, "deleted_at"])

    @cached_property
    def bury(self) -> Any:
        """Delete points, and remember the epoch, also for absent ids."""
        keys = func.unnest(_KEYS).table_valued("key", name="rows").render_derived()
        epoch = bindparam("epoch", type_=BigInteger)
        put = insert(self.points).from_select(["key", "epoch", "deleted_at"], select(keys.c.key, epoch, func.now()))
        return self._fenced(put, [column.name for column in self.points.c if not column.primary_key])

    def _fenced(self, put: Any, columns: Sequence[str]) -> Any:
        """*put*, changed to skip rows with a higher epoch. Epoch 0 means no epoch, and always writes."""
        new, old = put.excluded, self.points.c
        values = {name: new[name] for name in columns if name != "key"}
        values["epoch"] = func.greatest(old.epoch, new.epoch)
        passes = or_(new.epoch == 0, new.epoch >= old.epoch)
        return put.on_conflict_do_update(index_elements=[old.key], set_=values, where=passes)

    @cached_property
    def delete(self) -> Any:
        c = self.points.c
        in_order = select(c.key).where(self.named).order_by(c.key).with_for_update()
        return delete(self.points).where(c.key.in_(in_order))

    @cached_property
    def forget(self) -> Any:
        """Delete some old epochs. No write with a lower epoch can still be under way."""
        c = self.points.c
        old = c.deleted_at < func.now() - bindparam("remembered", type_=INTERVAL)
        keys = select(c.key).where(old).order_by(c.deleted_at).limit(bindparam("most"))
        return delete(self.points).where(c.key.in_(keys.with_for_update(skip_locked=True)))

    @cached_property
    def get(self) -> Select[Any]:
        c = self.points.c
        return self._among([c.id, c.fingerprint, c.unit, c.norm], [self.named])

    @cached_property
    def scan(self) -> Select[Any]:
        """The next points by id. The index has only the beginnings of ids, so ids with equal beginnings are sorted."""
        c, after = self.points.c, bindparam("after", type_=Text)
        later = [self.prefix >= func.substr(after, 1, _PREFIX), c.id > after]
        return self._among([c.id, c.fingerprint], later).order_by(self.prefix, c.id).limit(bindparam("limit"))


def vectors_text(vectors: NDArray[np.float32]) -> str:
    """The vectors for `Statements.upsert`, in one text. For a list, the driver would quote each number."""
    return _BETWEEN.join(map(as_json, vectors.tolist()))


def key_of(id_: str) -> bytes:
    return sha256(id_.encode("utf-8", "surrogatepass")).digest()


def value_of(value: Scalar) -> Any:
    """*value* in a form that jsonb can hold: text without NUL, and a float with an integer value as an int."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return encode(value) if isinstance(value, str) else value
