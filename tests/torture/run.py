"""The run: processes and servers, a schedule of faults, the calm after it, and the audit."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from chromadb.errors import InternalError
from rich.console import Console
from rich.table import Table
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from memstate_sa import MemstateError
from memstate_sa.errors import DeliveryError
from memstate_sa.relay.backlog import Backlog, backlog
from memstate_sa.relay.index_key import IndexKey
from tests.support.redis_server import AT_ONCE, Server as Redis
from tests.torture import worker, writer
from tests.torture.app import COLLECTION, WORKERS, WRITERS, App, Base, Setting
from tests.torture.audit import Audit, audit
from tests.torture.faults import EXPOSED_S
from tests.torture.servers import Chroma, Postgres

_DRAINED_WITHIN_S = 180.0
_BROKEN_AFTER_S = 15.0
_ENDED_WITHIN_S = 60.0
_SHOWN = 20
_LINES_IN_A_SECOND = 100
"""More in a worker's log means that it does not wait before it tries again."""


@dataclass
class Child:
    kind: str
    number: int
    life: int
    process: BaseProcess
    stopped: bool = False
    exposed_until: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number}"

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid


@dataclass
class Report:
    seed: int
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    journal: Counter[str] = field(default_factory=Counter)
    counters: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0
    """Sums of all workers, also after the last fault."""
    log_lines: int = 0
    oldest_s: dict[str, float] = field(default_factory=dict)
    """The longest time that a key waited, by index."""
    drained_after_s: float | None = None
    chroma_replaced: int = 0
    """Chroma itself found its files broken."""
    problems: list[str] = field(default_factory=list)
    audit: Audit = field(default_factory=Audit)

    @property
    def ok(self) -> bool:
        return not self.problems and not self.audit.differences


