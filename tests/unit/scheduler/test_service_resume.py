"""Calls that end and come back, over the real step loop and an executor that computes hashes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from stepwire.executor.v1 import executor_pb2_grpc
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.served_model import ServingState
from stepwire_scheduler.step_loop import StepLoop
from stepwire_scheduler.tokenizer import Tokenizer
from stepwire_scheduler.validation import input_digest
from support.hashing_executor import HashingExecutor, expected_output
from support.scheduler_fakes import FakeStepLoop, eventually, served, tiny_tokenizer

PROMPT = [1, 2, 3, 4, 5]
WINDOW_MS = 30_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(Path(tmp_path_factory.mktemp("model")))


@dataclass
class Service:
    loop: StepLoop
    stub: generation_pb2_grpc.GenerationServiceAsyncStub

    def blocks_are_free(self) -> bool:
        assert self.loop._planner is not None
        pool = self.loop._planner.block_pool
        return pool.num_free == pool.num_blocks


@asynccontextmanager
async def serving(
    tokenizer: Tokenizer, executor: HashingExecutor, **settings: int
) -> AsyncIterator[Service]:
    server = grpc.aio.server()
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(executor, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    config = SchedulerConfig(model="m", executor_addresses=(f"127.0.0.1:{port}",), **settings)
    loop = StepLoop(config, Metrics("m"))
    loop.set_tokenizer(tokenizer)
    running = asyncio.create_task(loop.run())
    try:
        await eventually(lambda: loop.state is ServingState.READY)
        async with served(tokenizer, cast(FakeStepLoop, loop), **settings) as harness:
            yield Service(loop=loop, stub=harness.stub)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.stop(None)


def ask(
    from_seq: int = 0,
    *,
    request_id: str = "r",
    max_tokens: int = 12,
    n: int = 1,
    window_ms: int = WINDOW_MS,
    prompt: list[int] = PROMPT,
    **params: Any,
) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(
        input=pb.GenerationInput(
            request_id=request_id,
            token_ids=pb.TokenIds(ids=prompt),
            sampling_params=pb.SamplingParams(max_tokens=max_tokens, n=n, **params),
        ),
        from_seq=from_seq,
        resume_window_ms=window_ms,
    )


async def read(
    call: grpc.aio.UnaryStreamCall[Any, pb.GenerateStreamResponse], num_events: int = 10**9
) -> list[pb.GenerateStreamResponse]:
    events: list[pb.GenerateStreamResponse] = []
    async with asyncio.timeout(20):
        async for event in call:
            events.append(event)
            if len(events) == num_events:
                break
    return events


def tokens_of(events: list[pb.GenerateStreamResponse], index: int = 0) -> list[int]:
    outputs = [event.output for event in events if event.HasField("output")]
    return [token for each in outputs if each.index == index for token in each.token_ids]


async def reason_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call)
    details = dict(caught.value.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    return caught.value.code(), str(details)


async def test_what_ended_can_be_read_again_from_every_event(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, HashingExecutor(step_seconds=0.002)) as service:
        whole = await read(service.stub.GenerateStream(ask(n=3)))
        assert [event.seq for event in whole] == list(range(len(whole)))
        for index in range(3):
            assert tokens_of(whole, index) == expected_output(PROMPT, 12, index)
        for seq in range(len(whole) + 1):
            assert await read(service.stub.GenerateStream(ask(seq, n=3))) == whole[seq:]


@pytest.mark.parametrize("num_events", [1, 2, 3, 5, 9])
async def test_a_stream_that_is_cut_goes_on_after_what_was_seen(
    tokenizer: Tokenizer, num_events: int
) -> None:
    async with serving(tokenizer, HashingExecutor(step_seconds=0.005)) as service:
        events: list[pb.GenerateStreamResponse] = []
        while not events or not events[-1].HasField("completed"):
            call = service.stub.GenerateStream(ask(len(events), max_tokens=40, n=2))
            events += await read(call, num_events)
            call.cancel()
            num_events += 3
        assert [event.seq for event in events] == list(range(len(events)))
        for index in range(2):
            assert tokens_of(events, index) == expected_output(PROMPT, 40, index)
        assert service.loop._metrics.registry.get_sample_value(
            "stepwire_requests_queued_total"
        ) == pytest.approx(1)


async def test_what_nobody_comes_back_for_ends_after_its_window(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, HashingExecutor(step_seconds=0.01)) as service:
        call = service.stub.GenerateStream(ask(max_tokens=200, window_ms=200))
        seen = await read(call, 4)
        call.cancel()
        await eventually(service.blocks_are_free)
        code, reason = await reason_of(service.stub.GenerateStream(ask(len(seen), max_tokens=200)))
        assert code is grpc.StatusCode.OUT_OF_RANGE
        assert "NOT_RETAINED" in reason


async def test_the_servers_retention_caps_the_window(tokenizer: Tokenizer) -> None:
    executor = HashingExecutor(step_seconds=0.01)
    async with serving(tokenizer, executor, resume_retention_ms=100) as service:
        call = service.stub.GenerateStream(ask(max_tokens=200))
        await read(call, 4)
        call.cancel()
        await eventually(service.blocks_are_free)


async def test_without_a_window_a_request_ends_with_its_call(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, HashingExecutor(step_seconds=0.01)) as service:
        call = service.stub.GenerateStream(ask(max_tokens=200, window_ms=0))
        await read(call, 3)
        code, _ = await reason_of(service.stub.GenerateStream(ask(max_tokens=200)))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        call.cancel()
        await eventually(service.blocks_are_free)
        assert not service.loop.knows(("", "r"))


async def test_another_input_is_another_request(tokenizer: Tokenizer) -> None:
    """Refused while the first runs; once it has ended, its id is free again."""
    async with serving(tokenizer, HashingExecutor(step_seconds=0.01)) as service:
        call = service.stub.GenerateStream(ask(max_tokens=30))
        seen = await read(call, 3)
        code, _ = await reason_of(service.stub.GenerateStream(ask(max_tokens=30, prompt=[9])))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        await read(call)
        other = await read(service.stub.GenerateStream(ask(max_tokens=30, prompt=[9])))
        assert tokens_of(other) == expected_output([9], 30)
        again = service.stub.GenerateStream(ask(len(seen), max_tokens=30))
        assert (await reason_of(again))[0] is grpc.StatusCode.OUT_OF_RANGE


async def test_a_second_reader_takes_over_and_the_first_is_told(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, HashingExecutor(step_seconds=0.01)) as service:
        first = service.stub.GenerateStream(ask(max_tokens=30))
        await read(first, 3)
        second = asyncio.create_task(read(service.stub.GenerateStream(ask(max_tokens=30))))
        code, reason = await reason_of(first)
        assert code is grpc.StatusCode.ABORTED
        assert "TAKEN_OVER" in reason
        assert tokens_of(await second) == expected_output(PROMPT, 30)


async def test_cancel_ends_what_nobody_reads_and_forgets_it(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, HashingExecutor(step_seconds=0.01)) as service:
        call = service.stub.GenerateStream(ask(max_tokens=200))
        await read(call, 3)
        call.cancel()
        response = await service.stub.Cancel(pb.CancelRequest(request_ids=["r"]))
        assert list(response.cancelled_request_ids) == ["r"]
        await eventually(service.blocks_are_free)
        await eventually(lambda: not service.loop.knows(("", "r")))


async def test_generate_sent_again_brings_the_same_answer(tokenizer: Tokenizer) -> None:
    """Whether the first call was lost on its way there, under way, or on its way back."""
    async with serving(tokenizer, HashingExecutor(step_seconds=0.005)) as service:
        message = pb.GenerateRequest(input=ask().input, resume_window_ms=WINDOW_MS)
        lost = service.stub.Generate(message)
        await eventually(lambda: service.loop.knows(("", "r")))
        lost.cancel()
        answers = [await service.stub.Generate(message) for _ in range(2)]
        assert list(answers[0].choices[0].token_ids) == expected_output(PROMPT, 12)
        assert answers[0] == answers[1]


async def test_an_error_is_kept_like_output(tokenizer: Tokenizer) -> None:
    """And the deadline is the first call's."""
    async with serving(tokenizer, HashingExecutor(step_seconds=0.02)) as service:
        call = service.stub.GenerateStream(ask(max_tokens=250), timeout=0.3)
        seen = await read(call, 3)
        call.cancel()
        for _ in range(2):
            again = service.stub.GenerateStream(ask(len(seen), max_tokens=250), timeout=20)
            assert (await reason_of(again))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(service.blocks_are_free)


