"""Tells of refused requests without a line for each where there are many."""

from __future__ import annotations

import asyncio
from collections import Counter

from stepwire_scheduler.errors import SchedulerError
from stepwire_scheduler.logs import get_logger

LINES_A_PERIOD = 10
"""A line costs about as much as the refusal itself; a flood of them must not cost readers time."""
PERIOD_S = 1.0

log = get_logger("service")


class RejectionLog:
    """Logs each refusal, up to a number in each period; then one line says how many more."""

    def __init__(self) -> None:
        self._num_lines = 0
        self._unlogged: Counter[str] = Counter()

    def add(self, error: SchedulerError) -> None:
        """Tell of one, now or in the sum at the period's end; called from the event loop."""
        if self._num_lines == 0:
            asyncio.get_running_loop().call_later(PERIOD_S, self._end_period)
        if self._num_lines == LINES_A_PERIOD:
            self._unlogged[error.reason] += 1
            return
        self._num_lines += 1
        fields = [violation.field for violation in getattr(error, "violations", ())]
        log.info("request rejected", reason=error.reason, fields=fields)

    def _end_period(self) -> None:
        self._num_lines = 0
        for reason, count in self._unlogged.items():
            log.info("more requests rejected", reason=reason, num_requests=count)
        self._unlogged.clear()
