"""Bugs planted in the planner: each must break the state machine that guards it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from stepwire_scheduler import drafting as drafting_module
from stepwire_scheduler.block_pool import BlockPool
from stepwire_scheduler.block_table import BlockTables
from stepwire_scheduler.drafting import Drafting
from stepwire_scheduler.planner import Planner
from stepwire_scheduler.prefix_cache import PrefixCache
from stepwire_scheduler.running_set import RunningSet
from stepwire_scheduler.sequence import SequenceStatus
from support.planner_machine import PlannerMachine, SpeculatingPlannerMachine

Plant = Callable[[pytest.MonkeyPatch], None]


def free_without_lease(patch: pytest.MonkeyPatch) -> None:
    release = BlockPool.release
    patch.setattr(BlockPool, "release", lambda pool, blocks, _: release(pool, blocks, 0))


def keep_evicted_blocks_in_the_prefix_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixCache, "forget", lambda cache, block_id: None)
    patch.setattr(
        PrefixCache, "__contains__", lambda cache, block_id: block_id in cache._hash_of_block
    )


def find_the_whole_prompt_in_the_cache(patch: pytest.MonkeyPatch) -> None:
    def find(tables: BlockTables, sequence: Any) -> list[int]:
        cache, tenant = tables._prefix_cache, sequence.request.tenant
        cache.extend_hashes(sequence.block_hashes, sequence.token_ids, tenant)
        return cache.match(sequence.block_hashes, sequence.token_ids, tenant)

    patch.setattr(BlockTables, "find_cached", find)


def forget_samples_of_preempted_sequences(patch: pytest.MonkeyPatch) -> None:
    preempt = RunningSet._preempt

    def drop(running: RunningSet, sequence: Any, plan: Any) -> None:
        preempt(running, sequence, plan)
        sequence.num_pending_tokens = 0

    patch.setattr(RunningSet, "_preempt", drop)


def leave_the_slot_of_a_cancelled_sequence(patch: pytest.MonkeyPatch) -> None:
    finish = Planner.finish

    def leak(planner: Planner, sequence: Any, *arguments: Any, **keywords: Any) -> None:
        was_running = sequence.status is SequenceStatus.RUNNING
        finish(planner, sequence, *arguments, **keywords)
        if was_running and planner._running._released_slots:
            planner._running._released_slots.pop()

    patch.setattr(Planner, "finish", leak)


def give_every_block_at_once(patch: pytest.MonkeyPatch) -> None:
    extend = BlockTables.extend
    patch.setattr(
        BlockTables,
        "extend",
        lambda tables, sequence, _: extend(
            tables, sequence, len(sequence.token_ids) - sequence.num_computed_tokens
        ),
    )


def keep_epoch_state(patch: pytest.MonkeyPatch) -> None:
    reset = BlockPool.reset

    def forgetful(pool: BlockPool) -> None:
        entries = dict(pool._prefix_cache._entries)
        blocks = dict(pool._prefix_cache._hash_of_block)
        reset(pool)
        pool._prefix_cache._entries.update(entries)
        pool._prefix_cache._hash_of_block.update(blocks)

    patch.setattr(BlockPool, "reset", forgetful)


def keep_the_blocks_of_rejected_drafts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockTables, "cut", lambda tables, sequence: None)


def count_accepted_drafts_as_not_computed(patch: pytest.MonkeyPatch) -> None:
    book = Drafting.book

    def forgetful(drafting: Drafting, plan: Any, *arguments: Any) -> Any:
        sequences = plan.sampled_sequences
        before = [sequence.num_computed_tokens for sequence in sequences]
        updates = book(drafting, plan, *arguments)
        for sequence, num_computed in zip(sequences, before, strict=True):
            if sequence.status is SequenceStatus.RUNNING:
                sequence.num_computed_tokens = num_computed
        return updates

    patch.setattr(Drafting, "book", forgetful)


def count_rejected_drafts_as_computed(patch: pytest.MonkeyPatch) -> None:
    book = Drafting.book

    def hopeful(drafting: Drafting, plan: Any, *arguments: Any) -> Any:
        before = [len(sequence.token_ids) for sequence in plan.sampled_sequences]
        updates = book(drafting, plan, *arguments)
        for i, sequence in enumerate(plan.sampled_sequences):
            if plan.work_num_drafts and sequence.status is SequenceStatus.RUNNING:
                num_accepted = len(sequence.token_ids) - before[i] - 1
                sequence.num_computed_tokens += plan.work_num_drafts[i] - num_accepted
        return updates

    patch.setattr(Drafting, "book", hopeful)


def register_before_the_tokens_are_there(patch: pytest.MonkeyPatch) -> None:
    plan_drafts = Drafting.plan

    def early(drafting: Drafting, plan: Any, *arguments: Any) -> None:
        plan_drafts(drafting, plan, *arguments)
        for sequence, num_drafts in zip(plan.work_sequences, plan.work_num_drafts, strict=False):
            plan.filled.append((sequence, sequence.num_computed_tokens + num_drafts))

    patch.setattr(Drafting, "plan", early)


def deliver_tokens_behind_the_end(patch: pytest.MonkeyPatch) -> None:
    def keep(token_ids: list[int], stop_token_ids: frozenset[int]) -> int | None:
        return next((token for token in token_ids if token in stop_token_ids), None)

    patch.setattr(drafting_module, "_cut_behind_stop", keep)


def plan_on_before_drafts_are_verified(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Drafting, "is_inflight", property(lambda _: False, lambda *_: None), raising=False
    )


def draft_for_the_place_of_a_pending_token(patch: pytest.MonkeyPatch) -> None:
    def propose(drafting: Drafting, sequences: Any, num_tokens: int, budget: int) -> Any:
        return drafting._speculator.propose(sequences, num_tokens=num_tokens, budget=budget)

    patch.setattr(Drafting, "_propose", propose)


def draft_past_max_tokens(patch: pytest.MonkeyPatch) -> None:
    plan_drafts = Drafting.plan

    def long_winded(drafting: Drafting, plan: Any, num_decodes: int, config: Any) -> None:
        sequences = plan.work_sequences[:num_decodes]
        for sequence in sequences:
            sequence.max_num_tokens += 1
        plan_drafts(drafting, plan, num_decodes, config)
        for sequence in sequences:
            sequence.max_num_tokens -= 1

    patch.setattr(Drafting, "plan", long_winded)


def draft_into_blocks_that_are_not_free(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Drafting, "_room_of", lambda drafting, sequence, config: 1_000)


PLANTS: tuple[Plant, ...] = (
    free_without_lease,
    keep_evicted_blocks_in_the_prefix_cache,
    find_the_whole_prompt_in_the_cache,
    forget_samples_of_preempted_sequences,
    leave_the_slot_of_a_cancelled_sequence,
    give_every_block_at_once,
    keep_epoch_state,
)
PLANTS_IN_DRAFTING: tuple[Plant, ...] = (
    keep_the_blocks_of_rejected_drafts,
    count_accepted_drafts_as_not_computed,
    count_rejected_drafts_as_computed,
    register_before_the_tokens_are_there,
    deliver_tokens_behind_the_end,
    plan_on_before_drafts_are_verified,
    draft_for_the_place_of_a_pending_token,
    draft_past_max_tokens,
    draft_into_blocks_that_are_not_free,
)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_the_machine_catches(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    _check_machine_catches(PlannerMachine)


@pytest.mark.parametrize("plant", PLANTS_IN_DRAFTING, ids=lambda plant: plant.__name__)
def test_the_machine_that_speculates_catches(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    _check_machine_catches(SpeculatingPlannerMachine)


def _check_machine_catches(machine: type[PlannerMachine]) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - any broken invariant will do
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=2_000,
                stateful_step_count=50,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                print_blob=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
