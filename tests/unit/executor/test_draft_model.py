"""A draft model that is the target is always right, whatever became of its sequences before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stepwire_executor.engine.host import HostEngine
from stepwire_executor.model import LoadedModel
from stepwire_executor.speculation.draft_model import DraftModel
from stepwire_executor.speculation.draft_state import DraftState
from support import drafting_scenarios as scenarios
from support.drafting import (
    BLOCK_SIZE,
    BUILDERS,
    VOCAB_SIZE,
    Tally,
    load_tiny_model,
    make_drafting_executor,
    write_tiny_model,
)
from support.drafting_scenarios import Scenario, prompt
from support.executor_fakes import sampling_params
from support.rank_threads import run_ranks

SMALL_BUDGET = 32


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def target(path: Path) -> LoadedModel:
    return load_tiny_model(path)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A draft model that is right now and then: one layer, other heads, noise of its own."""
    directory = tmp_path_factory.mktemp("other")
    return load_tiny_model(write_tiny_model(directory, num_layers=1, seed=3, num_key_value_heads=6))


def _run(scenario: Scenario, target: LoadedModel, **options: Any) -> Tally:
    budget = SMALL_BUDGET if scenario is scenarios.slow_catching_up else 512
    return scenario(
        make_drafting_executor(target, target, max_num_batched_tokens=budget, **options)
    )


@pytest.mark.parametrize("engine_name", BUILDERS)
@pytest.mark.parametrize(
    "scenario", [*scenarios.ALL, scenarios.slow_catching_up], ids=lambda each: each.__name__
)
def test_a_draft_model_that_is_the_target_is_right_after(
    scenario: Scenario, engine_name: str, target: LoadedModel
) -> None:
    tally = _run(scenario, target, engine_name=engine_name)
    assert tally.num_asked > 0
    assert tally == Tally(
        num_asked=tally.num_asked, num_drafts=tally.num_asked, num_accepted=tally.num_asked
    )


def test_all_drafts_are_accepted_for_500_steps(target: LoadedModel) -> None:
    executor = make_drafting_executor(target, target)
    greedy = executor.join(0, prompt(5))
    seeded = executor.join(1, prompt(8), params=scenarios.PENALISED)
    for _ in range(500):
        executor.step({0: 1, 1: 3})
    assert greedy.tally == Tally(num_asked=500, num_drafts=500, num_accepted=500)
    assert seeded.tally == Tally(num_asked=1500, num_drafts=1500, num_accepted=1500)


def test_drafts_are_right_in_fp8_pages_too(target: LoadedModel) -> None:
    executor = make_drafting_executor(target, target, is_fp8=True)
    tally = scenarios.different_numbers_of_drafts(executor)
    assert tally.num_drafts == tally.num_accepted == tally.num_asked


@pytest.mark.parametrize("engine_name", BUILDERS)
def test_rejection_accepts_all_that_is_drawn_from_the_targets_own_distribution(
    target: LoadedModel, engine_name: str
) -> None:
    executor = make_drafting_executor(target, target, engine_name=engine_name, rule="rejection")
    tally = scenarios.different_numbers_of_drafts(executor)
    assert tally.num_accepted == tally.num_drafts == tally.num_asked


def test_rejection_accepts_some_of_another_draft_models_tokens_and_the_greedy_ids_stay(
    target: LoadedModel, other: LoadedModel
) -> None:
    alone = make_drafting_executor(target, None)
    expected = alone.join(0, prompt(6))
    while len(expected.output) < 60:
        alone.step(0)
    executor = make_drafting_executor(target, other, rule="rejection")
    greedy = executor.join(0, prompt(6))
    seeded = executor.join(1, prompt(7), params=scenarios.SEEDED)
    while len(greedy.output) < 60:
        executor.step({0: 2, 1: 4})
    assert greedy.output[:60] == expected.output[:60]
    assert 0 < seeded.tally.num_accepted < seeded.tally.num_drafts


