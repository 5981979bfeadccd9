"""How far the draft model's keys and values reach: in each block, and so in each sequence.

A draft page has the id of the target's page of the same tokens. The target's content of a block is
the scheduler's to say; which part of it the draft model has computed too, only this records.
"""

from __future__ import annotations

import numpy as np

from stepwire_executor.slots import SlotTable
from stepwire_executor.step_work import AppliedPlan, Int64Array


class DraftState:
    """Valid positions of every block, counted from the block's first."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        """Make a state in which nothing is valid."""
        self._block_size = block_size
        self._num_valid = np.zeros(num_blocks, np.int64)
        self._drafted: dict[int, tuple[int, int]] = {}
        """By slot, of the step before: where drafts began, and how many of them were computed."""

    def clear(self) -> None:
        """Forget all content."""
        self._num_valid[:] = 0
        self._drafted.clear()

    def take(self, applied: AppliedPlan, slots: SlotTable) -> None:
        """Take what became of the drafts of the step before, and a plan's changes.

        A block that joins a table holds what its sequence has computed in it, if anything: what
        was valid beyond that was of another sequence. The target of a copy starts anew.
        """
        released = set(applied.released_slots.tolist())
        for slot, (start, num_drafts) in self._drafted.items():
            if slot not in released:
                num_accepted = int(slots.num_computed_tokens[slot]) - start
                self.set_computed(slot, start, start + min(num_accepted, num_drafts), slots)
        self._drafted.clear()
        places = applied.table_places
        if places.size:
            rows, columns = np.divmod(places, slots.max_blocks_per_seq)
            held = slots.num_computed_tokens[rows] - columns * self._block_size
            block_ids = slots.block_table[rows, columns]
            np.minimum.at(self._num_valid, block_ids, held.clip(0, self._block_size))
        self._num_valid[applied.copy_targets] = 0

    def num_computed_tokens(self, rows: Int64Array, slots: SlotTable) -> Int64Array:
        """Leading tokens of each sequence whose keys and values are valid; rows: slots."""
        num_columns = int(slots.num_table_blocks[rows].max(initial=0))
        # A block more than any sequence has, so that each has one that is not full.
        num_valid = np.zeros((rows.size, num_columns + 1), np.int64)
        block_ids = slots.block_table[rows, :num_columns]
        num_valid[:, :num_columns] = np.where(block_ids >= 0, self._num_valid[block_ids], 0)
        first = (num_valid < self._block_size).argmax(axis=1)
        num_computed: Int64Array = first * self._block_size + num_valid[np.arange(rows.size), first]
        return num_computed

    def set_computed(self, slot: int, start: int, end: int, slots: SlotTable) -> None:
        """Positions start to end of a sequence are valid, as all before them are."""
        columns = np.arange(start // self._block_size, -(-end // self._block_size))
        block_ids = slots.block_table[slot, columns]
        reached = (end - columns * self._block_size).clip(max=self._block_size)
        self._num_valid[block_ids] = np.maximum(self._num_valid[block_ids], reached)

    def set_drafted(self, slot: int, start: int, num_drafts: int) -> None:
        """As set_computed, for as many of num_drafts as the step's end finds accepted."""
        self._drafted[slot] = (start, num_drafts)
