"""The command line on an application of its own, found in the working directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from sqlalchemy import create_engine, insert, select, text, update
from sqlalchemy.orm import sessionmaker

from memstate_sa import __version__
from memstate_sa.cli import opening
from memstate_sa.db.tables import cursor, holder, parked, utcnow
from tests.support.commands import ROOT, Application, add_dead_key, app, bare, flat, invoke

__all__ = ["app", "bare"]

pytest.importorskip("typer")
pytest.importorskip("rich")


def test_version_stands_alone_on_its_line() -> None:
    """Scripts read it."""
    assert invoke("--version") == f"{__version__}\n"


def test_help_explains_every_command() -> None:
    """Every command explains its options."""
    output = invoke("--help")
    commands = ["demo", "init", "relay", "drain", "status", "pause", "resume", "verify", "doctor", "backfill", "log"]
    commands += ["diff", "rollback", "revoke", "export", "import", "reindex", "forget-index"]
    for command in commands:
        assert command in output
        explained = invoke(command, "--help")
        assert "--app" in explained or command == "demo"
        assert "\\b" not in explained and "\b" not in explained, "it is for click, not for people"
    for command in ("list", "retry", "drop"):
        assert command in invoke("dead", "--help")
        assert "--app" in invoke("dead", command, "--help")


@pytest.mark.deep
def test_the_application_is_looked_for_in_the_working_directory(bare: Application) -> None:
    """Servers do the same. Users need not set PYTHONPATH."""
    command = [sys.executable, "-c", "import sys; sys.path.pop(0); from memstate_sa.cli import main; main()"]
    command += ["init", "--app", f"{bare.name}:memory", "--url", bare.url]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("app_option", "message"),
    [
        ("nothing", "is not of the form"),
        ("no_such_module_here:memory", "Cannot find the module 'no_such_module_here'"),
        ("{name}:missing", "has no attribute 'missing'"),
        ("{name}:something_else", "is not a Memory or a MemoryStore (its type is int). Did you mean {name}:memory?"),
        ("{name}:Note", "(it is a class)"),
        ("{name}:make", "(it is a function). Did you mean {name}:memory?"),
        ("{name}:memry", "Did you mean memory?"),
        ("{name}.py:memory", "Give a module, not a file: {name}:memory"),
    ],
)
def test_an_application_that_is_not_found_is_explained(bare: Application, app_option: str, message: str) -> None:
    """The message names the module, and close names."""
    output = invoke("status", "--app", app_option.format(name=bare.name), "--url", bare.url, exit_code=2)
    assert message.format(name=bare.name) in flat(output)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("not a url: secret", "This is not a database URL"),
        ("postgresql://ana:secret@host:port/x", "This is not a database URL"),
        ("pgsql://ana:secret@host/x", "does not support pgsql. It works with PostgreSQL and SQLite. Write for example"),
        ("mysql://ana:secret@host/x", "memstate_sa does not support mysql. It works with PostgreSQL and SQLite"),
        ("mysql+nosuchdriver://host/x", "does not support mysql"),
        ("nosuchdatabase://host/x", "does not support nosuchdatabase"),
        ("sqlite+nosuchdriver:///x", "does not know the driver of sqlite+nosuchdriver://"),
        ("postgresql+pg8000://host/x", "The driver pg8000 is not installed"),
    ],
)
def test_a_bad_url_is_explained(bare: Application, url: str, message: str) -> None:
    """The message does not repeat the URL, which may hold a password."""
    output = invoke("status", "--app", f"{bare.name}:memory", "--url", url, exit_code=2)
    assert message in flat(output)
    assert "secret" not in output


def test_a_database_that_does_not_answer_is_explained(bare: Application) -> None:
    """The message is that of the driver."""
    folder = f"sqlite:///{Path.cwd()}"
    output = invoke("status", "--app", f"{bare.name}:memory", "--url", folder, exit_code=1)
    assert "Cannot use the database: unable to open database file" in output and "Check --url" in output


@pytest.mark.parametrize(
    "command",
    [
        *("relay", "drain", "status", "pause", "resume", "verify", "doctor", "backfill", "log", "diff x", "rollback"),
        *("revoke --tx x", "reindex", "forget-index x", "export -", "import -", "import-checkpoints sqlite://"),
        *("dead list", "dead retry", "dead drop"),
    ],
)
def test_command_does_not_create_a_missing_sqlite_file(bare: Application, command: str) -> None:
    """SQLite would create an empty file. The user would then see missing tables, not the wrong name."""
    file = Path("nowhere.db").absolute()
    bare.url = "sqlite:///nowhere.db"
    said = bare.run(*command.split(), exit_code=1)
    assert "There is no such database" in said and str(file) in said
    assert not file.exists()


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("sqlite:///{}", True),
        ("sqlite+aiosqlite:///{}", True),
        ("sqlite:///file:{}?mode=rwc&uri=true", True),
        ("sqlite:///file://{}?uri=true", True),
        ("sqlite:///file:{}?mode=memory&uri=true", False),
        ("sqlite:///file::memory:?cache=shared&uri=true", False),
        ("sqlite://", False),
        ("sqlite:///:memory:", False),
        ("postgresql://nobody@nowhere/{}", False),
        ("no url: {}", False),
    ],
)
def test_missing_sqlite_file_is_recognised_in_any_url(tmp_path: Path, url: str, named: bool) -> None:
    file = tmp_path / "a b.db"
    assert opening.missing_file(url.format(file)) == (file if named else None)
    file.touch()
    assert opening.missing_file(url.format(file)) is None


def test_missing_tables_are_explained(bare: Application) -> None:
    """The message names the command that creates them."""
    assert "memstate-sa init" in bare.run("status", exit_code=1)


def test_app_and_url_may_come_from_the_environment(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL with a password does not belong on a command line."""
    monkeypatch.setenv("MEMSTATE_APP", f"{app.name}:memory")
    monkeypatch.setenv("MEMSTATE_URL", app.url)
    assert "pending" in invoke("status")


