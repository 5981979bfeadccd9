"""Describe and Execute over a loopback server, with a model small enough to predict."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from stepwire.executor.v1.executor_pb2 import (
    ExecuteRequest,
    LoadState,
    OpenEpoch,
    StepPlan,
)
from stepwire_executor.load_status import ModelDescription
from stepwire_executor.service import MAX_OUTSTANDING_PLANS
from support.executor_fakes import (
    admission,
    expected_continuation,
    step,
)
from support.executor_rank import (
    DESCRIPTION,
    FINGERPRINT,
    Rank,
    Stream,
    open_stream,
    opened_stream,
    serving,
)

PROMPT = [5, 9, 2, 7, 1, 3]


class HeldSteps:
    """Holds every forward pass until told to let go."""

    def __init__(self, rank: Rank) -> None:
        self._entered, self._gate = threading.Event(), threading.Event()
        rank.executor.decoder.before_forward = self._hold

    def _hold(self) -> None:
        self._entered.set()
        self._gate.wait(10)

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 10)

    def release(self) -> None:
        self._gate.set()


@contextmanager
def held_steps(rank: Rank) -> Iterator[HeldSteps]:
    held = HeldSteps(rank)
    try:
        yield held
    finally:
        held.release()


def first_step(epoch: int = 1) -> StepPlan:
    return step(epoch, 1, {0: 6}, admissions=[admission(0, PROMPT, [0, 1, 2])])


async def test_plans_ahead_of_their_results_run_in_order() -> None:
    async with serving() as rank:
        stream = await opened_stream(rank)
        await stream.send(first_step())
        for step_id in range(2, 6):
            await stream.send(step(1, step_id, {0: 1}))
        results = [await stream.result() for _ in range(5)]
        assert [result.step_id for result in results] == [1, 2, 3, 4, 5]
        tokens = [result.sampled_token_ids[0] for result in results]
        assert tokens == expected_continuation(PROMPT, 5)
        assert results[0].timings.queue_ms > 0
        await stream.call.done_writing()
        assert (await stream.status())[0] == grpc.StatusCode.OK


async def test_more_plans_than_are_read_ahead_all_get_an_answer() -> None:
    async with serving() as rank:
        stream = await opened_stream(rank)
        num_plans = 5 * MAX_OUTSTANDING_PLANS
        for step_id in range(1, num_plans + 1):
            await stream.send(step(1, step_id))
        await stream.call.done_writing()
        ids = [(await stream.result()).step_id for _ in range(num_plans)]
        assert ids == list(range(1, num_plans + 1))
        assert (await stream.status())[0] == grpc.StatusCode.OK


async def test_a_peer_that_does_not_read_is_read_ahead_of_only_so_far() -> None:
    async with serving() as rank:
        stream = await opened_stream(rank)
        with held_steps(rank) as held:
            await stream.send(first_step())
            for step_id in range(2, 4 * MAX_OUTSTANDING_PLANS):
                await stream.send(step(1, step_id))
            await asyncio.sleep(0.2)
            assert rank.compute.num_queued < MAX_OUTSTANDING_PLANS
            held.release()
            stream.call.cancel()


async def test_describe_answers_while_a_step_runs() -> None:
    async with serving() as rank:
        stream = await opened_stream(rank)
        with held_steps(rank) as held:
            await stream.send(first_step())
            await held.entered()
            described = await asyncio.wait_for(rank.describe(), 5)
            assert described.load_state == LoadState.LOAD_STATE_READY
            held.release()
            assert (await stream.result()).step_id == 1


async def test_describe_follows_the_load() -> None:
    async with serving(ready=False) as rank:
        rank.load.advance("read weights", 0.5)
        loading = await rank.describe()
        assert loading.load_state == LoadState.LOAD_STATE_LOADING
        assert (loading.load_phase, loading.load_fraction) == ("read weights", 0.5)
        assert (loading.instance_id, loading.world_size) == ("i-1", 1)
        assert not loading.model_fingerprint
        rank.load.advance("pack weights", 0.25)
        assert (await rank.describe()).load_fraction == 0.5
        rank.become_ready()
        ready = await rank.describe()
        assert ready.load_state == LoadState.LOAD_STATE_READY
        assert ready.load_ms >= loading.load_ms
        for name in ModelDescription.__dataclass_fields__:
            value = getattr(DESCRIPTION, name)
            described = getattr(ready, name)
            assert (tuple(described) if isinstance(value, tuple) else described) == value, name


async def test_describe_says_why_a_load_failed() -> None:
    async with serving(ready=False) as rank:
        rank.load.fail("config.json is missing: download it")
        described = await rank.describe()
        assert described.load_state == LoadState.LOAD_STATE_FAILED
        assert described.load_error == "config.json is missing: download it"


async def test_no_epoch_opens_before_the_model_is_ready() -> None:
    async with serving(ready=False) as rank:
        code, details = await (await open_stream(rank)).status()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "loading" in details
        rank.become_ready()
        await opened_stream(rank)


async def test_another_models_fingerprint_is_refused() -> None:
    async with serving() as rank:
        code, details = await (await open_stream(rank, fingerprint="beef")).status()
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert FINGERPRINT in details


async def test_a_newer_epoch_ends_the_older_stream_and_drops_its_plans() -> None:
    async with serving() as rank:
        older = await opened_stream(rank, 1)
        with held_steps(rank) as held:
            await older.send(first_step())
            await held.entered()  # a step under way is not dropped
            await older.send(step(1, 2, {0: 1}))
            newer = await open_stream(rank, 2)
            code, details = await older.status()
            assert code == grpc.StatusCode.ABORTED
            assert "epoch 2" in details
            held.release()
        assert (await newer.receive()).epoch_opened.epoch == 2
        result = await newer.run(first_step(2))
        assert list(result.sampled_token_ids) == expected_continuation(PROMPT, 1)
        assert rank.executor.decoder.num_forwards == 2


@pytest.mark.parametrize("epoch", [0, 4, 5])
async def test_an_epoch_must_be_newer_than_any_seen(epoch: int) -> None:
    async with serving() as rank:
        seen = await opened_stream(rank, 5)
        code, details = await (await open_stream(rank, epoch)).status()
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "not greater than 5" in details
        assert (await seen.run(step(5, 1))).step_id == 1


@pytest.mark.parametrize(
    ("plan", "code", "reason"),
    [
        (step(1, 2), grpc.StatusCode.FAILED_PRECONDITION, "step 1 was expected"),
        (step(2, 1), grpc.StatusCode.FAILED_PRECONDITION, "epoch 2"),
        (step(1, 1, released=[0]), grpc.StatusCode.INVALID_ARGUMENT, "holds no sequence"),
        (step(1, 1, {9: 1}), grpc.StatusCode.INVALID_ARGUMENT, "out of range"),
    ],
)
async def test_a_wrong_plan_ends_its_stream_and_the_next_epoch_works(
    plan: StepPlan, code: grpc.StatusCode, reason: str
) -> None:
    async with serving() as rank:
        stream = await opened_stream(rank)
        await stream.send(plan)
        assert (await stream.status())[0] == code
        assert reason in (await stream.status())[1]
        fresh = await opened_stream(rank, 2)
        assert (await fresh.run(first_step(2))).sampled_slots == [0]


async def test_a_stream_opens_one_epoch_first_and_once() -> None:
    async with serving() as rank:
        early = Stream(rank)
        await early.send(step(1, 1))
        assert (await early.status())[0] == grpc.StatusCode.FAILED_PRECONDITION
        empty = Stream(rank)
        await empty.call.write(ExecuteRequest())
        assert (await empty.status())[0] == grpc.StatusCode.FAILED_PRECONDITION
        silent = Stream(rank)
        await silent.call.done_writing()
        assert (await silent.status())[0] == grpc.StatusCode.FAILED_PRECONDITION
        twice = await opened_stream(rank, 3)
        opening = OpenEpoch(epoch=4, model_fingerprint=FINGERPRINT)
        await twice.call.write(ExecuteRequest(open_epoch=opening))
        assert (await twice.status())[0] == grpc.StatusCode.FAILED_PRECONDITION


async def test_bytes_that_are_no_message_end_their_stream_only() -> None:
    async with serving() as rank:
        other = await opened_stream(rank)
        raw = rank.channel.stream_stream("/stepwire.executor.v1.ExecutorService/Execute")
        call = raw()
        await call.write(b"\xff\xff\xff")
        assert await asyncio.wait_for(call.code(), 10) != grpc.StatusCode.OK
        assert "Traceback" not in (await call.details())
        assert (await other.run(first_step())).sampled_slots == [0]
        broken = raw()
        opening = OpenEpoch(epoch=2, model_fingerprint=FINGERPRINT)
        await broken.write(ExecuteRequest(open_epoch=opening).SerializeToString())
        await broken.read()
        await broken.write(b"\xff\xff\xff")
        assert await asyncio.wait_for(broken.code(), 10) != grpc.StatusCode.OK
        fresh = await opened_stream(rank, 3)
        assert (await fresh.run(first_step(3))).sampled_slots == [0]


async def test_an_exception_in_a_step_tells_the_peer_nothing_and_spares_the_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def explode() -> None:
        raise RuntimeError("secret detail")

    async with serving() as rank:
        rank.executor.decoder.before_forward = explode
        stream = await opened_stream(rank)
        await stream.send(first_step())
        code, details = await stream.status()
        assert code == grpc.StatusCode.INTERNAL
        assert details == "step 1 failed; the executor's log says why"
        captured = capsys.readouterr()
        assert "secret detail" in captured.out + captured.err
        rank.executor.decoder.before_forward = None
        fresh = await opened_stream(rank, 2)
        assert (await fresh.run(first_step(2))).sampled_slots == [0]


async def test_a_peer_that_leaves_gets_its_step_in_flight_finished_and_the_rest_dropped() -> None:
    async with serving() as rank:
        stream = await opened_stream(rank)
        with held_steps(rank) as held:
            await stream.send(first_step())
            for step_id in range(2, 6):
                await stream.send(step(1, step_id, {0: 1}))
            await held.entered()
            stream.call.cancel()
            await asyncio.sleep(0.1)
            held.release()
        fresh = await opened_stream(rank, 2)
        assert rank.executor.decoder.num_forwards == 1
        assert (await fresh.run(first_step(2))).sampled_slots == [0]


async def test_stopping_answers_the_step_in_flight_first() -> None:
    async with serving() as rank:
        stream = await opened_stream(rank)
        with held_steps(rank) as held:
            await stream.send(first_step())
            await stream.send(step(1, 2, {0: 1}))
            await held.entered()
            rank.service.stop()
            held.release()
            assert (await stream.result()).step_id == 1
            code, details = await stream.status()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "stopping" in details
        late, _ = await (await open_stream(rank, 2)).status()
        assert late == grpc.StatusCode.UNAVAILABLE
