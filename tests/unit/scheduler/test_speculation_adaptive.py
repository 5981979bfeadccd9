"""How many drafts are sent follows from acceptance and from what steps cost."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable

import pytest
from stepwire_scheduler.sequence import Sequence
from stepwire_scheduler.speculation.adaptive import INDEX_TOKENS_PER_ROUND, LookupSpeculator
from stepwire_scheduler.speculation.draft_model import DraftModelSpeculator
from stepwire_scheduler.speculation.interface import Speculator
from stepwire_scheduler.speculation.lookup import Prediction, SequenceIndex
from support.speculation import make_sequence, teach_cost

K = 5
WRONG = 7
RIGHT = 8


class LookupOfKnownQuality:
    """Each token that it predicts is right with a probability that a test sets."""

    num_grades = 1
    prior: tuple[float, ...] = (0.5,)

    def __init__(self, quality: float) -> None:
        self.quality = quality
        self.num_lookups = 0
        self._random = random.Random(0)

    def open(self, sequence: Sequence) -> SequenceIndex:
        return SequenceIndex(sequence, (1,))

    def predict(self, index: SequenceIndex, num_tokens: int) -> Prediction:
        self.num_lookups += 1
        token_ids = [
            RIGHT if self._random.random() < self.quality else WRONG for _ in range(num_tokens)
        ]
        return Prediction(token_ids, [0] * num_tokens)

    def close(self, sequence: Sequence) -> None:
        pass

    def catch_up(self, num_tokens: int) -> None:
        pass


class Generation:
    """Sequences whose next token is always RIGHT, and an executor whose cost is known."""

    def __init__(
        self,
        speculator: Speculator,
        num_sequences: int = 1,
        *,
        step_ms: float = 10.0,
        token_ms: float = 1.0,
        quality: float | None = None,
    ) -> None:
        """quality: of the executor's draft model, where drafts are lengths only."""
        self.speculator = speculator
        self.sequences = [make_sequence(max_tokens=10**9) for _ in range(num_sequences)]
        self.step_ms, self.token_ms = step_ms, token_ms
        self.quality = quality
        self._random = random.Random(1)
        teach_cost(speculator, step_ms=step_ms, token_ms=token_ms)

    def step(self) -> list[int]:
        """Run one step; returns how many drafts each sequence had."""
        drafts = self.speculator.propose(
            self.sequences, num_tokens=len(self.sequences), budget=1_000
        )
        num_tokens = len(self.sequences) + sum(map(len, drafts))
        for sequence, draft in zip(self.sequences, drafts, strict=True):
            num_accepted = 0
            for token in draft:
                is_right = token == RIGHT
                if self.quality is not None:
                    is_right = self._random.random() < self.quality
                if not is_right:
                    break
                num_accepted += 1
            sequence.token_ids.extend(array("I", [RIGHT] * (num_accepted + 1)))
            self.speculator.observe(sequence, num_drafted=len(draft), num_accepted=num_accepted)
        self.speculator.note_step(
            num_tokens=num_tokens,
            busy_ms=self.step_ms + self.token_ms * num_tokens,
            num_drafts=sum(map(len, drafts)),
            idle_ms=0.0,
        )
        return [len(draft) for draft in drafts]

    def mean_length(self, num_steps: int) -> float:
        """Mean length of the drafts of num_steps steps."""
        lengths = [length for _ in range(num_steps) for length in self.step()]
        return sum(lengths) / len(lengths)


def test_good_drafts_are_sent_whole() -> None:
    generation = Generation(LookupSpeculator(LookupOfKnownQuality(0.9), num_speculative_tokens=K))
    generation.mean_length(100)
    assert generation.mean_length(200) > K - 0.5


def test_bad_drafts_are_not_sent() -> None:
    generation = Generation(LookupSpeculator(LookupOfKnownQuality(0.05), num_speculative_tokens=K))
    generation.mean_length(200)
    assert generation.mean_length(500) < 0.05


def test_middling_drafts_are_shorter_than_good_ones() -> None:
    generation = Generation(LookupSpeculator(LookupOfKnownQuality(0.5), num_speculative_tokens=K))
    generation.mean_length(100)
    assert 0.5 < generation.mean_length(300) < K - 1


def test_drafts_come_back_where_predictions_that_were_not_sent_came_true() -> None:
    lookup = LookupOfKnownQuality(0.9)
    generation = Generation(LookupSpeculator(lookup, num_speculative_tokens=3))
    generation.mean_length(100)
    assert generation.mean_length(100) > 2.5
    lookup.quality = 0.05
    generation.mean_length(300)
    assert generation.mean_length(500) < 0.05
    lookup.quality = 0.9
    generation.mean_length(200)
    assert generation.mean_length(100) > 2.5


