"""The asyncio client's streams, which survive the calls that carry them, and its cancellations."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Self, TypeAlias

import grpc
import grpc.aio
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc

from stepwire_client import conversion
from stepwire_client.cancellations import CANCEL_TIMEOUT_S, FLUSH_TIMEOUT_S
from stepwire_client.credentials import Metadata
from stepwire_client.errors import RequestCancelledError, RpcError, StepwireError
from stepwire_client.events import Completed, Event
from stepwire_client.resumption import Resumption
from stepwire_client.rpc_errors import error_from_rpc

StreamCall: TypeAlias = grpc.aio.UnaryStreamCall[
    pb.GenerateStreamRequest, pb.GenerateStreamResponse
]


class AsyncCancellations:
    """Sends Cancel without waiting for the answer."""

    def __init__(self, stub: pb_grpc.GenerationServiceAsyncStub, metadata: Metadata) -> None:
        """metadata: goes with every call."""
        self._stub = stub
        self._metadata = metadata
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, *request_ids: str) -> None:
        """End requests; nothing is raised, for a server that is not there has ended them."""
        task = asyncio.get_running_loop().create_task(self._send(request_ids))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def flush(self) -> None:
        """Wait a moment for what has been sent to arrive."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=FLUSH_TIMEOUT_S)

    async def _send(self, request_ids: tuple[str, ...]) -> None:
        request = pb.CancelRequest(request_ids=request_ids)
        with contextlib.suppress(grpc.RpcError, grpc.aio.UsageError):
            await self._stub.Cancel(
                request, timeout=CANCEL_TIMEOUT_S, metadata=self._metadata, wait_for_ready=True
            )


class _Call:
    """What the stream and its finalizer share: the current call, and whether it matters."""

    def __init__(self, cancellations: AsyncCancellations, request_id: str, *, is_on: bool) -> None:
        self.current: StreamCall | None = None
        self.is_done = False
        """Whether the server has ended the request."""
        self.cancelled = asyncio.Event()
        self._cancellations = cancellations
        self._request_id = request_id
        self._is_on = is_on

    def cancel(self) -> None:
        """End the call, and the request where it would outlive it; in the event loop."""
        is_first = not self.cancelled.is_set()
        self.cancelled.set()
        if self.current is None:
            return
        self.current.cancel()
        if is_first and not self.is_done and self._is_on:
            self._cancellations.send(self._request_id)


class AsyncGenerationStream(AsyncIterator[Event]):
    """The events of one request, in order: Queued, Scheduled, Output …, Completed.

    A call that breaks is sent again and goes on where it broke. Ends the request when it is
    closed, left as a context manager, collected before it is done, or when the task that waits
    for an event is cancelled.
    """

    def __init__(
        self,
        start_call: Callable[[int, float | None], StreamCall],
        *,
        resumption: Resumption,
        cancellations: AsyncCancellations,
        request_id: str,
        address: str,
    ) -> None:
        """start_call: sends the request; takes from_seq and the time that is left, in seconds."""
        self.request_id = request_id
        self._loop = asyncio.get_running_loop()
        self._start_call = start_call
        self._resumption = resumption
        self._address = address
        self._call = _Call(cancellations, request_id, is_on=resumption.is_on)
        self._responses: AsyncIterator[pb.GenerateStreamResponse]
        self._send()

    async def __anext__(self) -> Event:
        try:
            while True:
                try:
                    event = await self._read()
                except RpcError as error:
                    await self._wait_after(error)
                    self._send()
                else:
                    return event
        except StopAsyncIteration:
            self._call.is_done = True
            raise
        except asyncio.CancelledError:
            # grpc.aio raises this both for the task and for its own call.
            if self._call.cancelled.is_set():
                raise _cancelled() from None
            self.cancel()
            raise
        except StepwireError:
            self.cancel()
            raise

    async def _read(self) -> Event:
        """The call's next event; raises RpcError where it ends early."""
        call = self._call
        try:
            message = await anext(self._responses)
        except grpc.RpcError as status:
            if call.cancelled.is_set():
                raise _cancelled() from None
            if call.is_done:  # only the status was lost
                raise StopAsyncIteration from None
            raise error_from_rpc(status, address=self._address) from None
        self._resumption.accept(message)
        event = conversion.from_stream_response(message)
        call.is_done = isinstance(event, Completed)
        return event

    async def _wait_after(self, error: RpcError) -> None:
        """Return when the call should be sent again; raises the error if it should not."""
        call = self._call
        delay_s = self._resumption.delay_after(error)
        if delay_s is None:
            call.is_done = call.is_done or not self._resumption.may_still_run
            raise error
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await call.cancelled.wait()
            raise _cancelled()

    def _send(self) -> None:
        timeout_s = self._resumption.start_call()
        try:
            self._call.current = self._start_call(self._resumption.next_seq, timeout_s)
        except grpc.aio.UsageError:  # so says gRPC of a closed channel
            raise RequestCancelledError("the client is closed", code="CANCELLED") from None
        self._responses = aiter(self._call.current)

    def cancel(self) -> None:
        """End the request; the server frees what it held. Does not wait; may be repeated."""
        self._call.cancel()

    async def aclose(self) -> None:
        """End the request."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        # grpc.aio's own tasks keep a call that nobody reads alive. Any thread may collect this.
        with contextlib.suppress(RuntimeError):  # the event loop is closed, the call with it
            self._loop.call_soon_threadsafe(self._call.cancel)


def _cancelled() -> RequestCancelledError:
    return RequestCancelledError("the call was cancelled", code="CANCELLED")
