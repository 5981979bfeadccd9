"""Settings, counters, and what each method proposes."""

from __future__ import annotations

import itertools
import random
from array import array
from typing import Any

import pytest
from stepwire_scheduler.sequence import Sequence
from stepwire_scheduler.speculation import (
    SpeculationConfig,
    SpeculationCounters,
    Speculator,
    make_speculator,
)
from stepwire_scheduler.speculation.step_cost import StepCost
from stepwire_scheduler.speculation.suffix import SuffixLookup
from support.speculation import make_sequence, teach_cost


@pytest.mark.parametrize(
    "settings",
    [
        {"num_speculative_tokens": 0},
        {"num_speculative_tokens": 17},
        {"ngram_min": 0},
        {"ngram_min": 6, "ngram_max": 5},
        {"ngram_max": 33},
        {"history_tokens": -1},
        {"history_tokens": 10**9},
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(settings)):
        SpeculationConfig(method="ngram", **settings)


def test_no_method_is_no_speculator() -> None:
    assert make_speculator(SpeculationConfig()) is None


def random_tokens(seed: int, num_tokens: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1_000) for _ in range(num_tokens)]


def speculator_of(method: str, **settings: Any) -> Speculator:
    speculator = make_speculator(SpeculationConfig(method=method, **settings))  # type: ignore[arg-type]
    assert speculator is not None
    teach_cost(speculator, step_ms=10.0, token_ms=0.01)
    return speculator


def generate(speculator: Speculator, sequence: Sequence, output: list[int]) -> int:
    """Let a sequence sample output; returns the number of steps."""
    num_steps, position = 0, 0
    while position < len(output):
        (draft,) = speculator.propose([sequence], num_tokens=1, budget=100)
        num_accepted = 0
        for token, sampled in zip(draft, output[position:-1], strict=False):
            if token != sampled:
                break
            num_accepted += 1
        new = output[position : position + num_accepted + 1]
        sequence.token_ids.extend(array("I", new))
        position += len(new)
        speculator.observe(sequence, num_drafted=len(draft), num_accepted=num_accepted)
        num_steps += 1
    return num_steps


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_a_text_that_is_repeated_takes_a_fraction_of_the_steps(method: str) -> None:
    text = random_tokens(0, 500)
    steps = generate(speculator_of(method), make_sequence(text), list(text))
    assert steps < 500 / 5
    speculator = speculator_of(method)
    noise = random_tokens(1, 500)
    assert generate(speculator, make_sequence(text), noise) > 495
    assert speculator.counters.num_draft_tokens < 50


def test_a_loop_of_one_token_is_drafted_whole() -> None:
    for method in ("ngram", "suffix"):
        speculator = speculator_of(method)
        steps = generate(speculator, make_sequence([1, 2]), [7] * 300)
        assert steps < 300 / 4


def test_suffix_repeats_what_an_earlier_sequence_said_and_ngram_does_not() -> None:
    text = random_tokens(2, 300)
    steps = {}
    for method in ("ngram", "suffix"):
        speculator = speculator_of(method)
        first = make_sequence([5, 6, 7])
        generate(speculator, first, text)
        speculator.forget(first)
        steps[method] = generate(speculator, make_sequence([5, 6, 7]), text)
    assert steps["ngram"] > 295
    assert steps["suffix"] < 300 / 3


def test_tenants_never_see_what_others_said() -> None:
    speculator = speculator_of("suffix")
    secret = random_tokens(3, 300)
    mine = make_sequence([5, 6, 7], tenant="a")
    generate(speculator, mine, secret)
    speculator.forget(mine)
    for tenant, fewest in (("b", 300), ("", 300), ("a", 1)):
        before = speculator.counters.num_draft_tokens
        steps = generate(speculator, make_sequence([5, 6, 7], tenant=tenant), secret)
        assert steps >= fewest
        has_drafted = speculator.counters.num_draft_tokens > before
        assert has_drafted == (tenant == "a")


def test_what_finished_sequences_leave_takes_bounded_memory() -> None:
    lookup = SuffixLookup(min_length=2, history_tokens=1_000)
    for tenant in range(200):
        for _ in range(5):
            lookup.close(make_sequence([1], range(400), tenant=str(tenant)))
            lookup.catch_up(100)
    kept = [lookup.history.num_tokens(str(tenant)) for tenant in range(200)]
    assert max(kept) <= 1_000
    assert sum(count > 0 for count in kept) == 64
    assert kept[-1] > 0
    assert lookup.history.num_behind <= sum(kept)


def test_an_index_takes_few_bytes_a_token() -> None:
    speculator = SuffixLookup(min_length=2, history_tokens=0)
    sequence = make_sequence(range(8_000), max_tokens=192)
    index = speculator.open(sequence)
    index.extend(8_000)
    assert index.num_bytes <= 8_192 * 2 * 8


def test_counters_count_by_position() -> None:
    counters = SpeculationCounters()
    for num_drafted, num_accepted in ((3, 2), (0, 0), (5, 0), (2, 2)):
        counters.add(num_drafted=num_drafted, num_accepted=num_accepted)
    assert counters == SpeculationCounters(
        num_drafts=3,
        num_draft_tokens=10,
        num_accepted_tokens=4,
        accepted_per_position=[2, 2, 0, 0, 0],
    )


def test_cost_rises_with_tokens_whatever_was_measured() -> None:
    cost = StepCost()
    generator = random.Random(0)
    sizes = [1, 2, 3, 5, 8, 13, 21, 40, 100, 300, 5_000]
    for _ in range(500):
        estimates = [cost.estimate_ms(size) for size in sizes]
        for smaller, larger in itertools.pairwise(estimates):
            assert larger >= smaller * (1 - 1e-12)
        assert min(estimates) > 0
        cost.note(generator.choice(sizes), generator.uniform(0.1, 50))


def test_cost_between_and_beyond_measured_sizes() -> None:
    cost = StepCost()
    for _ in range(50):
        for size, time_ms in ((8, 10.0), (16, 20.0), (32, 33.0)):
            cost.note(size, time_ms)
    assert cost.estimate_ms(8) == pytest.approx(10)
    assert cost.estimate_ms(12) == pytest.approx(15)
    assert cost.estimate_ms(24) == pytest.approx(26.5)
    assert cost.estimate_ms(1) < 10
    assert cost.estimate_ms(64) > 33
