"""SERVING means that steps make progress."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from stepwire_scheduler.rpc_handlers import SERVICE_NAME
from stepwire_scheduler.served_model import ServingState
from support.scheduler_fakes import FakeStepLoop, served, tiny_tokenizer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize(
    ("state", "is_progressing", "has_tokenizer", "expected"),
    [
        (ServingState.CONNECTING, False, True, NOT_SERVING),
        (ServingState.LOADING, False, True, NOT_SERVING),
        (ServingState.READY, True, True, SERVING),
        (ServingState.READY, True, False, NOT_SERVING),
        (ServingState.READY, False, True, NOT_SERVING),
        (ServingState.DRAINING, True, True, NOT_SERVING),
    ],
)
async def test_the_service_serves_only_while_steps_progress(
    tmp_path: Path, state: ServingState, is_progressing: bool, has_tokenizer: bool, expected: int
) -> None:
    tokenizer = tiny_tokenizer(tmp_path) if has_tokenizer else None
    step_loop = FakeStepLoop(state=state, is_progressing=is_progressing)
    async with served(tokenizer, step_loop) as harness:
        process = await harness.health.Check(health_pb2.HealthCheckRequest())
        service = await harness.health.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
    assert process.status == SERVING
    assert service.status == expected


async def test_a_watcher_learns_of_every_change(tmp_path: Path) -> None:
    step_loop = FakeStepLoop()
    async with served(tiny_tokenizer(tmp_path), step_loop) as harness:
        watch = harness.health.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        async with asyncio.timeout(10):
            assert (await watch.read()).status == SERVING
            step_loop.is_progressing = False
            assert (await watch.read()).status == NOT_SERVING
            step_loop.is_progressing = True
            assert (await watch.read()).status == SERVING
        watch.cancel()


async def test_unknown_services_are_not_found_or_unknown(tmp_path: Path) -> None:
    async with served(None) as harness:
        request = health_pb2.HealthCheckRequest(service="nobody")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.health.Check(request)
        watch = harness.health.Watch(request)
        status = (await watch.read()).status
        watch.cancel()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
