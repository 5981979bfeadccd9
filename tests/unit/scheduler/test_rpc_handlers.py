"""What a handler's failure becomes that is not the handler's."""

from __future__ import annotations

import asyncio
import gc
import types
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest
import structlog
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire_scheduler.errors import QueueFullError
from stepwire_scheduler.rpc_handlers import _answer
from stepwire_scheduler.tenants import Authenticator
from support.scheduler_fakes import FakeStepLoop, served, tiny_tokenizer


class GoneContext:
    """Of a client that has left: nothing can be sent."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


async def fail_to_write(request: Any, context: Any) -> None:
    raise grpc.aio.InternalError('Failed "execute_batch"')


async def test_a_client_that_left_cancels_its_call_and_is_no_defect() -> None:
    context = cast(Any, GoneContext())
    with structlog.testing.capture_logs() as logged, pytest.raises(asyncio.CancelledError):
        await _answer(fail_to_write, pb.GenerateRequest, Authenticator(), b"", context)
    assert not logged


async def test_refusals_leave_little_to_the_garbage_collector(tmp_path: Path) -> None:
    """An exception that holds its frames would be ten times what gRPC itself leaves of a call."""
    step_loop = FakeStepLoop()
    step_loop.check_room = refuse  # type: ignore[method-assign]
    request = pb.GenerateStreamRequest(input=pb.GenerationInput(text="hi"))
    async with served(tiny_tokenizer(tmp_path), step_loop) as harness:

        async def be_refused() -> None:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await harness.stub.GenerateStream(request).read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        await be_refused()
        gc.collect()
        gc.disable()
        try:
            for _ in range(50):
                await be_refused()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            frames = [each for each in gc.garbage if isinstance(each, types.FrameType)]
            files = [frame.f_code.co_filename for frame in frames]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert not [file for file in files if "stepwire_scheduler" in file]


def refuse(num_sequences: int = 1) -> None:
    raise QueueFullError("too many requests wait")
