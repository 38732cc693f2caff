"""The output of commands: values as people write them, names that commands accept, JSON, and logs."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from memstate_sa import Change
from memstate_sa.cli import processes
from memstate_sa.cli.display import Console, print_changes
from tests.support.commands import ROOT, Application, add_dead_key, app, bare, invoke

__all__ = ["app", "bare"]

pytest.importorskip("typer")

STORE = """
from memstate_sa import Fact, MemoryStore
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder

store = MemoryStore("sqlite:///facts.db", InMemoryIndex(), embedder=HashEmbedder(), background=False)
"""

VALUES = """
from datetime import date, datetime
from decimal import Decimal
from uuid import UUID

from sqlalchemy import JSON
from sqlalchemy.orm import Mapped, mapped_column

from {app} import Base, memory


class Thing(Base):
    __tablename__ = "thing"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    at: Mapped[datetime]
    day: Mapped[date]
    raw: Mapped[bytes]
    good: Mapped[bool]
    tags: Mapped[list] = mapped_column(JSON)


memory.track(Thing, text="name")
"""


def shown_names(output: str) -> list[str]:
    """The facts that `log` shows, as it writes them."""
    return re.findall(r"^\S+Z  [0-9a-f]{32}  \w+  (.*)$", output, re.MULTILINE)


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_times_ids_and_names_are_whole_at_any_width(app: Application, columns: int) -> None:
    key = app.add("Likes tea", actor="ana", session_id="s" * 60)
    (entry,) = map(json.loads, app.run("log", "--json").splitlines())
    lines = app.run("log", columns=columns).splitlines()
    at = datetime.fromisoformat(entry["at"]).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert lines[0] == f"{at}  {entry['tx']}  insert  note {key}"
    assert lines[1:] == [f"  by ana in {'s' * 60}", f"  id: {key}", "  text: Likes tea"]


def test_namespace_of_a_langgraph_item_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("langgraph")
    from memstate_sa.integrations.langgraph.item_rows import scope_of

    item = {"scope": scope_of(("users", "ana")), "value": {"likes": "tea"}}
    at = datetime(2026, 1, 2, tzinfo=UTC)
    insert = Change(1, "tx", "memstate_item", "key", "insert", None, item, at)
    print_changes(Console(width=200), [insert, replace(insert, op="delete", before=item, after=None)])
    assert capsys.readouterr().out.count('scope: ["users", "ana"]') == 2


def test_values_are_written_as_people_write_them(app: Application) -> None:
    """A command accepts the key as `log` shows it."""
    Path(f"things_of_{app.name}.py").write_text(VALUES.format(app=app.name))
    app.name = f"things_of_{app.name}"
    module = app.module
    app.run("init")
    module.Base.metadata.create_all(app.engine)
    with app.sessions() as session:
        values = {"at": datetime(2026, 3, 1, 12), "day": datetime(2026, 3, 1).date(), "raw": b"\x00\xff", "good": True}
        module.memory.attach(session)
        for number, name in ((1, "a, b"), (2, None)):
            session.add(module.Thing(id=module.UUID(int=number), name=name, tags=["é", 1, None], **values))
        session.commit()
    key = "00000000-0000-0000-0000-000000000001"
    output = app.run("log", "thing", key)
    assert output.splitlines()[1:] == [
        f"  id: {key}",
        "  name: a, b",
        "  at: 2026-03-01T12:00:00",
        "  day: 2026-03-01",
        "  raw: 00ff",
        "  good: true",
        '  tags: ["é", 1, null]',
    ]
    assert "  name: null\n" in app.run("log", "Thing", key.replace("1", "2"))


def test_displayed_names_are_accepted(app: Application) -> None:
    """Classes, entities, and composite keys."""
    app.add("Likes tea")
    with app.sessions() as session:
        session.add(app.module.Pair(left=1, right='b "c"', text="ale"))
        session.commit()
    names = shown_names(app.run("log"))
    assert names == ["note 1", 'pair [1, "b \\"c\\""]']
    for name in names:
        assert shown_names(app.run("log", *name.split(" ", 1))) == [name]
    app.run("drain")
    index = app.module.memory.indexes["memory"]
    index.delete([entry.id for entry in index.scan(None, 10)])
    missing = re.findall("^missing: (.*)$", app.run("verify", exit_code=1), re.MULTILINE)
    assert sorted(missing) == names
    assert "0 rows were new" in app.run("backfill", "note", "Pair")


def test_log_without_changes_says_so_and_prints_no_json(app: Application) -> None:
    assert app.run("log", "Note", "7") == "There are no such changes.\n"
    assert app.run("log", "Note", "7", "--json") == ""
    assert app.run("log", stdout=True) == ""


def test_log_marks_an_erased_fact(app: Application) -> None:
    key = app.add("Likes tea")
    assert "erased" not in app.run("log")
    with app.sessions() as session:
        app.module.memory.erase(session, app.module.Note, key)
        session.commit()
    assert app.run("log").count("(the values were erased)") == 2


# -- JSON ------------------------------------------------------------------------------------------------------------


def test_status_verify_and_doctor_print_one_json_document(app: Application) -> None:
    """Their names are those of the Python objects."""
    key = app.add("Likes tea")
    status = json.loads(app.run("status", "--json"))
    assert (status["memory"]["pending"], status["memory"]["paused"]) == (1, False)
    app.run("drain")
    clean = {"checked": 1, "missing": [], "ghost": [], "stale": [], "pending": [], "clean": True}
    assert json.loads(app.run("verify", "--json")) == clean
    with app.engine.begin() as connection:
        connection.execute(text("UPDATE note SET text = 'Likes coffee'"))
        connection.execute(text("INSERT INTO pair (\"left\", \"right\", text) VALUES (1, 'b', 'ale')"))
    fact, pair = {"entity": "note", "key": key}, {"entity": "pair", "key": [1, "b"]}
    drift = {"checked": 2, "missing": [pair], "ghost": [], "stale": [fact], "pending": [], "clean": False}
    assert json.loads(app.run("verify", "--json", exit_code=1)) == drift
    diagnosis = {"checked": 2, "changed": [fact], "gone": [], "unlogged": 1, "unlogged_by_entity": {"pair": 1}}
    document = json.loads(app.run("doctor", "--json", exit_code=1))
    assert document == {**diagnosis, "problems": [], "healthy": False}
    assert json.loads(app.run("doctor", "--json", "--repair")) == document
    with app.engine.begin() as connection:
        connection.execute(text("DROP TABLE memstate_parked"))
    (problem,) = json.loads(app.run("doctor", "--json", exit_code=1))["problems"]
    assert problem["subject"] == "memstate_parked" and problem["risk"] is False and problem["message"]


def test_json_is_alone_on_stdout_and_has_a_zone(app: Application) -> None:
    app.add("one")
    app.add("two")
    (last,) = map(json.loads, app.run("log", "--json", "--limit", "1", stdout=True).splitlines())
    assert datetime.fromisoformat(last["at"]).utcoffset() == timedelta(0)
    assert list(last) == [
        *("id", "tx", "entity", "key", "op", "before", "after", "at", "actor", "reason", "session_id", "reverts")
    ]


@pytest.mark.parametrize(
    ("command", "exit_code"), [("status", 0), ("verify", 1), ("doctor", 1), ("log", 0), ("dead list", 0)]
)
def test_json_has_the_names_of_the_example_on_the_page(app: Application, command: str, exit_code: int) -> None:
    key = app.add("Likes tea", actor="ana")
    app.run("drain")
    index = app.module.memory.indexes["memory"]
    index.delete([entry.id for entry in index.scan(None, 10)])
    add_dead_key(app, key)
    with app.engine.begin() as connection:
        connection.execute(text("UPDATE note SET text = 'Likes coffee'"))
        connection.execute(text("DROP TABLE memstate_unique"))
    name, *rest = command.split()
    output = app.run(name, *rest, "--json", exit_code=exit_code, stdout=True)
    section = (ROOT / "docs" / "cli.md").read_text("utf-8").partition(f"### `{command}`\n")[2]
    example = section.partition("```json\n")[2].partition("```")[0]
    assert keys_of(json.loads(output)) == keys_of(json.loads(example))


def keys_of(document: object) -> object:
    """The names in a JSON document, without the values. Columns and entities of an application are left out."""
    if isinstance(document, list):
        return [keys_of(item) for item in document[:1]]
    if not isinstance(document, dict):
        return None
    own = {"before", "after", "unlogged_by_entity"}
    return {name: None if name in own else keys_of(value) for name, value in document.items()}


# -- the application -------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module with a MemoryStore that has one fact."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "facts_here", raising=False)
    (tmp_path / "facts_here.py").write_text(STORE)
    import facts_here

    facts_here.store.commit(facts_here.Fact(type="note", payload={"text": "Likes tea"}))
    yield "facts_here:store"
    facts_here.store.close()
    monkeypatch.delitem(sys.modules, "facts_here")


def test_store_brings_its_own_database(store: str) -> None:
    at = ("--app", store)
    assert "Likes tea" in invoke("log", *at)
    assert "Nothing is pending" in invoke("drain", *at)
    assert "Nothing has drifted" in invoke("verify", *at)
    assert "nothing left to do" in invoke("init", *at, "--dry-run")
    assert "nothing left to do" in invoke("init", "--dry-run"), "the only one in the folder is taken"
    assert "1 change undone" in invoke("rollback", *at, "--yes")


def test_log_shows_namespaces_as_people_write_them(store: str) -> None:
    pytest.importorskip("langgraph.store")
    import facts_here

    from memstate_sa.integrations.langgraph import MemStateStore

    items = MemStateStore(facts_here.store)
    items.setup()
    items.put(("users", "ana"), "tea", {"text": "Likes tea"})
    assert 'scope: ["users", "ana"]' in invoke("log", "--app", store)


def test_url_of_the_command_line_wins_over_that_of_a_store(store: str) -> None:
    output = invoke("status", "--app", store, "--url", "sqlite:///other.db", exit_code=1)
    assert "no such database" in output and "other.db" in output


def test_checklist_needs_no_url(bare: Application) -> None:
    output = invoke("init", "--app", f"{bare.name}:memory", "--dry-run")
    assert "a Memory that tracks note, pair" in output
    assert "Not checked. Give --url to check the database." in output
    assert "To do: 1 of 3 items. The database was not checked." in output


# -- the relay -------------------------------------------------------------------------------------------------------


def relay_logs(app: Application, stop_after: int = 1, **variables: str) -> list[str]:
    """The first log lines of a relay that has its options from the environment."""
    names = {"MEMSTATE_APP": f"{app.name}:memory", "MEMSTATE_URL": app.url, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "memstate_sa", "relay"]
    with subprocess.Popen(
        command, env={**os.environ, **names, **variables}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(stop_after)]
        process.terminate()
        lines += process.stderr.readlines()
        assert process.wait(timeout=60) == 0, lines
    return lines


def test_relay_options_come_from_the_environment_and_log_lines_have_zone_and_worker(app: Application) -> None:
    lines = relay_logs(app, 2, MEMSTATE_METRICS_PORT="0", MEMSTATE_LEASE="5")
    assert "serving /metrics and /readyz on port" in lines[0]
    for line in lines:
        at, level, worker, pid, name = line.split()[:5]
        assert datetime.fromisoformat(at).utcoffset() == timedelta(0)
        assert (level, worker, name) == ("INFO", "worker=1", "memstate_sa.worker:") and pid.startswith("pid=")


def test_workers_have_the_options_of_the_command_and_start_no_workers(
    app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options travel in the environment, where no list of processes shows them."""
    started: list[tuple[list[list[str]], dict[str, str]]] = []
    monkeypatch.setattr(processes, "supervise", lambda *arguments: started.append(arguments))
    monkeypatch.setattr("memstate_sa.cli.relay._require_shared", lambda memory: None)
    monkeypatch.setenv("MEMSTATE_WORKERS", "2")
    monkeypatch.setenv("MEMSTATE_LOG_LEVEL", "error")
    app.run("relay", "--metrics-port", "9000", "--keep-log", "90")
    ((arguments, environment),) = started
    assert arguments == [["--metrics-port", "9000"], ["--metrics-port", "9001"]]
    assert environment == {
        "MEMSTATE_APP": f"{app.name}:memory",
        "MEMSTATE_URL": app.url,
        "MEMSTATE_WORKERS": "1",
        "MEMSTATE_LEASE": "30.0",
        "MEMSTATE_METRICS_PORT": "9000",
        "MEMSTATE_METRICS_HOST": "127.0.0.1",
        "MEMSTATE_LOG_LEVEL": "error",
        "MEMSTATE_LOG_JSON": "False",
        "MEMSTATE_KEEP_LOG": "90",
    }


def test_log_level_leaves_out_lower_records(app: Application) -> None:
    lines = relay_logs(app, MEMSTATE_LOG_LEVEL="debug", MEMSTATE_LOG_JSON="1")
    record = json.loads(lines[0])
    assert record["worker"] == 1 and datetime.fromisoformat(record["at"]).utcoffset() == timedelta(0)
    processes.configure_logging(level="warning", as_json=False, worker=2)
    assert not processes.logger.isEnabledFor(logging.INFO) and processes.logger.isEnabledFor(logging.WARNING)


def test_traceback_is_one_log_line(capsys: pytest.CaptureFixture[str]) -> None:
    processes.configure_logging(level="info", as_json=False, worker=3)
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        processes.logger.exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "worker=3" in line and "Traceback" in line and line.endswith("ValueError: first | second")
