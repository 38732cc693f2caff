"""The demo: play an agent's memory twice, through failing calls and a crash, then compare the two."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from chromadb.api.models.Collection import Collection
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session, sessionmaker

from memstate_sa import Change, Memory
from memstate_sa.demo.agent import FAILURE_RATE, Note, Played, adopt, chroma, database
from memstate_sa.demo.audit import Drift, drift
from memstate_sa.demo.inputs import Correct, Forget, Remember, Turn, parse
from memstate_sa.embedders import WordLlamaEmbedder
from memstate_sa.errors import MemstateError
from memstate_sa.indexes import ChromaIndex

QUESTIONS = ("food to cook and eat", "Which trains and flights are booked?", "illness, allergy and medicine")
STEPS_UNDONE = 2


def run(input_path: Path | None, *, directory: Path | None = None, console: Console, seed: int = 7) -> None:
    """Play the conversation in *input_path* and show the results. None means the conversation in the package.

    All files are in *directory*, which must be empty or new, and remain there. Without it, they are in a temporary
    folder. Raises MemstateError if the memstate_sa side has drifted at all.
    """
    text = read(input_path)
    turns = parse(text)
    WordLlamaEmbedder()  # this raises an error now if wordllama is not installed
    with ExitStack() as stack:
        home = directory or Path(stack.enter_context(TemporaryDirectory(prefix="memstate-sa-demo-")))
        home.mkdir(parents=True, exist_ok=True)
        if any(home.iterdir()):
            raise MemstateError(f"Cannot use {home}. It is not empty, and the demo needs an empty folder.")
        (home / "input").write_text(text, "utf-8")

        introduce(turns, console)
        by_hand, memstate = play(turns, home, seed, console)
        compare(by_hand, memstate, turns, console)
        tour(memstate, console)
        if directory:
            console.print(f"\nThe databases, indexes and logs of both agents are in {escape(str(home))}")


def read(path: Path | None) -> str:
    try:
        return (path or files("memstate_sa.demo") / "conversation.jsonl").read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MemstateError(f"Cannot read {path}: {error}") from error


def introduce(turns: Sequence[Turn], console: Console) -> None:
    actions = [action for turn in turns for action in turn.actions]
    count = {kind: sum(isinstance(action, kind) for action in actions) for kind in (Remember, Correct, Forget)}
    users = {action.user for action in actions if isinstance(action, Remember)}
    console.rule("One conversation, two memories")
    console.print(
        f"An assistant talks to {len(users)} users in {len(turns)} turns. It remembers {count[Remember]} facts, "
        f"corrects {count[Correct]} and forgets {count[Forget]}. Each turn is a transaction in SQLite. The vectors go "
        "to Chroma.\n"
        f"{FAILURE_RATE:.0%} of the calls to the index fail. Right after the commit of turn {middle(turns)}, the "
        "process is killed (SIGKILL) and started again."
    )


def middle(turns: Sequence[Turn]) -> int:
    return turns[(len(turns) - 1) // 2].number


# -- playing ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The files of one side, in *home*, and the figures of its run."""

    home: Path
    calls: int = 0
    failed: int = 0
    killed_after: int = 0
    waiting: int | None = None

    @cached_property
    def engine(self) -> Engine:
        return database(self.home)

    @cached_property
    def collection(self) -> Collection:
        return chroma(self.home).get_collection("notes")


