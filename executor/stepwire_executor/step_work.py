"""What is left of a plan once the slot table has taken its delta: work, and the rows it samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from stepwire.executor.v1.executor_pb2 import Admission

Int64Array: TypeAlias = npt.NDArray[np.int64]
Int32Array: TypeAlias = npt.NDArray[np.int32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """The checked work list of one step.

    What follows from it is worked out once: a step of few sequences takes longer to describe than
    to compute.
    """

    slots: Int64Array
    """[num_seqs], distinct."""
    starts: Int64Array
    """[num_seqs], position of each sequence's first query token."""
    known_ends: Int64Array
    """[num_seqs], tokens of context including this step's, without drafts."""
    is_sampled: BoolArray
    """[num_seqs], whether the work reaches the end of the tokens known."""
    tenancies: Int64Array
    """[num_seqs], tells the sequence from others that the slot holds before and after it."""
    num_drafts: Int64Array
    """[num_seqs], drafts to verify, behind the last known token; 0 where nothing is sampled."""
    num_planned_drafts: Int64Array
    """[num_seqs], as the plan has them; a draft model may propose fewer."""
    draft_token_ids: Int64Array
    """[num_planned_drafts.sum()], concatenated; empty where a draft model is to propose them."""

    @cached_property
    def ends(self) -> Int64Array:
        """[num_seqs], tokens of context including this step's and its drafts."""
        return self.known_ends + self.num_drafts

    @cached_property
    def sampled_slots(self) -> Int64Array:
        """Slots that sample, in the order of the work list."""
        return self.slots[self.is_sampled]

    @property
    def num_tokens(self) -> int:
        """Query tokens of the step."""
        return int((self.ends - self.starts).sum())

    @cached_property
    def is_speculative(self) -> bool:
        """Whether the plan has drafts: how many tokens come of the step is known at its end."""
        return bool(self.num_planned_drafts.any())

    @cached_property
    def has_drafts(self) -> bool:
        """Whether any sequence has a draft to verify now."""
        return bool(self.num_drafts.any())

    @property
    def is_left_to_model(self) -> bool:
        """Whether the plan has drafts and names none."""
        return self.is_speculative and self.draft_token_ids.size == 0

    def with_num_drafts(self, num_drafts: Int64Array) -> StepWork:
        """The work with as many drafts as were proposed, [num_seqs]."""
        if num_drafts is self.num_drafts:
            return self
        return replace(self, num_drafts=num_drafts)

    @cached_property
    def rows(self) -> SampledRowPlaces:
        """The rows that are sampled, side by side."""
        if not self.has_drafts:
            return self._rows_without_drafts()
        num_rows = 1 + self.num_drafts[self.is_sampled]
        first_rows = np.cumsum(num_rows) - num_rows
        places = np.arange(num_rows.sum()) - np.repeat(first_rows, num_rows)
        return SampledRowPlaces(
            slots=np.repeat(self.sampled_slots, num_rows),
            positions=np.repeat(self.known_ends[self.is_sampled], num_rows) + places,
            draft_starts=np.repeat(first_rows - np.arange(first_rows.size), num_rows),
            num_drafts_before=places,
            first_rows=first_rows,
            num_rows=num_rows,
        )

    def _rows_without_drafts(self) -> SampledRowPlaces:
        """What `rows` comes to where each sequence that samples has one."""
        slots = self.sampled_slots
        zeros = np.zeros(slots.size, np.int64)
        return SampledRowPlaces(
            slots=slots,
            positions=self.known_ends[self.is_sampled],
            draft_starts=zeros,
            num_drafts_before=zeros,
            first_rows=np.arange(slots.size),
            num_rows=np.ones(slots.size, np.int64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRowPlaces:
    """The rows of a step that are sampled: behind each sequence's last token, and each draft."""

    slots: Int64Array
    """[num_rows]."""
    positions: Int64Array
    """[num_rows], place in its sequence of the token to sample."""
    draft_starts: Int64Array
    """[num_rows], place in the step's drafts of the first of the row's sequence."""
    num_drafts_before: Int64Array
    """[num_rows], drafts between the last known token and the one to sample."""
    first_rows: Int64Array
    """[num_sampled], each sequence's first row."""
    num_rows: Int64Array
    """[num_sampled]."""

    @property
    def has_next_draft(self) -> BoolArray:
        """[num_rows], whether a draft stands behind the row: behind all but each last one."""
        has_next = np.ones(self.slots.size, np.bool_)
        has_next[self.first_rows + self.num_rows - 1] = False
        return has_next

    def kept(self, num_accepted: Int64Array) -> BoolArray:
        """[num_rows], whose tokens stay where num_accepted drafts of each sequence do."""
        if self.slots.size == self.first_rows.size:  # nobody has drafts
            return np.ones(self.slots.size, np.bool_)
        kept: BoolArray = self.num_drafts_before <= np.repeat(num_accepted, self.num_rows)
        return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedPlan:
    """What is left to do of a plan once the table has taken its delta."""

    released_slots: Int64Array
    """Slots whose sequence left; one of them may be among the admissions."""
    admissions: tuple[Admission, ...]
    """Sequences that joined, as the plan had them."""
    copy_sources: Int64Array
    """[num_copies] block ids."""
    copy_targets: Int64Array
    """[num_copies] block ids, distinct."""
    table_places: Int64Array
    """[num_entries], slot * max_blocks_per_seq + index of each new entry of the block table."""
    work: StepWork


def has_duplicates(values: Int64Array) -> bool:
    """Whether a value of values, [num_values], is there twice."""
    if values.size < 2:
        return False
    ordered = np.sort(values)
    return bool((ordered[1:] == ordered[:-1]).any())
