"""Bugs planted in the planner: each must break the state machine that guards it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from stepwire_scheduler.block_pool import BlockPool
from stepwire_scheduler.block_table import BlockTables
from stepwire_scheduler.planner import Planner
from stepwire_scheduler.prefix_cache import PrefixCache
from stepwire_scheduler.running_set import RunningSet
from stepwire_scheduler.sequence import SequenceStatus
from support.planner_machine import PlannerMachine

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


def preempt_the_earliest(patch: pytest.MonkeyPatch) -> None:
    def earliest(running: RunningSet, sequence: Any, plan: Any) -> Any:
        others = [o for o in running.sequences if o.last_step_id != plan.step_id]
        return next((o for o in others if o is not sequence), None)

    patch.setattr(RunningSet, "_choose_victim", earliest)


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


@pytest.mark.parametrize(
    "plant",
    [
        free_without_lease,
        keep_evicted_blocks_in_the_prefix_cache,
        find_the_whole_prompt_in_the_cache,
        forget_samples_of_preempted_sequences,
        preempt_the_earliest,
        leave_the_slot_of_a_cancelled_sequence,
        give_every_block_at_once,
        keep_epoch_state,
    ],
    ids=lambda plant: plant.__name__,
)
def test_the_machine_catches(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017, PT011 - any broken invariant will do
        run_state_machine_as_test(
            PlannerMachine,
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
