"""When sequences must have ended."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from stepwire_scheduler.sequence import Sequence, SequenceStatus

_MAX_ENDED = 64
"""Sequences that have ended and may be held beside twice those that go on."""


class Deadlines:
    """The deadlines of sequences, the earliest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        """With a number that tells equal deadlines apart."""
        self._num_added = 0

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence, if its request has a deadline."""
        deadline_ms = sequence.request.deadline_ms
        if deadline_ms != float("inf"):
            self._num_added += 1
            heapq.heappush(self._heap, (deadline_ms, self._num_added, sequence))

    @property
    def next_ms(self) -> float | None:
        """When pop_expired may next have something."""
        return self._heap[0][0] if self._heap else None

    def pop_expired(self, now_ms: float) -> Iterator[Sequence]:
        """Those that have not ended and whose deadline has passed."""
        while self._heap and self._heap[0][0] <= now_ms:
            _, _, sequence = heapq.heappop(self._heap)
            if sequence.status is not SequenceStatus.FINISHED:
                yield sequence

    def forget_ended(self, num_live: int) -> None:
        """Drop sequences that have ended, once they are many beside the num_live others."""
        if len(self._heap) > 2 * num_live + _MAX_ENDED:
            self._heap = [
                item for item in self._heap if item[2].status is not SequenceStatus.FINISHED
            ]
            heapq.heapify(self._heap)
