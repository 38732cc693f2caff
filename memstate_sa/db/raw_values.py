"""`RAW`: a type that leaves values as the driver returns them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Float
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

from memstate_sa.db.dialects import database_of


def hashable(value: Any) -> Any:
    """*value* with tuples in place of lists, at all levels."""
    return tuple(map(hashable, value)) if isinstance(value, (list, tuple)) else value


class Raw(UserDefinedType[Any]):
    """A value as the driver returns and takes it."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        raise NotImplementedError("Raw is for expressions only.")


RAW = Raw()


def undecorated(type_: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    """The type below any TypeDecorator and any variant for *dialect*."""
    while True:
        variant = type_._variant_mapping.get(database_of(dialect).name)  # noqa: SLF001  # there is no other way to ask
        if variant is not None:
            type_ = variant
        elif isinstance(type_, TypeDecorator):
            inner = type_.type_engine(dialect)
            if inner is type_ or isinstance(inner, type(type_)):
                inner = type_.load_dialect_impl(dialect)
            type_ = inner
        else:
            return type_


def implementation(type_: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    """The dialect's type below any TypeDecorator."""
    type_ = undecorated(type_, dialect)
    # In SQLAlchemy 2.0, PostgreSQL's own type for a float is a Numeric but no Float.
    return type_ if isinstance(type_, Float) else type_.dialect_impl(dialect)