def play(turns: Sequence[Turn], home: Path, seed: int, console: Console) -> list[Outcome]:
    """Play *turns* by hand and with memstate_sa, at the same time."""
    columns = (TextColumn("{task.description:<38}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor() as pool:
        tasks = {
            "by-hand": progress.add_task("by hand: commit, then write to Chroma", total=len(turns)),
            "memstate": progress.add_task("memstate_sa: commit", total=len(turns)),
        }
        return list(pool.map(lambda side: _play(side, turns, home, seed, progress, tasks[side]), tasks))


def _play(side: str, turns: Sequence[Turn], home: Path, seed: int, progress: Progress, task: TaskID) -> Outcome:
    """Play *turns* in a process that dies in the middle, and continue in a second one."""
    outcome = Outcome(home / side)
    order = {turn.number: position for position, turn in enumerate(turns, start=1)}
    for crash_at in (middle(turns), None):
        figures = {"calls": 0, "failed": 0}
        for report in _agent(outcome.home, home / "input", side, seed, crash_at):
            figures |= report
            if "turn" in report:
                progress.update(task, completed=order[report["turn"]])
        outcome.calls += figures["calls"]
        outcome.failed += figures["failed"]
        outcome.waiting = figures.get("waiting")
        if crash_at is not None:
            with outcome.engine.connect() as connection:
                outcome.killed_after = connection.execute(select(func.max(Played.turn))).scalar_one()
    return outcome


def _agent(home: Path, conversation: Path, side: str, seed: int, crash_at: int | None) -> Iterable[dict[str, int]]:
    """Run one agent process, and yield its reports."""
    command = [sys.executable, "-m", "memstate_sa.demo.agent", side, str(conversation), str(home), "--seed", str(seed)]
    if crash_at is not None:
        command += ["--crash-at", str(crash_at)]
    home.mkdir(exist_ok=True)
    with (home / "agent.log").open("a+", encoding="utf-8") as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            assert process.stdout is not None
            yield from map(json.loads, process.stdout)
        if process.returncode != (0 if crash_at is None else -signal.SIGKILL):
            log.seek(0)
            raise MemstateError(f"The agent {side} failed ({process.returncode}):\n{log.read()[-2000:]}")


# -- comparing -------------------------------------------------------------------------------------------------------


def compare(by_hand: Outcome, memstate: Outcome, turns: Sequence[Turn], console: Console) -> None:
    embedder = WordLlamaEmbedder()
    outcomes = (by_hand, memstate)
    drifts = [drift(outcome.engine, outcome.collection, embedder) for outcome in outcomes]
    table = Table(title="\nSQL against Chroma, compared by content")
    for header in ("", "by hand", "memstate_sa"):
        table.add_column(header, justify="right" if header else "left")
    table.add_column("for example, by hand")
    table.add_row("killed after turn", *(str(outcome.killed_after) for outcome in outcomes))
    waiting = ("—" if outcome.waiting is None else str(outcome.waiting) for outcome in outcomes)
    table.add_row("facts waiting in the outbox then", *waiting)
    table.add_row("index calls that failed", *(f"{outcome.failed} of {outcome.calls}" for outcome in outcomes))
    table.add_row("facts in SQL", *(str(_count(outcome.engine)) for outcome in outcomes))
    table.add_row("vectors in Chroma", *(str(outcome.collection.count()) for outcome in outcomes), end_section=True)
    actions = [action for turn in turns for action in turn.actions]
    texts = {action.fact: action.text for action in actions if not isinstance(action, Forget)}
    for kind, meaning in (
        ("missing", "never found: “{}”"),
        ("ghost", "forgotten, yet still found: “{}”"),
        ("stale", "found by its old text: “{}”"),
    ):
        ids_by_side: list[list[str]] = [getattr(side, kind) for side in drifts]
        example = meaning.format(_short(texts[ids_by_side[0][0]])) if ids_by_side[0] else ""
        table.add_row(kind, *(f"[{'red' if ids else 'green'}]{len(ids)}[/]" for ids in ids_by_side), example)
    console.print(table)
    if any(drifts[1]):
        raise MemstateError(f"The memstate_sa side has drifted: {drifts[1]}")


def _count(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(Note)) or 0


def _short(text: str | None, width: int = 60) -> str:
    return "—" if text is None else escape(textwrap.shorten(text, width, placeholder="…"))


# -- more of memstate_sa ---------------------------------------------------------------------------------------------


def tour(outcome: Outcome, console: Console) -> None:
    """Show search, undo, history and verify on the memstate_sa side."""
    sessions = sessionmaker(outcome.engine)
    index = ChromaIndex(chroma(outcome.home), "notes")
    with closing(adopt(outcome.engine, index, sessions)) as memory:
        with sessions() as session:
            search(memory, session, console)
            undo(memory, session, outcome, console)
            history(memory, session, console)
        report = memory.verify(outcome.engine)
    counts = {kind: len(getattr(report, kind)) for kind in ("missing", "ghost", "stale", "pending")}
    console.print(f"\nmemory.verify(engine) checked {report.checked} facts: {counts}")
    if any(counts.values()):
        raise MemstateError("The memstate_sa side is not clean.")


def search(memory: Memory, session: Session, console: Console) -> None:
    users = session.scalars(select(Note.user_id).group_by(Note.user_id).order_by(Note.user_id).limit(len(QUESTIONS)))
    table = Table("user", "question", "score", "remembered fact", title="\nSearch, one user at a time")
    for user, question in zip(users.all(), QUESTIONS, strict=False):
        hits = memory.search(session, question, select(Note).where(Note.user_id == user), limit=2)
        for position, hit in enumerate(hits):
            heading = (escape(user), question) if position == 0 else ("", "")
            table.add_row(*heading, f"{hit.score:.2f}", _short(hit.fact.text), end_section=position == len(hits) - 1)
    console.print(table)


def undo(memory: Memory, session: Session, outcome: Outcome, console: Console) -> None:
    embedder = WordLlamaEmbedder()
    notes = {note.id: note.text for note in session.scalars(select(Note))}
    before = drift(outcome.engine, outcome.collection, embedder), notes

    undone = memory.rollback(session, steps=STEPS_UNDONE)
    session.commit()
    memory.relay(outcome.engine).drain()

    notes = {note.id: note.text for note in session.scalars(select(Note))}
    after = drift(outcome.engine, outcome.collection, embedder), notes
    table = Table(title=f"\nmemory.rollback(session, steps={STEPS_UNDONE}): the last {STEPS_UNDONE} turns are undone")
    for header in ("fact", "SQL before", "SQL after", "vector before", "vector after"):
        table.add_column(header)
    for key in dict.fromkeys(change.key for change in undone):
        sql = [_short(rows.get(key), 40) for _, rows in (before, after)]
        table.add_row(escape(key), *sql, *(_vector(key, *state) for state in (before, after)))
    console.print(table)


def _vector(key: str, drifted: Drift, rows: dict[str, str]) -> str:
    if key in drifted.stale:
        return "[red]stale[/]"
    if key in drifted.ghost:
        return "[red]ghost[/]"
    if key in drifted.missing:
        return "[red]missing[/]"
    return "up to date" if key in rows else "—"


def history(memory: Memory, session: Session, console: Console) -> None:
    changes: dict[str, list[Change]] = {}
    for change in memory.history(session, Note):
        changes.setdefault(change.key, []).append(change)
    longest = max(changes.values(), key=len)
    table = Table(title=f"\nThe history of fact {escape(longest[0].key)}, which keeps every change")
    for header in ("at", "change", "text", "reason"):
        table.add_column(header)
    for change in longest:
        text = _short(change.after["text"] if change.after else None)
        table.add_row(
            f"{change.at:%H:%M:%S.%f}"[:-3],
            change.op + (" (undo)" if change.reverts else ""),
            text,
            escape(change.reason or ""),
        )
    console.print(table)
