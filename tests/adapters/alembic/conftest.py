"""Migrations create tables with their comments."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from tests.support.engines import make_engine


@pytest.fixture
def postgres_engine(postgres_engine: Engine) -> Iterator[Engine]:
    engine = make_engine(postgres_engine.url, comments=True)
    yield engine
    engine.dispose()
