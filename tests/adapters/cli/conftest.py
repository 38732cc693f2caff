"""Commands in this process configure the logging of memstate_sa. Each test restores it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    package = logging.getLogger("memstate_sa")
    handlers, level, propagate = package.handlers[:], package.level, package.propagate
    yield
    package.handlers[:] = handlers
    package.setLevel(level)
    package.propagate = propagate