@pytest.mark.parametrize(("engine_name", "num_drafts"), [("host", 1), ("host", 5), ("device", 3)])
def test_ids_are_those_without_drafts_whatever_the_draft_model(
    target: LoadedModel, other: LoadedModel, engine_name: str, num_drafts: int
) -> None:
    params = [sampling_params(), scenarios.PENALISED, scenarios.SEEDED, scenarios.LATE]
    outputs = []
    for draft in (None, other):
        executor = make_drafting_executor(target, draft, engine_name=engine_name)
        sequences = [
            executor.join(slot, prompt(5 + slot), params=each) for slot, each in enumerate(params)
        ]
        while min(len(sequence.output) for sequence in sequences) < 100:
            executor.step(0 if draft is None else num_drafts)
        outputs.append([sequence.output[:100] for sequence in sequences])
        if draft is not None:
            tally = sum((sequence.tally for sequence in sequences), Tally())
            assert 0 < tally.num_accepted < tally.num_drafts
    assert outputs[0] == outputs[1]


def test_what_is_proposed_depends_on_the_tokens_only(
    target: LoadedModel, other: LoadedModel
) -> None:
    """As many drafts are accepted as of a sequence that joined with these tokens a step ago."""
    executor = make_drafting_executor(target, other)
    sequence = executor.join(0, prompt(6), params=scenarios.PENALISED)
    accepted = {}
    for _ in range(25):
        num_tokens = len(sequence.token_ids)
        executor.step(4)
        accepted[num_tokens] = sequence.last.num_accepted
        # Tokens that the draft model does not compute, where its refused drafts were.
        executor.step(0)
        executor.step(0)
    assert len(set(accepted.values())) > 2, "too few kinds of acceptance to tell anything"
    fresh = make_drafting_executor(target, other)
    for num_tokens, num_accepted in accepted.items():
        joined = fresh.join(
            0,
            sequence.token_ids[:num_tokens],
            num_prompt_tokens=6,
            params=scenarios.PENALISED,
        )
        fresh.step(4)
        assert joined.last.num_accepted == num_accepted, num_tokens
        fresh.leave(joined)


def test_who_is_caught_up_with_proposes_nothing_and_keeps_nobody_from_it(
    target: LoadedModel,
) -> None:
    executor = make_drafting_executor(target, target, max_num_batched_tokens=SMALL_BUDGET)
    short = executor.join(0, prompt(3))
    executor.step(3)
    long = executor.join(1, prompt(90, seed=5))
    while len(long.token_ids) == 90:
        executor.step({0: 3}, chunks={1: 20})
    lasts = []
    while not long.last.num_drafts:
        executor.step(3)
        lasts.append((short.last.num_drafts, long.last.num_drafts))
    # Up to 32 tokens a step, 1 or 2 of which are the short one's, until there are 90 and more.
    assert lasts == [(3, 0), (3, 0), (3, 0), (3, 3)]
    assert short.tally.num_accepted == short.tally.num_drafts == short.tally.num_asked


def test_ranks_propose_the_same(path: Path, target: LoadedModel) -> None:
    def run(group: Any) -> list[list[int]]:
        shard = load_tiny_model(path, group=group)
        executor = make_drafting_executor(shard, target, group=group)
        scenarios.different_numbers_of_drafts(executor)
        return [
            [*sequence.output, sequence.tally.num_drafts, sequence.tally.num_accepted]
            for sequence in executor.sequences.values()
        ]

    first, second = run_ranks(2, run)
    assert first == second
    executor = make_drafting_executor(target, target)
    scenarios.different_numbers_of_drafts(executor)
    assert [each[:-2] for each in first] == [s.output for s in executor.sequences.values()]


