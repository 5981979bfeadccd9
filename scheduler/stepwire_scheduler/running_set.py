"""The sequences that have a slot and blocks, and which of them gives its own up for another."""

from __future__ import annotations

import bisect

from stepwire_scheduler.block_table import BlockTables
from stepwire_scheduler.plan import StepPlan
from stepwire_scheduler.planner_config import PlannerConfig
from stepwire_scheduler.request_queue import RequestQueue
from stepwire_scheduler.sequence import Sequence, SequenceStatus


class RunningSet:
    """Hands out slots and blocks; the preempted wait in the queue, and their tokens with them.

    When blocks run out the cheapest later sequence of the lowest priority is preempted. Earlier
    sequences never wait for later ones, so the earliest always advances.
    """

    def __init__(self, config: PlannerConfig, waiting: RequestQueue, *, prefix_key: bytes) -> None:
        """waiting: where the preempted go. prefix_key: secret bytes for the prefix cache's hash."""
        self._waiting = waiting
        self._prefix_key = prefix_key
        self.sequences: list[Sequence] = []
        """By order_key."""
        self.reconfigure(config)

    def reconfigure(self, config: PlannerConfig) -> None:
        """Begin with other slots and another pool; nothing runs."""
        assert not self.sequences
        self._max_num_seqs = config.max_num_seqs
        self.block_tables = BlockTables(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            prefix_key=self._prefix_key,
        )
        self._empty_slots()

    def _empty_slots(self) -> None:
        self.free_slots = list(range(self._max_num_seqs - 1, -1, -1))
        self._released_slots: list[int] = []
        """Freed since the last plan; the executor has not been told."""

    def take_released_slots(self) -> list[int]:
        """Slots that were freed since the last call."""
        released, self._released_slots = self._released_slots, []
        return released

    def clear(self) -> list[Sequence]:
        """Take everything back as the executors are gone; returns those that ran."""
        self._empty_slots()
        self.block_tables.pool.reset()
        interrupted, self.sequences = self.sequences, []
        for sequence in interrupted:
            sequence.forget_computed()
        return interrupted

    def enter(self, sequence: Sequence, cached_block_ids: list[int], plan: StepPlan) -> None:
        """Give a slot, which is free, and a block table that begins with these blocks."""
        self.block_tables.open(sequence, cached_block_ids)
        sequence.slot = self.free_slots.pop()
        sequence.status = SequenceStatus.RUNNING
        sequence.admitted_step_id = plan.step_id
        bisect.insort(self.sequences, sequence, key=_order_key)

    def leave(self, sequence: Sequence) -> None:
        """Take slot and blocks back; the caller says where the sequence goes."""
        position = bisect.bisect_left(self.sequences, sequence.order_key, key=_order_key)
        assert self.sequences[position] is sequence, sequence
        del self.sequences[position]
        self._released_slots.append(sequence.slot)
        self.free_slots.append(sequence.slot)
        self.block_tables.close(sequence)

    def ensure_blocks(self, sequence: Sequence, num_tokens: int, plan: StepPlan) -> bool:
        """Give a sequence the blocks for its next tokens; False: not in this step."""
        num_missing = self.block_tables.num_missing(sequence, num_tokens)
        if num_missing == 0:
            return True
        if not self._make_room(sequence, num_missing, plan):
            return False
        self.append_blocks(sequence, num_tokens, plan)
        return True

    def append_blocks(self, sequence: Sequence, num_tokens: int, plan: StepPlan) -> None:
        """Add the blocks that the next num_tokens tokens lack; the pool must have them free."""
        for block_id in self.block_tables.extend(sequence, num_tokens):
            plan.appended_slots.append(sequence.slot)
            plan.appended_block_ids.append(block_id)

    def _make_room(self, sequence: Sequence, num_blocks: int, plan: StepPlan) -> bool:
        pool = self.block_tables.pool
        while pool.num_free < num_blocks:
            if pool.num_free + pool.num_leased >= num_blocks:
                return False  # enough come back with the steps in flight
            victim = self._choose_victim(sequence, plan)
            if victim is None:
                if any(other.last_step_id == plan.step_id for other in self.sequences):
                    return False  # those in this step go on; their end frees blocks
                assert len(self.sequences) > 1, "a request that can never fit was accepted"
                victim = sequence
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        return True

    def _choose_victim(self, sequence: Sequence, plan: StepPlan) -> Sequence | None:
        """The lowest priority, then the fewest tokens to recompute, then the latest."""
        position = bisect.bisect_right(self.sequences, sequence.order_key, key=_order_key)
        candidates = [
            other for other in self.sequences[position:] if other.last_step_id != plan.step_id
        ]
        return min(
            candidates,
            key=lambda other: (-other.order_key[0], other.num_computed_tokens, -other.order_key[1]),
            default=None,
        )

    def _preempt(self, sequence: Sequence, plan: StepPlan) -> None:
        self.leave(sequence)
        sequence.num_preemptions += 1
        plan.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self._waiting.push(sequence)


def _order_key(sequence: Sequence) -> tuple[int, int]:
    return sequence.order_key
