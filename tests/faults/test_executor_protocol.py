"""An executor that breaks the protocol ends its epoch, with one line, and nothing else.

One scheduler process for all of it: every fault finds the scheduler that survived those before.
Streams that ran under the fault go on at a good executor on the same address.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from stepwire.executor.v1 import executor_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2 as generation_pb
from stepwire.scheduler.v1 import generation_pb2_grpc
from support.faulty_executor import (
    Answer,
    Describe,
    FaultyExecutor,
    Misbehaviour,
    StreamOverError,
    free_port,
    serving,
    until,
    until_state,
)
from support.hashing_executor import HashingExecutor, expected_output
from support.scheduler_tokenizers import write_tokenizer

from benchmarks.checked_streams import SeededRequest, read_stream
from benchmarks.processes import SchedulerProcess, scheduler_process

STEP_TIMEOUT_MS = 500
NUM_TOKENS = 12
NUM_STREAMS = 4


def _scheduler(tmp: Path, *ports: int) -> Any:
    return scheduler_process(
        write_tokenizer(tmp / "tiny"),
        executors=[f"127.0.0.1:{port}" for port in ports],
        log=tmp / "scheduler.log",
        flags=["--step-timeout-ms", str(STEP_TIMEOUT_MS)],
    )


@pytest.fixture(scope="module")
def ports() -> list[int]:
    return [free_port(), free_port()]


@pytest.fixture(scope="module")
def alone(ports: list[int], tmp_path_factory: Any) -> Iterator[SchedulerProcess]:
    """A scheduler of one executor."""
    with _scheduler(tmp_path_factory.mktemp("alone"), ports[0]) as scheduler:
        yield scheduler


@pytest.fixture(scope="module")
def paired(ports: list[int], tmp_path_factory: Any) -> Iterator[SchedulerProcess]:
    """A scheduler of two ranks."""
    with _scheduler(tmp_path_factory.mktemp("paired"), *ports) as scheduler:
        yield scheduler


async def old_epoch(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    right.step_result.epoch -= 1
    yield right


async def wrong_step_id(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    right.step_result.step_id += 7
    yield right


async def the_same_twice(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    yield right
    yield right


async def slot_not_asked(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    right.step_result.sampled_slots[0] += 1
    yield right


async def failure_of_a_slot_not_asked(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    right.step_result.failures.add(slot=4_000_000_000, reason="?")
    yield right


async def too_few_tokens(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    del right.step_result.sampled_token_ids[-1]
    yield right


async def token_outside_the_vocabulary(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    right.step_result.sampled_token_ids[0] = 4_000_000_000
    yield right


async def opens_another_epoch(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    yield pb.ExecuteResponse(epoch_opened=pb.EpochOpened(epoch=1))


async def empty_message(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    yield pb.ExecuteResponse()


async def not_protobuf(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    yield b"\xff\xff\xff\xff"


async def oversize_message(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    yield bytes(65 * 1024 * 1024)


async def flood(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    for _ in range(20_000):
        yield right


async def end_of_stream(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    raise StreamOverError
    yield right


async def exception(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    raise RuntimeError("broken on purpose")
    yield right


async def silence(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    await asyncio.Event().wait()
    yield right


async def _read_all(address: str) -> list[list[int]]:
    """Read NUM_STREAMS streams at once; their tokens."""
    params = generation_pb.SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        transcripts = await asyncio.gather(
            *(
                read_stream(
                    stub,
                    SeededRequest(name=str(i), prompt=(i, 1, 2), params=params),
                    timeout_s=60,
                )
                for i in range(NUM_STREAMS)
            )
        )
    return [transcript[0].token_ids for transcript in transcripts]


EXPECTED = [expected_output([i, 1, 2], NUM_TOKENS) for i in range(NUM_STREAMS)]


async def _until_ready(address: str) -> None:
    await until_state(address, generation_pb.MODEL_STATE_READY)


async def _until_away(address: str) -> None:
    await until_state(address, generation_pb.MODEL_STATE_CONNECTING)


async def _until_epoch_ended(scheduler: SchedulerProcess) -> None:
    """Wait for the one line of the fault."""
    records: list[dict[str, Any]] = []

    def ended() -> list[dict[str, Any]]:
        records.extend(scheduler.new_records())
        return [record for record in records if record["event"] == "epoch ended"]

    await until(ended)
    assert len(ended()) == 1
    assert "\n" not in ended()[0]["cause"]
    assert not [record for record in records if "exception" in record]


FAULTS = [
    (old_epoch, 3),
    (wrong_step_id, 3),
    (the_same_twice, 3),
    (slot_not_asked, 3),
    (failure_of_a_slot_not_asked, 3),
    (too_few_tokens, 3),
    (token_outside_the_vocabulary, 3),
    (opens_another_epoch, 0),
    (opens_another_epoch, 3),
    (empty_message, 0),
    (empty_message, 3),
    (not_protobuf, 0),
    (not_protobuf, 3),
    (oversize_message, 3),
    (flood, 0),
    (flood, 3),
    (end_of_stream, 3),
    (exception, 0),
    (exception, 3),
    (silence, 0),
    (silence, 3),
]


@pytest.mark.parametrize(
    ("misbehave", "fault_at"), FAULTS, ids=[f"{fault.__name__}-{at}" for fault, at in FAULTS]
)
async def test_a_fault_ends_the_epoch_and_streams_go_on_at_a_good_executor(
    alone: SchedulerProcess, ports: list[int], misbehave: Misbehaviour, fault_at: int
) -> None:
    async with serving(HashingExecutor(), ports[0]):
        await _until_ready(alone.address)  # so that requests are taken from here on
    await _until_away(alone.address)
    alone.new_records()
    faulty = FaultyExecutor(misbehave=misbehave, fault_at=fault_at)
    async with serving(faulty, ports[0]):
        reading = asyncio.create_task(_read_all(alone.address))
        await until(lambda: faulty.num_faults)
        await _until_epoch_ended(alone)
        assert not reading.done()
    async with serving(HashingExecutor(), ports[0]):
        assert await asyncio.wait_for(reading, 30) == EXPECTED
    assert faulty.num_faults == 1
    assert alone.process.exit_code() is None


async def wrong_checksum(right: pb.ExecuteResponse) -> AsyncIterator[Answer]:
    right.step_result.slot_table_checksum += 1
    yield right


PAIR_FAULTS = [wrong_checksum, wrong_step_id, not_protobuf, end_of_stream, silence]


@pytest.mark.parametrize("faulty_rank", [pytest.param(0, marks=pytest.mark.long), 1])
@pytest.mark.parametrize("misbehave", PAIR_FAULTS)
async def test_a_fault_of_one_rank_ends_the_epoch_of_both(
    paired: SchedulerProcess, ports: list[int], misbehave: Misbehaviour, faulty_rank: int
) -> None:
    def rank(number: int, **settings: Any) -> FaultyExecutor:
        return FaultyExecutor(description={"world_size": 2, "rank": number}, **settings)

    async with serving(rank(0), ports[0]), serving(rank(1), ports[1]):
        await _until_ready(paired.address)
    await _until_away(paired.address)
    paired.new_records()
    faulty = rank(faulty_rank, misbehave=misbehave)
    other = rank(1 - faulty_rank)
    async with serving(other, ports[1 - faulty_rank]):
        async with serving(faulty, ports[faulty_rank]):
            reading = asyncio.create_task(_read_all(paired.address))
            await until(lambda: faulty.num_faults)
            await _until_epoch_ended(paired)
            assert not reading.done()
        async with serving(rank(faulty_rank), ports[faulty_rank]):
            assert await asyncio.wait_for(reading, 30) == EXPECTED


async def garbage(context: Any) -> bytes:
    return b"\xff\xff\xff\xff"


async def nothing(context: Any) -> bytes:
    return b""


async def never(context: Any) -> bytes:
    await asyncio.Event().wait()
    raise AssertionError


async def refusal(context: Any) -> bytes:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "what is that?")
    raise AssertionError


def zero(field: str) -> Describe:
    """A description that is right but for one field."""

    async def describe(context: Any) -> bytes:
        right = await HashingExecutor().Describe(pb.DescribeRequest(), None)
        setattr(right, field, 0)
        return right.SerializeToString()

    return describe


ZEROES = ["world_size", "vocab_size", "max_position_embeddings", "block_size", "num_blocks"]
ZEROES += ["max_num_seqs", "max_num_batched_tokens"]
DESCRIPTIONS: dict[str, Describe] = {
    "garbage": garbage,
    "nothing": nothing,
    "never": never,
    "refusal": refusal,
} | {f"{field}-0": zero(field) for field in ZEROES}


@pytest.mark.parametrize("name", DESCRIPTIONS)
async def test_a_description_that_makes_no_sense_is_waited_out(
    alone: SchedulerProcess, ports: list[int], name: str
) -> None:
    async with serving(HashingExecutor(), ports[0]):
        await _until_ready(alone.address)
    await _until_away(alone.address)
    alone.new_records()
    faulty = FaultyExecutor(describe=DESCRIPTIONS[name])
    async with serving(faulty, ports[0]):
        reading = asyncio.create_task(_read_all(alone.address))
        await until(lambda: faulty.num_described >= (1 if name == "never" else 3))
        assert faulty.num_epochs == 0
        assert not reading.done()
    complaints = [r for r in alone.new_records() if r["level"] != "info"]
    assert not [record for record in complaints if "exception" in record]
    assert len(complaints) <= 2, "one line of a fault that stays, and one of an end"
    async with serving(HashingExecutor(), ports[0]):
        assert await asyncio.wait_for(reading, 30) == EXPECTED
