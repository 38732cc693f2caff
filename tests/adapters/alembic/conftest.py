"""Migrations make tables with their comments."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine


@pytest.fixture
def postgres_engine(postgres_engine: Engine) -> Iterator[Engine]:
    engine = create_engine(postgres_engine.url)  # with a dialect of its own, which makes them
    yield engine
    engine.dispose()
