"""The demo: its inputs, and the truth of the results that it shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest

from memstate_sa.demo.inputs import Correct, Forget, InputError, Remember, parse
from memstate_sa.errors import MemstateError

ROOT = Path(__file__).resolve().parents[3]
SHARED_DATA = Path(os.environ.get("MEMSTATE_SHARED_DATA", ROOT.parent / "shared" / "data"))
CONVERSATION = ROOT / "memstate_sa" / "demo" / "conversation.jsonl"

REMEMBER = '{"turn": 1, "op": "remember", "fact": "f1", "user": "ana", "role": "profile", "text": "Lives in Graz"}\n'
FORGET = '{"turn": 2, "op": "forget", "fact": "f1"}\n'
MEMORY_BANK = {
    "Ada ": {
        "name": "Ada",
        "history": {
            "2023-05-02": [{"query": "I moved to Bergen.", "response": "How is the rain?"}],
            "2023-05-01": [{"query": "Hello!", "response": ""}],
        },
    },
    "Bo": {"history": {"2023-05-01": [{"query": "I keep bees.", "response": "How many hives?"}]}},
}


# -- reading ---------------------------------------------------------------------------------------------------------


def test_the_shipped_conversation_remembers_corrects_and_forgets() -> None:
    """It is big enough to convince, and every turn in it can be played."""
    steps = [step for turn in parse(CONVERSATION.read_text("utf-8")) for step in turn.actions]
    count = {kind: sum(isinstance(step, kind) for step in steps) for kind in (Remember, Correct, Forget)}
    assert count[Remember] >= 95
    assert count[Correct] >= 20
    assert count[Forget] >= 10


def test_turn_of_the_crash_remembers_corrects_and_forgets() -> None:
    """The crash then shows all three kinds of drift, whichever index calls fail."""
    turns = parse(CONVERSATION.read_text("utf-8"))
    assert {type(step) for step in turns[(len(turns) - 1) // 2].actions} == {Remember, Correct, Forget}


def test_steps_of_one_turn_stay_together() -> None:
    """A turn is a transaction."""
    turns = parse(REMEMBER + REMEMBER.replace("f1", "f2") + "\n" + FORGET)
    assert [(turn.number, len(turn.actions)) for turn in turns] == [(1, 2), (2, 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The input is empty"),
        ("hello", "line 1: not JSON"),
        (REMEMBER + "hello", "line 2: not JSON"),
        ('{"op": "remember", ', "line 1: not JSON"),
        (REMEMBER + '{"turn": 2, "op": "recall", "fact": "f1"}', 'line 2, field "op"'),
        (REMEMBER + '{"turn": 2, "fact": "f1"}', 'line 2, field "op"'),
        (REMEMBER + '{"turn": 2, "op": "correct", "fact": "f1"}', 'line 2, field "text": Field required'),
        (REMEMBER + '{"turn": 2, "op": "correct", "fact": "f1", "text": " "}', 'line 2, field "text"'),
        (REMEMBER + '{"turn": "2", "op": "forget", "fact": "f1"}', 'line 2, field "turn"'),
        (REMEMBER + "\n" + FORGET.replace("2", "0"), 'line 3, field "turn"'),
        (REMEMBER.replace('"user"', '"usr"') + FORGET, 'line 1, field "user"'),
        (REMEMBER + FORGET.replace("}", ', "why": "moved"}'), 'line 2, field "why"'),
        (REMEMBER + REMEMBER, "line 2, field \"fact\": 'f1' was remembered before"),
        (REMEMBER + FORGET + FORGET, "line 3, field \"fact\": 'f1' is not remembered here"),
        (REMEMBER.replace("1, ", "3, ") + FORGET, 'line 2, field "turn": 2 comes after 3'),
        (REMEMBER, "at least two turns"),
        ("{}", "at least two turns"),
        ('{"Ada": {"history": {"2023-05-01": [{"query": 3}]}}}', 'field "Ada.history.2023-05-01.0.query"'),
        ('{"Ada": {}}', 'field "Ada.history"'),
        ('{\n  "Ada": {"history"', "line 2: not JSON"),
    ],
)
def test_input_error_names_line_and_field(text: str, message: str) -> None:
    """The message names the line and the field, or the path in the document."""
    with pytest.raises(InputError) as caught:
        parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("indent", [None, 2])
def test_memory_bank_file_is_recognised_by_its_content(indent: int | None) -> None:
    """An exchange is a turn. Days are played in order, all users together. Empty texts are left out."""
    turns = parse(json.dumps(MEMORY_BANK, indent=indent))
    said = [
        [(step.user, step.role, step.text) for step in turn.actions if isinstance(step, Remember)] for turn in turns
    ]
    assert said == [
        [("Ada", "user", "Hello!")],
        [("Bo", "user", "I keep bees."), ("Bo", "assistant", "How many hives?")],
        [("Ada", "user", "I moved to Bergen."), ("Ada", "assistant", "How is the rain?")],
    ]


def test_the_whole_of_memory_bank_can_be_read() -> None:
    """It has 566 exchanges of 15 users."""
    path = SHARED_DATA / "memory_bank" / "memory_bank_en.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not here; MEMSTATE_SHARED_DATA names the folder that has it")
    turns = parse(path.read_text("utf-8"))
    assert len(turns) == 566
    assert len({step.user for turn in turns for step in turn.actions if isinstance(step, Remember)}) == 15


# -- playing ---------------------------------------------------------------------------------------------------------


class Played(NamedTuple):
    home: Path
    exit_code: int
    output: str


def demo(*arguments: str) -> Played:
    command = [sys.executable, "-c", "from memstate_sa.cli import main; main()", "demo", *arguments]
    environment = {**os.environ, "COLUMNS": "140", "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return Played(Path(), done.returncode, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    pytest.importorskip("chromadb")
    pytest.importorskip("wordllama")
    home = tmp_path_factory.mktemp("demo")
    return demo("--keep", str(home))._replace(home=home)


@pytest.mark.deep
def test_the_demo_ends_well(played: Played) -> None:
    """It exits with 0, after showing each of its parts."""
    assert played.exit_code == 0, played.output
    for part in ("by hand", "missing", "ghost", "stale", "Search", "rollback", "history", "verify"):
        assert part in played.output


@pytest.mark.deep
def test_two_writes_in_a_row_drift_and_one_transaction_does_not(played: Played) -> None:
    """The test reads the databases and indexes of the demo, not its output."""
    from memstate_sa.demo.audit import drift
    from memstate_sa.demo.script import Outcome
    from memstate_sa.embedders import WordLlamaEmbedder

    outcomes = {side: Outcome(played.home / side) for side in ("by-hand", "memstate")}
    found = {side: drift(left.engine, left.collection, WordLlamaEmbedder()) for side, left in outcomes.items()}
    assert all(found["by-hand"])
    assert not any(found["memstate"])


@pytest.mark.deep
def test_comparison_fails_on_a_drifted_index(played: Played) -> None:
    """A demo whose memstate side has drifted fails."""
    from rich.console import Console

    from memstate_sa.demo.script import Outcome, compare

    drifted = Outcome(played.home / "by-hand")
    with pytest.raises(MemstateError, match="has drifted"):
        compare(drifted, drifted, parse(CONVERSATION.read_text("utf-8")), Console(file=StringIO()))


@pytest.mark.deep
def test_the_agents_were_killed_between_commit_and_delivery(played: Played) -> None:
    """At least the three facts of the turn in the middle were committed and not delivered."""
    assert re.search(r"killed after turn +│ +36 │ +36 │", played.output), played.output
    waiting = re.search(r"waiting in the outbox then +│ +— │ +(\d+) │", played.output)
    assert waiting is not None, played.output
    assert int(waiting[1]) >= 3


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    """The demo starts from nothing."""
    (tmp_path / "notes.txt").write_text("mine")
    again = demo("--keep", str(tmp_path))
    assert again.exit_code == 1
    assert "is not empty" in again.output
    assert "Traceback" not in again.output


@pytest.mark.deep_on("chromadb")
@pytest.mark.deep_on("wordllama")
@pytest.mark.parametrize("package", ["chromadb", "wordllama"])
def test_a_missing_extra_is_a_hint(package: str) -> None:
    """The demo gives the hint before it plays anything."""
    hide = (
        "import sys, importlib.util as u; found = u.find_spec;"
        f"u.find_spec = lambda name, *rest: None if name == {package!r} else found(name, *rest);"
        f"sys.modules[{package!r}] = None; from memstate_sa.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", hide, "demo"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "pip install 'memstate-sa[" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.deep
def test_a_bad_input_is_a_message(tmp_path: Path) -> None:
    """The demo shows the line, and no traceback."""
    pytest.importorskip("chromadb")
    (tmp_path / "bad.jsonl").write_text(REMEMBER + "hello\n")
    done = demo("--input", str(tmp_path / "bad.jsonl"))
    assert done.exit_code == 1
    assert "line 2: not JSON" in done.output
    assert "Traceback" not in done.output