class Torture:
    """One run in *folder*. *seed* decides the schedule, but not how the processes interleave."""

    def __init__(self, folder: Path, seed: int, console: Console) -> None:
        self._folder = folder
        self._console = console
        self._chance = random.Random(seed)
        self._processes = multiprocessing.get_context("forkserver")  # imports shared modules only once
        self._processes.set_forkserver_preload([worker.__name__, writer.__name__])
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self._postgres = Postgres()
        self._chroma = Chroma(folder / "chroma", folder / "logs" / "chroma.log")
        self._redis_folder = tempfile.TemporaryDirectory(prefix="redis-")  # a socket's path has at most 107 characters
        self._redis = Redis(Path(self._redis_folder.name), *AT_ONCE)
        self._setting = Setting(folder, self._postgres.url, self._chroma.port, self._redis.port, seed)
        self._children: dict[str, Child] = {}
        self._agenda: list[tuple[float, Callable[[], None]]] = []
        self._postgres_down_at = 0.0
        self._postgres_up_at: float | None = 0.0
        self._chroma_is_up = self._redis_is_up = True
        self._began = time.monotonic()
        self._said_at = self._looked_at = 0.0
        self._report = Report(seed)
        self._app: App | None = None
        self._keys: dict[str, IndexKey] = {}

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self, *, seconds: float = float("inf"), faults: float = float("inf")) -> Report:
        try:
            self._chroma.start()
            self._redis.start()
            app = App(self._setting, "run")
            Base.metadata.create_all(app.engine)
            app.memory.create_tables(app.engine)
            app.memory.status(app.engine)  # opens the indexes
            self._app = app
            self._identify()
            for number in range(WRITERS):
                self._start("writer", number)
            for number in range(WORKERS):
                self._start("worker", number)
            self._began = time.monotonic()
            self._rage(seconds, faults)
            self._calm(app)
            self._report.audit = audit(app)
            self._look_into_logs()
            self._looked_at = 0.0
            self._look()
            app.close()
        finally:
            self._end()
        return self._report

    def _identify(self) -> None:
        """Record the indexes' present incarnations, as far as they answer."""
        assert self._app is not None
        for name, index in self._app.memory.indexes.items():
            with contextlib.suppress(DeliveryError):
                self._keys[name] = IndexKey(name, index.incarnation)

    def _rage(self, seconds: float, faults: float) -> None:
        next_at = time.monotonic() + 2.0
        while time.monotonic() - self._began < seconds and self._report.faults.total() < faults:
            now = time.monotonic()
            for item in sorted(self._agenda, key=lambda item: item[0]):
                if item[0] <= now:
                    self._agenda.remove(item)
                    item[1]()
            if now >= next_at:
                self._fault()
                next_at = time.monotonic() + self._chance.uniform(0.2, 1.0)
            self._watch()
            self._look()
            time.sleep(0.02)
        self._report.seconds = time.monotonic() - self._began

    def _calm(self, app: App) -> None:
        """Stop all faults, and let stopped processes go on. Then the workers must finish the work."""
        while self._agenda:
            self._agenda.sort(key=lambda item: item[0])
            self._agenda.pop(0)[1]()
            time.sleep(0.02)
        self._say("writers stop")
        self._stop("writer")
        (self._folder / "calm").touch()
        began = time.monotonic()
        quiet_since: float | None = None
        while time.monotonic() - began < _DRAINED_WITHIN_S:
            self._watch()
            status = self._status(app)
            if status is None or any(_is_behind(backlog) for backlog in status.values()):
                quiet_since = None
            elif quiet_since is None:
                quiet_since = time.monotonic()
                self._report.drained_after_s = quiet_since - began
            elif time.monotonic() - quiet_since > 2 * self._setting.lease_s:  # late calls have been reported by now
                break
            if time.monotonic() - began > _BROKEN_AFTER_S and self._replace_broken_chroma(app):
                began, quiet_since = time.monotonic(), None
            self._say(f"draining: {status}")
            time.sleep(0.1)
        else:
            self._report.problems.append(f"not drained within {_DRAINED_WITHIN_S:g} s: {self._status(app)}")
        self._stop("worker")

    def _replace_broken_chroma(self, app: App) -> bool:
        """Act as Chroma's operator: a kill may damage Chroma's own files so that it answers with 500 from then on.

        Its content is then delivered again.
        """
        try:
            app.chroma._client.get_collection(COLLECTION, embedding_function=None).get(limit=1)
        except InternalError:
            self._chroma.replace()
            self._report.chroma_replaced += 1
            self._note(replaced="Chroma")
            return True
        except Exception:  # the next round asks again
            return False
        return False

    def _status(self, app: App) -> dict[str, Backlog] | None:
        try:
            return app.memory.status(app.engine)
        except (MemstateError, SQLAlchemyError):
            return None

    # -- processes -----------------------------------------------------------------------------------------------------

    def _start(self, kind: str, number: int, life: int = 0) -> None:
        target = {"worker": worker.run, "writer": writer.run}[kind]
        name = f"{kind}-{number}"
        process = self._processes.Process(target=target, args=(self._setting, number, life), name=name, daemon=True)
        process.start()
        self._children[name] = Child(kind, number, life, process)

    def _watch(self) -> None:
        """Check that no process ends by itself."""
        for child in list(self._children.values()):
            if child.process.exitcode is not None:
                self._report.problems.append(
                    f"{child.name}.{child.life} ended with {child.process.exitcode}: see its log"
                )
                self._start(child.kind, child.number, child.life + 1)

    def _stop(self, kind: str) -> None:
        mine = [child for child in self._children.values() if child.kind == kind]
        for child in mine:
            child.process.terminate()
        deadline = time.monotonic() + _ENDED_WITHIN_S
        for child in mine:
            child.process.join(max(0.1, deadline - time.monotonic()))
            if child.process.exitcode is None:
                self._report.problems.append(f"{child.name} does not end: see its log for where it is")
                os.kill(child.pid, signal.SIGUSR1)
                time.sleep(1.0)
                child.process.kill()
                child.process.join()
            elif child.process.exitcode not in (0, -signal.SIGTERM):  # it was told before it listened
                self._report.problems.append(f"{child.name} ended with {child.process.exitcode}: see its log")
            del self._children[child.name]

    def _end(self) -> None:
        for child in self._children.values():
            child.process.kill()
        for child in self._children.values():
            child.process.join()
        self._chroma.kill()
        self._redis.stop()
        self._redis_folder.cleanup()
        self._postgres.close()

    # -- faults --------------------------------------------------------------------------------------------------------

    def _fault(self) -> None:
        faults: dict[Callable[[], bool], float] = {
            self._kill_worker: 3.0,
            self._kill_writer: 3.0,
            self._suspend_worker: 3.0,
            self._terminate_connection: 3.0,
            self._stop_postgres: 0.9,
            self._kill_chroma: 0.9,
            self._kill_redis: 0.9,
        }
        while not self._chance.choices(list(faults), list(faults.values()))[0]():
            pass

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._agenda.append((time.monotonic() + seconds, action))

    def _count(self, kind: str, whom: str = "") -> None:
        self._report.faults[kind] += 1
        self._note(fault=kind, whom=whom)

    def _kill(self, child: Child, kind: str) -> bool:
        child.process.kill()
        child.process.join()
        del self._children[child.name]
        self._count(kind, f"{child.name}.{child.life}")
        self._later(self._chance.uniform(0.0, 1.5), lambda: self._start(child.kind, child.number, child.life + 1))
        return True

    def _kill_writer(self) -> bool:
        writers = [child for child in self._children.values() if child.kind == "writer"]
        return bool(writers) and self._kill(self._chance.choice(writers), "kill -9 of a writer")

    def _kill_worker(self) -> bool:
        workers = [child for child in self._running_workers() if not self._is_exposed(child)]
        return bool(workers) and self._kill(self._chance.choice(workers), "kill -9 of a worker")

    def _running_workers(self) -> list[Child]:
        return [child for child in self._children.values() if child.kind == "worker" and not child.stopped]

    def _is_exposed(self, worker: Child) -> bool:
        """Chroma has no fence, so a request whose lease has expired may land last.

        The worker notices this, and has the keys delivered again. A kill before that may leave a point that only
        verify()
        finds. This can happen just after SIGCONT, after a call beyond the lease, or while the worker cannot reach
        PostgreSQL.
        It is documented, and the run avoids it.
        """
        until = worker.exposed_until
        with contextlib.suppress(OSError, ValueError):
            until = max(until, float((self._folder / f"exposed-{worker.pid}").read_text()))
        if until > self._postgres_down_at > 0:
            if self._postgres_up_at is None:
                return True
            until = max(until, self._postgres_up_at + EXPOSED_S)
        return time.monotonic() < until

    def _suspend_worker(self) -> bool:
        workers = self._running_workers()
        if len(workers) < 2:
            return False
        child = self._chance.choice(workers)
        os.kill(child.pid, signal.SIGSTOP)
        child.stopped = True
        self._count("SIGSTOP of a worker beyond its lease", f"{child.name}.{child.life}")

        def resume() -> None:
            child.stopped = False
            child.exposed_until = time.monotonic() + EXPOSED_S
            os.kill(child.pid, signal.SIGCONT)
            self._note(resumed=child.name)

        self._later(self._setting.lease_s * self._chance.uniform(1.1, 2.2), resume)
        return True

    def _terminate_connection(self) -> bool:
        if self._postgres_up_at is None:
            return False
        chosen = (
            "SELECT pid FROM pg_stat_activity WHERE application_name ~ '^(worker|writer)-' ORDER BY random() LIMIT 1"
        )
        engine = self._setting.engine("executioner")
        try:
            with engine.connect() as connection:
                found = connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM ({chosen}) AS chosen")).all()
        except SQLAlchemyError:
            return False
        finally:
            engine.dispose()
        if not found:
            return False
        self._count("connection to PostgreSQL terminated")
        return True

    def _stop_postgres(self) -> bool:
        if self._postgres_up_at is None:
            return False
        self._postgres_down_at, self._postgres_up_at = time.monotonic(), None
        self._postgres.stop_at_once()
        self._count("PostgreSQL stopped at once")

        def start() -> None:
            self._postgres.start()
            self._postgres_up_at = time.monotonic()
            self._note(up="PostgreSQL")

        self._later(self._chance.uniform(0.0, 3.0), start)
        return True

    def _kill_chroma(self) -> bool:
        if not self._chroma_is_up:
            return False
        self._chroma_is_up = False
        self._chroma.kill()
        self._count("kill -9 of the Chroma server")

        def start() -> None:
            self._chroma.start()
            self._later(0.0, wait)

        def wait() -> None:
            if self._chroma.answers():
                self._chroma_is_up = True
                self._note(up="Chroma")
            else:
                self._later(0.1, wait)

        self._later(self._chance.uniform(0.0, 3.0), start)
        return True

    def _kill_redis(self) -> bool:
        """It returns with its acknowledged writes, or with nothing."""
        if not self._redis_is_up:
            return False
        self._redis_is_up = False
        self._redis.kill()
        forgets = self._chance.random() < 0.5
        self._count("kill -9 of Redis" + (", which forgets all" if forgets else ""))

        def start() -> None:
            if forgets:
                shutil.rmtree(self._redis.folder / "appendonlydir")
            self._redis.start()
            self._redis_is_up = True
            self._identify()
            self._note(up="Redis")

        self._later(self._chance.uniform(0.0, 3.0), start)
        return True

    # -- output --------------------------------------------------------------------------------------------------------

    def _note(self, **values: Any) -> None:
        with (self._folder / "timeline.jsonl").open("a") as timeline:
            timeline.write(json.dumps({"t": round(time.monotonic(), 3), **values}) + "\n")

    def _look(self) -> None:
        """Count the lines that the processes have written, once a second."""
        if time.monotonic() - self._looked_at < 1.0:
            return
        self._looked_at = time.monotonic()
        report = self._report
        injected = Counter(line["kind"] for line in _read(self._folder / "faults"))
        for kind, count in injected.items():
            report.faults[kind] = count
        kinds = ("committing", "committed", "rolled_back")
        report.journal = Counter(kind for line in _read(self._folder / "journal") for kind in kinds if kind in line)
        report.counters, report.cpu_s = Counter(), 0.0
        for path in (self._folder / "counters").glob("*.json"):
            told = json.loads(path.read_text())
            report.cpu_s += told["cpu_s"]
            for name, counters in told["indexes"].items():
                for what, count in counters.items():
                    report.counters[f"{name} {what}"] += count
        waiting = {name: round(seconds, 1) for name, seconds in self._waiting().items()}
        report.oldest_s = {name: max(report.oldest_s.get(name, 0.0), seconds) for name, seconds in waiting.items()}
        self._note(
            oldest_s=waiting,
            commits=report.journal["committed"],
            faults=report.faults.total(),
            **dict(report.counters),
        )
        self._say(f"{report.journal['committed']} commits, {report.faults.total()} faults")

    def _waiting(self) -> dict[str, float]:
        """The age of the oldest undelivered key, by index. It does not ask the indexes, which may be away."""
        found = dict.fromkeys(self._keys, 0.0) | self._report.oldest_s
        if self._app is None:
            return found
        try:
            with self._app.engine.connect() as connection:
                for name, key in self._keys.items():
                    found[name] = backlog(connection, key, ["recollection", "habit"]).oldest_s or 0.0
        except SQLAlchemyError:
            pass
        return found

    def _look_into_logs(self) -> None:
        for path in sorted((self._folder / "logs").glob("worker-*.log")):
            lines = path.read_text(errors="replace").splitlines()
            self._report.log_lines += len(lines)
            second, count = max(Counter(line[:19] for line in lines).items(), key=lambda item: item[1], default=("", 0))
            if count > _LINES_IN_A_SECOND:
                self._report.problems.append(f"{path.name}: {count} lines in one second, {second}")
            if tracebacks := sum(line.startswith("Traceback") for line in lines):
                self._report.problems.append(f"{path.name}: {tracebacks} tracebacks")

    def _say(self, what: str) -> None:
        """Print one changing line on a terminal, and a line from time to time elsewhere."""
        now = time.monotonic()
        if self._console.is_terminal:
            self._console.print(
                f"{now - self._began:6.1f} s  {what}"[: self._console.width - 1], end="\r", soft_wrap=True
            )
            self._said_at = now
        elif now - self._said_at >= 10.0:
            self._console.print(f"{now - self._began:6.1f} s  {what}", soft_wrap=True)
            self._said_at = now