def test_drafts_end_where_the_draft_models_context_does(
    target: LoadedModel, tmp_path: Path
) -> None:
    draft = load_tiny_model(write_tiny_model(tmp_path, max_position_embeddings=24))
    executor = make_drafting_executor(target, draft)
    sequence = executor.join(0, prompt(10))
    lengths = {}
    while len(sequence.token_ids) < 40:
        before = len(sequence.token_ids)
        executor.step(3)
        lengths[before] = sequence.last.num_drafts
    # The draft of position 24 is the last one: what comes after it needs a key at 24.
    assert lengths == {n: max(0, min(3, 24 - n + 1)) for n in lengths}
    assert sequence.tally.num_accepted > 0


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 9, VOCAB_SIZE + 27])
def test_heads_may_be_padded_to_different_sizes(
    target: LoadedModel, tmp_path: Path, vocab_size: int
) -> None:
    draft = load_tiny_model(write_tiny_model(tmp_path, vocab_size=vocab_size))
    outputs = []
    for each in (None, draft):
        executor = make_drafting_executor(target, each)
        sequence = executor.join(0, prompt(6), params=scenarios.SEEDED)
        while len(sequence.output) < 60:
            executor.step(0 if each is None else 3)
        outputs.append(sequence.output[:60])
    assert max(outputs[0]) >= VOCAB_SIZE - 9, "no token that only one of them has"
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("engine_name", BUILDERS)
def test_a_draft_model_whose_logits_are_not_finite_harms_nobody(
    target: LoadedModel, tmp_path: Path, engine_name: str
) -> None:
    broken = write_tiny_model(tmp_path)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = torch.nan
    save_file(tensors, broken / "model.safetensors")
    outputs = []
    for each in (None, load_tiny_model(broken)):
        executor = make_drafting_executor(target, each, engine_name=engine_name)
        params = [sampling_params(), scenarios.PENALISED]
        sequences = [executor.join(slot, prompt(6), params=p) for slot, p in enumerate(params)]
        while min(len(sequence.output) for sequence in sequences) < 20:
            executor.step(0 if each is None else 3)
        outputs.append([sequence.output[:20] for sequence in sequences])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("lengths", [[1], [3, 1, 1], [5000, 2]])
def test_padding_of_any_length_leaves_what_is_proposed_as_it_was(
    target: LoadedModel, lengths: list[int]
) -> None:
    executor = make_drafting_executor(target, target, engine_name="device")
    sequence = executor.join(0, prompt(10))
    executor.step(3)
    engine: Any = executor.runner._engine
    engine._draft_source._proposer.run_padding(lengths, executor.runner.slots)
    executor.step(3)
    assert sequence.tally.num_accepted == sequence.tally.num_asked == 6


def test_drafts_leave_nothing_of_themselves_in_the_block_table(
    target: LoadedModel, other: LoadedModel
) -> None:
    executor = make_drafting_executor(target, other)
    sequence = executor.join(0, prompt(6))
    for _ in range(20):
        executor.step(5)
        table = executor.runner.slots.block_table[0]
        assert table[table >= 0].tolist() == sequence.block_ids
    executor.leave(sequence)
    assert sorted(executor.free_blocks) == list(range(executor.num_blocks))


# Planted bugs: what each breaks, and in which life of a sequence it shows.

Plant = Callable[[pytest.MonkeyPatch], None]


def take_the_last_draft_for_computed(patch: pytest.MonkeyPatch) -> None:
    set_drafted = DraftState.set_drafted
    patch.setattr(
        DraftState,
        "set_drafted",
        lambda state, slot, start, num: set_drafted(state, slot, start, num + 1),
    )


def take_the_targets_keys_for_the_draft_models(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        DraftState,
        "num_computed_tokens",
        lambda state, rows, slots: slots.num_computed_tokens[rows].copy(),
    )


def keep_what_was_valid_of_another_sequence(patch: pytest.MonkeyPatch) -> None:
    take = DraftState.take

    def without_new_blocks(state: DraftState, applied: Any, slots: Any) -> None:
        valid = state._num_valid.copy()
        take(state, applied, slots)
        places = applied.table_places
        block_ids = slots.block_table.reshape(-1)[places]
        state._num_valid[block_ids] = valid[block_ids]

    patch.setattr(DraftState, "take", without_new_blocks)


def keep_what_was_valid_of_a_copys_target(patch: pytest.MonkeyPatch) -> None:
    take = DraftState.take

    def without_copies(state: DraftState, applied: Any, slots: Any) -> None:
        valid = state._num_valid.copy()
        take(state, applied, slots)
        state._num_valid[applied.copy_targets] = valid[applied.copy_targets]

    patch.setattr(DraftState, "take", without_copies)


