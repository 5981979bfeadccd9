"""A device works on one step while the next is launched; nothing of that shows in the answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import grpc
import pytest
from stepwire.executor.v1.executor_pb2 import StepPlan
from stepwire_executor.runner import PendingStep
from support.executor_fakes import (
    GatedQueue,
    admission,
    expected_continuation,
    make_executor,
    step,
)
from support.executor_rank import Rank, open_stream, opened_stream, serving

PROMPT = [5, 9, 2, 7, 1, 3]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition did not come true in 10 s")


def num_forwards(rank: Rank) -> int:
    return rank.executor.decoder.num_forwards


@pytest.mark.parametrize("engine_name", ["device", "graphs"])
async def test_plans_are_launched_while_steps_run_and_answered_in_order(engine_name: str) -> None:
    queue = GatedQueue()
    executor = make_executor(engine_name=engine_name, queue=queue)  # type: ignore[arg-type]
    async with serving(executor=executor) as rank:
        stream = await opened_stream(rank)
        queue.gate.clear()
        await stream.send(step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1, 2])]))
        for step_id in (2, 3):
            await stream.send(step(1, step_id, {0: 1}))
        await until(lambda: num_forwards(rank) == 3)
        reading = asyncio.ensure_future(stream.result())
        await asyncio.sleep(0.05)
        assert not reading.done()
        queue.gate.set()
        results = [await reading, await stream.result(), await stream.result()]
        assert [result.step_id for result in results] == [1, 2, 3]
        tokens = [token for result in results for token in result.sampled_token_ids]
        assert tokens == expected_continuation(PROMPT, 3)
        # Nothing is deferred any more: the next step takes the short way, behind them.
        await stream.send(step(1, 4, {0: 1}))
        assert list((await stream.result()).sampled_token_ids) == [
            expected_continuation(PROMPT, 4)[3]
        ]


async def test_stopping_answers_every_launched_step_first() -> None:
    queue = GatedQueue()
    async with serving(executor=make_executor(engine_name="device", queue=queue)) as rank:
        stream = await opened_stream(rank)
        queue.gate.clear()
        await stream.send(step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1])]))
        await stream.send(step(1, 2, {0: 1}))
        await until(lambda: num_forwards(rank) == 2)
        rank.service.stop()
        rank.compute.stop()
        queue.gate.set()
        assert [(await stream.result()).step_id for _ in range(2)] == [1, 2]
        code, _ = await stream.status()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert await asyncio.to_thread(rank.compute.join, 10)


async def test_a_step_seen_done_does_not_overtake_the_one_before() -> None:
    queue = GatedQueue()
    async with serving(executor=make_executor(engine_name="device", queue=queue)) as rank:
        stream = await opened_stream(rank)
        first, later = threading.Event(), threading.Event()
        queue.gate = first
        later.set()
        await stream.send(step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1])]))
        await until(lambda: num_forwards(rank) == 1)
        queue.gate = later
        await stream.send(step(1, 2, {0: 1}))
        await until(lambda: num_forwards(rank) == 2)
        first.set()
        assert [(await stream.result()).step_id for _ in range(2)] == [1, 2]


async def test_an_epoch_opens_over_steps_that_still_run() -> None:
    queue = GatedQueue()
    async with serving(executor=make_executor(engine_name="device", queue=queue)) as rank:
        older = await opened_stream(rank)
        queue.gate.clear()
        await older.send(step(1, 1, {0: 6}, admissions=[admission(0, [8] * 6, [0, 1])]))
        await until(lambda: num_forwards(rank) == 1)
        newer = await open_stream(rank, 2)
        assert (await newer.receive()).epoch_opened.epoch == 2
        await newer.send(step(2, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1])]))
        await until(lambda: num_forwards(rank) == 2)
        queue.gate.set()
        result = await newer.result()
        assert (result.epoch, list(result.sampled_token_ids)) == (
            2,
            expected_continuation(PROMPT, 1),
        )
        assert not result.failures


async def test_a_broken_device_ends_the_stream_and_is_told() -> None:
    queue = GatedQueue()
    async with serving(executor=make_executor(engine_name="device", queue=queue)) as rank:
        stream = await opened_stream(rank)
        queue.gate.clear()
        await stream.send(step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1])]))
        await until(lambda: num_forwards(rank) == 1)
        queue.error = RuntimeError("an illegal memory access was encountered")
        queue.gate.set()
        code, details = await stream.status()
        assert code == grpc.StatusCode.INTERNAL
        assert "illegal" not in details
        await until(lambda: bool(rank.broken))
        assert rank.broken == ["an illegal memory access was encountered"]


class HostMemoryError(RuntimeError):
    """As torch says that the host has no memory."""

    def __init__(self) -> None:
        super().__init__(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
        )


@pytest.mark.parametrize(
    ("error", "is_broken"),
    [(MemoryError(), True), (HostMemoryError(), True), (RuntimeError("a defect"), False)],
)
async def test_an_executor_without_memory_is_broken_and_one_failed_step_is_not(
    error: Exception, is_broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as rank:
        runner = rank.executor.runner

        def fail(plan: StepPlan) -> PendingStep:
            raise error

        monkeypatch.setattr(runner, "launch", fail)
        stream = await opened_stream(rank)
        await stream.send(step(1, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1])]))
        code, details = await stream.status()
        assert code == grpc.StatusCode.INTERNAL
        assert "alloc" not in details
        await opened_stream(rank, 2)  # behind the failed step, on the thread that computes
        assert bool(rank.broken) == is_broken
