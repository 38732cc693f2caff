"""The examples work as documented, on recorded data that lies beside the project."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, select

from examples import revoke_failed_runs as example
from memstate_sa.db.codec import encode_key
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import assert_index_holds


@pytest.fixture(scope="module")
def recording() -> example.Recording:
    folder = example.shared_data()
    if not (folder / "trajectories.json").is_file():
        pytest.skip(f"{folder.name} is not here; MEMSTATE_SHARED_DATA names the folder that has it")
    return example.Recording.read(folder)


@pytest.fixture
def airline(engine: Engine) -> Iterator[example.Airline]:
    made = example.Airline(engine, InMemoryIndex())
    yield made
    made.memory.close()


@pytest.fixture(scope="module")
def expected(recording: example.Recording, tmp_path_factory: pytest.TempPathFactory) -> Iterator[example.State]:
    engine = example.open_engine(f"sqlite:///{tmp_path_factory.mktemp('clean') / 'clean.db'}")
    other = example.Airline(engine, InMemoryIndex())
    yield example.replay_the_others(recording, other)
    other.memory.close()
    engine.dispose()


def test_the_recording_is_read_as_it_is(recording: example.Recording) -> None:
    """It has every successful call of a writing tool, in order, and no call that failed."""
    assert len(recording.runs) == 200 and sum(run.failed for run in recording.runs) == 116
    assert len(recording.calls()) == 177 and len(recording.calls(failed=True)) == 134
    first_turn = recording.calls()[: sum(bool(run.calls) for run in recording.runs)]
    assert {call.number for call in first_turn} == {0}
    assert len({call.name for call in recording.calls()}) == 177


@pytest.mark.deep
@pytest.mark.parametrize("by", ["run", "transaction"])
def test_revoking_runs_leaves_the_state_of_the_others(
    recording: example.Recording, airline: example.Airline, expected: example.State, by: example.Granularity
) -> None:
    """Rows and vectors are equal by content, except facts that several runs wrote, which are reported."""
    proof = example.prove(recording, airline, expected, by)
    assert proof.holds
    assert proof.facts == len(expected.rows) > 10_000
    assert proof.revoked.reverted > 300
    assert proof.differing_rows < proof.revoked.reported
    assert {"payment_method", "itinerary", "reservation"} >= {name for name, _ in proof.revoked.reported}
    cards = {fact for fact in proof.differing_rows if fact[0] == "payment_method"}
    assert len(cards) == 4  # charged by a failed run, and by a good run afterwards
    if by == "transaction":  # the last good run's value replaces values that were blindly overwritten
        assert proof.differing_rows == cards
    with airline.sessions() as session:
        texts = {
            model.__tablename__ + encode_key(session.identity_key(instance=row)[1]): text(row)
            for model, text in example.TEXTS.items()
            for row in session.scalars(select(model))
        }
    assert_index_holds(airline.index, HashEmbedder(), texts)
    assert airline.memory.doctor(airline.engine).healthy
