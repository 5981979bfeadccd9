"""Drafts in plans and in results: how long each may be, its blocks, and what became of it."""

from __future__ import annotations

from collections.abc import Callable

from stepwire_scheduler.plan import SequenceUpdate, StepOutcome, StepPlan
from stepwire_scheduler.planner_config import PlannerConfig
from stepwire_scheduler.running_set import RunningSet
from stepwire_scheduler.sequence import FinishReason, Sequence, SequenceStatus
from stepwire_scheduler.speculation.config import MAX_SPECULATIVE_TOKENS
from stepwire_scheduler.speculation.interface import Draft, Speculator

FinishFunction = Callable[[Sequence, FinishReason, int | None], None]


class Drafting:
    """Puts a speculator's drafts into plans and books how many tokens they brought.

    How many tokens a sequence has after a step with drafts is known with its result only, so no
    plan follows before that (Leviathan et al. 2023 for the step; the barrier is for the whole
    batch, which keeps it in one step).
    """

    def __init__(self, speculator: Speculator, running: RunningSet) -> None:
        self._speculator = speculator
        self._running = running
        self.is_inflight = False
        """Whether a plan with drafts is without its result."""
        self.last_drafts: list[tuple[int, int]] = []
        """Of the step booked last: how many tokens each draft had, and how many were accepted."""

    def plan(self, plan: StepPlan, num_decodes: int, config: PlannerConfig) -> None:
        """Draft for the leading num_decodes sequences of a plan, which compute one token each.

        Takes what everything else has left of the token budget, of the rows of logits and of the
        free blocks.
        """
        # Executors reckon with logits of so many rows; each token and each draft has one.
        most_rows = max(config.max_num_seqs, 1 + MAX_SPECULATIVE_TOKENS)
        budget = min(
            config.max_num_batched_tokens - plan.num_scheduled_tokens,
            most_rows - len(plan.sampled_sequences),
        )
        indexes: list[int] = []
        limits: list[int] = []
        sequences: list[Sequence] = []
        for index, sequence in enumerate(plan.work_sequences[:num_decodes]):
            limit = sequence.max_num_tokens - len(sequence.token_ids) - sequence.num_pending_tokens
            num_asked = sequence.request.sampling_params.num_speculative_tokens
            if num_asked is not None:
                limit = min(limit, num_asked)
            if limit > 0:
                indexes.append(index)
                limits.append(limit)
                sequences.append(sequence)
        if budget <= 0 or not sequences:
            return
        drafts = self._propose(sequences, plan.num_scheduled_tokens, budget)
        num_drafts = [0] * len(plan.work_slots)
        num_left = budget
        for index, sequence, limit, draft in zip(indexes, sequences, limits, drafts, strict=True):
            num_tokens = min(len(draft), limit, num_left, self._room_of(sequence, config))
            if num_tokens > 0:
                self._running.append_blocks(sequence, num_tokens, plan)
                num_drafts[index] = num_tokens
                num_left -= num_tokens
                if not config.has_draft_model:
                    plan.draft_token_ids.extend(draft[:num_tokens])
        if num_left < budget:
            plan.work_num_drafts = num_drafts
            plan.num_scheduled_tokens += budget - num_left
            self.is_inflight = True

    def _propose(self, sequences: list[Sequence], num_tokens: int, budget: int) -> list[Draft]:
        # A draft is of what follows the token that this step samples: it is not pending yet.
        for sequence in sequences:
            sequence.num_pending_tokens -= 1
        drafts = self._speculator.propose(sequences, num_tokens=num_tokens, budget=budget)
        for sequence in sequences:
            sequence.num_pending_tokens += 1
        return drafts

    def _room_of(self, sequence: Sequence, config: PlannerConfig) -> int:
        """Tokens behind its known ones that its blocks and the free ones hold."""
        num_blocks = len(sequence.block_ids) + self._running.block_tables.pool.num_free
        return num_blocks * config.block_size - sequence.num_computed_tokens

    def book(
        self, plan: StepPlan, outcome: StepOutcome, finish: FinishFunction, idle_ms: float | None
    ) -> list[SequenceUpdate]:
        """Append what a step sampled, cut at stop tokens, and settle its drafts.

        finish: ends a sequence. idle_ms: as Planner.commit has it.
        """
        counts, num_drafted_of = outcome.num_sampled_tokens, outcome.num_draft_tokens
        tables, speculator = self._running.block_tables, self._speculator
        updates: list[SequenceUpdate] = []
        self.last_drafts = []
        end = 0
        for i, sequence in enumerate(plan.sampled_sequences):
            sequence.num_pending_tokens -= 1
            start, end = end, end + (counts[i] if counts else 1)
            num_drafted = num_drafted_of[i] if num_drafted_of else 0
            num_accepted = max(0, end - start - 1)
            if num_drafted:
                self.last_drafts.append((num_drafted, num_accepted))
            if sequence.status is SequenceStatus.FINISHED:
                continue
            token_ids = outcome.sampled_token_ids[start:end]
            stop_token_id = _cut_behind_stop(token_ids, sequence.stop_token_ids)
            sequence.token_ids.extend(token_ids)
            sequence.num_draft_tokens += num_drafted
            sequence.num_accepted_tokens += num_accepted
            # Decodes lead both lists, and no other work has drafts.
            if plan.work_num_drafts and plan.work_num_drafts[i]:
                sequence.num_computed_tokens += len(token_ids) - 1
                tables.register(sequence, plan)
                tables.cut(sequence)
            speculator.observe(sequence, num_drafted=num_drafted, num_accepted=num_accepted)
            if stop_token_id is not None:
                finish(sequence, FinishReason.STOP, stop_token_id)
            elif len(sequence.token_ids) >= sequence.max_num_tokens:
                finish(sequence, FinishReason.LENGTH, None)
            logprobs = outcome.logprobs[start : start + len(token_ids)]
            updates.append(
                SequenceUpdate(
                    sequence,
                    tuple(token_ids),
                    tuple(entry for entry in logprobs if entry is not None),
                )
            )
        if plan.work_num_drafts:
            self.is_inflight = False
        num_unverified = sum(plan.work_num_drafts) - sum(num_drafted_of)
        speculator.note_step(
            num_tokens=plan.num_scheduled_tokens - num_unverified,
            busy_ms=outcome.busy_ms,
            num_drafts=sum(plan.work_num_drafts),
            idle_ms=idle_ms,
        )
        return updates

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        self._speculator.forget(sequence)

    def reset_epoch(self) -> None:
        """The plans in flight are gone."""
        self.is_inflight = False


def _cut_behind_stop(token_ids: list[int], stop_token_ids: frozenset[int]) -> int | None:
    """Drop what comes behind the first stop token, and return that, if there is one."""
    for position, token_id in enumerate(token_ids, 1):
        if token_id in stop_token_ids:
            del token_ids[position:]
            return token_id
    return None
