"""Writes a stream's events to its client."""

from __future__ import annotations

import asyncio
from typing import Any, Self

import grpc.aio
from stepwire.scheduler.v1 import generation_pb2

from stepwire_scheduler.errors import SlowReaderError

_Context = grpc.aio.ServicerContext[Any, Any]


class EventWriter:
    """Writes the events of one call and gives up on a client that does not read them.

    A context manager, to be entered by the task that writes. One timer watches all of the
    call's writes, for nearly every write ends at once: a timer each would cost more than what
    the scheduler does for a token otherwise.
    """

    def __init__(self, context: _Context, request_id: str, timeout_s: float) -> None:
        self._context = context
        self._request_id = request_id
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._began_s: float | None = None
        """When the write under way began."""
        self._is_late = False

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def write(self, seq: int, **event: Any) -> None:
        """Send one event, given as the oneof's field; raises SlowReaderError."""
        response = generation_pb2.GenerateStreamResponse(
            request_id=self._request_id, seq=seq, **event
        )
        self._began_s = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._check)
        try:
            # Waits only while the connection's flow control says that the client lags.
            await self._context.write(response)
        except asyncio.CancelledError:
            if self._is_late and self._task is not None and self._task.uncancel() == 0:
                raise SlowReaderError("the output was not read for too long") from None
            raise  # somebody else has cancelled, too
        finally:
            self._began_s = None

    def _check(self) -> None:
        """Cancel a write that takes too long, or look again when the one under way might."""
        self._timer = None
        if self._began_s is None or self._task is None:
            return  # the next write sets the timer
        remaining_s = self._began_s + self._timeout_s - self._loop.time()
        if remaining_s > 0:
            self._timer = self._loop.call_later(remaining_s, self._check)
        else:
            self._is_late = True
            self._task.cancel()
