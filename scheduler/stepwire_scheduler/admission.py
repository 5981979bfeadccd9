"""Lets sequences that wait join the step that is being planned."""

from __future__ import annotations

from stepwire_scheduler.plan import Admission, StepPlan
from stepwire_scheduler.planner_config import PlannerConfig
from stepwire_scheduler.request_queue import RequestQueue
from stepwire_scheduler.running_set import RunningSet
from stepwire_scheduler.sequence import Sequence, SequenceStatus


def plan_admissions(
    config: PlannerConfig,
    waiting: RequestQueue,
    running: RunningSet,
    *,
    prefills: list[Sequence],
    budget: int,
    plan: StepPlan,
    now_ms: float,
) -> None:
    """Admit in strict order: a large request at the head is not overtaken, so not starved.

    prefills: running sequences that still need blocks for tokens that they know.
    budget: most tokens of the admitted in this step.
    """
    if not running.free_slots or not waiting:
        return
    tables = running.block_tables
    reserved = sum(tables.num_to_come(sequence) for sequence in prefills)
    while budget > 0 and running.free_slots:
        sequence = waiting.peek()
        if sequence is None or sequence.num_pending_tokens or _awaits_leader(sequence, config):
            return
        cached = tables.find_cached(sequence)
        num_new = tables.num_blocks_for(len(sequence.token_ids)) - len(cached)
        available = tables.pool.num_free - tables.pool.num_free_among(cached)
        # Leave the running ones some room to grow, or admissions cause preemptions.
        watermark = max(1, config.num_blocks // 100) if running.sequences else 0
        if num_new + reserved + watermark > available:
            return
        waiting.pop()
        running.enter(sequence, cached, plan)
        num_cached_tokens = sequence.num_computed_tokens
        if config.enable_prefix_caching:
            plan.num_prefix_queried_tokens += len(sequence.token_ids)
            plan.num_prefix_hit_tokens += num_cached_tokens
        if sequence.first_scheduled_ms is None:
            sequence.first_scheduled_ms = now_ms
            sequence.num_cached_tokens = num_cached_tokens
            plan.first_scheduled.append(sequence)
        num_tokens = min(len(sequence.token_ids) - num_cached_tokens, budget)
        tables.extend(sequence, num_tokens)
        reserved += tables.num_to_come(sequence)
        plan.admissions.append(_describe(sequence, num_cached_tokens))
        plan.add_work(sequence, num_tokens, config.block_size)
        budget -= num_tokens


def _awaits_leader(sequence: Sequence, config: PlannerConfig) -> bool:
    """Whether another sequence of its request is about to fill blocks that it can share."""
    leader = sequence.leader
    return (
        config.enable_prefix_caching
        and leader is not None
        and leader.status is SequenceStatus.RUNNING
        and leader.num_registered_blocks < (sequence.num_prompt_tokens - 1) // config.block_size
    )


def _describe(sequence: Sequence, num_cached_tokens: int) -> Admission:
    return Admission(
        slot=sequence.slot,
        token_ids=sequence.token_ids[:],
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_computed_tokens=num_cached_tokens,
        block_ids=list(sequence.block_ids),
        sampling_params=sequence.request.sampling_params,
        stream=sequence.index,
        suppressed_token_ids=tuple(sorted(sequence.stop_token_ids))
        if sequence.request.sampling_params.min_tokens
        else (),
    )