def _is_behind(backlog: Backlog) -> bool:
    return bool(backlog.pending or backlog.parked or backlog.dead or backlog.refilling)


def _read(folder: Path) -> list[Any]:
    lines = []
    for path in folder.glob("*.jsonl"):
        for line in path.read_bytes().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


def show(report: Report, console: Console) -> None:
    minutes = report.seconds / 60 or 1.0
    faults = Table("fault", "times", title=f"{report.seconds:.0f} s, seed {report.seed}", title_style="")
    for kind, count in sorted(report.faults.items(), key=lambda item: (item[0].startswith("index"), -item[1])):
        faults.add_row(kind, str(count))
    faults.add_section()
    faults.add_row("together", f"{report.faults.total()} ({report.faults.total() / minutes:.0f} a minute)")
    console.print(faults)
    done = Table("done", "times")
    journal, counters = report.journal, report.counters
    done.add_row("commits", str(journal["committed"]))
    done.add_row("rolled back, on purpose or by a fault", str(journal["rolled_back"]))
    done.add_row("commits without an answer", str(journal["committing"] - journal["committed"]))
    for name in report.oldest_s:
        done.add_row(f"{name}: keys delivered", str(counters[f"{name} converged"]))
        done.add_row(f"{name}: keys refused and parked", str(counters[f"{name} rejected"]))
        done.add_row(f"{name}: slots lost to another worker", str(counters[f"{name} lost"]))
    done.add_row("lines in the workers' logs", str(report.log_lines))
    done.add_row("CPU time of a worker, share of the time", f"{report.cpu_s / WORKERS / (report.seconds or 1.0):.0%}")
    for name, seconds in report.oldest_s.items():
        done.add_row(f"{name}: longest wait", f"{seconds:.1f} s")
    drained = report.drained_after_s
    done.add_row("Chroma's own files broken, and replaced", str(report.chroma_replaced))
    done.add_row("all delivered after the last fault", "never" if drained is None else f"{drained:.1f} s")
    console.print(done)
    found = Table("audit", "found")
    for what, count in report.audit.counts.items():
        found.add_row(what, str(count))
    found.add_row("processes that failed or hung", str(len(report.problems)))
    console.print(found)
    for line in (*report.problems, *report.audit.differences[:_SHOWN], *report.audit.context):
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print("[green]all correct" if report.ok else "[red]NOT correct", highlight=False)
