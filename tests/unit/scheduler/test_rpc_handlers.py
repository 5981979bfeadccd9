"""What a handler's failure becomes that is not the handler's."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc.aio
import pytest
import structlog
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire_scheduler.errors import QueueFullError
from stepwire_scheduler.rpc_handlers import _answer
from stepwire_scheduler.tenants import Authenticator


class GoneContext:
    """Of a client that has left: nothing can be sent."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def abort(self, *_: Any) -> None:
        raise grpc.aio.InternalError('Failed "execute_batch"')


async def fail_to_write(request: Any, context: Any) -> None:
    raise grpc.aio.InternalError('Failed "execute_batch"')


async def refuse(request: Any, context: Any) -> None:
    raise QueueFullError("too many requests wait")


@pytest.mark.parametrize("method", [fail_to_write, refuse])
async def test_a_client_that_left_cancels_its_call_and_is_no_defect(method: Any) -> None:
    with structlog.testing.capture_logs() as logged, pytest.raises(asyncio.CancelledError):
        await _answer(method, pb.GenerateRequest, Authenticator(), b"", cast(Any, GoneContext()))
    assert not logged
