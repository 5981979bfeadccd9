"""Starting, driving and stopping a real executor process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from grpc import aio
from stepwire.executor.v1.executor_pb2 import (
    DescribeRequest,
    DescribeResponse,
    ExecuteRequest,
    LoadState,
    OpenEpoch,
    StepPlan,
    StepResult,
)
from stepwire.executor.v1.executor_pb2_grpc import ExecutorServiceStub

START_TIMEOUT_S = 10
LOAD_TIMEOUT_S = 120


@dataclass
class ExecutorProcess:
    """A child process that serves, and a channel to it."""

    process: asyncio.subprocess.Process
    address: str
    channel: aio.Channel
    stub: Any

    async def describe(self) -> DescribeResponse:
        response: DescribeResponse = await self.stub.Describe(DescribeRequest(), timeout=5)
        return response

    async def until_loaded(self) -> DescribeResponse:
        """Wait for the load to end, well or not."""
        async with asyncio.timeout(LOAD_TIMEOUT_S):
            while True:
                described = await self.describe()
                if described.load_state != LoadState.LOAD_STATE_LOADING:
                    return described
                await asyncio.sleep(0.05)

    async def exit_status(self, timeout_s: float) -> tuple[int, str]:
        """Wait for the process to end by itself; its status and standard error."""
        assert self.process.stderr is not None
        async with asyncio.timeout(timeout_s):
            text = (await self.process.stderr.read()).decode()
            return await self.process.wait(), text

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@asynccontextmanager
async def executor_process(*arguments: str) -> AsyncIterator[ExecutorProcess]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "stepwire_executor",
        "--listen",
        "127.0.0.1:0",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if not k.startswith("STEPWIRE_EXECUTOR_")},
    )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)).decode()
        prefix, _, address = line.strip().rpartition(" ")
        assert prefix == "listening on", line
        async with aio.insecure_channel(address) as channel:
            yield ExecutorProcess(process, address, channel, ExecutorServiceStub(channel))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class PlanStream:
    """The scheduler's end of one epoch."""

    def __init__(self, executor: ExecutorProcess, epoch: int) -> None:
        self.epoch = epoch
        self.call = executor.stub.Execute()

    async def open(self, model_fingerprint: str) -> None:
        opening = OpenEpoch(epoch=self.epoch, model_fingerprint=model_fingerprint)
        await self.call.write(ExecuteRequest(open_epoch=opening))
        assert (await self.call.read()).epoch_opened.epoch == self.epoch

    async def send(self, plan: StepPlan) -> None:
        await self.call.write(ExecuteRequest(step_plan=plan))

    async def result(self) -> StepResult:
        response = await asyncio.wait_for(self.call.read(), 60)
        assert response is not aio.EOF, await self.call.details()
        result: StepResult = response.step_result
        return result

    async def run(self, plan: StepPlan) -> StepResult:
        await self.send(plan)
        return await self.result()
