"""The query tokens of a step, laid out row by row from the slot table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stepwire_executor.errors import PlanError
from stepwire_executor.slots import SlotTable
from stepwire_executor.step_work import (
    Int64Array,
    SampledRowPlaces,
    StepWork,
    has_duplicates,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLayout:
    """Work of a step over num_seqs sequences with num_tokens query tokens in all."""

    slots: Int64Array
    """[num_tokens], whose token it is."""
    positions: Int64Array
    """[num_tokens], place of each token in its sequence."""
    slot_mapping: Int64Array
    """[num_tokens], where each token's KV goes: block_id * block_size + offset."""
    cu_seqlens_q: Int64Array
    """[num_seqs + 1]."""
    rows: SampledRowPlaces
    """Whose logits are wanted."""
    logit_rows: Int64Array
    """[num_rows], the query row of the token that each of rows stands behind."""
    draft_rows: Int64Array
    """[num_drafts], the query rows of drafts, in the order of the work list."""
    max_query_len: int
    """Most query tokens of a sequence."""


def lay_out(slots: SlotTable, work: StepWork) -> StepLayout:
    """Lay out a step's work, which must not be empty, with the drafts that it has now.

    Raises PlanError where two tokens of the step would be stored in one place.
    """
    ends = work.ends
    lengths = ends - work.starts
    max_query_len = int(lengths.max())
    if max_query_len == 1:  # most steps
        cu_seqlens_q = np.arange(lengths.size + 1)
        token_slots, positions = work.slots, work.starts
    else:
        cu_seqlens_q = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=cu_seqlens_q[1:])
        token_slots = np.repeat(work.slots, lengths)
        first_rows = np.repeat(cu_seqlens_q[:-1] - work.starts, lengths)
        positions = np.arange(cu_seqlens_q[-1]) - first_rows
    blocks, offsets = np.divmod(positions, slots.block_size)
    block_ids = slots.block_table[token_slots, blocks].astype(np.int64)
    slot_mapping = block_ids * slots.block_size + offsets
    if has_duplicates(slot_mapping):
        raise PlanError("work_slots: two tokens of the step have the same place in the KV cache")
    rows = work.rows
    logit_rows = cu_seqlens_q[1:][work.is_sampled] - 1
    if work.has_drafts:
        first_rows = np.repeat(logit_rows - (rows.num_rows - 1), rows.num_rows)
        logit_rows = first_rows + rows.num_drafts_before
    return StepLayout(
        slots=token_slots,
        positions=positions,
        slot_mapping=slot_mapping,
        cu_seqlens_q=cu_seqlens_q,
        rows=rows,
        logit_rows=logit_rows,
        draft_rows=logit_rows[rows.num_drafts_before > 0],
        max_query_len=max_query_len,
    )
