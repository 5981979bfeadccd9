"""An executor that speaks the plan stream from this process and computes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from stepwire.executor.v1 import executor_pb2 as pb
from stepwire.executor.v1 import executor_pb2_grpc


@dataclass
class FakeExecutor(executor_pb2_grpc.ExecutorServiceServicer):
    """Samples sampled_token_id for every slot that has computed all it knows."""

    step_seconds: float = 0.0
    """How long a step takes."""
    sampled_token_id: int = 70
    load_state: pb.LoadState = pb.LOAD_STATE_READY
    has_stepped: asyncio.Event = field(default_factory=asyncio.Event)
    _known: dict[int, int] = field(default_factory=dict)
    """Tokens of each slot."""
    _computed: dict[int, int] = field(default_factory=dict)

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        return pb.DescribeResponse(
            load_state=self.load_state,
            load_phase="read weights",
            load_fraction=0.25,
            world_size=1,
            instance_id="fake",
            model_fingerprint="fake",
            vocab_size=390,
            max_position_embeddings=1024,
            eos_token_ids=[2],
            block_size=16,
            num_blocks=64,
            max_num_seqs=8,
            max_num_batched_tokens=256,
        )

    async def Execute(
        self, requests: AsyncIterator[pb.ExecuteRequest], context: Any
    ) -> AsyncIterator[pb.ExecuteResponse]:
        async for request in requests:
            if request.WhichOneof("message") == "open_epoch":
                self._known.clear()
                self._computed.clear()
                opened = pb.EpochOpened(epoch=request.open_epoch.epoch)
                yield pb.ExecuteResponse(epoch_opened=opened)
            else:
                await asyncio.sleep(self.step_seconds)
                yield pb.ExecuteResponse(step_result=self._step(request.step_plan))

    def _step(self, plan: pb.StepPlan) -> pb.StepResult:
        self.has_stepped.set()
        for slot in plan.released_slots:
            del self._known[slot], self._computed[slot]
        for admission in plan.admissions:
            self._known[admission.slot] = len(admission.token_ids)
            self._computed[admission.slot] = admission.num_computed_tokens
        sampled = []
        for slot, num_tokens in zip(plan.work_slots, plan.work_num_tokens, strict=True):
            self._computed[slot] += num_tokens
            if self._computed[slot] == self._known[slot]:
                self._known[slot] += 1
                sampled.append(slot)
        return pb.StepResult(
            epoch=plan.epoch,
            step_id=plan.step_id,
            sampled_slots=sampled,
            num_sampled_tokens=[1] * len(sampled),
            sampled_token_ids=[self.sampled_token_id] * len(sampled),
        )


@asynccontextmanager
async def serving(executor: FakeExecutor) -> AsyncIterator[str]:
    """Serve on a free loopback port; yields HOST:PORT."""
    server = grpc.aio.server()
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(executor, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
