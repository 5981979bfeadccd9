"""The real planner with its invariants checked after every event."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from stepwire_scheduler.plan import SequenceUpdate, StepOutcome, StepPlan
from stepwire_scheduler.planner import Planner, PlannerConfig
from stepwire_scheduler.sequence import FinishReason, Request, Sequence, SequenceStatus
from stepwire_scheduler.speculation import Speculator

from tests.support.scripted_speculator import ScriptedSpeculator

if TYPE_CHECKING:
    from tests.simulation.world import World


class CheckedPlanner(Planner):
    """Reports what must never be to the world it runs in."""

    def __init__(
        self, world: World, config: PlannerConfig, speculator: ScriptedSpeculator | None
    ) -> None:
        config = replace(config, has_draft_model=world.scenario.speculation == "draft_model")
        super().__init__(config, prefix_key=b"simulated", speculator=speculator)
        self._world = world
        self._speculator = speculator
        self._touched: dict[int, set[int]] = {}
        """Blocks that each step in flight may read or write."""
        self._expected_key: dict[int, tuple[int, int]] = {}
        """Policy order by id of the sequence; sequences are kept in all_sequences."""
        self.all_sequences: list[Sequence] = []
        self.ends_by_ms: dict[int, float] = {}
        """When each must have ended, by id: validation may last past a deadline."""

    def add(self, request: Request) -> list[Sequence]:
        sequences = super().add(request)
        is_by_priority = self.config.scheduling_policy == "priority"
        for sequence in sequences:
            self.all_sequences.append(sequence)
            self.ends_by_ms[id(sequence)] = max(request.deadline_ms, self._world.now_ms)
            priority = request.priority if is_by_priority else 0
            self._expected_key[id(sequence)] = (priority, len(self.all_sequences))
        settings = self._world.scenario.config
        num_waiting, _ = self.count_waiting()
        num_tokens = sum(sequence.num_prompt_tokens for sequence in self.waiting)
        self._require(
            num_waiting <= settings.max_queued_requests, f"{num_waiting} sequences are queued"
        )
        self._require(num_tokens <= settings.max_queued_tokens, f"{num_tokens} tokens are queued")
        self._check()
        return sequences

    def count_waiting(self) -> tuple[int, int]:
        """Sequences and tokens that wait, counted one by one."""
        waiting = [s for s in self.all_sequences if s.status is SequenceStatus.WAITING]
        return len(waiting), sum(len(sequence.token_ids) for sequence in waiting)

    def plan(self, now_ms: float) -> StepPlan | None:
        has_drafts_inflight = any(plan.work_num_drafts for plan in self.inflight.values())
        plan = super().plan(now_ms)
        if plan is None:
            return None
        self._require(not has_drafts_inflight, "a plan follows drafts that are not verified")
        self._world.num_steps += 1
        self._touched[plan.step_id] = {
            block_id for sequence in plan.work_sequences for block_id in sequence.block_ids
        }
        if plan.admissions:
            self._check_order(plan)
        if self._world.is_tracing:
            work = dict(zip(plan.work_slots, plan.work_num_tokens, strict=True))
            self._world.note(
                f"plan {plan.step_id}: work {work}, drafts {plan.work_num_drafts} "
                f"{plan.draft_token_ids}, released {plan.released_slots}, admitted "
                f"{[s for s in plan.work_sequences if s.admitted_step_id == plan.step_id]}"
            )
        self._check()
        return plan

    def _check_order(self, plan: StepPlan) -> None:
        """Nothing that waits comes before what was admitted."""
        key = self._expected_key
        admitted = [key[id(s)] for s in plan.work_sequences if s.admitted_step_id == plan.step_id]
        first_waiting = min((key[id(s)] for s in self.waiting), default=None)
        if first_waiting is not None and admitted:
            self._require(max(admitted) < first_waiting, "a sequence was overtaken")

    def commit(self, outcome: StepOutcome, *, idle_ms: float | None = None) -> list[SequenceUpdate]:
        world = self._world
        self._require(
            (world.epoch, outcome.step_id) not in world.poisoned,
            f"a wrong result of step {outcome.step_id} was booked",
        )
        if outcome.failures:
            oldest = next(iter(self.inflight.values()))
            by_slot = dict(zip(oldest.work_slots, oldest.work_sequences, strict=True))
            world.failed_request_ids |= {
                by_slot[slot].request.request_id for slot in outcome.failures
            }
        updates = super().commit(outcome, idle_ms=idle_ms)
        world.last_booked_s = world.now_ms / 1e3
        self._touched.pop(outcome.step_id, None)
        if world.is_tracing:
            world.note(f"result {outcome.step_id}: {list(outcome.sampled_token_ids)}")
        self._check()
        return updates

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_token_id: int | None = None
    ) -> None:
        was_finished = sequence.finish_reason
        super().finish(sequence, reason, stop_token_id)
        self._require(sequence.finish_reason is (was_finished or reason), "a sequence ended twice")

    def expire(self, now_ms: float) -> list[SequenceUpdate]:
        expired = super().expire(now_ms)
        for update in expired:
            self._require(
                update.sequence.request.deadline_ms <= now_ms, "a deadline came too early"
            )
        if expired:
            self._check()
        return expired

    def reset_epoch(self, *, is_handover: bool = False) -> list[SequenceUpdate]:
        running = list(self.running)
        before = {id(each): (each.num_resumes, len(each.token_ids)) for each in running}
        failed = super().reset_epoch(is_handover=is_handover)
        if self._speculator is not None:
            self._speculator.reset_epoch()
        self._world.note(
            f"epoch ends{' by handover' * is_handover}; {len(running)} sequences are queued again"
        )
        if is_handover:
            self._world.num_handovers += bool(running)
            self._require(not self._touched, "a handover discards the results of steps in flight")
            self._require(
                before == {id(each): (each.num_resumes, len(each.token_ids)) for each in running},
                "a handover counts as a resume",
            )
        self._touched.clear()
        for sequence in self.waiting:
            self._require(
                sequence.num_resumes <= self.config.max_resumes, "a sequence is resumed too often"
            )
        self._require(self.block_pool.num_free == self.config.num_blocks, "blocks stay in use")
        self._check()
        return failed

    def reconfigure(
        self, config: PlannerConfig, *, speculator: Speculator | None = None
    ) -> list[SequenceUpdate]:
        self._world.note(f"the pool has {config.num_blocks} blocks of {config.block_size} now")
        config = replace(config, has_draft_model=self.config.has_draft_model)
        assert speculator is None or isinstance(speculator, ScriptedSpeculator)
        self._speculator = speculator
        misfits = super().reconfigure(config, speculator=speculator)
        self._check()
        return misfits

    def check_idle(self) -> None:
        """Everything is back where it was before the first request."""
        pool = self.block_pool
        self._require(not self.running and not self.waiting, "sequences are left")
        self._require(pool.num_free == pool.num_blocks, f"{pool.num_used} blocks are still used")
        self._require(
            len(self._running.free_slots) == self.config.max_num_seqs, "slots are still taken"
        )

    def _check(self) -> None:
        pool, num_blocks = self.block_pool, self.config.num_blocks
        counts = (pool.num_free, pool.num_used, pool.num_leased)
        self._require(
            sum(counts) == num_blocks and min(counts) >= 0,
            f"of {num_blocks} blocks {counts} are free, used and leased",
        )
        num_references: dict[int, int] = {}
        slots = set()
        for sequence in self.running:
            slots.add(sequence.slot)
            for block_id in sequence.block_ids:
                num_references[block_id] = num_references.get(block_id, 0) + 1
        self._require(len(slots) == len(self.running), "two sequences share a slot")
        self._require(
            all(0 <= slot < self.config.max_num_seqs for slot in slots), "a slot is out of range"
        )
        self._require(
            pool.num_used == len(num_references)
            and all(pool.ref_count(b) == count for b, count in num_references.items()),
            "references differ from the running sequences' block tables",
        )
        if not self.inflight:
            self._require(pool.num_leased == 0, "a lease outlives its step")
        is_free: Callable[[int], bool] = pool.is_free
        for step_id in self.inflight:
            self._require(
                not any(map(is_free, self._touched[step_id])),
                f"blocks of step {step_id}, which is in flight, are free",
            )

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            self._world.violate(problem)