def test_a_sequence_whose_drafts_fail_does_not_hold_back_its_neighbours() -> None:
    class MixedLookup(LookupOfKnownQuality):
        def predict(self, index: SequenceIndex, num_tokens: int) -> Prediction:
            is_first = index.tokens is generation.sequences[0].token_ids
            self.quality = 0.02 if is_first else 0.95
            return super().predict(index, num_tokens)

    generation = Generation(
        LookupSpeculator(MixedLookup(0.5), num_speculative_tokens=K), num_sequences=2
    )
    generation.mean_length(200)
    lengths = [generation.step() for _ in range(200)]
    assert sum(first for first, _ in lengths) / 200 < 0.3
    assert sum(second for _, second in lengths) / 200 > 4


def test_no_drafts_where_each_token_costs_as_much_as_a_step() -> None:
    lookup = LookupOfKnownQuality(0.9)
    generation = Generation(
        LookupSpeculator(lookup, num_speculative_tokens=K),
        num_sequences=64,
        step_ms=0.1,
        token_ms=10.0,
    )
    assert generation.mean_length(50) == 0
    # Nor is there much work: a lookup in few of the rounds.
    assert lookup.num_lookups < 64 * 50 / 8


def test_a_bad_figure_of_a_step_is_forgotten() -> None:
    speculator = LookupSpeculator(LookupOfKnownQuality(0.9), num_speculative_tokens=K)
    generation = Generation(speculator)
    generation.mean_length(100)
    for num_tokens in (2, 3, 4, 5, 6, 8):
        for _ in range(20):
            speculator.note_step(num_tokens=num_tokens, busy_ms=1_000.0, idle_ms=0.0)
    assert generation.mean_length(20) < 1
    generation.mean_length(2_000)
    assert generation.mean_length(100) > K - 0.5


def test_the_wait_behind_drafts_is_part_of_their_price() -> None:
    speculator = LookupSpeculator(LookupOfKnownQuality(0.2), num_speculative_tokens=K)
    generation = Generation(speculator, token_ms=0.01)
    generation.mean_length(100)
    assert generation.mean_length(50) > 0
    for _ in range(100):
        speculator.note_step(num_tokens=6, busy_ms=10.06, num_drafts=5, idle_ms=30.0)
    assert generation.mean_length(1) == 0


def test_before_anything_is_measured_good_drafts_are_sent_and_bad_ones_are_not() -> None:
    for num_sequences, least in ((1, K), (4, 1)):
        speculator = LookupSpeculator(LookupOfKnownQuality(1.0), num_speculative_tokens=K)
        sequences = [make_sequence() for _ in range(num_sequences)]
        drafts = speculator.propose(sequences, num_tokens=num_sequences, budget=1_000)
        if num_sequences == 1:
            assert 1 <= len(drafts[0]) <= least
        assert sum(map(len, drafts)) >= 1


@pytest.mark.parametrize(("pending", "asked"), [(0, None), (2, None), (0, 2), (1, 0)])
def test_drafts_are_never_longer_than_request_budget_and_end_allow(
    pending: int, asked: int | None
) -> None:
    speculator = LookupSpeculator(LookupOfKnownQuality(1.0), num_speculative_tokens=K)
    teach_cost(speculator, step_ms=10.0, token_ms=0.001)
    for max_tokens in range(1, 12):
        for budget in range(8):
            sequences = [
                make_sequence(max_tokens=max_tokens, num_speculative_tokens=asked) for _ in range(2)
            ]
            for sequence in sequences:
                sequence.num_pending_tokens = min(pending, max_tokens - 1)
            drafts = speculator.propose(sequences, num_tokens=2, budget=budget)
            most = min(K if asked is None else asked, max_tokens - min(pending, max_tokens - 1) - 1)
            assert all(len(draft) <= max(0, most) for draft in drafts)
            assert sum(map(len, drafts)) <= budget
            if budget == 7 and most >= 1:
                assert any(drafts)


def test_a_draft_begins_behind_the_pending_tokens() -> None:
    class Count(LookupOfKnownQuality):
        def predict(self, index: SequenceIndex, num_tokens: int) -> Prediction:
            return Prediction(list(range(100, 100 + num_tokens)), [0] * num_tokens)

    speculator = LookupSpeculator(Count(1.0), num_speculative_tokens=3)
    teach_cost(speculator, step_ms=10.0, token_ms=0.001)
    sequence = make_sequence()
    sequence.num_pending_tokens = 1
    (draft,) = speculator.propose([sequence], num_tokens=1, budget=10)
    assert list(draft) == [101, 102, 103]


