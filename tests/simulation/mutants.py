"""Bugs to plant in the scheduler: the simulation must notice each."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import pytest
from stepwire.executor.v1 import executor_pb2 as pb
from stepwire_scheduler import drafting
from stepwire_scheduler.block_pool import BlockPool
from stepwire_scheduler.block_table import BlockTables
from stepwire_scheduler.executor_client import ExecutorGroup, PlanStream
from stepwire_scheduler.executor_groups import ExecutorGroups
from stepwire_scheduler.plan import SequenceUpdate, StepOutcome, StepPlan
from stepwire_scheduler.planner import Planner
from stepwire_scheduler.request_stream import RequestStream, StreamReader
from stepwire_scheduler.running_requests import RunningRequests
from stepwire_scheduler.running_set import RunningSet
from stepwire_scheduler.sequence import FinishReason, Sequence, SequenceStatus
from stepwire_scheduler.step_loop import StepLoop

Plant = Callable[[pytest.MonkeyPatch], None]


def ignore_leases(mutate: pytest.MonkeyPatch) -> None:
    release = BlockPool.release
    mutate.setattr(BlockPool, "release", lambda pool, blocks, _: release(pool, blocks, 0))


def lease_to_the_last_who_leaves(mutate: pytest.MonkeyPatch) -> None:
    release = BlockPool.release

    def forgetful(pool: BlockPool, block_ids: list[int], last_step_id: int) -> None:
        pool._last_step_ids = [0] * pool.num_blocks
        release(pool, block_ids, last_step_id)

    mutate.setattr(BlockPool, "release", forgetful)


def accept_results_of_any_epoch(mutate: pytest.MonkeyPatch) -> None:
    receive = PlanStream.receive

    async def credulous(stream: PlanStream) -> Any:
        parse = PlanStream._on_all

        async def relabel(self: PlanStream, operation: Any) -> list[pb.ExecuteResponse]:
            replies = await parse(self, operation)
            for reply in replies:
                if reply is not None:
                    reply.step_result.epoch = self.epoch
            return replies

        with patch.object(PlanStream, "_on_all", relabel):
            return await receive(stream)

    mutate.setattr(PlanStream, "receive", credulous)


def ignore_checksums(mutate: pytest.MonkeyPatch) -> None:
    on_all = PlanStream._on_all

    async def trusting(stream: PlanStream, operation: Any) -> Any:
        replies = await on_all(stream, operation)
        for reply in replies:
            if reply is not None and reply.HasField("step_result"):
                reply.step_result.slot_table_checksum = 0
        return replies

    mutate.setattr(PlanStream, "_on_all", trusting)


def book_tokens_of_resumed_sequences_twice(mutate: pytest.MonkeyPatch) -> None:
    commit = Planner.commit

    def eager(planner: Planner, outcome: StepOutcome) -> list[SequenceUpdate]:
        updates = commit(planner, outcome)
        again = [u for u in updates if u.sequence.num_resumes and not u.sequence.finish_reason]
        return [*again[:1], *updates]

    mutate.setattr(Planner, "commit", eager)


def keep_blocks_of_cancelled_sequences(mutate: pytest.MonkeyPatch) -> None:
    finish = Planner.finish

    def leaky(planner: Planner, sequence: Sequence, reason: FinishReason, *rest: Any) -> None:
        if reason is FinishReason.CANCELLED and sequence.status is SequenceStatus.RUNNING:
            sequence.block_ids = sequence.block_ids[:-1]
        finish(planner, sequence, reason, *rest)

    mutate.setattr(Planner, "finish", leaky)


def queue_by_arrival_only(mutate: pytest.MonkeyPatch) -> None:
    add = Planner.add

    def impartial(planner: Planner, request: Any) -> list[Sequence]:
        return add(planner, dataclasses.replace(request, priority=-request.priority))

    mutate.setattr(Planner, "add", impartial)


def queue_without_bound(mutate: pytest.MonkeyPatch) -> None:
    submit = StepLoop.submit

    def generous(loop: StepLoop, request: Any) -> Any:
        config = loop._config
        loop._config = dataclasses.replace(config, max_queued_requests=1_000)
        try:
            return submit(loop, request)
        finally:
            loop._config = config

    mutate.setattr(StepLoop, "submit", generous)


def accept_what_no_longer_fits(mutate: pytest.MonkeyPatch) -> None:
    mutate.setattr(StepLoop, "_check_fits", lambda loop, request: None)


def open_epochs_without_a_deadline(mutate: pytest.MonkeyPatch) -> None:
    async def patient(loop: StepLoop, group: ExecutorGroup, *arguments: Any) -> PlanStream:
        return await group.open_epoch(*arguments)

    mutate.setattr(StepLoop, "_open_epoch", patient)


def leave_calls_of_failed_openings(mutate: pytest.MonkeyPatch) -> None:
    async def careless(group: ExecutorGroup, epoch: int, descriptions: Any) -> PlanStream:
        stream = PlanStream(epoch, group._channels)
        await stream.open(descriptions[0].model_fingerprint)
        return stream

    mutate.setattr(ExecutorGroup, "open_epoch", careless)


def watch_no_step(mutate: pytest.MonkeyPatch) -> None:
    async def blind(loop: StepLoop) -> None:
        await asyncio.Event().wait()

    mutate.setattr(StepLoop, "_watch_steps", blind)


def forget_deadlines(mutate: pytest.MonkeyPatch) -> None:
    mutate.setattr(Planner, "expire", lambda planner, now_ms: [])


def resume_for_ever(mutate: pytest.MonkeyPatch) -> None:
    reset_epoch = Planner.reset_epoch

    def stubborn(planner: Planner, **how: bool) -> list[SequenceUpdate]:
        config = planner.config
        planner.config = dataclasses.replace(config, max_resumes=1_000)
        try:
            return reset_epoch(planner, **how)
        finally:
            planner.config = config

    mutate.setattr(Planner, "reset_epoch", stubborn)


def wait_for_slow_readers(mutate: pytest.MonkeyPatch) -> None:
    mutate.setattr(RunningRequests, "end_slow_readers", lambda requests, now, timeout_ms: None)


def forget_samples_of_preempted_sequences(mutate: pytest.MonkeyPatch) -> None:
    preempt = RunningSet._preempt

    def drop(running: RunningSet, sequence: Sequence, plan: Any) -> None:
        preempt(running, sequence, plan)
        sequence.num_pending_tokens = 0

    mutate.setattr(RunningSet, "_preempt", drop)


def keep_the_prefix_cache_over_epochs(mutate: pytest.MonkeyPatch) -> None:
    reset = BlockPool.reset

    def forgetful(pool: BlockPool) -> None:
        cache = pool._prefix_cache
        entries, blocks = dict(cache._entries), dict(cache._hash_of_block)
        reset(pool)
        cache._entries.update(entries)
        cache._hash_of_block.update(blocks)

    mutate.setattr(BlockPool, "reset", forgetful)


def deliver_updates_in_reverse(mutate: pytest.MonkeyPatch) -> None:
    deliver = RunningRequests.deliver

    def backwards(requests: RunningRequests, updates: Iterable[SequenceUpdate]) -> None:
        # Two steps' tokens change places where the second comes before the first was read.
        held: list[SequenceUpdate] = requests.__dict__.setdefault("_held", [])
        fresh = list(updates)
        ready, held[:] = [*fresh, *held], []
        if fresh and len(fresh) == 1 and fresh[0].sequence.finish_reason is None and not held:
            held[:], ready = ready[-1:], ready[:-1]
        deliver(requests, ready)

    mutate.setattr(RunningRequests, "deliver", backwards)


def count_handovers_as_losses(mutate: pytest.MonkeyPatch) -> None:
    reset_epoch = Planner.reset_epoch
    mutate.setattr(Planner, "reset_epoch", lambda planner, **_how: reset_epoch(planner))


def plan_on_while_executors_drain(mutate: pytest.MonkeyPatch) -> None:
    read = PlanStream._read

    async def deaf(stream: PlanStream, call: Any) -> Any:
        try:
            return await read(stream, call)
        finally:
            stream.drain_notice.clear()

    mutate.setattr(PlanStream, "_read", deaf)


def hand_over_with_steps_in_flight(mutate: pytest.MonkeyPatch) -> None:
    async def hasty(loop: StepLoop, stream: PlanStream, planner: Planner) -> None:
        await stream.drain_notice.wait()
        for plan in planner.inflight.values():
            for sequence in plan.sampled_sequences:
                sequence.num_pending_tokens = 0
        planner.inflight.clear()

    mutate.setattr(StepLoop, "_until_handover", hasty)


def wait_for_the_group_that_computed(mutate: pytest.MonkeyPatch) -> None:
    ask = ExecutorGroups._ask

    async def loyal(groups: ExecutorGroups, group: ExecutorGroup, fingerprint: Any) -> Any:
        ready = await ask(groups, group, fingerprint)
        return ready if groups._active in (None, group) else None

    mutate.setattr(ExecutorGroups, "_ask", loyal)


def wait_for_every_group_to_answer(mutate: pytest.MonkeyPatch) -> None:
    choose = ExecutorGroups._choose

    async def thorough(groups: ExecutorGroups, answers: Any) -> Any:
        await asyncio.gather(*(groups._ask(group, None) for group in groups._groups))
        return await choose(groups, answers)

    mutate.setattr(ExecutorGroups, "_choose", thorough)


def never_end_what_nobody_reads(mutate: pytest.MonkeyPatch) -> None:
    mutate.setattr(RunningRequests, "expire", lambda requests, now: None)


def resume_one_event_late(mutate: pytest.MonkeyPatch) -> None:
    attach = RequestStream.attach

    def late(stream: RequestStream, from_seq: int = 0) -> StreamReader:
        reader = attach(stream, from_seq)
        if from_seq and reader._cursor.position < stream._log.num_events:
            reader._cursor.read()
        return reader

    mutate.setattr(RequestStream, "attach", late)


def keep_the_blocks_of_rejected_drafts(mutate: pytest.MonkeyPatch) -> None:
    mutate.setattr(BlockTables, "cut", lambda tables, sequence: None)


def count_accepted_drafts_as_not_computed(mutate: pytest.MonkeyPatch) -> None:
    register = BlockTables.register

    def forgetful(tables: BlockTables, sequence: Sequence, plan: StepPlan) -> None:
        register(tables, sequence, plan)
        sequence.num_computed_tokens = min(
            sequence.num_computed_tokens, len(sequence.token_ids) - 2
        )

    mutate.setattr(BlockTables, "register", forgetful)


def deliver_tokens_behind_the_end(mutate: pytest.MonkeyPatch) -> None:
    def keep(token_ids: list[int], stop_token_ids: frozenset[int]) -> int | None:
        return next((token for token in token_ids if token in stop_token_ids), None)

    mutate.setattr(drafting, "_cut_behind_stop", keep)


def plan_on_before_drafts_are_verified(mutate: pytest.MonkeyPatch) -> None:
    never = property(lambda _: False, lambda *_: None)
    mutate.setattr(drafting.Drafting, "is_inflight", never, raising=False)


def draft_for_the_place_of_a_pending_token(mutate: pytest.MonkeyPatch) -> None:
    def propose(self: drafting.Drafting, sequences: Any, num_tokens: int, budget: int) -> Any:
        return self._speculator.propose(sequences, num_tokens=num_tokens, budget=budget)

    mutate.setattr(drafting.Drafting, "_propose", propose)


MUTANTS: tuple[Plant, ...] = (
    ignore_leases,
    lease_to_the_last_who_leaves,
    accept_results_of_any_epoch,
    ignore_checksums,
    book_tokens_of_resumed_sequences_twice,
    keep_blocks_of_cancelled_sequences,
    queue_by_arrival_only,
    queue_without_bound,
    accept_what_no_longer_fits,
    open_epochs_without_a_deadline,
    leave_calls_of_failed_openings,
    watch_no_step,
    forget_deadlines,
    resume_for_ever,
    wait_for_slow_readers,
    forget_samples_of_preempted_sequences,
    keep_the_prefix_cache_over_epochs,
    deliver_updates_in_reverse,
    count_handovers_as_losses,
    plan_on_while_executors_drain,
    hand_over_with_steps_in_flight,
    wait_for_the_group_that_computed,
    wait_for_every_group_to_answer,
    never_end_what_nobody_reads,
    resume_one_event_late,
    keep_the_blocks_of_rejected_drafts,
    count_accepted_drafts_as_not_computed,
    deliver_tokens_behind_the_end,
    plan_on_before_drafts_are_verified,
    draft_for_the_place_of_a_pending_token,
)
