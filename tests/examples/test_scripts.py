"""The single-file examples work as documented, with real embeddings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import sessionmaker

from memstate_sa import Memory
from memstate_sa.indexes import InMemoryIndex

pytest.importorskip("wordllama")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


# -- agent.py ----------------------------------------------------------------------------------------------------------


@pytest.mark.deep_on("postgres")
def test_the_agent_remembers_corrects_itself_and_is_undone(engine: Engine) -> None:
    """The output is exact, except arguments of tools. It runs as a user would run it, without a warning."""
    url = engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-W", "error", str(EXAMPLES / "agent.py"), "--url", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    talk, _, known = done.stdout.partition("What is believed, and why:\n")
    said = [line for line in talk.splitlines() if line.startswith(("user", "agent"))]
    assert said == [
        "user   Priya is a vegetarian",
        "agent  I will remember that.",
        "user   Priya lives in Porto",
        "agent  I will remember that.",
        "user   What should I cook for Priya's dinner?",
        "agent  Priya is a vegetarian.",
        "user   Please buy tickets for the concert",
        "agent  I will.",
        "user   No, Priya eats fish again, but no meat",
        "agent  I had that wrong; I know better now.",
        "user   What should I cook for Priya's dinner?",
        "agent  Priya eats fish again, but no meat.",
        "user   Priya plays the violin",
        "agent  I will remember that.",
        "user   Undo that",
        "agent  As if it had not been said.",
        "user   What should I cook for Priya's dinner?",
        "agent  Priya is a vegetarian.",
        "user   Forget all that I told you today",
        "agent  What were we talking about?",
        "user   Does Priya make music?",
        "agent  Priya plays the violin.",
    ]
    fish = "Priya eats fish again, but no meat"
    # The schema's refusal went back to the model, which then corrected its call.
    assert talk.count("'certainty': 90}: ['certainty: Input should be less than or equal to 1']") == 3
    assert known.splitlines() == [
        "  Priya is a vegetarian",
        "    monday: insert 'Priya is a vegetarian', as was said: 'Priya is a vegetarian'",
        f"    tuesday: update {fish!r}, as was said: 'No, {fish}'",
        "    tuesday: update 'Priya is a vegetarian', as was said: 'Undo that'",
        "  Priya lives in Porto",
        "    monday: insert 'Priya lives in Porto', as was said: 'Priya lives in Porto'",
        "  Priya plays the violin",
        "    monday: insert 'Priya plays the violin', as was said: 'Priya plays the violin'",
        "Errands: []",
    ]


def test_failed_turn_leaves_nothing(engine: Engine) -> None:
    """The model becomes unreachable after a tool call: no belief, no history, no vector."""
    from examples import agent as example

    def unreachable(said: str, results: list[example.Result]) -> example.Call | str:
        if results:
            raise TimeoutError("the model is away")
        return example.Call("remember", {"content": said, "certainty": 0.5})

    sessions, index = sessionmaker(engine), InMemoryIndex()
    with closing(Memory(index)) as memory:
        memory.track(example.Belief, text="content", metadata=("certainty",), schema=example.ValidBelief)
        memory.attach(sessions)
        example.Base.metadata.create_all(engine)
        memory.create_tables(engine)
        with pytest.raises(TimeoutError):
            example.Agent(sessions, memory, unreachable, "monday").turn("Priya is a vegetarian")
        memory.relay(engine).drain()
        with sessions() as session:
            assert session.scalars(select(example.Belief)).all() == memory.history(session) == []
        assert index.scan(None, 10) == []


# -- flask_app.py ------------------------------------------------------------------------------------------------------

Ask = Callable[..., Any]


@pytest.fixture
def ask(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ask]:
    """``ask("ada", "GET", "/bookmarks")``. Each request has its own Session, as from a browser."""
    pytest.importorskip("flask")
    pytest.importorskip("chromadb")
    import atexit

    from examples import flask_app as example

    at_exit = ExitStack()
    monkeypatch.setattr(atexit, "register", at_exit.callback)
    monkeypatch.setenv("BOOKMARKS_CHROMA", str(tmp_path / "chroma"))
    app = example.create_app(engine.url.render_as_string(hide_password=False))
    client = app.test_client()

    def ask(user: str, method: str, path: str, status: int = 200, **options: Any) -> Any:
        answer = client.open(path, method=method, headers={"X-User": user} if user else {}, **options)
        assert answer.status_code == status, answer.text
        return answer.get_json(silent=True)

    with at_exit:
        yield ask


@pytest.mark.deep_on("sqlite")
def test_bookmarks_are_found_and_undone_by_their_user(ask: Ask) -> None:
    """Each user searches and undoes only their own bookmarks."""

    def add(user: str, note: str) -> Any:
        return ask(user, "POST", "/bookmarks", 201, json={"url": "https://example.org", "note": note})

    def found(user: str, question: str) -> list[str]:
        return [hit["note"] for hit in ask(user, "GET", "/search", query_string={"q": question})]

    bread = add("ada", "how to bake rye bread")
    add("ada", "train timetable to Porto")
    violin = add("bob", "violin lessons")
    assert found("ada", "baking a cake") == ["how to bake rye bread", "train timetable to Porto"]
    assert found("ada", "rail travel") == ["train timetable to Porto", "how to bake rye bread"]
    assert found("bob", "baking a cake") == ["violin lessons"]
    ask("bob", "DELETE", f"/bookmarks/{bread['id']}", 404)
    ask("ada", "DELETE", f"/bookmarks/{bread['id']}", 204)
    assert found("ada", "baking a cake") == ["train timetable to Porto"]
    assert ask("bob", "POST", "/undo") == [{"op": "delete", "id": violin["id"]}]
    assert found("bob", "violin") == []
    assert ask("ada", "POST", "/undo") == [{"op": "insert", "id": bread["id"]}]
    assert ask("ada", "GET", "/bookmarks")[0] == bread
    assert found("ada", "baking a cake")[0] == "how to bake rye bread"
    ask("", "GET", "/bookmarks", 401)
