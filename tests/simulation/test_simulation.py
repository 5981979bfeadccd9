"""The scheduler among executors and clients that fail; what must hold is checked inside."""

from __future__ import annotations

import pytest
from stepwire_scheduler.sequence import FinishReason

from tests.simulation.mutants import MUTANTS, Plant
from tests.simulation.world import ViolationError, simulate

NUM_SEEDS = 300
NUM_SEEDS_OF_MUTANTS = 500
_CHUNK = 100


@pytest.mark.parametrize("first_seed", range(0, NUM_SEEDS, _CHUNK))
def test_every_invariant_holds_whatever_fails(first_seed: int) -> None:
    _simulate_all(range(first_seed, first_seed + _CHUNK))


@pytest.mark.parametrize("seed", [3, 89])
def test_a_seed_replays_to_the_letter(seed: int) -> None:
    assert simulate(seed, is_tracing=True).trace == simulate(seed, is_tracing=True).trace


def test_the_seeds_reach_what_they_are_about() -> None:
    worlds = [simulate(seed) for seed in range(80)]
    sequences = [sequence for world in worlds for sequence in world.sequences]
    assert {sequence.finish_reason for sequence in sequences} == set(FinishReason)
    for name in (
        *("num_preemptions", "num_resumes", "num_cached_tokens", "index"),
        *("num_draft_tokens", "num_accepted_tokens"),
    ):
        assert sum(getattr(sequence, name) > 0 for sequence in sequences) > 5, name
    assert {world.scenario.world_size for world in worlds} == {1, 2, 3}
    assert len({world.scenario.speculation for world in worlds}) == 3
    assert any(world.poisoned for world in worlds)
    assert any(world.failed_request_ids for world in worlds)
    assert sum(world.num_handovers > 0 for world in worlds) > 5
    assert any(len(world.offers) > 1 and world.scenario.only_drains for world in worlds)


@pytest.mark.parametrize("plant", MUTANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(ViolationError):
        _simulate_all(range(NUM_SEEDS_OF_MUTANTS))


def _simulate_all(seeds: range) -> None:
    for seed in seeds:
        simulate(seed)
