"""``memstate-sa backfill`` in several processes, killed and run again while the application writes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, func, insert, select
from sqlalchemy.orm import sessionmaker

from memstate_sa.db.tables import backfill, log, outbox
from memstate_sa.log.changes import replay

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from memstate_sa import cli

ROOT = Path(__file__).resolve().parents[3]
KILLS = int(os.environ.get("MEMSTATE_KILLS", "2"))
ROWS = int(os.environ.get("MEMSTATE_ROWS", str(1000 * (KILLS + 2))))
PATIENCE_S = 100 + ROWS // 500

APPLICATION = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memstate_sa import Memory
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Word(Base):
    __tablename__ = "word"

    word: Mapped[str] = mapped_column(primary_key=True)


memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
memory.track(Note, text="text")
memory.track(Word, text="word")
"""


class Application:
    """An application in its own folder, with *rows* rows that are older than tracking."""

    def __init__(self, folder: Path, engine: Engine, rows: int) -> None:
        self.name = f"application_{uuid4().hex}"
        self.folder, self.engine = folder, engine
        (folder / f"{self.name}.py").write_text(APPLICATION)
        self.module: Any = import_module(self.name)
        self.memory = self.module.memory
        self.module.Base.metadata.create_all(engine)
        with engine.begin() as connection:
            notes = [{"id": n, "text": f"old note {n}"} for n in range(rows)]
            connection.execute(insert(self.module.Note.__table__), notes)
            connection.execute(insert(self.module.Word.__table__), [{"word": word} for word in ("one", "two", "three")])
        self.sessions = sessionmaker(engine)
        self.memory.attach(self.sessions)
        self.memory.create_tables(engine)

    @property
    def environment(self) -> dict[str, str]:
        url = self.engine.url.render_as_string(hide_password=False)
        return {"MEMSTATE_APP": f"{self.name}:memory", "MEMSTATE_URL": url, "COLUMNS": "200", "TERM": "dumb"}

    def run(self, *arguments: str) -> str:
        """Run the command in this process. Returns its output."""
        result = CliRunner().invoke(cli.application(), ["backfill", *arguments], env=self.environment)
        assert result.exit_code == 0, result.output
        return str(result.output)

    @contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Start the command as the leader of a process group, which is killed at the end."""
        process = subprocess.Popen(
            [sys.executable, "-m", "memstate_sa", "backfill", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def seen(self) -> int:
        with self.engine.connect() as connection:
            return int(connection.scalar(select(func.sum(backfill.c.seen))) or 0)

    def assert_taken_in(self) -> None:
        """Assert one first entry a row, all rows marked for delivery, and replay(log) == tables == index."""
        with self.engine.connect() as connection:
            entries = connection.execute(select(log.c.entity, log.c.key, log.c.op).order_by(log.c.id)).all()
            assert not connection.execute(select(backfill.c.start).where(~backfill.c.done)).all()
            marked = {tuple(row) for row in connection.execute(select(outbox.c.entity, outbox.c.key))}
        first: dict[Any, str] = {}
        for entity, key, op in entries:
            assert op in ("baseline", "insert") if (entity, key) not in first else op != "baseline"
            first.setdefault((entity, key), op)
        assert first.keys() == marked
        with self.sessions() as session:
            for model, names in ((self.module.Note, ("id", "text")), (self.module.Word, ("word",))):
                rows = {getattr(row, names[0]): {name: getattr(row, name) for name in names}
                        for row in session.scalars(select(model))}  # fmt: skip
                replayed = replay(self.memory.history(session, model))
                assert {key: dict(row) for (_, key), row in replayed.items()} == rows
        self.memory.relay(self.engine).drain(timeout=PATIENCE_S)
        assert self.memory.verify(self.engine).clean


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> Iterator[Callable[[int], Application]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    made: list[Application] = []

    def new(rows: int) -> Application:
        made.append(Application(tmp_path, engine, rows))
        return made[-1]

    yield new
    for application in made:
        application.memory.close()


def poll(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.deep
@pytest.mark.timeout(5 * PATIENCE_S + 20 * KILLS)
def test_backfill_resumes_after_sigkill_of_all_processes(make: Callable[[int], Application]) -> None:
    """Each run resumes where the last one was killed, while the application changes, deletes and adds rows."""
    app = make(ROWS)
    chance = random.Random(int(os.environ.get("MEMSTATE_SEED", "11")))
    finished = threading.Event()
    failed: list[BaseException] = []
    midway = 0

    def write() -> None:
        step = 0
        try:
            while not finished.wait(0.01):
                step += 1
                with app.sessions() as session:
                    for n in sorted(chance.sample(range(ROWS + 100), 3)):
                        note = session.get(app.module.Note, n)
                        if note is None:
                            session.add(app.module.Note(id=n, text=f"new in step {step}"))
                        elif step % 3:
                            note.text = f"changed in step {step}"
                        else:
                            session.delete(note)
                    session.commit()
        except BaseException as error:
            failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(KILLS):
            before, more = app.seen(), chance.randrange(ROWS // (KILLS + 2))
            with app.running("--workers", "2", "--batch-size", "40", "--rate", str(ROWS // 4)) as process:
                poll(lambda b=before, m=more, p=process: app.seen() > b + m or p.poll() is not None)
                midway += process.poll() is None
        with app.running("--workers", "2", "--batch-size", "40") as process:
            output, _ = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0, output
    finally:
        finished.set()
        writer.join()
    assert not failed
    assert midway
    assert "rows were new to the log" in output
    app.assert_taken_in()


@pytest.mark.deep
def test_rows_of_a_killed_worker_are_taken_over(make: Callable[[int], Application]) -> None:
    """The other workers take over, or at last the process that started it."""
    app = make(1500)
    with app.running("--workers", "2", "--batch-size", "25", "--rate", "500") as process:
        poll(lambda: app.seen() > 0)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("this system does not list child processes")
        for child in children.read_text().split():
            os.kill(int(child), signal.SIGKILL)
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "1503 rows were new to the log" in output
    app.assert_taken_in()


@pytest.mark.deep
@pytest.mark.deep_on("2")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interruption_says_how_to_go_on(
    sqlite_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, workers: int
) -> None:
    """It ends at once, even between slow batches, and leaves no process behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    app = Application(tmp_path, sqlite_engine, 100)
    with app.running("Note", "--workers", str(workers), "--batch-size", "10", "--rate", "0.1") as process:
        poll(lambda: app.seen() > 0)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Interrupted. Run it again to resume." in output
        assert "Traceback" not in output
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    assert 0 < app.seen() < 100
    assert f"{100 - app.seen()} rows were new to the log" in app.run("Note")


