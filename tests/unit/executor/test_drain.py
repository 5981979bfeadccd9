"""An executor that is to end: it tells its scheduler, and runs what that still sends."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest
from stepwire.executor.v1.executor_pb2 import LoadState
from stepwire_executor import service
from support.executor_fakes import admission, expected_continuation, step
from support.executor_rank import open_stream, opened_stream, serving

PROMPT = [5, 9, 2, 7, 1, 3]
ADMITTED = [admission(0, PROMPT, [0, 1, 2])]


async def until_closed(rank_service: service.ExecutorService) -> None:
    await asyncio.wait_for(rank_service.wait_until_no_stream(), 10)


async def test_plans_of_a_live_stream_are_run_after_the_notice_until_it_is_closed() -> None:
    async with serving() as rank:
        stream = await opened_stream(rank)
        first = await stream.run(step(1, 1, {0: 6}, admissions=ADMITTED))
        rank.service.drain()
        assert (await stream.receive()).WhichOneof("message") == "draining"
        second = await stream.run(step(1, 2, {0: 1}))
        tokens = [*first.sampled_token_ids, *second.sampled_token_ids]
        assert tokens == expected_continuation(PROMPT, 2)
        waiting = asyncio.create_task(rank.service.wait_until_no_stream())
        await asyncio.sleep(0.05)
        assert not waiting.done(), "the process would have ended under its scheduler"
        stream.call.cancel()
        await asyncio.wait_for(waiting, 10)


async def test_a_notice_takes_no_room_of_a_plan() -> None:
    async with serving() as rank:
        stream = await opened_stream(rank)
        rank.service.drain()
        num_plans = 3 * service.MAX_OUTSTANDING_PLANS
        for step_id in range(1, num_plans + 1):
            await stream.send(step(1, step_id))
        responses = [await stream.receive() for _ in range(num_plans + 1)]
        kinds = [response.WhichOneof("message") for response in responses]
        assert kinds.count("draining") == 1
        results = [each.step_result.step_id for each in responses if each.HasField("step_result")]
        assert results == list(range(1, num_plans + 1))


async def test_an_executor_that_drains_says_so_and_opens_no_epoch() -> None:
    async with serving() as rank:
        rank.service.drain()
        await until_closed(rank.service)
        described = await rank.describe()
        assert described.load_state == LoadState.LOAD_STATE_DRAINING
        assert described.model_fingerprint
        code, details = await (await open_stream(rank)).status()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "stopping" in details


async def test_a_result_says_how_long_the_executor_had_the_plan() -> None:
    async with serving() as rank:
        stream = await opened_stream(rank)
        result = await stream.run(step(1, 1, {0: 6}, admissions=ADMITTED))
        timings = result.timings
        parts = timings.queue_ms + timings.prepare_ms + timings.forward_ms + timings.sample_ms
        assert timings.elapsed_ms >= parts > 0


async def test_a_step_that_outlives_its_stream_for_long_breaks_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "STUCK_AFTER_S", 0.05)
    async with serving() as rank:
        entered, gate = threading.Event(), threading.Event()

        def hold() -> None:
            entered.set()
            gate.wait(10)

        rank.executor.decoder.before_forward = hold
        stream = await opened_stream(rank)
        await stream.send(step(1, 1, {0: 6}, admissions=ADMITTED))
        assert await asyncio.to_thread(entered.wait, 10)
        assert rank.broken == [], "a step may take its time while somebody waits for it"
        stream.call.cancel()
        for _ in range(1_000):
            if rank.broken:
                break
            await asyncio.sleep(0.01)
        gate.set()
    assert "has not ended" in rank.broken[0]


async def test_a_stream_that_is_closed_between_steps_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "STUCK_AFTER_S", 0.05)
    async with serving() as rank:
        stream = await opened_stream(rank)
        await stream.run(step(1, 1, {0: 6}, admissions=ADMITTED))
        stream.call.cancel()
        await until_closed(rank.service)
        await asyncio.sleep(0.2)
        assert rank.broken == []
