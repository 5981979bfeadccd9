"""Bugs planted in speculation: each must break a test that guards against it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import Phase, settings
from stepwire_scheduler.speculation import adaptive, draft_model, history, lookup, ngram, suffix
from stepwire_scheduler.speculation.acceptance import Acceptance
from stepwire_scheduler.speculation.counters import SpeculationCounters
from stepwire_scheduler.speculation.history import History
from stepwire_scheduler.speculation.occurrences import OccurrenceIndex

Plant = Callable[[pytest.MonkeyPatch], None]
TESTS = Path(__file__).parents[1]


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_mutated", TESTS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What fails need not be made small: these settings hold for the tests of the next line.
_before = settings.get_current_profile_name()
settings.register_profile("mutants", database=None, derandomize=True, phases=[Phase.generate])
settings.load_profile("mutants")
LOOKUP = _load("property/test_speculation_lookup.py")
settings.load_profile(_before)
ADAPTIVE = _load("unit/scheduler/test_speculation_adaptive.py")
METHODS = _load("unit/scheduler/test_speculation.py")


def take_the_oldest_occurrence(patch: pytest.MonkeyPatch) -> None:
    before_last = OccurrenceIndex.before_last

    def oldest_first(index: OccurrenceIndex) -> Iterator[int]:
        return reversed(list(before_last(index)))  # type: ignore[return-value]

    patch.setattr(OccurrenceIndex, "before_last", oldest_first)


def stop_at_the_first_match(patch: pytest.MonkeyPatch) -> None:
    islice = ngram.islice
    patch.setattr(ngram, "islice", lambda chain, _: islice(chain, 1))


def continue_one_token_late(patch: pytest.MonkeyPatch) -> None:
    original = lookup.continuation
    patch.setattr(
        ngram, "continuation", lambda tokens, end, num: original(tokens, end, num + 1)[1:]
    )


def share_a_history_among_tenants(patch: pytest.MonkeyPatch) -> None:
    add, generations = History.add, History.generations
    patch.setattr(
        History, "add", lambda self, tenant, tokens, **rest: add(self, "", tokens, **rest)
    )
    patch.setattr(History, "generations", lambda self, tenant: generations(self, ""))


def keep_every_generation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(History, "_drop", lambda self, indices: indices.clear())
    original = History.add

    def add(self: History, tenant: str, tokens: Any, **rest: Any) -> None:
        kept = list(self.generations(tenant))
        original(self, tenant, tokens, **rest)
        now = self.generations(tenant)
        now.extend(index for index in kept if index not in now)

    patch.setattr(History, "add", add)


def keep_every_tenant(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(history, "_MAX_TENANTS", 10**9)


def continue_into_the_next_sequence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(suffix, "SEPARATOR", -1)


def let_every_match_count_alike(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(suffix, "_WEIGHTS", (1.0,) * 64)


def ignore_pending_tokens(patch: pytest.MonkeyPatch) -> None:
    propose = adaptive.LookupSpeculator.propose

    def forget_pending(self: Any, sequences: Any, **rest: Any) -> Any:
        for sequence in sequences:
            sequence.num_pending_tokens = 0
        return propose(self, sequences, **rest)

    patch.setattr(adaptive.LookupSpeculator, "propose", forget_pending)


def draft_to_the_very_last_token(patch: pytest.MonkeyPatch) -> None:
    most = adaptive.most_drafts
    patch.setattr(adaptive, "most_drafts", lambda sequence, k: most(sequence, k) + 1)


def score_only_what_was_sent(patch: pytest.MonkeyPatch) -> None:
    observe = adaptive.LookupSpeculator.observe

    def forgetful(self: Any, sequence: Any, *, num_drafted: int, num_accepted: int) -> None:
        if num_drafted:
            observe(self, sequence, num_drafted=num_drafted, num_accepted=num_accepted)

    patch.setattr(adaptive.LookupSpeculator, "observe", forgetful)


def score_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Acceptance, "score", lambda self, grade, *, is_accepted: None)


def index_a_prompt_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(adaptive, "INDEX_TOKENS_PER_ROUND", 10**9)


def take_the_barrier_for_free(patch: pytest.MonkeyPatch) -> None:
    from stepwire_scheduler.speculation.round_cost import RoundCost

    patch.setattr(RoundCost, "note_idle", lambda self, **_: None)
    original = RoundCost.__init__

    def without(self: RoundCost) -> None:
        original(self)
        self._barrier_ms = 0.0

    patch.setattr(RoundCost, "__init__", without)


def never_forget_a_step(patch: pytest.MonkeyPatch) -> None:
    from stepwire_scheduler.speculation import step_cost

    patch.setattr(step_cost, "_MAX_AGE", 10**9)


def take_draft_tokens_for_free(patch: pytest.MonkeyPatch) -> None:
    note = draft_model.DraftModelSpeculator.note_step

    def free(self: Any, **rest: Any) -> None:
        note(self, **rest)
        self._draft_ms = 0.0

    patch.setattr(draft_model.DraftModelSpeculator, "note_step", free)


def count_one_position_late(patch: pytest.MonkeyPatch) -> None:
    add = SpeculationCounters.add

    def late(self: SpeculationCounters, *, num_drafted: int, num_accepted: int) -> None:
        add(self, num_drafted=num_drafted, num_accepted=max(0, num_accepted - 1))

    patch.setattr(SpeculationCounters, "add", late)


GUARDS: list[tuple[Plant, Any]] = [
    (
        take_the_oldest_occurrence,
        LOOKUP.test_ngram_continues_the_longest_most_recent_match,
    ),
    (stop_at_the_first_match, LOOKUP.test_ngram_continues_the_longest_most_recent_match),
    (continue_one_token_late, LOOKUP.test_ngram_continues_the_longest_most_recent_match),
    (share_a_history_among_tenants, METHODS.test_tenants_never_see_what_others_said),
    (
        keep_every_generation,
        LOOKUP.test_history_keeps_the_newest_tokens_of_each_tenant_within_its_bound,
    ),
    (keep_every_tenant, METHODS.test_what_finished_sequences_leave_takes_bounded_memory),
    (continue_into_the_next_sequence, LOOKUP.test_suffix_follows_the_weighted_majority),
    (let_every_match_count_alike, LOOKUP.test_suffix_follows_the_weighted_majority),
    (ignore_pending_tokens, ADAPTIVE.test_a_draft_begins_behind_the_pending_tokens),
    (
        draft_to_the_very_last_token,
        lambda: ADAPTIVE.test_drafts_are_never_longer_than_request_budget_and_end_allow(0, None),
    ),
    (
        score_only_what_was_sent,
        ADAPTIVE.test_drafts_come_back_where_predictions_that_were_not_sent_came_true,
    ),
    (score_nothing, ADAPTIVE.test_bad_drafts_are_not_sent),
    (index_a_prompt_at_once, ADAPTIVE.test_a_long_prompt_is_indexed_in_several_rounds),
    (take_the_barrier_for_free, ADAPTIVE.test_the_wait_behind_drafts_is_part_of_their_price),
    (never_forget_a_step, ADAPTIVE.test_a_bad_figure_of_a_step_is_forgotten),
    (take_draft_tokens_for_free, ADAPTIVE.test_what_a_draft_model_takes_is_part_of_the_price),
    (count_one_position_late, METHODS.test_counters_count_by_position),
]


@pytest.mark.parametrize(("plant", "guard"), GUARDS, ids=[plant.__name__ for plant, _ in GUARDS])
def test_planted_bug_is_caught(
    plant: Plant, guard: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        guard()