def test_a_long_prompt_is_indexed_in_several_rounds() -> None:
    from stepwire_scheduler.speculation.ngram import NgramLookup

    lookup = NgramLookup(min_length=2, max_length=8)
    opened: list[SequenceIndex] = []
    open_index = lookup.open

    def remember(sequence: Sequence) -> SequenceIndex:
        opened.append(open_index(sequence))
        return opened[-1]

    lookup.open = remember  # type: ignore[method-assign]
    speculator = LookupSpeculator(lookup, num_speculative_tokens=K)
    teach_cost(speculator, step_ms=10.0, token_ms=0.001)
    sequences = [make_sequence([1, 2, 3, 4] * 1_000) for _ in range(2)]
    before = 0
    for _ in range(100):
        drafts = speculator.propose(sequences, num_tokens=2, budget=100)
        indexed = sum(index.num_tokens for index in opened)
        assert indexed - before <= INDEX_TOKENS_PER_ROUND
        before = indexed
        for index, draft in zip(opened, drafts, strict=False):
            assert index.num_tokens == 4_000 or not draft
    assert before == 8_000
    assert all(drafts)


MAKERS: dict[str, Callable[[], Speculator]] = {
    "lookup": lambda: LookupSpeculator(LookupOfKnownQuality(0.6), num_speculative_tokens=K),
    "draft_model": lambda: DraftModelSpeculator(num_speculative_tokens=K),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_calls_give_the_same_drafts(name: str) -> None:
    runs = []
    for _ in range(2):
        generation = Generation(
            MAKERS[name](), num_sequences=3, quality=0.6 if name == "draft_model" else None
        )
        runs.append([generation.step() for _ in range(300)])
    assert runs[0] == runs[1]
    assert any(map(any, runs[0]))


@pytest.mark.parametrize("name", MAKERS)
def test_steps_that_are_said_to_take_no_time_do_no_harm(name: str) -> None:
    quality = 0.6 if name == "draft_model" else None
    generation = Generation(
        MAKERS[name](), num_sequences=3, step_ms=0.0, token_ms=0.0, quality=quality
    )
    for _ in range(100):
        generation.step()


def test_a_draft_model_is_asked_as_its_acceptance_pays() -> None:
    for quality, low, high in ((0.95, K - 0.6, K), (0.05, 0.0, 0.2)):
        generation = Generation(
            DraftModelSpeculator(num_speculative_tokens=K), quality=quality, num_sequences=2
        )
        generation.mean_length(300)
        assert low <= generation.mean_length(300) <= high


def test_a_draft_model_that_became_good_is_found_by_probes() -> None:
    generation = Generation(DraftModelSpeculator(num_speculative_tokens=3), quality=0.9)
    generation.mean_length(100)
    assert generation.mean_length(100) > 2.5
    generation.quality = 0.0
    generation.mean_length(8_000)
    num_probes = sum(any(generation.step()) for _ in range(1_000))
    assert 1 <= num_probes < 30
    generation.quality = 0.95
    generation.mean_length(5_000)
    assert generation.mean_length(100) > 2.5


def test_what_a_draft_model_takes_is_part_of_the_price() -> None:
    speculator = DraftModelSpeculator(num_speculative_tokens=K)
    generation = Generation(speculator, quality=0.9)
    generation.mean_length(50)
    assert generation.mean_length(50) > 3

    class Slow(Generation):
        """Each draft token takes three steps' time."""

        def step(self) -> list[int]:
            lengths = super().step()
            if max(lengths):
                for _ in range(3):
                    self.speculator.note_step(
                        num_tokens=1 + sum(lengths),
                        busy_ms=11.0 + 30.0 * max(lengths),
                        num_drafts=sum(lengths),
                        idle_ms=0.0,
                    )
            return lengths

    slow = Slow(speculator, quality=0.9)
    slow.mean_length(100)
    assert slow.mean_length(30) < 0.5


def test_a_sequence_that_has_ended_leaves_nothing() -> None:
    for maker in MAKERS.values():
        speculator = maker()
        sequences = [make_sequence() for _ in range(3)]
        speculator.propose(sequences, num_tokens=3, budget=100)
        for sequence in sequences:
            speculator.forget(sequence)
            speculator.forget(sequence)
        kept = getattr(speculator, "_states", None) or getattr(speculator, "_acceptances", {})
        assert not kept
