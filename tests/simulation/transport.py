"""What the scheduler uses of grpc.aio, in memory: channels and calls to simulated ranks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
from grpc.aio import AioRpcError, Metadata
from stepwire.executor.v1 import executor_pb2 as pb

if TYPE_CHECKING:
    from tests.simulation.rank import Rank

_TICK_S = 1e-7
"""Between two messages of a call that would arrive at once: timers of equal time may swap."""


def rpc_error(code: grpc.StatusCode, details: str) -> AioRpcError:
    """The error that grpc.aio raises for a status."""
    return AioRpcError(code, Metadata(), Metadata(), details=details)


class Channel:
    """Stands in for grpc.aio.Channel."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def unary_unary(self, method: str, **_options: Any) -> Callable[..., Any]:
        assert method.endswith("/Describe"), method

        async def describe(_request: Any, timeout: float) -> pb.DescribeResponse:  # noqa: ASYNC109 - grpc's
            try:
                async with asyncio.timeout(timeout):
                    return await self._rank.describe()
            except TimeoutError:
                raise rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "") from None

        return describe

    def stream_stream(self, method: str, **_options: Any) -> Callable[..., Call]:
        assert method.endswith("/Execute"), method
        return lambda: Call(self._rank)

    async def close(self) -> None:
        """Nothing to close."""


class Call:
    """Stands in for grpc.aio.StreamStreamCall: messages arrive late, in order, or not at all."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.instance = rank.instance
        self.is_closed = False
        """Ended by either side."""
        self.waits_since_s: float | None = None
        """Since when a message of the scheduler waits for the next answer."""
        self._num_unanswered = 0
        self.outcome: BaseException | None = None
        """What reads raise once the inbox is empty; None where the end is in order."""
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._last_arrival_s = 0.0
        self._last_delivery_s = 0.0
        rank.add_call(self)

    # The scheduler's side

    async def write(self, message: bytes) -> None:
        if self.is_closed:
            raise asyncio.InvalidStateError("the call has ended")
        request = pb.ExecuteRequest.FromString(message)
        self._num_unanswered += 1
        if self.waits_since_s is None:
            self.waits_since_s = self._loop.time()
        self._last_arrival_s = self._later(self._last_arrival_s)
        self._loop.call_at(self._last_arrival_s, self.rank.arrive, self, request)

    async def read(self) -> Any:
        while not self._inbox:
            if self.is_closed:
                if self.outcome is not None:
                    raise self.outcome
                return grpc.aio.EOF
            self._waiter = self._loop.create_future()
            await self._waiter
        return pb.ExecuteResponse.FromString(self._inbox.popleft())

    def cancel(self) -> None:
        if not self.is_closed:
            self._inbox.clear()
            self._close(asyncio.CancelledError())

    # The rank's side

    def deliver(self, response: pb.ExecuteResponse) -> None:
        """Send a response on its way."""
        message = response.SerializeToString()
        is_answer = not response.HasField("draining")
        self._last_delivery_s = self._later(self._last_delivery_s)
        self._loop.call_at(self._last_delivery_s, self._put, message, is_answer)

    def end(self, code: grpc.StatusCode, details: str, *, loses_messages: bool = False) -> None:
        """Send the call's end; what is on its way comes before it, or never."""
        outcome = None if code is grpc.StatusCode.OK else rpc_error(code, details)
        if loses_messages:
            self._close(outcome)
        else:
            self._last_delivery_s = self._later(self._last_delivery_s)
            self._loop.call_at(self._last_delivery_s, self._close, outcome)

    def _put(self, message: bytes, is_answer: bool) -> None:
        if self.is_closed:
            return
        self._inbox.append(message)
        if is_answer:
            self._num_unanswered = max(0, self._num_unanswered - 1)
            self.waits_since_s = self._loop.time() if self._num_unanswered else None
        self._wake()

    def _close(self, outcome: BaseException | None) -> None:
        if not self.is_closed:
            self.is_closed, self.outcome = True, outcome
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _later(self, last_s: float) -> float:
        return max(last_s + _TICK_S, self._loop.time() + self.rank.draw_latency_s())
