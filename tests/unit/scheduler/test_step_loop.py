"""The step loop over real streams: every token reaches its reader once, whatever breaks."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from stepwire.executor.v1 import executor_pb2 as pb
from stepwire.executor.v1 import executor_pb2_grpc
from stepwire_scheduler.clock import now_ms
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.errors import (
    DeadlineExceededError,
    DrainingError,
    DuplicateRequestError,
    ExecutorLostError,
    InternalError,
    InvalidRequestError,
    NotReadyError,
    QueueFullError,
    SlowReaderError,
)
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.request_stream import RequestStream, Scheduled, SequenceOutput
from stepwire_scheduler.sequence import FinishReason, Request, SamplingParams
from stepwire_scheduler.served_model import ServingState
from stepwire_scheduler.step_loop import StepLoop
from support.hashing_executor import VOCAB_SIZE, HashingExecutor, expected_output
from support.scheduler_fakes import eventually


class Letters:
    """A tokenizer whose every token is one letter."""

    token_bytes: Sequence[bytes] = [bytes([97 + i % 26]) for i in range(VOCAB_SIZE)]


def request(
    prompt: Sequence[int] = (1, 2, 3, 4, 5),
    *,
    request_id: str = "r",
    deadline_in_ms: float = 60_000,
    tenant: str = "",
    **params: Any,
) -> Request:
    now = now_ms()
    return Request(
        request_id=request_id,
        prompt_token_ids=array("I", prompt),
        sampling_params=SamplingParams(**({"max_tokens": 20} | params)),
        arrival_ms=now,
        deadline_ms=now + deadline_in_ms,
        tenant=tenant,
    )


@asynccontextmanager
async def served(executor: HashingExecutor, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server()
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(executor, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


@asynccontextmanager
async def looping(*ports: int, **settings: Any) -> AsyncIterator[StepLoop]:
    config = SchedulerConfig(
        model="m", executor_addresses=tuple(f"127.0.0.1:{port}" for port in ports), **settings
    )
    loop = StepLoop(config, Metrics("m"))
    loop.set_tokenizer(Letters())
    task = asyncio.create_task(loop.run())
    try:
        yield loop
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def ready(loop: StepLoop) -> StepLoop:
    await eventually(lambda: loop.state is ServingState.READY)
    return loop


async def read(stream: RequestStream) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    async for event in stream:
        if isinstance(event, SequenceOutput):
            tokens.setdefault(event.index, []).extend(event.token_ids)
    return tokens


def all_blocks_are_back(loop: StepLoop) -> bool:
    assert loop._planner is not None
    return loop._planner.block_pool.num_free == loop._planner.block_pool.num_blocks


async def test_concurrent_requests_get_their_own_tokens_even_when_preempted() -> None:
    executor = HashingExecutor(num_blocks=16)
    async with served(executor) as port, looping(port, enable_prefix_caching=False) as loop:
        await ready(loop)
        prompts = [[i, *range(2 + i % 7)] for i in range(30)]
        streams = [
            loop.submit(request(prompt, request_id=str(i), n=1 + i % 2))
            for i, prompt in enumerate(prompts)
        ]
        outputs = await asyncio.gather(*map(read, streams))
        for prompt, stream, output in zip(prompts, streams, outputs, strict=True):
            for index in range(stream.request.sampling_params.n):
                assert output[index] == expected_output(prompt, 20, index)
        assert sum(stream.usage.num_preemptions for stream in streams) > 0
        assert all_blocks_are_back(loop)


async def test_events_come_in_order_and_end_with_usage_and_timings() -> None:
    async with served(HashingExecutor()) as port, looping(port) as loop:
        await ready(loop)
        stream = loop.submit(request(max_tokens=3))
        events = [event async for event in stream]
        assert isinstance(events[0], Scheduled)
        assert isinstance(events[-1], SequenceOutput)
        assert events[-1].finish_reason is FinishReason.LENGTH
        assert stream.usage.num_prompt_tokens == 5
        assert stream.usage.num_output_tokens == 3
        timings = stream.timings
        assert 0 <= timings.queue_ms <= timings.ttft_ms <= timings.e2e_ms


async def test_a_restarted_executor_goes_on_where_the_lost_one_stopped() -> None:
    lost, found = HashingExecutor(step_seconds=0.01), HashingExecutor()
    async with AsyncExitStack() as stack:
        async with served(lost) as port:
            loop = await stack.enter_async_context(looping(port))
            await ready(loop)
            streams = [loop.submit(request([i, 2, 3], request_id=str(i))) for i in range(5)]
            await eventually(lambda: lost.num_steps > 5)
        await eventually(lambda: loop.state is not ServingState.READY)
        async with served(found, port):
            outputs = await asyncio.wait_for(asyncio.gather(*map(read, streams)), 20)
        assert outputs == [{0: expected_output([i, 2, 3], 20)} for i in range(5)]
        assert lost.num_steps < 20, "the lost executor did it all"
        assert all_blocks_are_back(loop)


async def test_an_executor_may_come_back_with_another_pool() -> None:
    lost = HashingExecutor(step_seconds=0.01)
    smaller = HashingExecutor(num_blocks=30, block_size=3)
    async with AsyncExitStack() as stack:
        async with served(lost) as port:
            loop = await stack.enter_async_context(looping(port))
            await ready(loop)
            fits = [loop.submit(request([i, 2, 3], request_id=str(i))) for i in range(5)]
            misfit = loop.submit(request(request_id="large", max_tokens=100))
            await eventually(lambda: lost.num_steps > 5)
        await eventually(lambda: loop.state is not ServingState.READY)
        async with served(smaller, port):
            outputs = await asyncio.wait_for(asyncio.gather(*map(read, fits)), 20)
            with pytest.raises(ExecutorLostError, match="too small"):
                await read(misfit)
        assert outputs == [{0: expected_output([i, 2, 3], 20)} for i in range(5)]
        assert all_blocks_are_back(loop)


async def test_another_model_in_the_executors_place_ends_what_waits() -> None:
    lost = HashingExecutor(step_seconds=0.01)
    other = HashingExecutor(description={"model_fingerprint": "other"})
    async with AsyncExitStack() as stack:
        async with served(lost) as port:
            loop = await stack.enter_async_context(looping(port))
            await ready(loop)
            stream = loop.submit(request())
            await eventually(lambda: lost.num_steps > 2)
        async with served(other, port):
            with pytest.raises(ExecutorLostError, match="model changed"):
                await asyncio.wait_for(read(stream), 20)
            await ready(loop)
            again = loop.submit(request(request_id="again"))
            assert await read(again) == {0: expected_output([1, 2, 3, 4, 5], 20)}


async def test_a_hung_step_ends_the_epoch_and_nothing_is_lost() -> None:
    executor = HashingExecutor()
    hang_at = 4

    def hang_once(result: pb.StepResult) -> pb.StepResult | None:
        return None if executor.num_steps == hang_at else result

    executor.corrupt = hang_once
    async with served(executor) as port, looping(port, step_timeout_ms=200) as loop:
        await ready(loop)
        assert await read(loop.submit(request())) == {0: expected_output([1, 2, 3, 4, 5], 20)}
        assert executor.num_epochs == 2


@pytest.mark.parametrize("fault", ["slot", "count", "step_id", "epoch", "token"])
async def test_a_wrong_result_ends_the_epoch_and_nothing_is_lost(fault: str) -> None:
    executor = HashingExecutor()

    def corrupt_once(result: pb.StepResult) -> pb.StepResult:
        if executor.num_steps == 3:
            if fault == "slot":
                result.sampled_slots[0] += 1
            elif fault == "count":
                result.num_sampled_tokens[0] = 2
            elif fault == "step_id":
                result.step_id += 7
            elif fault == "epoch":
                result.epoch -= 1
            else:
                result.sampled_token_ids.append(1)
        return result

    executor.corrupt = corrupt_once
    async with served(executor) as port, looping(port) as loop:
        await ready(loop)
        assert await read(loop.submit(request())) == {0: expected_output([1, 2, 3, 4, 5], 20)}
        assert executor.num_epochs == 2


async def test_a_request_survives_max_resumes_epochs_and_no_more() -> None:
    executor = HashingExecutor()
    executor.corrupt = lambda result: None
    async with (
        served(executor) as port,
        looping(port, step_timeout_ms=50, max_resumes=2) as loop,
    ):
        await ready(loop)
        with pytest.raises(ExecutorLostError):
            await asyncio.wait_for(read(loop.submit(request())), 20)
        assert executor.num_epochs >= 3
        assert all_blocks_are_back(loop)


async def test_a_failed_slot_fails_its_request_only() -> None:
    executor = HashingExecutor()

    def fail_first_slot(result: pb.StepResult) -> pb.StepResult:
        if executor.num_steps == 3 and len(result.sampled_slots) == 2:
            slot = result.sampled_slots[0]
            del result.sampled_slots[0], result.num_sampled_tokens[0], result.sampled_token_ids[0]
            result.failures.add(slot=slot, reason="logits are not finite")
        return result

    executor.corrupt = fail_first_slot
    async with served(executor) as port, looping(port) as loop:
        await ready(loop)
        streams = [loop.submit(request([i, 1], request_id=str(i))) for i in range(2)]
        results = await asyncio.gather(*map(read, streams), return_exceptions=True)
        errors = [result for result in results if isinstance(result, InternalError)]
        outputs = [i for i, result in enumerate(results) if isinstance(result, dict)]
        assert [error.message for error in errors] == ["logits are not finite"]
        assert [results[i] for i in outputs] == [{0: expected_output([outputs[0], 1], 20)}]
        assert all_blocks_are_back(loop)


@pytest.mark.parametrize("delay_s", [0.0, 0.003, 0.02, 0.05])
@pytest.mark.parametrize("how", ["cancel", "close", "deadline"])
async def test_blocks_are_back_within_a_step_of_any_end(how: str, delay_s: float) -> None:
    executor = HashingExecutor(step_seconds=0.005)
    async with served(executor) as port, looping(port) as loop:
        await ready(loop)
        deadline_in_ms = delay_s * 1e3 if how == "deadline" else 60_000
        stream = loop.submit(request(max_tokens=250, deadline_in_ms=deadline_in_ms))
        other = loop.submit(request([9, 9], request_id="other"))
        await asyncio.sleep(delay_s)
        if how == "cancel":
            assert loop.cancel("r")
        elif how == "close":
            stream.close()
        else:
            with pytest.raises(DeadlineExceededError):
                await read(stream)
        await eventually(lambda: stream.has_ended)
        assert await read(other) == {0: expected_output([9, 9], 20)}, "a neighbour was touched"
        steps = executor.num_steps
        await eventually(lambda: all_blocks_are_back(loop))
        assert executor.num_steps <= steps + 2, "blocks outlived the steps in flight"
        assert not loop.cancel("r")


async def test_a_cancelled_stream_ends_with_what_it_has() -> None:
    async with served(HashingExecutor(step_seconds=0.01)) as port, looping(port) as loop:
        await ready(loop)
        stream = loop.submit(request(max_tokens=250))
        await eventually(lambda: stream.usage.num_output_tokens > 3)
        loop.cancel("r")
        events = [event async for event in stream if isinstance(event, SequenceOutput)]
        tokens = [token for event in events for token in event.token_ids]
        assert tokens == expected_output([1, 2, 3, 4, 5], len(tokens))
        assert events[-1].finish_reason is FinishReason.CANCELLED


async def test_a_slow_reader_is_coalesced_then_aborted_and_slows_nobody() -> None:
    async with (
        served(HashingExecutor(step_seconds=0.005)) as port,
        looping(port, max_unread_bytes=1_000, unread_timeout_ms=100) as loop,
    ):
        await ready(loop)
        slow = loop.submit(request(request_id="slow", max_tokens=200))
        await eventually(lambda: slow.over_bound_since_ms is not None)
        assert await read(loop.submit(request())) == {0: expected_output([1, 2, 3, 4, 5], 20)}
        await eventually(lambda: slow.has_ended)
        with pytest.raises(SlowReaderError):
            await read(slow)
        assert slow.over_bound_since_ms is None


async def test_unread_output_is_one_event_a_sequence() -> None:
    async with served(HashingExecutor()) as port, looping(port) as loop:
        await ready(loop)
        stream = loop.submit(request(max_tokens=50))
        await eventually(lambda: stream.has_ended)
        events = [event async for event in stream]
        assert [type(event) for event in events] == [Scheduled, SequenceOutput]
        assert isinstance(events[1], SequenceOutput)
        assert events[1].token_ids == expected_output([1, 2, 3, 4, 5], 50)


async def test_queues_are_bounded_in_requests_and_tokens() -> None:
    executor = HashingExecutor(step_seconds=0.05, max_num_seqs=1)
    async with (
        served(executor) as port,
        looping(port, max_queued_requests=3, max_queued_tokens=40) as loop,
    ):
        await ready(loop)
        loop.submit(request(request_id="running"))
        await eventually(lambda: loop.num_waiting == 0)
        loop.submit(request(range(30), request_id="long"))
        with pytest.raises(QueueFullError, match="tokens"):
            loop.submit(request(range(11), request_id="more"))
        loop.submit(request([1], request_id="a"))
        with pytest.raises(QueueFullError, match="requests"):
            loop.submit(request([1], request_id="b", n=2))
        with pytest.raises(DuplicateRequestError):
            loop.submit(request([1], request_id="a"))


async def test_a_stop_string_ends_a_sequence_and_frees_its_blocks() -> None:
    async with served(HashingExecutor()) as port, looping(port) as loop:
        await ready(loop)
        tokens = expected_output([1, 2, 3, 4, 5], 20)
        text = b"".join(Letters.token_bytes[token] for token in tokens).decode()
        stream = loop.submit(request(stop=(text[7:10],)))
        events = [event async for event in stream if isinstance(event, SequenceOutput)]
        assert "".join(event.text for event in events) == text[: text.index(text[7:10])]
        assert events[-1].finish_reason is FinishReason.STOP
        assert events[-1].stop_string == text[7:10]
        await eventually(lambda: all_blocks_are_back(loop))


async def test_draining_finishes_what_runs_and_refuses_the_rest() -> None:
    async with served(HashingExecutor(step_seconds=0.005)) as port, looping(port) as loop:
        await ready(loop)
        stream = loop.submit(request())
        drain = asyncio.create_task(loop.drain(10))
        await asyncio.sleep(0)
        with pytest.raises(DrainingError):
            loop.submit(request(request_id="late"))
        assert await read(stream) == {0: expected_output([1, 2, 3, 4, 5], 20)}
        await drain


async def test_what_outlasts_the_drain_is_told_so() -> None:
    async with served(HashingExecutor(step_seconds=0.05)) as port, looping(port) as loop:
        await ready(loop)
        stream = loop.submit(request(max_tokens=250))
        await loop.drain(0.05)
        with pytest.raises(DrainingError):
            await read(stream)


async def test_requests_are_refused_until_the_executors_are_ready() -> None:
    loading = HashingExecutor(
        description={
            "load_state": pb.LOAD_STATE_LOADING,
            "load_phase": "read weights",
            "load_fraction": 0.5,
        }
    )
    async with served(loading) as port, looping(port) as loop:
        await eventually(lambda: loop.state is ServingState.LOADING)
        assert loop.load_progress.phase == "read weights"
        assert loop.load_progress.fraction == 0.5
        with pytest.raises(NotReadyError):
            loop.submit(request())
        assert not loop.is_progressing


@pytest.mark.parametrize(
    ("difference", "flag"),
    [
        ({"model_fingerprint": "other"}, "--model"),
        ({"block_size": 8}, "--block-size"),
        ({"dtype": "float16"}, "--dtype"),
        ({"draft_model": "small"}, "--speculative-model"),
        ({"rank": 0}, "rank 1 is missing and rank 0 is there more than once: name each rank once"),
        ({"world_size": 3}, "--tensor-parallel-size"),
    ],
)
async def test_executors_that_disagree_never_serve_and_say_why(
    difference: dict[str, Any], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = HashingExecutor(description={"world_size": 2})
    second = HashingExecutor(description={"world_size": 2, "rank": 1} | difference)
    async with served(first) as one, served(second) as two, looping(one, two) as loop:
        await eventually(lambda: flag in loop.load_progress.phase)
        assert loop.state is not ServingState.READY
        with pytest.raises(NotReadyError):
            loop.submit(request())


@pytest.mark.parametrize(
    ("settings", "description", "fix"),
    [
        ({"speculative_method": "draft_model"}, {}, "start them with --speculative-model"),
        (
            {"speculative_method": "ngram", "num_speculative_tokens": 8},
            {"max_num_batched_tokens": 8},
            "do not fit in the executors' --max-num-batched-tokens 8",
        ),
    ],
)
async def test_executors_that_cannot_speculate_as_set_never_serve_and_say_why(
    settings: dict[str, Any], description: dict[str, Any], fix: str
) -> None:
    executor = HashingExecutor(description=description)
    async with served(executor) as port, looping(port, **settings) as loop:
        await eventually(lambda: fix in loop.load_progress.phase)
        assert loop.state is not ServingState.READY
        assert executor.num_epochs == 0


async def test_executors_with_a_draft_model_serve_what_asks_for_one() -> None:
    executor = HashingExecutor(description={"draft_model": "small"})
    settings = {"speculative_method": "draft_model", "num_speculative_tokens": 3}
    async with served(executor) as port, looping(port, **settings) as loop:
        await ready(loop)
        assert loop.model is not None
        assert (loop.model.speculative_method, loop.model.num_speculative_tokens) == (
            "draft_model",
            3,
        )


async def test_ranks_that_agree_serve_as_one() -> None:
    ranks = [HashingExecutor(description={"world_size": 2, "rank": rank}) for rank in (1, 0)]
    async with served(ranks[0]) as one, served(ranks[1]) as two, looping(one, two) as loop:
        await ready(loop)
        assert await read(loop.submit(request())) == {0: expected_output([1, 2, 3, 4, 5], 20)}
        assert ranks[0].num_steps == ranks[1].num_steps > 0


async def test_ranks_that_diverge_end_the_epoch_and_nothing_is_lost() -> None:
    ranks = [HashingExecutor(description={"world_size": 2, "rank": rank}) for rank in (0, 1)]

    def diverge_once(result: pb.StepResult) -> pb.StepResult:
        result.slot_table_checksum = 1 if ranks[1].num_steps == 3 else 0
        return result

    ranks[1].corrupt = diverge_once
    async with served(ranks[0]) as one, served(ranks[1]) as two, looping(one, two) as loop:
        await ready(loop)
        assert await read(loop.submit(request())) == {0: expected_output([1, 2, 3, 4, 5], 20)}
        assert ranks[0].num_epochs == ranks[1].num_epochs == 2


class SilentExecutor(HashingExecutor):
    """Takes a stream and never opens its epoch."""

    async def Execute(
        self, requests: AsyncIterator[pb.ExecuteRequest], context: Any
    ) -> AsyncIterator[pb.ExecuteResponse]:
        self.num_epochs += 1
        await asyncio.Event().wait()
        yield pb.ExecuteResponse()


async def test_an_epoch_that_is_not_opened_is_given_up_and_deadlines_hold_meanwhile() -> None:
    executor = SilentExecutor()
    async with served(executor) as port, looping(port, step_timeout_ms=2_000) as loop:
        await eventually(lambda: executor.num_epochs == 1)
        with pytest.raises(DeadlineExceededError):
            await read(loop.submit(request(deadline_in_ms=50)))
        assert executor.num_epochs == 1
        await eventually(lambda: executor.num_epochs > 1)


async def test_what_no_longer_fits_is_refused_and_ends_nothing_else() -> None:
    executor = HashingExecutor(num_blocks=4)
    async with served(executor) as port, looping(port) as loop:
        await ready(loop)
        with pytest.raises(InvalidRequestError, match="more than the 16"):
            loop.submit(request(max_tokens=12))
        output = await read(loop.submit(request(max_tokens=11)))
        assert output[0] == expected_output([1, 2, 3, 4, 5], 11)


async def test_tenants_have_request_ids_of_their_own() -> None:
    executor = HashingExecutor(step_seconds=0.02)
    async with served(executor) as port, looping(port) as loop:
        await ready(loop)
        alices = loop.submit(request((1, 2, 3), request_id="r", tenant="alice", max_tokens=200))
        bobs = loop.submit(request((4, 5, 6), request_id="r", tenant="bob"))
        with pytest.raises(DuplicateRequestError):
            loop.submit(request(request_id="r", tenant="bob"))
        assert (loop.num_requests_of("alice"), loop.num_requests_of("bob")) == (1, 1)
        assert not loop.cancel("r", "eve")
        assert not loop.cancel("r")
        assert loop.cancel("r", "alice")
        await read(alices)
        assert await read(bobs) == {0: expected_output([4, 5, 6], 20)}
        assert (loop.num_requests_of("alice"), loop.num_requests_of("bob")) == (0, 0)


async def test_a_tenant_shares_prefixes_with_itself_and_with_nobody_else() -> None:
    prompt = tuple(range(1, 40))

    async def num_cached_tokens(loop: StepLoop, tenant: str) -> int:
        stream = loop.submit(request(prompt, tenant=tenant, max_tokens=2))
        await read(stream)
        return stream.usage.num_cached_tokens

    async with served(HashingExecutor()) as port, looping(port) as loop:
        await ready(loop)
        assert await num_cached_tokens(loop, "alice") == 0
        own = await num_cached_tokens(loop, "alice")
        assert own > 0
        assert await num_cached_tokens(loop, "bob") == 0
        assert await num_cached_tokens(loop, "") == 0
        assert await num_cached_tokens(loop, "bob") == own
