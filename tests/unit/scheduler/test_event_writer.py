"""Writes that end, that take too long, and that are cancelled by somebody else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, cast

import pytest
from stepwire.scheduler.v1 import generation_pb2
from stepwire_scheduler.errors import SlowReaderError
from stepwire_scheduler.event_writer import EventWriter

_OUTPUT = generation_pb2.Output(text="a")


class _Context:
    """A call whose writes wait until it is told."""

    def __init__(self) -> None:
        self.written: list[generation_pb2.GenerateStreamResponse] = []
        self.may_write = asyncio.Event()
        self.may_write.set()

    async def write(self, message: generation_pb2.GenerateStreamResponse) -> None:
        await self.may_write.wait()
        self.written.append(message)


def _writer(context: _Context, timeout_s: float) -> EventWriter:
    return EventWriter(cast(Any, context), "r", timeout_s)


async def test_events_are_sent_in_order_under_their_numbers() -> None:
    context = _Context()
    with _writer(context, 10.0) as writer:
        for seq in range(3):
            await writer.write(seq, output=_OUTPUT)
    assert [(each.request_id, each.seq) for each in context.written] == [
        ("r", 0),
        ("r", 1),
        ("r", 2),
    ]


@pytest.mark.parametrize("num_before", [0, 1, 5])
async def test_a_write_that_takes_too_long_ends_as_a_slow_reader(num_before: int) -> None:
    context = _Context()
    with _writer(context, 0.05) as writer:
        for seq in range(num_before):
            await writer.write(seq, output=_OUTPUT)
        context.may_write.clear()
        with pytest.raises(SlowReaderError):
            async with asyncio.timeout(10):
                await writer.write(num_before, output=_OUTPUT)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert len(context.written) == num_before


async def test_time_between_writes_does_not_count() -> None:
    context = _Context()
    with _writer(context, 0.05) as writer:
        await writer.write(0, output=_OUTPUT)
        for seq in (1, 2):
            await asyncio.sleep(0.06)  # the timer of the write before fires with nothing to do
            await writer.write(seq, output=_OUTPUT)
    assert len(context.written) == 3


async def test_each_write_has_the_whole_time() -> None:
    context = _Context()
    loop = asyncio.get_running_loop()
    with _writer(context, 0.2) as writer:
        await writer.write(0, output=_OUTPUT)
        await asyncio.sleep(0.15)
        context.may_write.clear()
        began = loop.time()
        with pytest.raises(SlowReaderError):
            await writer.write(1, output=_OUTPUT)
        assert loop.time() - began >= 0.19


async def test_a_cancellation_by_somebody_else_stays_one() -> None:
    context = _Context()
    context.may_write.clear()

    async def write() -> None:
        with _writer(context, 10.0) as writer:
            await writer.write(0, output=_OUTPUT)

    task = asyncio.create_task(write())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_beside_the_timers_own_stays_one() -> None:
    context = _Context()
    context.may_write.clear()

    async def write() -> None:
        with _writer(context, 10.0) as writer:
            writer._is_late = True  # as if its timer had just cancelled, too
            cast("asyncio.Task[None]", asyncio.current_task()).cancel()
            await writer.write(0, output=_OUTPUT)

    task = asyncio.create_task(write())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_no_timer_is_left_behind() -> None:
    context = _Context()

    async def write() -> EventWriter:
        with _writer(context, 3600.0) as writer:
            await writer.write(0, output=_OUTPUT)
            assert writer._timer is not None
        return writer

    work: Awaitable[EventWriter] = write()
    writer = await work
    assert writer._timer is None
