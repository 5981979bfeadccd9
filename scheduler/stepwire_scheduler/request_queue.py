"""Sequences that wait for a slot, in the order of the policy."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from stepwire_scheduler.sequence import Sequence, SequenceStatus


class RequestQueue:
    """A priority queue of waiting sequences by order_key; removal is lazy.

    A preempted sequence keeps its key, so it returns ahead of what came after it. Bounds are
    the caller's: what was accepted once must always fit back.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._num_tokens = 0
        self._members: dict[Sequence, int] = {}
        """Waiting sequences and the tokens each was counted with."""

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return iter(self._members)

    @property
    def num_tokens(self) -> int:
        """Tokens of all waiting sequences, as known when they were queued."""
        return self._num_tokens

    def push(self, sequence: Sequence) -> None:
        assert sequence.status is SequenceStatus.WAITING, sequence
        assert sequence not in self._members, sequence
        self._members[sequence] = len(sequence.token_ids)
        self._num_tokens += len(sequence.token_ids)
        heapq.heappush(self._heap, (sequence.order_key, sequence))

    def peek(self) -> Sequence | None:
        """The next sequence, left in place."""
        while self._heap:
            sequence = self._heap[0][1]
            if sequence in self._members:
                return sequence
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Sequence:
        sequence = self.peek()
        assert sequence is not None
        heapq.heappop(self._heap)
        self._forget(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that ends while it waits."""
        assert sequence in self._members, sequence
        self._forget(sequence)
        if len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [item for item in self._heap if item[1] in self._members]
            heapq.heapify(self._heap)

    def _forget(self, sequence: Sequence) -> None:
        self._num_tokens -= self._members.pop(sequence)
