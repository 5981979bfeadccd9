"""Continuous batching as a pure state machine: events and the time in, step plans out.

No I/O, no clock, no randomness: the same calls give the same plans, so a recorded log replays
without an executor.
"""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass

from stepwire_scheduler.block_pool import BlockPool
from stepwire_scheduler.block_table import BlockTables
from stepwire_scheduler.config import SchedulingPolicy
from stepwire_scheduler.plan import Admission, SequenceUpdate, StepOutcome, StepPlan
from stepwire_scheduler.request_queue import RequestQueue
from stepwire_scheduler.sequence import FinishReason, Request, Sequence, SequenceStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerConfig:
    """What the executor offers and how to share it out."""

    num_blocks: int
    block_size: int
    """Tokens a KV block."""
    max_num_seqs: int
    """Slots of the executor."""
    max_num_batched_tokens: int
    """Most tokens a step."""
    max_num_prefill_tokens: int
    """Most prefill tokens a step while streams that have begun decode, or wait to be recomputed;
    bounds their gaps."""
    max_inflight_steps: int = 2
    """Plans that may be out without their result."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    enable_prefix_caching: bool = True
    eos_token_ids: frozenset[int] = frozenset()
    max_resumes: int = 3
    """Epochs that a sequence may lose before it fails."""


class Planner:
    """Holds every sequence and decides each step.

    Decodes first, then chunks of prefills, then admissions, all from one token budget. When
    blocks run out the cheapest later sequence of the lowest priority is preempted; its tokens
    stay here and are recomputed. Earlier sequences never wait for later ones, so the earliest
    always advances.
    """

    def __init__(self, config: PlannerConfig, *, prefix_key: bytes) -> None:
        """prefix_key: secret bytes for the prefix cache's hash."""
        self.config = config
        self._prefix_key = prefix_key
        self.block_tables = _block_tables(config, prefix_key)
        self.waiting = RequestQueue()
        self.running: list[Sequence] = []
        """Admitted sequences by order_key."""
        self.inflight: dict[int, StepPlan] = {}
        """Plans without a result, oldest first."""
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._released_slots: list[int] = []
        """Freed since the last plan; the executor has not been told."""
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._num_sequences = 0
        self._last_step_id = 0

    @property
    def block_pool(self) -> BlockPool:
        """The blocks of this epoch's executors."""
        return self.block_tables.pool

    # Events

    def add(self, request: Request) -> list[Sequence]:
        """Queue a request's n sequences; validation has checked that they can ever fit."""
        params = request.sampling_params
        stop_ids = params.stop_token_ids
        if not params.ignore_eos:
            stop_ids = stop_ids | self.config.eos_token_ids
        priority = request.priority if self.config.scheduling_policy == "priority" else 0
        sequences: list[Sequence] = []
        for index in range(params.n):
            self._num_sequences += 1
            sequence = Sequence(
                request,
                index,
                order_key=(priority, self._num_sequences),
                stop_ids=stop_ids,
                leader=sequences[0] if sequences else None,
            )
            self.waiting.push(sequence)
            if request.deadline_ms != float("inf"):
                heapq.heappush(
                    self._deadlines, (request.deadline_ms, self._num_sequences, sequence)
                )
            sequences.append(sequence)
        return sequences

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_token_id: int | None = None
    ) -> None:
        """End a sequence now; its blocks are free once no step in flight touches them."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._leave_slot(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        sequence.stop_token_id = stop_token_id

    def expire(self, now_ms: float) -> list[SequenceUpdate]:
        """End every sequence whose deadline has passed."""
        expired: list[SequenceUpdate] = []
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            _, _, sequence = heapq.heappop(self._deadlines)
            if sequence.status is not SequenceStatus.FINISHED:
                self.finish(sequence, FinishReason.DEADLINE)
                expired.append(SequenceUpdate(sequence))
        if len(self._deadlines) > 2 * (len(self.waiting) + len(self.running)) + 64:
            self._deadlines = [
                item for item in self._deadlines if item[2].status is not SequenceStatus.FINISHED
            ]
            heapq.heapify(self._deadlines)
        return expired

    @property
    def next_deadline_ms(self) -> float | None:
        """When expire may next have something to do."""
        return self._deadlines[0][0] if self._deadlines else None

    def commit(self, outcome: StepOutcome) -> list[SequenceUpdate]:
        """Book the result of the oldest plan in flight.

        Samples of sequences that have ended since are dropped; those of preempted ones count.
        """
        assert outcome.step_id == next(iter(self.inflight)), outcome.step_id
        plan = self.inflight.pop(outcome.step_id)
        assert len(outcome.sampled_token_ids) == len(plan.sampled_sequences)
        self.block_tables.register_full_blocks(plan)
        updates: list[SequenceUpdate] = []
        if outcome.failures:
            by_slot = dict(zip(plan.work_slots, plan.work_sequences, strict=True))
            for slot, reason in outcome.failures.items():
                sequence = by_slot[slot]
                if sequence.status is not SequenceStatus.FINISHED:
                    self.finish(sequence, FinishReason.ERROR)
                    updates.append(SequenceUpdate(sequence, error=reason))
        logprobs = outcome.logprobs
        for i, sequence in enumerate(plan.sampled_sequences):
            sequence.num_pending_tokens -= 1
            if sequence.status is SequenceStatus.FINISHED:
                continue
            token_id = outcome.sampled_token_ids[i]
            sequence.token_ids.append(token_id)
            if token_id in sequence.stop_token_ids:
                self.finish(sequence, FinishReason.STOP, stop_token_id=token_id)
            elif len(sequence.token_ids) >= sequence.max_num_tokens:
                self.finish(sequence, FinishReason.LENGTH)
            entry = logprobs[i] if logprobs else None
            updates.append(SequenceUpdate(sequence, (token_id,), (entry,) if entry else ()))
        self.block_tables.pool.acknowledge(outcome.step_id)
        return updates

    def reset_epoch(self, *, is_handover: bool = False) -> list[SequenceUpdate]:
        """Forget what the executor held: every running sequence waits to be admitted again.

        is_handover: the executors asked for it, and no plan is in flight; nothing is lost, so it
        does not count against max_resumes.
        Returns those that have lost more than max_resumes epochs and end here.
        """
        assert not (is_handover and self.inflight), "a handover waits for every result"
        for plan in self.inflight.values():
            for sequence in plan.sampled_sequences:
                sequence.num_pending_tokens = 0
        self.inflight.clear()
        self._last_step_id = 0
        self._released_slots.clear()
        self._free_slots = list(range(self.config.max_num_seqs - 1, -1, -1))
        self.block_tables.pool.reset()
        interrupted, self.running = self.running, []
        failed: list[SequenceUpdate] = []
        for sequence in interrupted:
            sequence.forget_computed()
            sequence.num_resumes += not is_handover
            sequence.status = SequenceStatus.WAITING
            self.waiting.push(sequence)
            if sequence.num_resumes > self.config.max_resumes:
                self.finish(sequence, FinishReason.ERROR)
                failed.append(SequenceUpdate(sequence, error="the executor was lost repeatedly"))
        self._choose_leaders()
        return failed

    def _choose_leaders(self) -> None:
        """Let the first sequence left of each request recompute the prompt for the others."""
        leaders: dict[int, Sequence] = {}
        several = (each for each in self.waiting if each.request.sampling_params.n > 1)
        for sequence in sorted(several, key=_order_key):
            leader = leaders.setdefault(id(sequence.request), sequence)
            sequence.leader = None if leader is sequence else leader

    def reconfigure(self, config: PlannerConfig) -> list[SequenceUpdate]:
        """Adopt what executors offer that came back with another pool; between epochs only.

        Returns the sequences that can no longer fit, which end here.
        """
        assert not self.running, "reset_epoch comes first"
        assert not self.inflight, "reset_epoch comes first"
        if config.block_size != self.config.block_size:
            for sequence in self.waiting:
                sequence.block_hashes.clear()
        self.config = config
        self.block_tables = _block_tables(config, self._prefix_key)
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        misfits = [
            sequence
            for sequence in self.waiting
            if sequence.max_num_tokens > config.num_blocks * config.block_size
        ]
        for sequence in misfits:
            self.finish(sequence, FinishReason.ERROR)
        reason = "the executors came back with too small a KV cache for it"
        return [SequenceUpdate(sequence, error=reason) for sequence in misfits]

    # Planning

    def plan(self, now_ms: float) -> StepPlan | None:
        """Decide the next step, or None where there is nothing to do or no room in flight."""
        if len(self.inflight) >= self.config.max_inflight_steps:
            return None
        plan = StepPlan(step_id=self._last_step_id + 1)
        budget = self.config.max_num_batched_tokens
        prefills: list[Sequence] = []
        block_size = self.config.block_size
        for sequence in tuple(self.running):
            num_known = len(sequence.token_ids) + sequence.num_pending_tokens
            num_computed = sequence.num_computed_tokens
            if num_known >= sequence.max_num_tokens:
                continue  # the sample in flight is its last
            if num_known - num_computed > 1:
                prefills.append(sequence)
            elif (
                num_known - num_computed == 1
                and budget > 0
                and sequence.status is SequenceStatus.RUNNING
                and (
                    num_computed < len(sequence.block_ids) * block_size  # most steps
                    or self._ensure_blocks(sequence, 1, plan)
                )
            ):
                self._schedule(sequence, 1, plan)
                budget -= 1
        if plan.work_slots or self._is_recomputing(prefills):
            budget = min(budget, self.config.max_num_prefill_tokens)
        budget = self._plan_prefills(prefills, budget, plan)
        if budget > 0 and plan.num_preemptions == 0:
            self._plan_admissions(budget, prefills, plan, now_ms)
        if not plan.work_slots:
            assert not plan.admissions
            return None
        plan.released_slots, self._released_slots = self._released_slots, []
        self._last_step_id = plan.step_id
        self.inflight[plan.step_id] = plan
        return plan

    def _is_recomputing(self, prefills: list[Sequence]) -> bool:
        """Whether a stream that has begun waits for its next token.

        Then one large step would let the first of many wait for the last of those that it holds.
        """
        first = self.waiting.peek()
        return any(sequence.num_output_tokens for sequence in prefills) or (
            first is not None and first.num_output_tokens > 0
        )

    def _plan_prefills(self, prefills: list[Sequence], budget: int, plan: StepPlan) -> int:
        for sequence in prefills:
            if budget <= 0:
                break
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted for an earlier one in this very step
            num_tokens = min(self._num_remaining_tokens(sequence), budget)
            if self._ensure_blocks(sequence, num_tokens, plan):
                self._schedule(sequence, num_tokens, plan)
                budget -= num_tokens
        return budget

    def _plan_admissions(
        self, budget: int, prefills: list[Sequence], plan: StepPlan, now_ms: float
    ) -> None:
        """Admit in strict order: a large request at the head is not overtaken, so not starved."""
        if not self._free_slots or not self.waiting:
            return
        tables = self.block_tables
        reserved = sum(tables.num_to_come(sequence) for sequence in prefills)
        while budget > 0 and self._free_slots:
            sequence = self.waiting.peek()
            if sequence is None or sequence.num_pending_tokens or self._awaits_leader(sequence):
                return
            cached = tables.find_cached(sequence)
            num_new = tables.num_blocks_for(len(sequence.token_ids)) - len(cached)
            available = tables.pool.num_free - tables.pool.num_free_among(cached)
            # Leave the running ones some room to grow, or admissions cause preemptions.
            watermark = max(1, self.config.num_blocks // 100) if self.running else 0
            if num_new + reserved + watermark > available:
                return
            self.waiting.pop()
            self._admit(sequence, cached, plan, now_ms)
            num_tokens = min(self._num_remaining_tokens(sequence), budget)
            tables.extend(sequence, num_tokens)
            reserved += tables.num_to_come(sequence)
            plan.admissions.append(self._describe_admission(sequence, num_cached=len(cached)))
            self._schedule(sequence, num_tokens, plan)
            budget -= num_tokens

    def _awaits_leader(self, sequence: Sequence) -> bool:
        """Whether another sequence of its request is about to fill blocks that it can share."""
        leader = sequence.leader
        return (
            self.config.enable_prefix_caching
            and leader is not None
            and leader.status is SequenceStatus.RUNNING
            and leader.num_registered_blocks
            < (sequence.num_prompt_tokens - 1) // self.config.block_size
        )

    def _admit(self, sequence: Sequence, cached: list[int], plan: StepPlan, now_ms: float) -> None:
        self.block_tables.open(sequence, cached)
        num_cached_tokens = sequence.num_computed_tokens
        sequence.slot = self._free_slots.pop()
        sequence.status = SequenceStatus.RUNNING
        sequence.admitted_step_id = plan.step_id
        bisect.insort(self.running, sequence, key=_order_key)
        if self.config.enable_prefix_caching:
            plan.num_prefix_queried_tokens += len(sequence.token_ids)
            plan.num_prefix_hit_tokens += num_cached_tokens
        if sequence.first_scheduled_ms is None:
            sequence.first_scheduled_ms = now_ms
            sequence.num_cached_tokens = num_cached_tokens
            plan.first_scheduled.append(sequence)

    def _describe_admission(self, sequence: Sequence, *, num_cached: int) -> Admission:
        return Admission(
            slot=sequence.slot,
            token_ids=sequence.token_ids[:],
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_computed_tokens=num_cached * self.config.block_size,
            block_ids=list(sequence.block_ids),
            sampling_params=sequence.request.sampling_params,
            stream=sequence.index,
            suppressed_token_ids=tuple(sorted(sequence.stop_token_ids))
            if sequence.request.sampling_params.min_tokens
            else (),
        )

    def _schedule(self, sequence: Sequence, num_tokens: int, plan: StepPlan) -> None:
        assert num_tokens > 0, sequence
        sequence.num_computed_tokens += num_tokens
        sequence.last_step_id = plan.step_id
        plan.work_slots.append(sequence.slot)
        plan.work_num_tokens.append(num_tokens)
        plan.work_sequences.append(sequence)
        plan.num_scheduled_tokens += num_tokens
        if num_tokens > 1 or sequence.num_computed_tokens % self.config.block_size == 0:
            plan.filled.append((sequence, sequence.num_computed_tokens))
        if sequence.num_computed_tokens == len(sequence.token_ids) + sequence.num_pending_tokens:
            sequence.num_pending_tokens += 1
            plan.sampled_sequences.append(sequence)

    def _num_remaining_tokens(self, sequence: Sequence) -> int:
        """Tokens that the executor will know and has not been asked to compute."""
        num_known = len(sequence.token_ids) + sequence.num_pending_tokens
        if num_known >= sequence.max_num_tokens:
            return 0  # the sample in flight is its last
        return num_known - sequence.num_computed_tokens

    # Blocks

    def _ensure_blocks(self, sequence: Sequence, num_tokens: int, plan: StepPlan) -> bool:
        """Give a running sequence the blocks for its next tokens; False: not in this step."""
        num_missing = self.block_tables.num_missing(sequence, num_tokens)
        if num_missing == 0:
            return True
        if not self._make_room(sequence, num_missing, plan):
            return False
        for block_id in self.block_tables.extend(sequence, num_tokens):
            plan.appended_slots.append(sequence.slot)
            plan.appended_block_ids.append(block_id)
        return True

    def _make_room(self, sequence: Sequence, num_blocks: int, plan: StepPlan) -> bool:
        pool = self.block_tables.pool
        while pool.num_free < num_blocks:
            if pool.num_free + pool.num_leased >= num_blocks:
                return False  # enough come back with the steps in flight
            victim = self._choose_victim(sequence, plan)
            if victim is None:
                if any(other.last_step_id == plan.step_id for other in self.running):
                    return False  # those in this step go on; their end frees blocks
                assert len(self.running) > 1, "a request that can never fit was accepted"
                victim = sequence
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        return True

    def _choose_victim(self, sequence: Sequence, plan: StepPlan) -> Sequence | None:
        """The lowest priority, then the fewest tokens to recompute, then the latest."""
        position = bisect.bisect_right(self.running, sequence.order_key, key=_order_key)
        candidates = [
            other for other in self.running[position:] if other.last_step_id != plan.step_id
        ]
        return min(
            candidates,
            key=lambda other: (-other.order_key[0], other.num_computed_tokens, -other.order_key[1]),
            default=None,
        )

    def _preempt(self, sequence: Sequence, plan: StepPlan) -> None:
        self._leave_slot(sequence)
        sequence.num_preemptions += 1
        plan.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self.waiting.push(sequence)

    def _leave_slot(self, sequence: Sequence) -> None:
        position = bisect.bisect_left(self.running, sequence.order_key, key=_order_key)
        assert self.running[position] is sequence, sequence
        del self.running[position]
        self._released_slots.append(sequence.slot)
        self._free_slots.append(sequence.slot)
        self.block_tables.close(sequence)


def _block_tables(config: PlannerConfig, prefix_key: bytes) -> BlockTables:
    return BlockTables(
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        prefix_key=prefix_key,
    )


def _order_key(sequence: Sequence) -> tuple[int, int]:
    return sequence.order_key
