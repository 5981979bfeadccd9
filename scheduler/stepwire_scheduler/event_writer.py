"""Writes a stream's events to its client."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
from stepwire.scheduler.v1 import generation_pb2

from stepwire_scheduler.errors import SlowReaderError

_Context = grpc.aio.ServicerContext[Any, Any]


class EventWriter:
    """Writes the events of one call and gives up on a client that does not read them."""

    def __init__(self, context: _Context, request_id: str, timeout_s: float) -> None:
        self._context = context
        self._request_id = request_id
        self._timeout_s = timeout_s

    async def write(self, seq: int, **event: Any) -> None:
        """Send one event, given as the oneof's field; raises SlowReaderError."""
        response = generation_pb2.GenerateStreamResponse(
            request_id=self._request_id, seq=seq, **event
        )
        try:
            # Waits only while the connection's flow control says that the client lags.
            async with asyncio.timeout(self._timeout_s):
                await self._context.write(response)
        except TimeoutError:
            raise SlowReaderError("the output was not read for too long") from None