def test_a_missing_extra_is_a_hint() -> None:
    """The console script shows no traceback if typer or rich is not installed."""
    hide = "import sys; sys.modules['typer'] = None; from memstate_sa.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hide], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "pip install 'memstate-sa[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_counts_what_is_pending(app: Application) -> None:
    """The number falls when a relay has delivered."""
    app.add("Likes tea")
    app.add("Likes coffee")
    assert row(app.run("status"), "memory")[1] == "2"
    assert "2 keys converged." in app.run("relay", "--once") or "Nothing" in app.run("drain")
    assert row(app.run("status"), "memory")[1] == "0"


def test_drain_delivers_everything(app: Application) -> None:
    """It exits when nothing is pending."""
    app.add("Likes tea")
    assert "Nothing is pending" in app.run("drain")
    assert row(app.run("status"), "memory")[1] == "0"


@pytest.mark.deep
def test_drain_can_be_interrupted(app: Application) -> None:
    """It ends at once. Other relays need not wait for its lease."""
    app.run("drain")
    app.add("Likes tea")
    app.run("pause")
    command = [sys.executable, "-m", "memstate_sa", "drain", "--app", f"{app.name}:memory", "--url", app.url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        with app.engine.connect() as connection:
            while connection.execute(select(holder.c.owner)).first() is None:
                assert time.monotonic() < deadline
                connection.rollback()
                time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) != 0
    with app.engine.connect() as connection:
        assert connection.execute(select(holder.c.owner)).all() == []


def test_relay_once_is_for_one_worker(app: Application) -> None:
    """Several workers need an index that several processes can share."""
    assert "--once works with one worker only" in flat(app.run("relay", "--once", "--workers", "2", exit_code=2))
    assert "lives in one process" in flat(app.run("relay", "--workers", "2", exit_code=1))


