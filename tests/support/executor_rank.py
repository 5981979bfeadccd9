"""One executor rank over a loopback server, with a model small enough to predict."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc import aio
from stepwire.executor.v1.executor_pb2 import (
    DescribeRequest,
    DescribeResponse,
    ExecuteRequest,
    ExecuteResponse,
    OpenEpoch,
    StepPlan,
    StepResult,
)
from stepwire.executor.v1.executor_pb2_grpc import (
    ExecutorServiceStub,
    add_ExecutorServiceServicer_to_server,
)
from stepwire_executor.compute import ComputeThread
from stepwire_executor.load_status import LoadStatus, ModelDescription
from stepwire_executor.service import ExecutorService
from support.executor_fakes import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    NUM_BLOCKS,
    VOCAB_SIZE,
    FakeExecutor,
    make_executor,
)

FINGERPRINT = "f00d"
DESCRIPTION = ModelDescription(
    model_fingerprint=FINGERPRINT,
    architecture="PagedEchoForCausalLM",
    dtype="float32",
    quantization="none",
    kv_cache_dtype="float32",
    device="cpu",
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=MAX_MODEL_LEN,
    eos_token_ids=(2, 3),
    block_size=BLOCK_SIZE,
    num_blocks=NUM_BLOCKS,
    max_num_seqs=MAX_NUM_SEQS,
    max_num_batched_tokens=64,
    weight_bytes=1,
    kv_cache_bytes=NUM_BLOCKS * BLOCK_SIZE * 8,
)


class Rank:
    """A served fake executor."""

    def __init__(self, executor: FakeExecutor | None = None) -> None:
        self.executor = executor or make_executor()
        self.broken: list[str] = []
        self.compute = ComputeThread()
        self.load = LoadStatus()
        self.service = ExecutorService(
            compute=self.compute,
            load=self.load,
            instance_id="i-1",
            on_broken=self.broken.append,
        )
        self.stub: Any = None
        self.channel: Any = None

    def become_ready(self) -> None:
        self.load.succeed(DESCRIPTION)
        self.service.set_runner(self.executor.runner)

    async def describe(self) -> DescribeResponse:
        response: DescribeResponse = await self.stub.Describe(DescribeRequest())
        return response


@asynccontextmanager
async def serving(
    *, ready: bool = True, executor: FakeExecutor | None = None
) -> AsyncIterator[Rank]:
    rank = Rank(executor)
    if ready:
        rank.become_ready()
    server = aio.server()
    add_ExecutorServiceServicer_to_server(rank.service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        rank.channel = channel
        rank.stub = ExecutorServiceStub(channel)
        yield rank
    await server.stop(None)
    rank.compute.stop()
    assert await asyncio.to_thread(rank.compute.join, 10)


class Stream:
    """The scheduler's end of one Execute call."""

    def __init__(self, rank: Rank) -> None:
        self.call = rank.stub.Execute()

    async def send(self, plan: StepPlan) -> None:
        await self.call.write(ExecuteRequest(step_plan=plan))

    async def receive(self) -> ExecuteResponse:
        response = await asyncio.wait_for(self.call.read(), 10)
        assert isinstance(response, ExecuteResponse), await self.status()
        return response

    async def result(self) -> StepResult:
        return (await self.receive()).step_result

    async def run(self, plan: StepPlan) -> StepResult:
        await self.send(plan)
        return await self.result()

    async def status(self) -> tuple[grpc.StatusCode, str]:
        code = await asyncio.wait_for(self.call.code(), 10)
        return code, await self.call.details()


async def open_stream(rank: Rank, epoch: int = 1, fingerprint: str = FINGERPRINT) -> Stream:
    stream = Stream(rank)
    opening = OpenEpoch(epoch=epoch, model_fingerprint=fingerprint)
    await stream.call.write(ExecuteRequest(open_epoch=opening))
    return stream


async def opened_stream(rank: Rank, epoch: int = 1) -> Stream:
    stream = await open_stream(rank, epoch)
    assert (await stream.receive()).epoch_opened.epoch == epoch
    return stream
