"""Wherever a draft is cut, client, scheduler and executor agree on what is left of it.

The scheduler's loop over a socket to the executor's own service, runner and engine; the model reads
its tokens back through the block table, so that one wrong block changes what comes out.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from stepwire.executor.v1 import executor_pb2_grpc
from stepwire_executor.batch import StepBatch
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.slots import SlotTable
from stepwire_scheduler.clock import now_ms
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.planner import Planner
from stepwire_scheduler.request_stream import SequenceOutput
from stepwire_scheduler.sequence import FinishReason, Request, SamplingParams
from stepwire_scheduler.sequence import Sequence as PlannedSequence
from stepwire_scheduler.served_model import ServingState
from stepwire_scheduler.step_loop import StepLoop
from support.executor_fakes import (
    BLOCK_SIZE,
    ENGINES,
    VOCAB_SIZE,
    EngineName,
    PagedEchoDecoder,
    expected_token,
    make_executor,
)
from support.executor_rank import DESCRIPTION, Rank
from support.scheduler_fakes import eventually
from support.scripted_speculator import ScriptedSpeculator
from torch import Tensor

NUM_DRAFTS = 5
CUTS = range(1, 3 + NUM_DRAFTS)
"""Tokens of a request: the first comes alone, then a whole draft and one more, then another."""
LENGTHS = range(3, 3 + BLOCK_SIZE)
"""Of prompts: drafts cross the end of a block at every place."""
MAX_TOKENS = 20
NEIGHBOUR = [11, 12, 13]


SCATTERED = random.Random(1).sample(range(VOCAB_SIZE - 1), VOCAB_SIZE - 1)


class ScatteringDecoder(PagedEchoDecoder):
    """Says other tokens, since those of the plain one soon repeat."""

    def hidden_states(self, batch: StepBatch, cache: KVCache) -> Tensor:
        plain = super().hidden_states(batch, cache)
        scattered = plain.clone()
        scattered[:, SCATTERED] = plain[:, : VOCAB_SIZE - 1]
        return scattered


def continuation(prompt: list[int], num_tokens: int) -> list[int]:
    """What it generates."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(SCATTERED[expected_token(tokens)])
    return tokens[len(prompt) :]


class Letters:
    """A tokenizer whose every token is one letter."""

    token_bytes: Sequence[bytes] = [bytes([48 + i % 75]) for i in range(VOCAB_SIZE)]


def text_of(token_ids: list[int]) -> str:
    return b"".join(Letters.token_bytes[token_id] for token_id in token_ids).decode()


