"""Migrations make tables with their comments."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine


@pytest.fixture
def postgres_engine(postgres_engine: Engine) -> Engine:
    postgres_engine.dialect.supports_comments = True
    return postgres_engine