def test_relay_runs_until_it_is_told_to_stop(app: Application) -> None:
    """A service manager sends SIGTERM. The relay completes its page and exits with 0."""
    command = [sys.executable, "-c", "from memstate_sa.cli import main; main()", "relay"]
    command += ["--app", f"{app.name}:memory", "--url", app.url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert b"delivering" in process.stdout.readline()
        process.terminate()
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0, rest


def test_a_worker_serves_metrics_and_its_readiness(app: Application) -> None:
    """Logs are one JSON object a line. Gauges come from the database, counters from the worker."""
    app.add("Likes tea")
    command = [sys.executable, "-m", "memstate_sa", "relay", "--log-json", "--metrics-port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MEMSTATE_APP": f"{app.name}:memory", "MEMSTATE_URL": app.url}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        records = [json.loads(process.stderr.readline()) for _ in range(2)]
        assert [record["level"] for record in records] == ["INFO", "INFO"]
        port = int(records[0]["message"].rpartition(" ")[2])
        metrics: dict[str, float] = {}
        deadline = time.monotonic() + 60
        # One look is not at one moment: it may see the key as pending, and then as converged.
        expected = {'memstate_converged_keys_total{index="memory"}': 1.0, 'memstate_backlog_keys{index="memory"}': 0.0}
        while expected.items() - metrics.items():
            assert time.monotonic() < deadline, metrics
            with urlopen(f"http://127.0.0.1:{port}/metrics") as response:
                lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
            metrics = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
        assert metrics['memstate_embedded_texts_total{index="memory"}'] == 1.0
        with urlopen(f"http://127.0.0.1:{port}/readyz") as response:
            assert json.load(response) == {"ready": True, "problems": {}}
        process.terminate()
        assert process.wait(timeout=60) == 0


def test_paused_relay_delivers_nothing_until_resumed(app: Application) -> None:
    """Status and drain show that the index is paused."""
    app.run("drain")
    app.add("Likes tea")
    assert "Paused: memory" in app.run("pause")
    assert "0 keys converged" in app.run("relay", "--once")
    assert "paused" in app.run("status")
    assert "it is paused" in flat(app.run("drain", "--timeout", "0.2", exit_code=1))
    assert "Resumed: memory" in app.run("resume", "--index", "memory")
    assert "1 key converged" in app.run("relay", "--once")
    for name in ("pause", "resume"):
        assert "Unknown index 'memori'. Did you mean memory?" in flat(app.run(name, "--index", "memori", exit_code=2))
    assert "Unknown index 'x'. There is: memory." in flat(app.run("dead", "list", "--index", "x", exit_code=2))


HOSTILE = "a\x1b]0;owned\x07\x1b[2J\x9b31m\u202ecba\r\nforged row\x7f"
"""It sets a window's title, clears the screen, colours, reorders text, and begins a line of its own."""


def assert_shows_escapes(output: str) -> None:
    raw = [character for character in output if character != "\n" and not character.isprintable()]
    assert raw == []
    assert "\\u001b" in output
    assert not any(line.startswith("forged row") for line in output.splitlines())


def test_control_characters_of_data_show_as_escapes(app: Application) -> None:
    """Every command escapes labels, keys, values and errors.

    The kind: DEL and C1 controls, which some terminals obey, marks that reorder text, and line ends that forge rows.
    """
    pair = app.module.Pair
    app.run("drain")
    with app.sessions() as session:
        session.add(pair(left=1, right=HOSTILE, text=HOSTILE))
        app.module.memory.annotate(session, actor=HOSTILE, reason=HOSTILE, session_id=HOSTILE)
        session.commit()
    wide = {"columns": 2000}
    for command in (
        ("log",),
        ("log", "Pair", json.dumps([1, HOSTILE])),
        ("diff", "2026-01-01"),
        ("rollback", "--dry-run"),
        ("revoke", "--dry-run", "--actor", HOSTILE),
    ):
        assert_shows_escapes(app.run(*command, **wide))
    (entry,) = map(json.loads, app.run("log", "--json", stdout=True).splitlines())
    assert_shows_escapes(app.run("log", "--json", stdout=True))
    assert (entry["actor"], entry["after"]["text"]) == (HOSTILE, HOSTILE)

    with app.engine.begin() as connection:
        incarnation = connection.scalar(select(cursor.c.incarnation))
        values = {"entity": "pair", "slot": 0, "attempts": 8, "next_at": utcnow(), "state": "dead", "mark": "x"}
        where = {"index": "memory", "incarnation": incarnation, "key": json.dumps([1, HOSTILE], ensure_ascii=False)}
        connection.execute(insert(parked), {**values, **where, "error": HOSTILE})
    assert_shows_escapes(app.run("dead", "list", **wide))
    with app.sessions() as session:
        session.get(pair, (1, HOSTILE)).text = "changed later"
        session.commit()
    refused = app.run("revoke", "--yes", "--on-conflict", "raise", "--actor", HOSTILE, exit_code=1, **wide)
    assert_shows_escapes(refused)


def test_drain_and_status_tell_of_refused_keys(app: Application) -> None:
    key = app.add("Likes tea")
    app.run("drain")
    add_dead_key(app, key)
    assert app.run("drain") == "Nothing is pending.\n1 key was refused. `memstate-sa status` shows an error.\n"
    assert "memory: DeliveryRejected from ValueError" in app.run("status")


def test_dead_keys_are_listed_retried_and_dropped(app: Application) -> None:
    """They show the key and the kind of error, never the fact."""
    app.run("drain")
    key = app.add("my secret")
    add_dead_key(app, key)
    listed = app.run("dead", "list")
    assert f"memory  note {key}  8 attempts\n" in listed and "ValueError" in listed and "secret" not in listed
    assert json.loads(app.run("dead", "list", "--json")) == {
        "index": "memory",
        "entity": "note",
        "key": key,
        "attempts": 8,
        "error": "DeliveryRejected from ValueError",
    }
    assert "0 keys will be tried again" in app.run("dead", "retry", "--key", "[77]")
    assert "0 keys will be tried again" in app.run("dead", "retry", "--key", f"other[{key}]")
    for name in (f"{key}", f"note {key}", f"[{key}]", f"note[{key}]"):  # as `dead list` and an error show it
        assert "1 key will be tried again" in app.run("dead", "retry", "--key", name)
        with app.engine.begin() as connection:
            connection.execute(update(parked).values(state="dead"))
    assert "1 key will be tried again" in app.run("dead", "retry")
    assert "No key is dead" in app.run("dead", "list")
    with app.engine.begin() as connection:
        connection.execute(update(parked).values(state="dead"))
    assert "1 key is forgotten" in app.run("dead", "drop")
    with app.engine.connect() as connection:
        assert connection.execute(select(parked)).all() == []


def test_doctor_tells_what_came_past_the_log(app: Application) -> None:
    """The exit code tells it too. --repair logs the change, and the relay delivers it."""
    key = app.add("Likes tea")
    app.run("drain")
    assert "The log agrees with the tables" in app.run("doctor")
    with app.engine.begin() as connection:
        connection.execute(text("UPDATE note SET text = 'Likes coffee'"))
    told = flat(app.run("doctor", exit_code=1))
    assert f"changed: note {key}" in told and "--repair logs these changes" in told and "coffee" not in told
    assert "Reconciled. The log has these changes now" in flat(app.run("doctor", "--repair"))
    assert "The log agrees with the tables" in app.run("doctor")
    assert "reconciled" in app.run("log", "Note")
    app.run("drain")
    assert "Nothing has drifted" in app.run("verify")
    with app.engine.begin() as connection:
        connection.execute(text("INSERT INTO note (id, text) VALUES (99, 'Likes milk')"))
    told = flat(app.run("doctor"))
    assert "1 row has no entry in the log" in told and "The log agrees with all other rows" in told


def test_doctor_repairs_beside_a_problem_that_stays(app: Application) -> None:
    """It tells that the changes are in the log. The exit code is that of the problem."""
    app.add("Likes tea")
    app.run("drain")
    with app.engine.begin() as connection:
        connection.execute(text("UPDATE note SET text = 'Likes coffee'"))
        connection.execute(text("DROP TABLE memstate_parked"))
    told = flat(app.run("doctor", "--repair", exit_code=1))
    assert "memstate_parked does not exist" in told and "The log has these changes now" in told
    assert "--repair logs" not in told


def test_doctor_and_init_warn_of_ids_that_come_twice(app: Application) -> None:
    """This is a note: both commands succeed. A composite key is not concerned."""
    for command in ("doctor", "init"):
        told = flat(app.run(command))
        assert "SQLite may give the id of a deleted row to a new row in note. Both" in told
    with app.engine.begin() as connection:
        connection.execute(text("DROP TABLE note"))
        connection.execute(text("CREATE TABLE note (id INTEGER PRIMARY KEY AUTOINCREMENT, text VARCHAR NOT NULL)"))
    for command in ("doctor", "init"):
        assert "SQLite may give" not in app.run(command)


def test_index_that_is_not_filled_yet_is_told(app: Application) -> None:
    """A relay has to fill it. This is no drift."""
    with app.engine.begin() as connection:
        connection.execute(text("INSERT INTO note (text) VALUES ('older than tracking')"))
    advice = "memory: not filled yet. Start a relay, or run `memstate-sa drain`."
    assert advice in flat(app.run("relay", "--once"))
    told = flat(app.run("verify", exit_code=1))
    assert advice in told and "drifted" not in told
    app.run("drain")
    assert "not filled" not in app.run("relay", "--once")


def hinted(output: str) -> list[str]:
    """The arguments of the command that doctor names."""
    return output.partition("memstate-sa ")[2].partition("\n")[0].split()


def test_doctor_names_the_command_for_rows_that_the_log_has_not_seen(app: Application) -> None:
    """It names the classes with such rows. A backfill goes through a complete class only by its name."""
    app.run("backfill")
    with app.engine.begin() as connection:
        connection.execute(text("INSERT INTO note (text) VALUES ('past the log')"))
    assert hinted(app.run("doctor")) == ["backfill", "note"]
    with app.engine.begin() as connection:
        connection.execute(text("INSERT INTO pair (\"left\", \"right\", text) VALUES (1, 'b', 'ale')"))
    told = app.run("doctor")
    assert "2 rows have no entry in the log" in told
    assert hinted(told) == ["backfill", "note", "pair"]
    assert "2 rows were new to the log" in app.run(*hinted(told))
    assert hinted(app.run("doctor")) == []


def test_doctor_finds_tables_missing(app: Application) -> None:
    """Other commands cannot start without these tables."""
    with app.engine.begin() as connection:
        connection.execute(text("DROP TABLE memstate_parked"))
    told = flat(app.run("doctor", exit_code=1))
    assert "memstate_parked does not exist. Create it with memory.create_tables(engine) or a migration." in told


def test_command_accepts_the_url_of_an_async_engine(app: Application) -> None:
    """The command uses the same database with a driver that blocks."""
    pytest.importorskip("aiosqlite")
    app.add("Likes tea")
    url = app.url.replace("sqlite:", "sqlite+aiosqlite:")
    at = ("--app", f"{app.name}:memory", "--url", url)
    assert "Likes tea" in invoke("log", *at, "Note")
    assert "Nothing is pending" in invoke("drain", *at)


def test_verify_tells_drift_by_its_exit_code(app: Application) -> None:
    """--repair delivers the facts again."""
    app.add("Likes tea")
    app.run("drain")
    assert "Nothing has drifted" in app.run("verify")

    index = app.module.memory.indexes["memory"]
    index.delete([entry.id for entry in index.scan(None, 10)])
    output = app.run("verify", exit_code=1)
    assert "missing: note 1" in output
    assert "Repaired" in app.run("verify", "--repair")
    assert "Nothing has drifted" in app.run("verify")


def test_verify_tells_that_an_index_lives_in_another_process(served: Application) -> None:
    """The command has an empty index of its own. That is no drift."""
    served.add("Likes tea")
    output = served.run("verify", exit_code=1)
    assert "memory: not filled yet" in output and "call memory.verify(engine) there" in output
    assert "drifted" not in output and "missing: note" not in output
    served.run("drain")
    assert "Nothing has drifted" in served.run("verify")


@pytest.mark.parametrize("named", [lambda _: "Note", lambda app: f"{app.name}:Note"])
def test_backfill_takes_in_what_was_there_before(bare: Application, named: Callable[[Application], str]) -> None:
    """A second run finds nothing new."""
    bare.add("Likes tea")
    bare.add("Likes coffee")
    bare.run("init")
    assert "2 rows were new" in bare.run("backfill", named(bare), "--batch-size", "1")
    assert "0 rows were new" in bare.run("backfill", named(bare))
    bare.run("drain")
    assert "Nothing has drifted" in bare.run("verify")


def test_backfill_of_an_unknown_model_is_explained(app: Application) -> None:
    """The name may be unknown, or its class not tracked."""
    assert "Unknown class 'Nope'. Did you mean Note" in flat(app.run("backfill", "Nope", exit_code=2))
    assert "not tracked" in app.run("backfill", "Base", exit_code=1)


def test_log_shows_the_history_of_one_fact(app: Application) -> None:
    """It shows the actor and the reason."""
    key = app.add("Likes tea", actor="ana", reason="first chat")
    app.add("Likes [red] wine")
    with app.sessions() as session:
        session.get_one(app.module.Note, key).text = "Likes coffee"
        session.commit()
    output = app.run("log", "Note", str(key))
    assert "Likes tea" in output
    assert "Likes coffee" in output
    assert "first chat" in output
    assert "wine" not in output
    assert "Likes [red] wine" in app.run("log", "Note")
    last = app.run("log", "Note", "--limit", "1")
    assert "text: Likes tea → Likes coffee" in last and "first chat" not in last


def test_log_takes_a_composite_key_as_json(app: Application) -> None:
    """Other text is refused, with the types of the key."""
    with app.sessions() as session:
        session.add_all(
            [app.module.Pair(left=1, right="a", text="tea"), app.module.Pair(left=1, right="b", text="ale")]
        )
        session.commit()
    output = app.run("log", "Pair", '[1, "a"]')
    assert "tea" in output
    assert "ale" not in output
    assert "A key of Pair is" in flat(app.run("log", "Pair", "1", exit_code=2))
    assert "A key of Note is" in flat(app.run("log", "Note", "x", exit_code=2))


def test_rollback_undoes_the_last_transactions(app: Application) -> None:
    """It shows the changes."""
    for words in ("one", "two", "three"):
        app.add(words)
    output = app.run("rollback", "--steps", "2", "--yes")
    assert "2 changes undone" in output
    assert "delete (undo)" in output
    assert app.texts() == ["one"]


def test_rollback_tells_that_there_are_fewer_steps(app: Application) -> None:
    app.add("one")
    app.add("two")
    assert "steps" not in app.run("rollback", "--steps", "2", "--dry-run")
    for output in (app.run("rollback", "--steps", "50", "--dry-run"), app.run("rollback", "--steps", "50", "--yes")):
        assert "Only 2 of the 50 steps exist." in output
    assert app.texts() == []


@pytest.mark.parametrize("yes", [(), ("--yes",)])
def test_undo_of_nothing_names_its_scope(app: Application, yes: tuple[str, ...]) -> None:
    app.add("one", actor="ana")
    assert "There is nothing to undo for actor 'anna'." in app.run("revoke", "--actor", "anna", *yes)
    scope = ("--session-id", "[b]", "--model", "Note")
    assert "There is nothing to undo for session id '[b]' and class 'Note'." in app.run("rollback", *scope, *yes)


def test_rollback_can_be_tried_first(app: Application) -> None:
    """--dry-run shows it and changes nothing."""
    app.add("one")
    assert "delete (undo)" in app.run("rollback", "--dry-run")
    assert app.texts() == ["one"]


def test_rollback_keeps_to_its_scope(app: Application) -> None:
    """A scope is one actor, or one agent session."""
    app.add("by ana", actor="ana")
    app.add("in s1", session_id="s1")
    app.add("by ben", actor="ben")
    app.run("rollback", "--actor", "ana", "--yes")
    app.run("rollback", "--session-id", "s1", "--yes")
    assert app.texts() == ["by ben"]


def test_a_rollback_in_conflict_is_a_message(app: Application) -> None:
    """Nothing is changed, and no traceback is shown."""
    key = app.add("one", actor="ana")
    with app.sessions() as session:
        session.execute(update(app.module.Note).where(app.module.Note.id == key).values(text="two"))
        session.commit()
    output = app.run("rollback", "--actor", "ana", exit_code=1)
    assert output.startswith("Error: ")
    assert app.texts() == ["two"]


@pytest.fixture(params=["sqlite", "postgres"])
def served(app: Application, request: pytest.FixtureRequest) -> Iterator[Application]:
    """An application that has adopted memstate_sa, on either database."""
    if request.param == "postgres":
        engine = request.getfixturevalue("postgres_engine")
        app.engine.dispose()
        app.engine, app.url = engine, engine.url.render_as_string(hide_password=False)
        app.sessions = sessionmaker(engine)
        app.module.Base.metadata.create_all(engine)
        app.run("init")
        app.adopt()
    yield app
    app.module.memory.close()


def edit(app: Application, key: int, text: str | None, **labels: str) -> str:
    """Change a note, or delete it if *text* is None. Returns the transaction."""
    with app.sessions() as session:
        app.module.memory.annotate(session, **labels)
        note = session.get_one(app.module.Note, key)
        if text is None:
            session.delete(note)
        else:
            note.text = text
        session.commit()
        return str(app.module.memory.token(session))


def test_log_tells_of_all_facts_and_filters(served: Application) -> None:
    """The filters are class, key, actor and session. --json is for programs."""
    key = served.add("Likes tea", actor="ana", session_id="s1", reason="said so")
    other = served.add("Likes rain")
    with served.sessions() as session:
        session.add(served.module.Pair(left=1, right="[b]", text="ale"))
        session.commit()
    tx = edit(served, key, "Likes coffee", actor="ben", session_id="s2")
    edit(served, other, None)

    everything = served.run("log")
    expected = ("Likes tea", "Likes rain", "ale", "ana in s1", "said so", 'pair [1, "[b]"]')
    assert all(words in everything for words in expected)
    by_ben = served.run("log", "--actor", "ben")
    assert "text: Likes tea → Likes coffee" in by_ben and "id:" not in by_ben and "rain" not in by_ben
    assert "Likes tea" in served.run("log", "--session-id", "s1")
    last = served.run("log", "--limit", "1")
    assert "There are older changes" in last and "delete" in last and "Likes rain" in last and "tea" not in last
    assert "ale" in served.run("log", "--model", "Pair", "--key", '[1, "[b]"]')
    assert "A key needs a class. Give --model too." in flat(served.run("log", "--key", "1", exit_code=2))

    [first, then] = map(json.loads, served.run("log", "Note", str(key), "--json").splitlines())
    assert first["after"] == {"id": key, "text": "Likes tea"} and first["before"] is None and first["actor"] == "ana"
    assert (then["tx"], then["op"], then["key"], then["session_id"]) == (tx, "update", key, "s2")
    assert served.run("log", "--actor", "nobody", "--json") == ""


def test_diff_tells_what_became_of_each_fact(served: Application) -> None:
    """A moment is a transaction or a time."""
    key = served.add("one")
    tx = json.loads(served.run("log", "--json"))["tx"]
    edit(served, key, "two")
    at = datetime.now(UTC).replace(tzinfo=None).isoformat()
    edit(served, key, "three")
    assert "text: one → three" in served.run("diff", tx)
    assert "text: one → two" in served.run("diff", tx, at)
    assert "text: two → three" in served.run("diff", at, "--model", "Note")
    assert json.loads(served.run("diff", tx, "--json"))["after"]["text"] == "three"
    assert "The log has no transaction 'nope'" in served.run("diff", "nope", exit_code=1)


def test_rollback_asks_before_it_changes_anything(served: Application) -> None:
    """It shows the plan first. Without a yes, it does nothing."""
    served.add("one")
    served.add("two")
    for answer in ("n\n", ""):
        refused = served.run("rollback", exit_code=1, input=answer)
        assert "delete (undo)" in refused and "Undo 1 change?" in refused and "Aborted" in refused
    assert served.texts() == ["one", "two"]
    assert "1 change undone" in served.run("rollback", input="y\n")
    assert served.texts() == ["one"]
    served.run("rollback", "--yes")
    assert "There is nothing to undo" in served.run("rollback")


def test_rollback_refuses_when_its_plan_has_changed(served: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may write while the command waits for an answer."""
    key = served.add("one")
    edit(served, key, "two")

    def hesitate(*args: Any, **options: Any) -> bool:
        edit(served, key, "three")
        return True

    monkeypatch.setattr("typer.confirm", hesitate)
    assert "Run the command again" in served.run("rollback", exit_code=1)
    assert served.texts() == ["three"]


def test_rollback_takes_a_moment_a_transaction_or_a_class(served: Application) -> None:
    """The rollback of a rollback is a redo."""
    key = served.add("one")
    first = json.loads(served.run("log", "--json"))["tx"]
    at = datetime.now(UTC).isoformat()
    tx = edit(served, key, "two")
    with served.sessions() as session:
        session.add(served.module.Pair(left=1, right="b", text="ale"))
        session.commit()
    served.run("rollback", "--to", first, "--model", "Note", "--yes")
    assert served.texts() == ["one"]
    assert "ale" in served.run("rollback", "--to", at, "--yes")
    undone = json.loads(served.run("log", "Note", "--json").splitlines()[-1])
    assert undone["reverts"] == tx
    served.run("rollback", "--tx", undone["tx"], "--yes")
    assert served.texts() == ["two"]
    assert "Give --tx or --to, not both" in flat(served.run("rollback", "--tx", tx, "--to", at, exit_code=2))
    assert "no transaction 'nope'" in served.run("rollback", "--tx", "nope", "--yes", exit_code=1)
    assert "'sometimes' is not one of" in flat(served.run("rollback", "--on-conflict", "sometimes", exit_code=2))


def test_conflict_shows_the_later_changes_and_their_actors(served: Application) -> None:
    """--on-conflict says how to treat them."""
    key = served.add("by ana", actor="ana")
    edit(served, key, "by ben", actor="ben", reason="knew better")
    output = served.run("rollback", "--actor", "ana", exit_code=1)
    assert (
        output.startswith("Error: Cannot undo: other transactions changed these facts later")
        and "update by ben" in output.splitlines()[0]
    )
    assert "in the way" in output and "knew better" in output and "text: by ana → by ben" in output
    assert "There is nothing to undo" in served.run("rollback", "--actor", "ana", "--on-conflict", "skip")
    assert "1 change undone" in served.run("rollback", "--actor", "ana", "--on-conflict", "force", "--yes")
    assert served.texts() == []


def test_revoke_undoes_a_run_and_reports_kept_facts(served: Application) -> None:
    """It reports the facts that are kept, and the changes of others that keep them."""
    kept = served.add("built upon", actor="bot", session_id="run")
    served.add("alone", actor="bot", session_id="run")
    edit(served, kept, "by ana", actor="ana")
    shown = served.run("revoke", "--actor", "bot", "--dry-run")
    assert "Nothing was changed" in shown and served.texts() == ["by ana", "alone"]
    assert "Aborted" in served.run("revoke", "--session-id", "run", input="n\n", exit_code=1)
    done = served.run("revoke", "--session-id", "run", input="y\n")
    assert "1 change undone" in done and served.texts() == ["by ana"]
    for output in (shown, done):
        assert all(words in output for words in ("delete (undo)", "kept", "built upon", "in the way", "ana"))
    tx = json.loads(served.run("log", "--json").splitlines()[0])["tx"]
    assert "changed these facts later" in served.run(
        "revoke", "--tx", tx, "--on-conflict", "raise", "--yes", exit_code=1
    )
    assert "1 change undone" in served.run("revoke", "--tx", tx, "--on-conflict", "force", "--yes")
    assert served.texts() == []
    refused = flat(served.run("revoke", "--yes", exit_code=2))
    assert "--actor, --session-id or --tx: Give one of these options" in refused


def test_exported_facts_import_into_another_database(served: Application, tmp_path: Path) -> None:
    """The facts travel through a file or a pipe."""
    key = served.add("Likes tea", actor="ana")
    edit(served, key, "Likes coffee ☕")
    with served.sessions() as session:
        session.add(served.module.Pair(left=1, right="b", text="ale"))
        session.commit()
    file = tmp_path / "facts.jsonl"
    assert "3 changes exported" in served.run("export", str(file))
    piped = served.run("export", "-", "--model", "Note", stdout=True)
    whole = file.read_text("utf-8").splitlines()
    assert piped.splitlines()[1:-1] == [line for line in whole[1:-1] if "pair" not in line]

    other = f"sqlite:///{tmp_path / 'other.db'}"
    at = ["--app", f"{served.name}:memory", "--url", other]
    engine = create_engine(other)
    served.module.Base.metadata.create_all(engine)
    invoke("init", *at)
    assert "2 changes imported" in invoke("import", *at, "-", input=piped)
    assert "Likes coffee ☕" in invoke("log", *at, "Note", str(key))
    assert "Perhaps this file was imported before" in invoke("import", *at, str(file), exit_code=1)
    with engine.connect() as connection:
        assert connection.scalars(select(served.module.Note.text)).all() == ["Likes coffee ☕"]
    engine.dispose()


def test_a_file_that_cannot_be_imported_is_explained(app: Application, tmp_path: Path) -> None:
    """The message has the line, or the error of the operating system."""
    app.add("Likes tea")
    file = tmp_path / "facts.jsonl"
    app.run("export", str(file))
    broken = tmp_path / "broken.jsonl"
    broken.write_text(file.read_text("utf-8")[:-40], "utf-8")
    assert app.run("import", str(broken), exit_code=1).splitlines()[-1].startswith("Error: line ")
    assert "No such file" in flat(app.run("import", str(tmp_path / "nothing.jsonl"), exit_code=2))
    assert "No such file" in flat(app.run("export", str(tmp_path / "nowhere" / "facts.jsonl"), exit_code=1))
    before = file.read_text("utf-8")
    app.run("export", str(file), "--model", "Nope", exit_code=2)
    assert file.read_text("utf-8") == before, "an error must not cost the file that was there"


def row(output: str, first: str) -> list[str]:
    """The cells of the table row that begins with *first*."""
    rows = ([cell.strip() for cell in line.strip(" │").split("│")] for line in output.splitlines())
    return next(cells for cells in rows if cells[0] == first)
