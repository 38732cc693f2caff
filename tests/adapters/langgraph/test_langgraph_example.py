"""The example agent works as described."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

pytest.importorskip("langgraph.graph")
pytest.importorskip("wordllama")

from examples.langgraph_agent import tell_the_story


@pytest.mark.deep_on("postgres")
def test_agent_example_prints_its_story(engine: Engine) -> None:
    lines = tell_the_story(engine.url.render_as_string(hide_password=False))
    paris, nuts, berlin = "I live in Paris.", "I am allergic to nuts.", "I have moved from Paris to Berlin."
    assert lines[:2] == [f"I shall remember: {paris}", f"I shall remember: {nuts}"]
    assert lines[2].split("; ")[0] == paris
    assert lines[3:5] == [f"killed: {[paris, nuts]}", f"resumed: {[paris, nuts, berlin]}"]
    assert set(lines[5].split("; ")) == {paris, berlin}
    assert berlin in lines[6] and lines[7].removeprefix("asked again then: ").split("; ") == [paris, nuts]
    assert lines[8:] == [f"gone back: {[paris, nuts]}", "forgotten: [], {}"]
