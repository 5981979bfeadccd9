"""How far the draft model's keys and values reach: in each block, and so in each sequence.

A draft page has the id of the target's page of the same tokens. The target's content of a block is
the scheduler's to say; which part of it the draft model has computed too, only this records.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stepwire_executor.slots import AppliedPlan, Int64Array, SlotTable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unconfirmed:
    """Drafts whose keys and values are there, but which nobody has accepted yet."""

    tenancy: int
    start: int
    """Position of the first."""
    token_ids: Int64Array


class DraftState:
    """Valid positions of every block, counted from the block's first."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        """Make a state in which nothing is valid."""
        self._block_size = block_size
        self._num_valid = np.zeros(num_blocks, np.int64)
        self._unconfirmed: dict[int, _Unconfirmed] = {}

    def clear(self) -> None:
        """Forget all content."""
        self._num_valid[:] = 0
        self._unconfirmed.clear()

    def take(self, applied: AppliedPlan, slots: SlotTable) -> None:
        """Take a plan's changes, before its work.

        A block that joins a table holds what its sequence has computed in it, if anything: what
        was valid beyond that was of another sequence. The target of a copy starts anew.
        """
        for slot in applied.released_slots.tolist():
            self._unconfirmed.pop(slot, None)
        places = applied.table_places
        if places.size:
            rows, columns = np.divmod(places, slots.max_blocks_per_seq)
            held = slots.num_computed_tokens[rows] - columns * self._block_size
            block_ids = slots.block_table[rows, columns]
            np.minimum.at(self._num_valid, block_ids, held.clip(0, self._block_size))
        self._num_valid[applied.copy_targets] = 0

    def num_computed_tokens(self, rows: Int64Array, slots: SlotTable) -> Int64Array:
        """Leading tokens of each sequence whose keys and values are valid; rows: slots."""
        for slot in rows.tolist():
            self._confirm(slot, slots)
        num_columns = int(slots.num_table_blocks[rows].max(initial=0))
        # A block more than any sequence has, so that each has one that is not full.
        num_valid = np.zeros((rows.size, num_columns + 1), np.int64)
        block_ids = slots.block_table[rows, :num_columns]
        num_valid[:, :num_columns] = np.where(block_ids >= 0, self._num_valid[block_ids], 0)
        first = (num_valid < self._block_size).argmax(axis=1)
        return first * self._block_size + num_valid[np.arange(rows.size), first]

    def set_computed(self, slot: int, start: int, end: int, slots: SlotTable) -> None:
        """Positions start to end of a sequence are valid, as all before them are."""
        first, last = start // self._block_size, -(-end // self._block_size)
        columns = np.arange(first, last)
        block_ids = slots.block_table[slot, columns]
        reached = (end - columns * self._block_size).clip(max=self._block_size)
        self._num_valid[block_ids] = np.maximum(self._num_valid[block_ids], reached)

    def set_drafted(
        self, slot: int, start: int, token_ids: Int64Array, slots: SlotTable
    ) -> None:
        """As set_computed from start on, provided that these tokens turn out to stand there."""
        self._unconfirmed[slot] = _Unconfirmed(
            tenancy=int(slots.tenancies[slot]), start=start, token_ids=token_ids
        )

    def _confirm(self, slot: int, slots: SlotTable) -> None:
        """Take the drafts that the sequence has gone on with."""
        drafted = self._unconfirmed.pop(slot, None)
        if drafted is None or drafted.tenancy != slots.tenancies[slot]:
            return
        end = min(drafted.start + drafted.token_ids.size, int(slots.num_tokens[slot]))
        known = slots.token_ids[slot, drafted.start : end]
        is_other = known != drafted.token_ids[: known.size]
        num_accepted = int(is_other.argmax()) if is_other.any() else known.size
        if num_accepted:
            self.set_computed(slot, drafted.start, drafted.start + num_accepted, slots)
