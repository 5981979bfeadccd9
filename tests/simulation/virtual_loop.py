"""An asyncio event loop whose clock is a number: it jumps to the next timer."""

from __future__ import annotations

import asyncio
from typing import Any


class DeadlockError(AssertionError):
    """Everything waits and no timer is set."""


class _Jump:
    """Stands in for a selector: instead of waiting, time passes."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise DeadlockError("everything waits and no timer is set")
        self._loop.now_s += timeout
        return []

    def close(self) -> None:
        """Nothing to close."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs tasks and timers in an order that depends on nothing but the program.

    No sockets, threads or signals; time passes only where every task waits.
    """

    def __init__(self, start_s: float = 1_000.0) -> None:
        super().__init__()
        self.now_s = start_s
        """Virtual seconds; what time() says."""
        self._selector = _Jump(self)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.now_s

    def _process_events(self, event_list: list[Any]) -> None:
        """There are no sockets."""

    def _write_to_self(self) -> None:
        """Nobody calls from another thread."""