def take_every_block_for_full(patch: pytest.MonkeyPatch) -> None:
    num_computed_tokens = DraftState.num_computed_tokens

    def rounded_up(state: DraftState, rows: Any, slots: Any) -> Any:
        exact = num_computed_tokens(state, rows, slots)
        return np.minimum(-(-exact // BLOCK_SIZE) * BLOCK_SIZE, slots.num_tokens[rows])

    patch.setattr(DraftState, "num_computed_tokens", rounded_up)


def take_a_part_for_all_of_it(patch: pytest.MonkeyPatch) -> None:
    set_computed = DraftState.set_computed

    def to_the_end(state: DraftState, slot: int, start: int, end: int, slots: Any) -> None:
        set_computed(state, slot, start, max(end, int(slots.num_tokens[slot]) - 1), slots)

    patch.setattr(DraftState, "set_computed", to_the_end)


def forget_the_drafts_before(patch: pytest.MonkeyPatch) -> None:
    gather = HostEngine._draw

    def uncounted(engine: HostEngine, table: Any, logits: Any, slots: Any, drafts: Any) -> Any:
        counts = engine._sampling.gather

        def without(slots: Any, positions: Any, num_generated: Any, _before: Any) -> Any:
            return counts(slots, positions, num_generated, lambda row: np.zeros(0, np.int64))

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(engine._sampling, "gather", without)
            return gather(engine, table, logits, slots, drafts)

    patch.setattr(HostEngine, "_draw", uncounted)


def mix_up_whose_drafts_are_whose(patch: pytest.MonkeyPatch) -> None:
    in_order = DraftModel._in_order_of

    def by_rank(model: DraftModel, places: Any, num_drafts: Any, drawn: Any) -> Any:
        return in_order(model, np.sort(places), num_drafts, drawn)

    patch.setattr(DraftModel, "_in_order_of", by_rank)


def draw_with_other_noise(patch: pytest.MonkeyPatch) -> None:
    draw = HostEngine._draw

    def elsewhere(engine: HostEngine, table: Any, logits: Any, slots: Any, drafts: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(table, "num_tokens", table.num_tokens + 1)
            return draw(engine, table, logits, slots, drafts)

    patch.setattr(HostEngine, "_draw", elsewhere)


MUTANTS: list[tuple[Plant, Scenario]] = [
    (take_the_last_draft_for_computed, scenarios.different_numbers_of_drafts),
    (take_the_targets_keys_for_the_draft_models, scenarios.prefix_hit_without_drafts),
    (take_the_targets_keys_for_the_draft_models, scenarios.pause),
    (take_the_targets_keys_for_the_draft_models, scenarios.preemption),
    (keep_what_was_valid_of_another_sequence, scenarios.reused_blocks),
    (keep_what_was_valid_of_another_sequence, scenarios.preemption),
    (keep_what_was_valid_of_a_copys_target, scenarios.copied_block),
    (take_every_block_for_full, scenarios.prefix_hit_on_a_half_drafted_block),
    (take_a_part_for_all_of_it, scenarios.slow_catching_up),
    (forget_the_drafts_before, scenarios.different_numbers_of_drafts),
    (mix_up_whose_drafts_are_whose, scenarios.different_numbers_of_drafts),
    (draw_with_other_noise, scenarios.different_numbers_of_drafts),
]


@pytest.mark.parametrize(
    ("plant", "scenario"), MUTANTS, ids=lambda each: getattr(each, "__name__", None)
)
def test_a_planted_bug_shows_in_the_acceptance(
    plant: Plant, scenario: Scenario, target: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    tally = _run(scenario, target)
    assert tally.num_accepted < tally.num_asked


def test_keys_of_refused_drafts_that_stay_show_in_what_is_proposed(
    target: LoadedModel, other: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = DraftState.take

    def all_accepted(state: DraftState, applied: Any, slots: Any) -> None:
        for slot, (start, num_drafts) in state._drafted.items():
            if slots.is_occupied[slot]:
                end = min(start + num_drafts, BLOCK_SIZE * int(slots.num_table_blocks[slot]))
                state.set_computed(slot, start, end, slots)
        take(state, applied, slots)

    monkeypatch.setattr(DraftState, "take", all_accepted)
    with pytest.raises(AssertionError):
        test_what_is_proposed_depends_on_the_tokens_only(target, other)
