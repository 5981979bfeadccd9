"""The slot table: what an executor knows of each admitted sequence.

Derived state: the scheduler can rebuild all of it by admitting its sequences again. Per-slot
values are rows of arrays, so that a step over many sequences costs a few array operations.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from stepwire.executor.v1.executor_pb2 import Admission, StepPlan

from stepwire_executor.config import blocks_for
from stepwire_executor.errors import PlanError
from stepwire_executor.step_work import (
    AppliedPlan,
    BoolArray,
    Int32Array,
    Int64Array,
    StepWork,
    has_duplicates,
)

_NO_VALUES: Int64Array = np.zeros(0, np.int64)


class SlotTable:
    """Tokens, progress and block table of every slot."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
    ) -> None:
        """Make an empty table; rows take memory only once they are written."""
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.max_blocks_per_seq = blocks_for(max_model_len, block_size)
        # One more than the longest sequence: the last position still samples a token.
        self.token_ids: Int32Array = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.block_table: Int32Array = np.full(
            (max_num_seqs, self.max_blocks_per_seq), -1, np.int32
        )
        self.num_tokens: Int64Array = np.zeros(max_num_seqs, np.int64)
        self.num_prompt_tokens: Int64Array = np.zeros(max_num_seqs, np.int64)
        self.num_computed_tokens: Int64Array = np.zeros(max_num_seqs, np.int64)
        self.num_table_blocks: Int64Array = np.zeros(max_num_seqs, np.int64)
        self.num_admitted_tokens: Int64Array = np.zeros(max_num_seqs, np.int64)
        self.tenancies: Int64Array = np.zeros(max_num_seqs, np.int64)
        self.is_occupied: BoolArray = np.zeros(max_num_seqs, np.bool_)
        self.is_failed: BoolArray = np.zeros(max_num_seqs, np.bool_)

    def clear(self) -> None:
        """Empty every slot."""
        self._release(np.flatnonzero(self.is_occupied))

    def apply(self, plan: StepPlan) -> AppliedPlan:
        """Take releases, admissions and appended blocks, in this order, and check the work.

        Raises PlanError where the plan contradicts the table; the table is then only fit for
        clear().
        """
        released = self._checked_slots(plan.released_slots, "released_slots")
        if released.size:
            self._release(released)
        admissions = tuple(plan.admissions)
        places = [self._admit(admission) for admission in admissions]
        places.append(self._append_blocks(plan))
        sources, targets = self._checked_copies(plan)
        return AppliedPlan(
            released_slots=released,
            admissions=admissions,
            copy_sources=sources,
            copy_targets=targets,
            table_places=np.concatenate(places) if admissions else places[0],
            work=self._checked_work(plan),
        )

    def advance(self, work: StepWork) -> None:
        """Count what a launched step computes and samples, before its tokens are known.

        Accepted drafts are counted by `settle`.
        """
        self.num_computed_tokens[work.slots] = work.known_ends
        self.num_tokens[work.sampled_slots] += 1

    def settle(self, work: StepWork, num_accepted: Int64Array) -> None:
        """Count the drafts that were accepted, before any further plan is applied.

        num_accepted: one for each sampled slot of work. The block table of a slot for which the
        plan had drafts is cut to the blocks that its tokens need.
        """
        slots, rows = work.sampled_slots, work.is_sampled
        is_cut = (work.num_planned_drafts[rows] > 0) & (
            self.tenancies[slots] == work.tenancies[rows]
        )
        slots = slots[is_cut]
        self.num_computed_tokens[slots] += num_accepted[is_cut]
        self.num_tokens[slots] += num_accepted[is_cut]
        for slot in slots.tolist():
            num_blocks = blocks_for(int(self.num_tokens[slot]), self.block_size)
            if num_blocks < self.num_table_blocks[slot]:
                self.block_table[slot, num_blocks:] = -1
                self.num_table_blocks[slot] = num_blocks

    def book(
        self,
        work: StepWork,
        sampled_token_ids: Int64Array,
        is_finite: BoolArray,
        num_accepted: Int64Array,
    ) -> BoolArray:
        """Take the tokens of a step that has run; later steps may have been launched.

        sampled_token_ids, is_finite: one for each row of work. num_accepted: one for each
        sampled slot. Where the last row that is kept is not finite, the slot fails and samples
        nothing more until it is released. Returns which sampled slots are valid: finite, and
        not failed before.
        """
        slots, is_sampled = work.sampled_slots, work.is_sampled
        rows = work.rows
        if work.has_drafts:
            is_finite = is_finite[rows.first_rows + num_accepted]
        # The slot may hold another sequence by now, which the tokens are none of.
        is_held = self.tenancies[slots] == work.tenancies[is_sampled]
        is_valid: BoolArray = is_finite & ~(self.is_failed[slots] & is_held)
        if not is_finite.all():
            self.is_failed[slots[~is_finite & is_held]] = True
        kept = is_valid & is_held
        if work.has_drafts:
            kept = rows.kept(num_accepted) & np.repeat(kept, rows.num_rows)
        self.token_ids[rows.slots[kept], rows.positions[kept]] = sampled_token_ids[kept]
        return is_valid

    def checksum(self) -> int:
        """CRC-32 over (slot, num_tokens, num_computed_tokens) of occupied slots, in slot order.

        Each number is a little-endian int64.
        """
        slots = self.is_occupied.nonzero()[0]
        rows = np.empty((slots.size, 3), "<i8")
        rows[:, 0] = slots
        rows[:, 1] = self.num_tokens[slots]
        rows[:, 2] = self.num_computed_tokens[slots]
        return zlib.crc32(rows.tobytes())

    def _release(self, slots: Int64Array) -> None:
        self.is_occupied[slots] = False
        self.is_failed[slots] = False
        self.num_tokens[slots] = 0
        self.num_prompt_tokens[slots] = 0
        self.num_admitted_tokens[slots] = 0
        self.num_computed_tokens[slots] = 0
        self.tenancies[slots] += 1
        self.num_table_blocks[slots] = 0
        self.block_table[slots] = -1

    def _admit(self, admission: Admission) -> Int64Array:
        """Take a sequence; return the places of its blocks in the block table."""
        slot = admission.slot
        if slot >= self.max_num_seqs:
            raise PlanError(f"admission to slot {slot}: the table has {self.max_num_seqs} slots")
        if self.is_occupied[slot]:
            raise PlanError(f"admission to slot {slot}: it is occupied; release it first")
        token_ids = _array(admission.token_ids)
        block_ids = self._checked_blocks(admission.block_ids, f"admission to slot {slot}")
        num_tokens, num_blocks = token_ids.size, block_ids.size
        num_computed = admission.num_computed_tokens
        problem = None
        if num_tokens == 0:
            problem = "token_ids is empty"
        elif num_tokens > self.max_model_len:
            problem = f"{num_tokens} tokens are more than the limit of {self.max_model_len}"
        elif token_ids.max() >= self.vocab_size:
            problem = f"token id {token_ids.max()} is beyond the vocabulary of {self.vocab_size}"
        elif not 1 <= admission.num_prompt_tokens <= num_tokens:
            problem = f"num_prompt_tokens {admission.num_prompt_tokens} is not in 1..{num_tokens}"
        elif num_computed >= num_tokens:
            problem = f"num_computed_tokens {num_computed} leaves none of {num_tokens} to compute"
        elif num_blocks > self.max_blocks_per_seq:
            problem = f"{num_blocks} blocks are more than {self.max_blocks_per_seq} for a sequence"
        elif num_computed > num_blocks * self.block_size:
            problem = f"{num_blocks} blocks cannot hold {num_computed} computed tokens"
        if problem is not None:
            raise PlanError(f"admission to slot {slot}: {problem}")
        self.is_occupied[slot] = True
        self.token_ids[slot, :num_tokens] = token_ids
        self.num_tokens[slot] = self.num_admitted_tokens[slot] = num_tokens
        self.num_prompt_tokens[slot] = admission.num_prompt_tokens
        self.num_computed_tokens[slot] = num_computed
        self.block_table[slot, :num_blocks] = block_ids
        self.num_table_blocks[slot] = num_blocks
        return slot * self.max_blocks_per_seq + np.arange(num_blocks)

    def _append_blocks(self, plan: StepPlan) -> Int64Array:
        """Lengthen block tables; return the places of the new entries."""
        if len(plan.appended_slots) != len(plan.appended_block_ids):
            raise PlanError("appended_slots and appended_block_ids differ in length")
        if not plan.appended_slots:  # most steps
            return _NO_VALUES
        block_ids = self._checked_blocks(plan.appended_block_ids, "appended_block_ids")
        places = []
        for slot, block_id in zip(plan.appended_slots, block_ids, strict=True):
            if slot >= self.max_num_seqs or not self.is_occupied[slot]:
                raise PlanError(f"appended_slots: slot {slot} holds no sequence")
            end = self.num_table_blocks[slot]
            if end >= self.max_blocks_per_seq:
                raise PlanError(
                    f"appended_slots: slot {slot} has all {self.max_blocks_per_seq} blocks of a "
                    "sequence"
                )
            self.block_table[slot, end] = block_id
            self.num_table_blocks[slot] = end + 1
            places.append(slot * self.max_blocks_per_seq + end)
        return np.array(places, np.int64)

    def _checked_copies(self, plan: StepPlan) -> tuple[Int64Array, Int64Array]:
        sources = self._checked_blocks(plan.copy_source_block_ids, "copy_source_block_ids")
        targets = self._checked_blocks(plan.copy_target_block_ids, "copy_target_block_ids")
        if sources.size != targets.size:
            raise PlanError("copy_source_block_ids and copy_target_block_ids differ in length")
        if has_duplicates(targets):
            raise PlanError("copy_target_block_ids: a block is written twice")
        return sources, targets

    def _checked_work(self, plan: StepPlan) -> StepWork:
        slots = self._checked_slots(plan.work_slots, "work_slots")
        num_tokens = _array(plan.work_num_tokens)
        if slots.size != num_tokens.size:
            raise PlanError("work_slots and work_num_tokens differ in length")
        if slots.size and num_tokens.min() == 0:
            raise PlanError("work_num_tokens: 0 tokens is no work")
        num_drafts, draft_token_ids = self._checked_drafts(plan)
        has_drafts = bool(plan.work_num_drafts)
        num_queries = int(num_tokens.sum())
        if has_drafts:
            num_queries += int(num_drafts.sum())
        if num_queries > self.max_num_batched_tokens:
            raise PlanError(
                f"work_num_tokens: {num_queries} tokens are more than the budget of "
                f"{self.max_num_batched_tokens}"
            )
        starts = self.num_computed_tokens[slots]
        known_ends = starts + num_tokens
        known = self.num_tokens[slots]
        limits = np.minimum(known, self.max_model_len)
        if (known_ends > limits).any():
            row = int(np.argmax(known_ends > limits))
            raise PlanError(
                f"work_num_tokens: slot {slots[row]} has {limits[row] - starts[row]} tokens to "
                f"compute, not {num_tokens[row]}"
            )
        is_sampled = known_ends == known
        ends = known_ends
        if has_drafts:
            ends = known_ends + num_drafts
            is_early = (num_drafts > 0) & ~is_sampled
            if is_early.any():
                raise PlanError(
                    f"work_num_drafts: slot {slots[np.argmax(is_early)]} has drafts, but its work "
                    "does not reach its last token"
                )
            if (ends > self.max_model_len).any():
                row = int(np.argmax(ends > self.max_model_len))
                raise PlanError(
                    f"work_num_drafts: slot {slots[row]} has room for "
                    f"{self.max_model_len - known[row]} drafts, not {num_drafts[row]}"
                )
        missing = ends > self.num_table_blocks[slots] * self.block_size
        if missing.any():
            row = int(np.argmax(missing))
            raise PlanError(
                f"work_slots: slot {slots[row]} has {self.num_table_blocks[slots[row]]} blocks, "
                f"too few for {ends[row]} tokens"
            )
        return StepWork(
            slots=slots,
            starts=starts,
            known_ends=known_ends,
            is_sampled=is_sampled,
            tenancies=self.tenancies[slots],
            num_drafts=num_drafts,
            num_planned_drafts=num_drafts,
            draft_token_ids=draft_token_ids,
        )

    def _checked_drafts(self, plan: StepPlan) -> tuple[Int64Array, Int64Array]:
        """Drafts of each sequence of the work list, [num_seqs], and those that are named."""
        if not plan.work_num_drafts:
            if plan.draft_token_ids:
                raise PlanError("draft_token_ids: work_num_drafts does not say whose they are")
            return np.zeros(len(plan.work_slots), np.int64), _NO_VALUES
        token_ids = _array(plan.draft_token_ids)
        num_drafts = _array(plan.work_num_drafts)
        if num_drafts.size != len(plan.work_slots):
            raise PlanError("work_slots and work_num_drafts differ in length")
        if token_ids.size and token_ids.size != num_drafts.sum():
            raise PlanError(
                f"draft_token_ids has {token_ids.size} tokens, where work_num_drafts counts "
                f"{num_drafts.sum()}"
            )
        if token_ids.size and token_ids.max() >= self.vocab_size:
            raise PlanError(
                f"draft_token_ids: token id {token_ids.max()} is beyond the vocabulary of "
                f"{self.vocab_size}"
            )
        return num_drafts, token_ids

    def _checked_slots(self, values: Sequence[int], name: str) -> Int64Array:
        slots = _array(values)
        if slots.size:
            if slots.max() >= self.max_num_seqs:
                raise PlanError(
                    f"{name}: slot {slots.max()} is out of range: the table has "
                    f"{self.max_num_seqs} slots"
                )
            if not self.is_occupied[slots].all():
                slot = slots[np.argmin(self.is_occupied[slots])]
                raise PlanError(f"{name}: slot {slot} holds no sequence")
            if has_duplicates(slots):
                raise PlanError(f"{name}: a slot is named twice")
        return slots

    def _checked_blocks(self, values: Sequence[int], name: str) -> Int64Array:
        blocks = _array(values)
        if blocks.size and blocks.max() >= self.num_blocks:
            raise PlanError(
                f"{name}: block {blocks.max()} is out of range: the pool has {self.num_blocks}"
            )
        return blocks


def _array(values: Sequence[int]) -> Int64Array:
    return np.array(values, np.int64) if values else _NO_VALUES