async def test_draining_waits_for_what_nobody_reads_and_lets_it_be_read(
    tokenizer: Tokenizer,
) -> None:
    async with serving(tokenizer, HashingExecutor(step_seconds=0.01)) as service:
        call = service.stub.GenerateStream(ask(max_tokens=30))
        seen = await read(call, 3)
        call.cancel()
        drain = asyncio.create_task(service.loop.drain(20))
        await eventually(service.blocks_are_free)
        assert not drain.done(), "its client has not seen the end"
        seen += await read(service.stub.GenerateStream(ask(len(seen), max_tokens=30)))
        assert tokens_of(seen) == expected_output(PROMPT, 30)
        await asyncio.wait_for(drain, 20)


async def test_a_window_needs_an_id(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, HashingExecutor()) as service:
        code, reason = await reason_of(service.stub.GenerateStream(ask(request_id="")))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "input.request_id" in reason


def test_equal_inputs_have_equal_digests_whatever_their_order_on_the_wire() -> None:
    forwards, backwards = pb.GenerationInput(text="a"), pb.GenerationInput(text="a")
    for token_id in range(50):
        forwards.sampling_params.logit_bias[token_id] = 1.0
        backwards.sampling_params.logit_bias[49 - token_id] = 1.0
    assert input_digest(forwards) == input_digest(backwards)
    backwards.sampling_params.logit_bias[7] = 2.0
    assert input_digest(forwards) != input_digest(backwards)
