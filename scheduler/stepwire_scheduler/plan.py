"""What the planner decides: plain data that the executor client puts on the wire."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from stepwire_scheduler.sequence import Logprobs, SamplingParams, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A sequence joins the executor's slot table."""

    slot: int
    token_ids: array[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: list[int]
    sampling_params: SamplingParams
    stream: int
    """Index of the sequence in its request."""
    suppressed_token_ids: tuple[int, ...]
    """Cannot be sampled before min_tokens."""


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """One step: what changed since the one before, and the work.

    Parallel lists as in the wire's message; the lists of sequences stay with the scheduler
    and say whom the results belong to.
    """

    step_id: int
    released_slots: list[int] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    appended_slots: list[int] = field(default_factory=list)
    appended_block_ids: list[int] = field(default_factory=list)
    work_slots: list[int] = field(default_factory=list)
    work_num_tokens: list[int] = field(default_factory=list)
    work_sequences: list[Sequence] = field(default_factory=list)
    work_num_drafts: list[int] = field(default_factory=list)
    """Drafts behind each work's last token; empty where there are none."""
    draft_token_ids: list[int] = field(default_factory=list)
    """Concatenated; empty where the executor's draft model is to propose them."""
    filled: list[tuple[Sequence, int]] = field(default_factory=list)
    """Sequences that may fill blocks in this step, with the tokens computed once it is done."""
    sampled_sequences: list[Sequence] = field(default_factory=list)
    """Those whose slot samples in this step, in the order of the work list."""
    first_scheduled: list[Sequence] = field(default_factory=list)
    """Those that get their first step now."""
    num_scheduled_tokens: int = 0
    """Query tokens of the step, drafts included."""
    num_preemptions: int = 0
    num_prefix_queried_tokens: int = 0
    num_prefix_hit_tokens: int = 0

    def add_work(self, sequence: Sequence, num_tokens: int, block_size: int) -> None:
        """Let a sequence compute its next num_tokens tokens, for which it has the blocks."""
        assert num_tokens > 0, sequence
        sequence.num_computed_tokens = num_computed = sequence.num_computed_tokens + num_tokens
        sequence.last_step_id = self.step_id
        self.work_slots.append(sequence.slot)
        self.work_num_tokens.append(num_tokens)
        self.work_sequences.append(sequence)
        self.num_scheduled_tokens += num_tokens
        if num_tokens > 1 or num_computed % block_size == 0:
            self.filled.append((sequence, num_computed))
        if num_computed == len(sequence.token_ids) + sequence.num_pending_tokens:
            sequence.num_pending_tokens += 1
            self.sampled_sequences.append(sequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What the executor answered to a plan."""

    step_id: int
    sampled_token_ids: list[int]
    """Of each of the plan's sampled_sequences, concatenated; one each, or num_sampled_tokens."""
    logprobs: list[Logprobs | None]
    """Parallel to sampled_token_ids, or empty where nobody asked."""
    failures: dict[int, str]
    """Reason by slot, for sequences that cannot go on."""
    num_sampled_tokens: list[int] = field(default_factory=list)
    """By sampled sequence, where the plan had drafts, else empty: accepted ones + 1; of a sequence
    that failed 0."""
    num_draft_tokens: list[int] = field(default_factory=list)
    """By sampled sequence, where the plan had drafts, else empty: how many were verified."""
    busy_ms: float = 0.0
    """What computes had the step's work."""


class SequenceUpdate(NamedTuple):  # made for every token: a frozen dataclass costs twice this
    """New tokens of a sequence, or its end, or both."""

    sequence: Sequence
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    error: str | None = None
    """Why it ended, for the client, where finish_reason is ERROR."""