class CheckingSpeculator(ScriptedSpeculator):
    """Also compares, whenever no step is in flight, the block tables of both sides."""

    def __init__(self, slots: SlotTable, *, is_always_right: bool) -> None:
        super().__init__(
            lambda sequence, num: continuation(list(sequence.token_ids), num),
            vocab_size=VOCAB_SIZE - 1,
            max_drafts=NUM_DRAFTS,
            is_always_right=is_always_right,
        )
        self._slots = slots
        self.planner: Planner | None = None
        self.num_compared = 0

    def note_step(self, **told: Any) -> None:
        super().note_step(**told)
        assert self.planner is not None
        if self.planner.inflight:
            return  # the executor may be ahead of what is booked
        for sequence in self.planner.running:
            self._compare(sequence)

    def _compare(self, sequence: PlannedSequence) -> None:
        slots, slot = self._slots, sequence.slot
        num_blocks = int(slots.num_table_blocks[slot])
        assert slots.block_table[slot, :num_blocks].tolist() == sequence.block_ids
        assert slots.num_tokens[slot] == len(sequence.token_ids)
        assert slots.num_computed_tokens[slot] == sequence.num_computed_tokens
        assert num_blocks <= -(-len(sequence.token_ids) // BLOCK_SIZE), "a draft has left some"
        assert num_blocks * BLOCK_SIZE >= sequence.num_computed_tokens
        self.num_compared += 1


@asynccontextmanager
async def serving(
    engine_name: EngineName, *, is_always_right: bool, eos_token_id: int
) -> AsyncIterator[tuple[StepLoop, CheckingSpeculator]]:
    executor = make_executor(engine_name=engine_name, decoder=ScatteringDecoder())
    rank = Rank(executor)
    rank.load.succeed(replace(DESCRIPTION, eos_token_ids=(eos_token_id,)))
    rank.service.set_runner(executor.runner)
    server = grpc.aio.server()
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(rank.service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    speculator = CheckingSpeculator(executor.slots, is_always_right=is_always_right)
    config = SchedulerConfig(
        model="m", executor_addresses=(f"127.0.0.1:{port}",), enable_prefix_caching=False
    )
    loop = StepLoop(config, Metrics("m"), make_speculator=lambda *_: speculator)
    loop.set_tokenizer(Letters())
    task = asyncio.create_task(loop.run())
    try:
        await eventually(lambda: loop.state is ServingState.READY)
        speculator.planner = loop._planner
        yield loop, speculator
        assert not rank.broken
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.stop(None)
        rank.compute.stop()
        assert await asyncio.to_thread(rank.compute.join, 10)


Way = Callable[[list[int]], tuple[dict[str, Any], FinishReason]]
"""From what a request is to say to its parameters, and why it ends."""


def at_max_tokens(output: list[int]) -> tuple[dict[str, Any], FinishReason]:
    return {"max_tokens": len(output), "ignore_eos": True}, FinishReason.LENGTH


def at_eos(output: list[int]) -> tuple[dict[str, Any], FinishReason]:
    return {}, FinishReason.STOP


def at_a_stop_token(output: list[int]) -> tuple[dict[str, Any], FinishReason]:
    return {"stop_token_ids": frozenset({output[-1]}), "ignore_eos": True}, FinishReason.STOP


def at_a_stop_string(output: list[int]) -> tuple[dict[str, Any], FinishReason]:
    return {"stop": (text_of(output)[-2:],), "ignore_eos": True}, FinishReason.STOP


def prompt_of(num_known: int, cut: int) -> list[int]:
    """Whose continuation has its token at the cut, and its letters there, for the first time."""
    rng = random.Random(cut)
    while True:
        prompt = [rng.randrange(VOCAB_SIZE - 1) for _ in range(num_known)]
        output = continuation(prompt, cut)
        text = text_of(output)
        if output[-1] not in output[:-1] and text[-2:] not in text[:-1]:
            return prompt


@pytest.mark.parametrize(
    ("engine_name", "is_always_right"),
    [("host", True), *((engine_name, False) for engine_name in ENGINES)],
)
@pytest.mark.parametrize("way", [at_max_tokens, at_eos, at_a_stop_token, at_a_stop_string])
async def test_an_end_inside_a_draft_leaves_both_sides_with_the_same_blocks(
    way: Way, is_always_right: bool, engine_name: EngineName
) -> None:
    num_drafted = num_accepted = num_compared = 0
    for cut, num_known in itertools.product(CUTS, LENGTHS):
        prompt = prompt_of(num_known, cut)
        output = continuation(prompt, cut)
        params, reason = way(output)
        async with (
            asyncio.timeout(60),
            serving(engine_name, is_always_right=is_always_right, eos_token_id=output[-1]) as (
                loop,
                speculator,
            ),
        ):
            # Beside a neighbour that goes on drafting in its own blocks.
            neighbour = asyncio.create_task(
                run(loop, "neighbour", NEIGHBOUR, max_tokens=24, ignore_eos=True)
            )
            assert await run(loop, "request", prompt, **params) == (output, reason)
            assert (await neighbour)[0] == continuation(NEIGHBOUR, 24)
            await eventually(lambda loop=loop: all_blocks_are_back(loop))
        num_drafted += speculator.num_drafted
        num_accepted += speculator.num_accepted
        num_compared += speculator.num_compared
    assert num_accepted > 200
    assert num_compared > 60
    if not is_always_right:
        assert num_accepted < num_drafted - 100


def all_blocks_are_back(loop: StepLoop) -> bool:
    assert loop._planner is not None
    pool = loop._planner.block_pool
    return not loop._planner.inflight and pool.num_free == pool.num_blocks


async def run(
    loop: StepLoop, request_id: str, prompt: list[int], **params: Any
) -> tuple[list[int], FinishReason | None]:
    """Tokens of a request, and why it ended."""
    now = now_ms()
    stream = loop.submit(
        Request(
            request_id=request_id,
            prompt_token_ids=array("I", prompt),
            sampling_params=SamplingParams(
                **({"max_tokens": MAX_TOKENS, "temperature": 0.0} | params)
            ),
            arrival_ms=now,
            deadline_ms=now + 60_000,
        )
    )
    token_ids: list[int] = []
    reason: FinishReason | None = None
    async for event in stream:
        if isinstance(event, SequenceOutput):
            token_ids += event.token_ids
            reason = event.finish_reason
    return token_ids, reason
