"""The provider's reason is shown wherever an operator looks: logs, dead letters, problems, status, search."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Engine

from memstate_sa.errors import DeliveryRejected, DeliveryRetryable
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.relay.retry import RetryPolicy
from memstate_sa.testing import FlakyIndex, HashEmbedder
from tests.support import Tag, World

REASON = "413 Content Too Large: at most 8192 tokens"


class Answer:
    status_code = 413
    headers = None

    def json(self) -> Any:
        return {"error": {"message": "at most 8192 tokens"}}


class Refused(Exception):
    response = Answer()


class Refusing(HashEmbedder):
    def embed(self, texts: Sequence[str]) -> Any:
        raise Refused(*texts)


def test_reason_of_a_refusal_is_told_everywhere(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """The same kind: an unavailable provider in `problems()`, a query that cannot be embedded, strict delivery."""
    world = World(engine)
    for destination in world.memory._destinations.values():
        destination.vectors.embedder = Refusing()
    relay = world.memory.relay(engine, policy=RetryPolicy(max_attempts=1))
    with world.session() as session:
        session.add(Tag(name="a", meaning="hidden meaning of it"))
        session.commit()
    with caplog.at_level(logging.WARNING):
        relay.drain()
    [letter] = relay.dead()
    status = world.memory.status(engine)["memory"]
    with world.session() as session, pytest.raises(DeliveryRejected) as raised:
        world.memory.search(session, "a question", Tag)
    reason = REASON.removeprefix("413 ").split(": ")[1]
    for told in (letter.error, status.problem, caplog.text, str(raised.value)):
        assert "413 " in str(told)
        assert reason in str(told)
        assert "hidden meaning" not in str(told)
    world.memory.close()


def test_the_end_of_an_outage_is_logged_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    world = World(engine, FlakyIndex(InMemoryIndex(), rate=1.0))
    relay = world.relay
    with world.session() as session:
        session.add(Tag(name="a", meaning="one"))
        session.commit()
    with caplog.at_level(logging.INFO, "memstate_sa.relay"):
        with pytest.raises(DeliveryRetryable):
            relay.run_once()
        world.index.rate = 0.0
        relay.drain()
        relay.drain()
    failed, works = [record.getMessage() for record in caplog.records]
    assert failed.startswith("index memory: The delivery failed (")
    assert works == "index memory: The delivery works again."
    world.memory.close()
