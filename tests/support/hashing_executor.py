"""A loopback executor over the simulated one: real streams, checkable tokens, planted faults."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from stepwire.executor.v1 import executor_pb2 as pb
from stepwire.executor.v1 import executor_pb2_grpc
from stepwire_scheduler.plan import Admission, StepPlan
from stepwire_scheduler.sequence import SamplingParams
from support.simulated_executor import (
    SampleFunction,
    SimulatedExecutor,
    hashed_draft,
    hashed_sample,
)

Corrupt = Callable[[pb.StepResult], pb.StepResult | None]
"""Changes a result on its way out; None keeps it back for good."""

VOCAB_SIZE = 390
_HASHED = hashed_sample(VOCAB_SIZE)
_REPEATED, _HASH_EVERY = 5, 24


def repeating_sample(token_ids: list[int], stream: int) -> int:
    """Mostly the token of five before, now and then a hash: what lookups draft is often right."""
    if len(token_ids) < _REPEATED or len(token_ids) % _HASH_EVERY == 0:
        return _HASHED(token_ids, stream)
    return token_ids[-_REPEATED]


@dataclass
class HashingExecutor(executor_pb2_grpc.ExecutorServiceServicer):
    """Samples hashes of the tokens so far and fails where KV would be wrong."""

    num_blocks: int = 64
    block_size: int = 4
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    step_seconds: float = 0.0
    corrupt: Corrupt = lambda result: result
    sample: SampleFunction = _HASHED
    description: dict[str, Any] = field(default_factory=dict)
    """Overrides of what Describe says."""
    num_epochs: int = 0
    num_steps: int = 0
    calls: list[Any] = field(default_factory=list)
    open_calls: list[Any] = field(default_factory=list)
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        says: dict[str, Any] = {
            "load_state": pb.LOAD_STATE_READY,
            "load_fraction": 1.0,
            "world_size": 1,
            "model_fingerprint": "hash",
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 1024,
            "block_size": self.block_size,
            "num_blocks": self.num_blocks,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
        }
        return pb.DescribeResponse(**(says | self.description))

    async def drain(self) -> None:
        """Say that the rank is to end, as SIGTERM does."""
        self.description["load_state"] = pb.LOAD_STATE_DRAINING
        for call in self.open_calls:
            await self._write(call, pb.ExecuteResponse(draining=pb.Draining()))

    async def _write(self, call: Any, response: pb.ExecuteResponse) -> None:
        async with self._writing:  # gRPC takes one message of a call at a time
            await call.write(response)

    async def Execute(self, requests: AsyncIterator[pb.ExecuteRequest], context: Any) -> None:
        self.calls.append(context)
        self.open_calls.append(context)
        try:
            await self._serve(requests, context)
        finally:
            self.open_calls.remove(context)

    async def _serve(self, requests: AsyncIterator[pb.ExecuteRequest], context: Any) -> None:
        simulated = SimulatedExecutor(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            sample=self.sample,
            draft=hashed_draft(self.sample, VOCAB_SIZE),
        )
        num_logprobs: dict[int, int] = {}
        async for request in requests:
            if request.WhichOneof("message") == "open_epoch":
                self.num_epochs += 1
                opened = pb.EpochOpened(epoch=request.open_epoch.epoch)
                await self._write(context, pb.ExecuteResponse(epoch_opened=opened))
                continue
            await asyncio.sleep(self.step_seconds)
            self.num_steps += 1
            result = self.corrupt(_execute(simulated, request.step_plan, num_logprobs))
            if result is not None:
                await self._write(context, pb.ExecuteResponse(step_result=result))


def expected_output(
    prompt: list[int], num_tokens: int, stream: int = 0, sample: SampleFunction = _HASHED
) -> list[int]:
    """What an undisturbed run generates."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(sample(tokens, stream))
    return tokens[len(prompt) :]


def _execute(
    simulated: SimulatedExecutor, plan: pb.StepPlan, num_logprobs: dict[int, int]
) -> pb.StepResult:
    """Run a step; num_logprobs: by slot, kept from plan to plan."""
    for slot in plan.released_slots:
        num_logprobs.pop(slot, None)
    for admission in plan.admissions:
        if admission.sampling_params.HasField("num_logprobs"):
            num_logprobs[admission.slot] = admission.sampling_params.num_logprobs
    known_before = {slot: len(state.token_ids) for slot, state in simulated.slots.items()}
    known_before |= {admission.slot: len(admission.token_ids) for admission in plan.admissions}
    outcome = simulated.execute(
        StepPlan(
            step_id=plan.step_id,
            released_slots=list(plan.released_slots),
            admissions=[
                Admission(
                    slot=admission.slot,
                    token_ids=array("I", admission.token_ids),
                    num_prompt_tokens=admission.num_prompt_tokens,
                    num_computed_tokens=admission.num_computed_tokens,
                    block_ids=list(admission.block_ids),
                    sampling_params=SamplingParams(max_tokens=1),
                    stream=admission.sampling_params.stream,
                    suppressed_token_ids=(),
                )
                for admission in plan.admissions
            ],
            appended_slots=list(plan.appended_slots),
            appended_block_ids=list(plan.appended_block_ids),
            work_slots=list(plan.work_slots),
            work_num_tokens=list(plan.work_num_tokens),
            work_num_drafts=list(plan.work_num_drafts),
            draft_token_ids=list(plan.draft_token_ids),
        )
    )
    sampled = [
        slot
        for slot in plan.work_slots
        if len(simulated.slots[slot].token_ids) > known_before[slot]
    ]
    num_sampled = outcome.num_sampled_tokens or [1] * len(sampled)
    slot_of_token = [
        slot for slot, count in zip(sampled, num_sampled, strict=True) for _ in range(count)
    ]
    logprobs = [
        pb.TokenLogprobs(
            token_id=token_id,
            logprob=-float(token_id),
            rank=1,
            top_token_ids=range(num_logprobs[slot]),
            top_logprobs=[-1.0] * num_logprobs[slot],
        )
        for slot, token_id in zip(slot_of_token, outcome.sampled_token_ids, strict=True)
        if slot in num_logprobs
    ]
    return pb.StepResult(
        epoch=plan.epoch,
        step_id=plan.step_id,
        sampled_slots=sampled,
        num_sampled_tokens=num_sampled,
        sampled_token_ids=outcome.sampled_token_ids,
        num_draft_tokens=outcome.num_draft_tokens,
        logprobs=logprobs,
    )
