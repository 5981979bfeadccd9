"""A scheduler process over an executor that computes nothing: from loading to its end."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stepwire.executor.v1 import executor_pb2
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc
from support.fake_executor import FakeExecutor, serving
from support.scheduler_tokenizers import write_tokenizer

SERVICE = health_pb2.HealthCheckRequest(service="stepwire.scheduler.v1.GenerationService")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Scheduler:
    process: asyncio.subprocess.Process
    stub: generation_pb2_grpc.GenerationServiceAsyncStub
    health: health_pb2_grpc.HealthStub

    async def until(self, status: int) -> None:
        """Wait for the service's health."""
        async with asyncio.timeout(20):
            async for response in self.health.Watch(SERVICE):
                if response.status == status:
                    return

    async def exit_status(self) -> int:
        async with asyncio.timeout(20):
            return await self.process.wait()


@asynccontextmanager
async def scheduler(model: Path, executor: FakeExecutor, *flags: str) -> AsyncIterator[Scheduler]:
    """A scheduler process connected to the executor."""
    async with serving(executor) as address:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "stepwire_scheduler", "--model", str(write_tokenizer(model))),
            *("--listen", "127.0.0.1:0", "--executor", address, *flags),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), 20)
            async with grpc.aio.insecure_channel(line.decode().split()[-1]) as channel:
                yield Scheduler(
                    process=process,
                    stub=generation_pb2_grpc.GenerationServiceStub(channel),
                    health=health_pb2_grpc.HealthStub(channel),
                )
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


def request(max_tokens: int) -> pb.GenerateRequest:
    params = pb.SamplingParams(max_tokens=max_tokens)
    return pb.GenerateRequest(input=pb.GenerationInput(text="hi", sampling_params=params))


async def test_health_and_progress_follow_the_executors_load(tmp_path: Path) -> None:
    executor = FakeExecutor(load_state=executor_pb2.LOAD_STATE_LOADING)
    async with scheduler(tmp_path, executor) as served:
        await served.until(NOT_SERVING)
        async with asyncio.timeout(20):
            while True:
                model = await served.stub.GetModel(pb.GetModelRequest())
                if model.state == pb.MODEL_STATE_LOADING:
                    break
        assert model.load_progress.phase == "read weights"
        assert model.load_progress.fraction == pytest.approx(0.25)
        executor.load_state = executor_pb2.LOAD_STATE_READY
        await served.until(SERVING)
        response = await served.stub.Generate(request(5))
    assert len(response.choices[0].token_ids) == 5
    assert response.choices[0].finish_reason == pb.FINISH_REASON_LENGTH


async def test_a_step_that_does_not_come_back_ends_serving(tmp_path: Path) -> None:
    executor = FakeExecutor(step_seconds=60)
    flags = ("--step-timeout-ms", "600")
    async with scheduler(tmp_path, executor, *flags) as served:
        await served.until(SERVING)
        running = served.stub.Generate(request(5))
        await served.until(NOT_SERVING)
        running.cancel()


async def test_draining_finishes_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    executor = FakeExecutor(step_seconds=0.02)
    async with scheduler(tmp_path, executor) as served:
        await served.until(SERVING)
        running = asyncio.ensure_future(served.stub.Generate(request(60)))
        await asyncio.wait_for(executor.has_stepped.wait(), 20)
        served.process.send_signal(signal.SIGTERM)
        await served.until(NOT_SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.stub.Generate(request(1))
        response = await running
        status = await served.exit_status()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(response.choices[0].token_ids) == 60
    assert status == 0


@pytest.mark.parametrize("hurried", [False, True])
async def test_a_drain_that_takes_too_long_ends_what_is_left(tmp_path: Path, hurried: bool) -> None:
    """At its timeout, or at once by a second signal; either way with a status."""
    executor = FakeExecutor(step_seconds=0.05)
    flags = () if hurried else ("--drain-timeout-ms", "200")
    async with scheduler(tmp_path, executor, *flags) as served:
        await served.until(SERVING)
        running = asyncio.ensure_future(served.stub.Generate(request(1000)))
        await asyncio.wait_for(executor.has_stepped.wait(), 20)
        served.process.send_signal(signal.SIGTERM)
        await served.until(NOT_SERVING)
        if hurried:
            served.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await served.exit_status() == 0
