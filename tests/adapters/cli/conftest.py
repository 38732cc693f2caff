"""Commands that run in this process configure the logging of memstate_sa: each test ends with the former one."""

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
