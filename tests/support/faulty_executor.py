"""An executor that speaks the plan stream wrongly, once, and is served on a chosen port."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from stepwire.executor.v1 import executor_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2, generation_pb2_grpc
from support.hashing_executor import HashingExecutor

SERVICE = "stepwire.executor.v1.ExecutorService"

Answer = pb.ExecuteResponse | bytes
"""Bytes go out as they are."""
Misbehaviour = Callable[[pb.ExecuteResponse], AsyncIterator[Answer]]
"""What goes out in the place of a response."""

Describe = Callable[[Any], Awaitable[bytes]]
"""Answers Describe in its own way; gets the call's context."""


class StreamOverError(Exception):
    """Raised by a misbehaviour that ends the stream as if all were well."""


class InterceptedExecutor(HashingExecutor):
    """Hands its answers to a method of its own, instead of sending them."""

    async def answer(self, response: pb.ExecuteResponse, place: int, context: Any) -> None:
        """Send a response, or something else; place: 0 for the epoch's opening, then one more."""
        await context.write(response)

    async def Execute(self, requests: AsyncIterator[pb.ExecuteRequest], context: Any) -> None:  # type: ignore[override]
        intercepted = _InterceptedContext(self, context)
        answering: Any = super().Execute(requests, intercepted)
        try:
            if isinstance(answering, AsyncIterator):
                async for response in answering:
                    await intercepted.write(response)
            else:
                await answering
        except StreamOverError:
            return


class _InterceptedContext:
    def __init__(self, executor: InterceptedExecutor, context: Any) -> None:
        self._executor = executor
        self._context = context
        self._num_written = 0

    async def write(self, response: pb.ExecuteResponse) -> None:
        place, self._num_written = self._num_written, self._num_written + 1
        await self._executor.answer(response, place, self._context)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


@dataclass
class FaultyExecutor(InterceptedExecutor):
    """Right until its fault_at-th answer on a stream, the epoch's opening being the 0th.

    From then on it says that it loads, so that there is one fault.
    """

    misbehave: Misbehaviour | None = None
    fault_at: int = 3
    num_faults: int = 0
    describe: Describe | None = None
    num_described: int = 0

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> Any:
        self.num_described += 1
        if self.describe is not None:
            return await self.describe(context)
        response = await super().Describe(request, context)
        if self.num_faults:
            response.load_state = pb.LOAD_STATE_LOADING
        return response

    async def answer(self, response: pb.ExecuteResponse, place: int, context: Any) -> None:
        if self.misbehave is None or place != self.fault_at:
            await context.write(response)
            return
        self.num_faults += 1
        async for answer in self.misbehave(response):
            await context.write(answer)


def _serialize(answer: Any) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()


@asynccontextmanager
async def serving(executor: HashingExecutor, port: int) -> AsyncIterator[None]:
    """Serve on a loopback port."""
    methods = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            executor.Describe,
            request_deserializer=pb.DescribeRequest.FromString,
            response_serializer=_serialize,
        ),
        "Execute": grpc.stream_stream_rpc_method_handler(
            executor.Execute,
            request_deserializer=pb.ExecuteRequest.FromString,
            response_serializer=_serialize,
        ),
    }
    unbounded = (("grpc.max_send_message_length", -1),)
    server = grpc.aio.server(options=unbounded)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    assert bound == port
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it never became so")
        await asyncio.sleep(0.01)


async def until_state(address: str, state: int, timeout_s: float = 30.0) -> None:
    """Wait until a scheduler says that it is in a ModelState."""
    deadline = time.monotonic() + timeout_s
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        while time.monotonic() < deadline:
            model = await stub.GetModel(
                generation_pb2.GetModelRequest(), wait_for_ready=True, timeout=timeout_s
            )
            if model.state == state:
                return
            await asyncio.sleep(0.01)
    raise TimeoutError(f"the scheduler's state never became {state}")


def free_port() -> int:
    """A port of the loopback address that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
