"""Continuous batching as a pure state machine: events and the time in, step plans out.

No I/O, no clock, no randomness: the same calls give the same plans, so a recorded log replays
without an executor.
"""

from __future__ import annotations

from collections.abc import Iterable

from stepwire_scheduler.admission import plan_admissions
from stepwire_scheduler.block_pool import BlockPool
from stepwire_scheduler.deadlines import Deadlines
from stepwire_scheduler.drafting import Drafting
from stepwire_scheduler.plan import SequenceUpdate, StepOutcome, StepPlan
from stepwire_scheduler.planner_config import PlannerConfig
from stepwire_scheduler.request_queue import RequestQueue
from stepwire_scheduler.running_set import RunningSet
from stepwire_scheduler.sequence import FinishReason, Request, Sequence, SequenceStatus
from stepwire_scheduler.speculation.interface import Speculator

__all__ = ["Planner", "PlannerConfig"]


class Planner:
    """Holds every sequence and decides each step.

    Decodes first, then chunks of prefills, then admissions, then drafts behind the decodes, all
    from one token budget. Tokens stay here whatever becomes of a sequence's slot and blocks, and
    are recomputed.
    """

    def __init__(
        self, config: PlannerConfig, *, prefix_key: bytes, speculator: Speculator | None = None
    ) -> None:
        """prefix_key: secret bytes for the prefix cache's hash. speculator: proposes drafts."""
        self.config = config
        self.waiting = RequestQueue()
        self._running = RunningSet(config, self.waiting, prefix_key=prefix_key)
        self.inflight: dict[int, StepPlan] = {}
        """Plans without a result, oldest first."""
        self._deadlines = Deadlines()
        self._num_sequences = 0
        self._last_step_id = 0
        self._drafting = None if speculator is None else Drafting(speculator, self._running)

    @property
    def running(self) -> list[Sequence]:
        """Admitted sequences by order_key."""
        return self._running.sequences

    @property
    def block_pool(self) -> BlockPool:
        """The blocks of this epoch's executors."""
        return self._running.block_tables.pool

    @property
    def last_drafts(self) -> list[tuple[int, int]]:
        """Of the step booked last: how many tokens each draft had, and how many were accepted."""
        return [] if self._drafting is None else self._drafting.last_drafts

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
            self._deadlines.add(sequence)
            sequences.append(sequence)
        return sequences

    def take_over(
        self, sequence: Sequence, token_ids: Iterable[int], finish_reason: FinishReason | None
    ) -> None:
        """Go on with a sequence that was just added where another planner left it."""
        self.waiting.remove(sequence)
        sequence.token_ids.extend(token_ids)
        self.waiting.push(sequence)
        if finish_reason is not None:
            self.finish(sequence, finish_reason)

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_token_id: int | None = None
    ) -> None:
        """End a sequence now; its blocks are free once no step in flight touches them."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._running.leave(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        sequence.stop_token_id = stop_token_id
        if self._drafting is not None:
            self._drafting.forget(sequence)

    def expire(self, now_ms: float) -> list[SequenceUpdate]:
        """End every sequence whose deadline has passed."""
        expired: list[SequenceUpdate] = []
        for sequence in self._deadlines.pop_expired(now_ms):
            self.finish(sequence, FinishReason.DEADLINE)
            expired.append(SequenceUpdate(sequence))
        self._deadlines.forget_ended(len(self.waiting) + len(self.running))
        return expired

    @property
    def next_deadline_ms(self) -> float | None:
        """When expire may next have something to do."""
        return self._deadlines.next_ms

    def commit(self, outcome: StepOutcome, *, idle_ms: float | None = None) -> list[SequenceUpdate]:
        """Book the result of the oldest plan in flight.

        idle_ms: how long the executor had nothing to do before it; None where that was for want
        of work. Samples of sequences that have ended since are dropped; those of preempted ones
        count.
        """
        assert outcome.step_id == next(iter(self.inflight)), outcome.step_id
        plan = self.inflight.pop(outcome.step_id)
        tables = self._running.block_tables
        tables.register_full_blocks(plan)
        updates: list[SequenceUpdate] = []
        if outcome.failures:
            by_slot = dict(zip(plan.work_slots, plan.work_sequences, strict=True))
            for slot, reason in outcome.failures.items():
                sequence = by_slot[slot]
                if sequence.status is not SequenceStatus.FINISHED:
                    self.finish(sequence, FinishReason.ERROR)
                    updates.append(SequenceUpdate(sequence, error=reason))
        if self._drafting is not None:
            updates += self._drafting.book(plan, outcome, self.finish, idle_ms)
        else:
            self._book(plan, outcome, updates)
        tables.pool.acknowledge(outcome.step_id)
        return updates

    def _book(self, plan: StepPlan, outcome: StepOutcome, updates: list[SequenceUpdate]) -> None:
        """Append the one token of each sequence that a step without drafts has sampled."""
        logprobs, finished = outcome.logprobs, SequenceStatus.FINISHED
        sampled = zip(plan.sampled_sequences, outcome.sampled_token_ids, strict=True)
        for i, (sequence, token_id) in enumerate(sampled):
            sequence.num_pending_tokens -= 1
            if sequence.status is finished:
                continue
            sequence.token_ids.append(token_id)
            if token_id in sequence.stop_token_ids:
                self.finish(sequence, FinishReason.STOP, stop_token_id=token_id)
            elif len(sequence.token_ids) >= sequence.max_num_tokens:
                self.finish(sequence, FinishReason.LENGTH)
            entry = logprobs[i] if logprobs else None
            updates.append(SequenceUpdate(sequence, (token_id,), (entry,) if entry else ()))

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
        if self._drafting is not None:
            self._drafting.reset_epoch()
        failed: list[SequenceUpdate] = []
        for sequence in self._running.clear():
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

    def reconfigure(
        self, config: PlannerConfig, *, speculator: Speculator | None = None
    ) -> list[SequenceUpdate]:
        """Adopt what executors offer that came back with another pool; between epochs only.

        speculator: takes the place of the one before; what waits is new to it.
        Returns the sequences that can no longer fit, which end here.
        """
        assert not self.running, "reset_epoch comes first"
        assert not self.inflight, "reset_epoch comes first"
        if config.block_size != self.config.block_size:
            for sequence in self.waiting:
                sequence.block_hashes.clear()
        self.config = config
        self._running.reconfigure(config)
        self._drafting = None if speculator is None else Drafting(speculator, self._running)
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
        drafting = self._drafting
        if len(self.inflight) >= self.config.max_inflight_steps or (
            drafting is not None and drafting.is_inflight
        ):
            return None
        plan = StepPlan(step_id=self._last_step_id + 1)
        budget = self.config.max_num_batched_tokens
        prefills: list[Sequence] = []
        block_size = self.config.block_size
        add_work = plan.add_work
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
                    or self._running.ensure_blocks(sequence, 1, plan)
                )
            ):
                add_work(sequence, 1, block_size)
                budget -= 1
        num_decodes = len(plan.work_slots)
        if num_decodes or self._is_recomputing(prefills):
            budget = min(budget, self.config.max_num_prefill_tokens)
        budget = self._plan_prefills(prefills, budget, plan)
        if budget > 0 and plan.num_preemptions == 0:
            plan_admissions(
                self.config,
                self.waiting,
                self._running,
                prefills=prefills,
                budget=budget,
                plan=plan,
                now_ms=now_ms,
            )
        if not plan.work_slots:
            assert not plan.admissions
            return None
        if drafting is not None and num_decodes:
            drafting.plan(plan, num_decodes, self.config)
        plan.released_slots = self._running.take_released_slots()
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
            if self._running.ensure_blocks(sequence, num_tokens, plan):
                plan.add_work(sequence, num_tokens, self.config.block_size)
                budget -= num_tokens
        return budget

    def _num_remaining_tokens(self, sequence: Sequence) -> int:
        """Tokens that the executor will know and has not been asked to compute."""
        num_known = len(sequence.token_ids) + sequence.num_pending_tokens
        if num_known >= sequence.max_num_tokens:
            return 0  # the sample in flight is its last
        return num_known - sequence.num_computed_tokens


def _order_key(sequence: Sequence) -> tuple[int, int]:
    return sequence.order_key
