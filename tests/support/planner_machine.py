"""The planner under random operations: no block is lost, no token is wrong."""

from __future__ import annotations

from array import array
from collections import deque
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stepwire_scheduler.plan import StepOutcome
from stepwire_scheduler.planner import Planner, PlannerConfig
from stepwire_scheduler.sequence import (
    FinishReason,
    Request,
    SamplingParams,
    Sequence,
    SequenceStatus,
)
from support.scripted_speculator import DraftModelSpeculator, ScriptedSpeculator
from support.simulated_executor import SimulatedExecutor, hashed_draft, hashed_sample, truth_of

VOCAB_SIZE = 3  # small, so that prefixes collide and end-of-sequence comes often
EOS = 2
TENANTS = ("", "other")


class PlannerMachine(RuleBasedStateMachine):
    """Requests, cancels, deadlines, lost executors and late results in any order."""

    is_speculating: ClassVar[bool] = False

    @initialize(
        num_blocks=st.integers(3, 12),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        max_num_batched_tokens=st.integers(1, 12),
        max_num_prefill_tokens=st.integers(1, 8),
        max_inflight_steps=st.integers(1, 3),
        policy=st.sampled_from(["fcfs", "priority"]),
        enable_prefix_caching=st.booleans(),
        has_draft_model=st.booleans(),
        speculation_seed=st.integers(0, 99),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_prefill_tokens: int,
        max_inflight_steps: int,
        policy: str,
        enable_prefix_caching: bool,
        has_draft_model: bool,
        speculation_seed: int,
    ) -> None:
        self.config = PlannerConfig(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_prefill_tokens=max_num_prefill_tokens,
            max_inflight_steps=max_inflight_steps,
            scheduling_policy=policy,  # type: ignore[arg-type]
            enable_prefix_caching=enable_prefix_caching,
            eos_token_ids=frozenset({EOS}),
            max_resumes=2,
            has_draft_model=has_draft_model,
        )
        self.sample = hashed_sample(VOCAB_SIZE)
        self.speculator: ScriptedSpeculator | None = None
        if self.is_speculating:
            speculate = DraftModelSpeculator if has_draft_model else ScriptedSpeculator
            self.speculator = speculate(
                truth_of(self.sample), vocab_size=VOCAB_SIZE, seed=speculation_seed
            )
        self.planner = Planner(self.config, prefix_key=b"secret", speculator=self.speculator)
        self.now_ms = 0.0
        self.sequences: list[Sequence] = []
        self.results: deque[StepOutcome] = deque()
        self.ended: list[Sequence] = []
        self._start_executor()

    def _start_executor(self) -> None:
        self.executor = SimulatedExecutor(
            num_blocks=self.config.num_blocks,
            block_size=self.config.block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            sample=self.sample,
            draft=hashed_draft(self.sample, VOCAB_SIZE),
        )
        if self.speculator is not None:
            self.speculator.reset_epoch()
        self.results.clear()
        self.touched: dict[int, set[int]] = {}

    @rule(
        prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12),
        max_tokens=st.integers(1, 12),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
        ignore_eos=st.booleans(),
        tenant=st.sampled_from(TENANTS),
        time_left_ms=st.sampled_from([1.0, 20.0, float("inf")]),
        num_speculative_tokens=st.sampled_from([None, None, 0, 1, 3]),
    )
    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        n: int,
        priority: int,
        ignore_eos: bool,
        tenant: str,
        time_left_ms: float,
        num_speculative_tokens: int | None,
    ) -> None:
        room = self.config.num_blocks * self.config.block_size
        if len(prompt) >= room:
            return
        self.sequences += self.planner.add(
            Request(
                request_id=f"r{len(self.sequences)}",
                prompt_token_ids=array("I", prompt),
                sampling_params=SamplingParams(
                    max_tokens=min(max_tokens, room - len(prompt)),
                    n=n,
                    ignore_eos=ignore_eos,
                    num_speculative_tokens=num_speculative_tokens,
                ),
                priority=priority,
                arrival_ms=self.now_ms,
                deadline_ms=self.now_ms + time_left_ms,
                tenant=tenant,
            )
        )

    @rule()
    def plan(self) -> None:
        earliest = self.planner.running[0] if self.planner.running else None
        has_drafts_inflight = any(self.drafts_inflight)
        plan = self.planner.plan(self.now_ms)
        if earliest is not None:
            assert earliest.status is SequenceStatus.RUNNING, "preempted for a later one"
        if plan is not None:
            assert not has_drafts_inflight, "planned before the drafts were verified"
            for sequence, num_drafts in zip(plan.work_sequences, plan.work_num_drafts):  # noqa: B905 - none where nothing is drafted
                num_asked = sequence.request.sampling_params.num_speculative_tokens
                assert num_asked is None or num_drafts <= num_asked
            self.touched[plan.step_id] = {
                block_id for sequence in plan.work_sequences for block_id in sequence.block_ids
            }
            self.results.append(self.executor.execute(plan))

    @precondition(lambda self: self.results)
    @rule()
    def receive(self) -> None:
        for update in self.planner.commit(self.results.popleft()):
            if update.sequence.status is SequenceStatus.FINISHED:
                self._note_end(update.sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        if sequence.status is not SequenceStatus.FINISHED:
            self.planner.finish(sequence, FinishReason.CANCELLED)
            self._note_end(sequence)

    @rule(passed_ms=st.floats(0, 10))
    def wait(self, passed_ms: float) -> None:
        self.now_ms += passed_ms
        for update in self.planner.expire(self.now_ms):
            assert update.sequence.request.deadline_ms <= self.now_ms
            self._note_end(update.sequence)

    @rule()
    def lose_executor(self) -> None:
        for update in self.planner.reset_epoch():
            assert update.sequence.num_resumes > self.config.max_resumes
            self._note_end(update.sequence)
        self._start_executor()

    @precondition(lambda self: not self.planner.inflight)
    @rule()
    def hand_over(self) -> None:
        before = [(each.num_resumes, len(each.token_ids)) for each in self.sequences]
        assert self.planner.reset_epoch(is_handover=True) == []
        assert before == [(each.num_resumes, len(each.token_ids)) for each in self.sequences]
        self._start_executor()

    def _note_end(self, sequence: Sequence) -> None:
        assert sequence not in self.ended, "ended twice"
        assert sequence.finish_reason is not None
        self.ended.append(sequence)

    @invariant()
    def every_block_is_free_used_or_leased(self) -> None:
        pool = self.planner.block_pool
        assert pool.num_free + pool.num_used + pool.num_leased == self.config.num_blocks
        assert min(pool.num_free, pool.num_used, pool.num_leased) >= 0
        references: dict[int, int] = {}
        for sequence in self.planner.running:
            for block_id in sequence.block_ids:
                references[block_id] = references.get(block_id, 0) + 1
        for block_id in range(self.config.num_blocks):
            assert pool.ref_count(block_id) == references.get(block_id, 0)
        assert pool.num_used == len(references)
        if not self.planner.inflight:
            assert pool.num_leased == 0, "a lease outlived its step"

    @invariant()
    def blocks_of_a_step_in_flight_are_not_free(self) -> None:
        for step_id in self.planner.inflight:
            assert not any(map(self.planner.block_pool.is_free, self.touched[step_id]))

    @property
    def drafts_inflight(self) -> dict[int, int]:
        """How many drafts each sequence has in flight, by its id."""
        return {
            id(sequence): num_drafts
            for plan in self.planner.inflight.values()
            if plan.work_num_drafts
            for sequence, num_drafts in zip(plan.work_sequences, plan.work_num_drafts, strict=True)
            if num_drafts
        }

    @invariant()
    def no_more_is_allocated_than_the_next_block(self) -> None:
        drafts = self.drafts_inflight
        for sequence in self.planner.running:
            num_needed = sequence.num_computed_tokens + drafts.get(id(sequence), 0)
            if self.speculator is not None and num_needed + 1 == len(sequence.token_ids):
                num_needed += 1  # what is behind accepted drafts may have its block already
            num_cells = len(sequence.block_ids) * self.config.block_size
            assert num_cells - num_needed < self.config.block_size

    @invariant()
    def the_executor_holds_what_the_planner_thinks(self) -> None:
        if self.planner.inflight:
            return
        for sequence in self.planner.running:
            slot = self.executor.slots[sequence.slot]
            assert slot.token_ids == list(sequence.token_ids)
            assert slot.num_computed == sequence.num_computed_tokens
            assert slot.block_ids == sequence.block_ids

    @invariant()
    def tokens_are_those_of_an_undisturbed_run(self) -> None:
        for sequence in self.sequences:
            tokens = list(sequence.token_ids)
            for end in range(sequence.num_prompt_tokens, len(tokens)):
                assert tokens[end] == self.sample(tokens[:end], sequence.index)
            assert len(tokens) <= sequence.max_num_tokens
            output = tokens[sequence.num_prompt_tokens :]
            if not sequence.request.sampling_params.ignore_eos:
                assert EOS not in output[:-1], "went on past the end"

    @invariant()
    def every_sequence_is_in_one_place(self) -> None:
        statuses = [sequence.status for sequence in self.sequences]
        assert statuses.count(SequenceStatus.RUNNING) == len(self.planner.running)
        assert statuses.count(SequenceStatus.WAITING) == len(self.planner.waiting)
        assert statuses.count(SequenceStatus.FINISHED) == len(self.ended)
        slots = [sequence.slot for sequence in self.planner.running]
        assert len(set(slots)) == len(slots) <= self.config.max_num_seqs
        assert self.planner.running == sorted(self.planner.running, key=lambda s: s.order_key)

    def teardown(self) -> None:
        """Left alone, everything accepted comes to its end and every block comes back."""
        if not hasattr(self, "planner"):
            return
        for _ in range(10_000):
            if len(self.ended) == len(self.sequences):
                break
            self.plan()
            if self.results:
                self.receive()
            else:
                assert self.planner.inflight or not self.planner.running, "stuck"
        assert len(self.ended) == len(self.sequences), "starved"
        while self.results:
            self.receive()
        assert self.planner.block_pool.num_free == self.config.num_blocks
        self.every_block_is_free_used_or_leased()
        self.tokens_are_those_of_an_undisturbed_run()


class SpeculatingPlannerMachine(PlannerMachine):
    """The same with drafts, from the scheduler or a draft model, right up to a random place."""

    is_speculating = True