STUBBORN = """
import os
import signal
import time
from pathlib import Path

if os.getpid() != {parent}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(f"{{os.getpid()}}.worker").touch()
    time.sleep(60)
"""


@pytest.mark.deep
def test_a_worker_that_does_not_end_is_killed(
    sqlite_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed after a while, because a driver may block all signals and a user waits at the terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("memstate_sa.cli.processes._GRACE_S", 0.5)
    app = Application(tmp_path, sqlite_engine, 10)
    module = tmp_path / f"{app.name}.py"
    module.write_text(module.read_text() + STUBBORN.format(parent=os.getpid()))

    def interrupted(_: float) -> None:
        poll(lambda: len(list(tmp_path.glob("*.worker"))) == 2)
        raise KeyboardInterrupt

    monkeypatch.setattr("memstate_sa.cli.backfill.sleep", interrupted)
    result = CliRunner().invoke(cli.application(), ["backfill", "--workers", "2"], env=app.environment)
    assert result.exit_code == 130, result.output
    for worker in tmp_path.glob("*.worker"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(worker.stem), 0)


def test_backfill_without_a_name_takes_all_unfinished_classes(make: Callable[[int], Application]) -> None:
    """A named class, or --restart, goes through all rows again: some may have been written without the log."""
    app = make(20)
    note = app.module.Note.__table__
    assert "23 rows were new to the log" in app.run("--batch-size", "7")
    with app.engine.begin() as connection:
        connection.execute(insert(note), {"id": 100, "text": "past the log"})
    assert "--restart goes through complete classes again" in app.run()
    assert "0 rows were new to the log" in app.run("Note", "--no-restart")
    assert "0 rows were new to the log" in app.run("Word")
    assert "1 row was new to the log" in app.run("Note")
    with app.engine.begin() as connection:
        connection.execute(insert(note), {"id": 101, "text": "past the log"})
    assert "1 row was new to the log" in app.run("--restart", "--rate", "100000")
    app.assert_taken_in()
    with app.engine.connect() as connection:
        assert Counter(connection.scalars(select(log.c.op))) == {"baseline": 25}


def test_backfill_shows_its_progress(sqlite_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the finished rows, the total, and rows per second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    app = Application(tmp_path, sqlite_engine, 20)
    output = app.run("Note", "--batch-size", "5")
    assert "20/20" in output
    assert "rows/s" in output
