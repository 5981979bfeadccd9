"""Executors that are to end, and groups that stand by: nothing is lost, nobody waits."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from stepwire.executor.v1 import executor_pb2 as pb
from stepwire.executor.v1 import executor_pb2_grpc
from stepwire_scheduler.clock import now_ms
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.request_stream import RequestStream, SequenceOutput
from stepwire_scheduler.sequence import Request, SamplingParams
from stepwire_scheduler.served_model import ServingState
from stepwire_scheduler.step_loop import StepLoop, step_deadline_ms
from support.hashing_executor import VOCAB_SIZE, HashingExecutor, expected_output
from support.scheduler_fakes import eventually


class Letters:
    """A tokenizer whose every token is one letter."""

    token_bytes = tuple(bytes([97 + i % 26]) for i in range(VOCAB_SIZE))


class Cluster:
    """A step loop over executors that can be told to end."""

    def __init__(self, loop: StepLoop, metrics: Metrics) -> None:
        self.loop = loop
        self._metrics = metrics

    def metric(self, name: str, **labels: str) -> float:
        return self._metrics.registry.get_sample_value(f"stepwire_{name}", labels) or 0.0

    def submit(self, prompt: list[int], num_tokens: int) -> RequestStream:
        now = now_ms()
        return self.loop.submit(
            Request(
                request_id=str(prompt[0]),
                prompt_token_ids=array("I", prompt),
                sampling_params=SamplingParams(max_tokens=num_tokens),
                arrival_ms=now,
                deadline_ms=now + 60_000,
            )
        )

    def num_resumes(self) -> int:
        planner = self.loop._planner
        assert planner is not None
        return max(each.num_resumes for each in [*planner.running, *planner.waiting])


@asynccontextmanager
async def serving(*groups: list[HashingExecutor], **settings: Any) -> AsyncIterator[Cluster]:
    """The first group computes, the others stand by."""
    async with AsyncExitStack() as stack:
        addresses: list[tuple[str, ...]] = []
        for group in groups:
            ports = []
            for executor in group:
                server = grpc.aio.server()
                executor_pb2_grpc.add_ExecutorServiceServicer_to_server(executor, server)
                ports.append(server.add_insecure_port("127.0.0.1:0"))
                await server.start()
                stack.push_async_callback(server.stop, None)
            addresses.append(tuple(f"127.0.0.1:{port}" for port in ports))
        config = SchedulerConfig(
            model="m",
            executor_addresses=addresses[0],
            standby_executor_addresses=tuple(addresses[1:]),
            **settings,
        )
        metrics = Metrics("m")
        loop = StepLoop(config, metrics)
        loop.set_tokenizer(Letters())
        task = asyncio.create_task(loop.run())
        try:
            await eventually(lambda: loop.state is ServingState.READY)
            yield Cluster(loop, metrics)
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def read(stream: RequestStream) -> list[int]:
    tokens: list[int] = []
    async for event in stream:
        if isinstance(event, SequenceOutput):
            tokens.extend(event.token_ids)
    return tokens


def loading(**description: Any) -> HashingExecutor:
    """An executor that is not ready until it is told."""
    return HashingExecutor(description={"load_state": pb.LOAD_STATE_LOADING} | description)


PROMPTS = [[i, *range(2 + i % 7)] for i in range(8)]


async def test_streams_go_on_at_a_standby_when_an_executor_drains() -> None:
    ends, stays = HashingExecutor(step_seconds=0.005), loading()
    async with serving([ends], [stays], max_resumes=0) as cluster:
        stays.description.clear()
        await eventually(lambda: cluster.metric("standby_groups_ready") == 1)
        readers = [asyncio.create_task(read(cluster.submit(each, 40))) for each in PROMPTS]
        await eventually(lambda: ends.num_steps > 5)
        await ends.drain()
        outputs = await asyncio.gather(*readers)
        assert outputs == [expected_output(prompt, 40) for prompt in PROMPTS]
        assert stays.num_epochs == 1
        assert cluster.metric("epochs_ended_total", cause="handover") == 1
        assert cluster.metric("sequences_handed_over_total") == len(PROMPTS)
        assert cluster.metric("sequences_resumed_total") == 0


async def test_a_handover_waits_for_results_and_closes_the_stream() -> None:
    ends = HashingExecutor(step_seconds=0.05)
    async with serving([ends]) as cluster:
        reader = asyncio.create_task(read(cluster.submit([1, 2, 3], 30)))
        await eventually(lambda: ends.num_steps > 2)
        assert cluster.loop._planner is not None
        await ends.drain()
        await eventually(lambda: not ends.open_calls)
        num_steps = ends.num_steps
        (sequence,) = cluster.loop._planner.waiting
        assert sequence.num_output_tokens == num_steps, "a result was thrown away"
        assert sequence.num_resumes == 0
        ends.description.clear()  # its replacement, behind the same address
        assert await reader == expected_output([1, 2, 3], 30)


async def test_one_rank_that_drains_hands_its_group_over() -> None:
    first, second = (
        HashingExecutor(step_seconds=0.005, description={"rank": rank, "world_size": 2})
        for rank in range(2)
    )
    async with serving([first, second], max_resumes=0) as cluster:
        reader = asyncio.create_task(read(cluster.submit([1, 2, 3], 30)))
        await eventually(lambda: second.num_steps > 2)
        await second.drain()
        await eventually(lambda: not first.open_calls and not second.open_calls)
        assert first.num_steps == second.num_steps, "a rank was left inside a step"
        second.description["load_state"] = pb.LOAD_STATE_READY
        assert await reader == expected_output([1, 2, 3], 30)


async def test_an_idle_executor_that_drains_is_left_at_once() -> None:
    ends = HashingExecutor()
    async with serving([ends]) as cluster:
        await ends.drain()
        await eventually(lambda: not ends.open_calls)
        assert cluster.loop.state is not ServingState.READY
        ends.description.clear()
        await eventually(lambda: cluster.loop.state is ServingState.READY)


async def test_streams_go_on_at_a_standby_when_a_step_is_overdue() -> None:
    hangs, stays = HashingExecutor(corrupt=lambda result: None), loading()
    async with serving([hangs], [stays], step_timeout_ms=200) as cluster:
        stays.description.clear()
        assert await read(cluster.submit([1, 2, 3], 20)) == expected_output([1, 2, 3], 20)
        assert hangs.num_epochs == 1, "an executor that hangs was preferred"
        assert cluster.metric("epochs_ended_total", cause="overdue") == 1
        assert cluster.metric("sequences_resumed_total") == 1


async def test_a_scheduler_that_drains_outlives_the_loss_of_its_executors() -> None:
    hangs, stays = HashingExecutor(step_seconds=0.005), loading()
    async with serving([hangs], [stays], step_timeout_ms=200) as cluster:
        stays.description.clear()
        reader = asyncio.create_task(read(cluster.submit([1, 2, 3], 60)))
        await eventually(lambda: hangs.num_steps > 2)
        draining = asyncio.create_task(cluster.loop.drain(30))
        hangs.corrupt = lambda result: None
        assert await reader == expected_output([1, 2, 3], 60)
        await draining
        assert stays.num_epochs == 1


async def test_a_standby_with_another_model_is_not_used() -> None:
    ends = HashingExecutor(step_seconds=0.005)
    other = HashingExecutor(description={"model_fingerprint": "another"})
    other.description["load_state"] = pb.LOAD_STATE_LOADING
    async with serving([ends], [other]) as cluster:
        other.description["load_state"] = pb.LOAD_STATE_READY
        reader = asyncio.create_task(read(cluster.submit([1, 2, 3], 30)))
        await eventually(lambda: ends.num_steps > 2)
        await ends.drain()
        await eventually(lambda: not ends.open_calls)
        ends.description.clear()
        assert await reader == expected_output([1, 2, 3], 30)
        assert other.num_epochs == 0


async def test_a_smaller_standby_ends_only_what_cannot_fit() -> None:
    ends, small = HashingExecutor(step_seconds=0.005), loading()
    small.num_blocks = 12
    async with serving([ends], [small]) as cluster:
        small.description.clear()
        long, short = cluster.submit([1] * 40, 20), cluster.submit([2, 3], 20)
        reader = asyncio.create_task(read(short))
        await eventually(lambda: ends.num_steps > 2)
        await ends.drain()
        assert await reader == expected_output([2, 3], 20)
        with pytest.raises(Exception, match="too small a KV cache"):
            await read(long)


@pytest.mark.parametrize("max_inflight_steps", [1, 2])
async def test_an_executor_idles_only_where_sequences_could_go_on(max_inflight_steps: int) -> None:
    def idle_before(result: pb.StepResult) -> pb.StepResult:
        result.timings.idle_ms, result.timings.forward_ms = 1_000.0, 500.0
        return result

    executor = HashingExecutor(corrupt=idle_before)
    async with serving([executor], max_inflight_steps=max_inflight_steps) as cluster:
        await read(cluster.submit([1, 2, 3], 10))
        await read(cluster.submit([2, 3, 4], 10))
        # The first step of each request came after a time in which there was nothing to do.
        assert executor.num_steps == 20
        assert cluster.metric("executor_idle_seconds_total") == pytest.approx(18.0)
        assert cluster.metric("executor_busy_seconds_total") == pytest.approx(10.0)


def test_a_large_step_has_longer_in_proportion() -> None:
    assert step_deadline_ms(10_000, 1) == step_deadline_ms(10_000, 512) == 10_000
    assert step_deadline_ms(10_000, 2_048) == 40_000
