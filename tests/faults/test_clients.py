"""What clients do to a scheduler, that of others included: vanish, dawdle, flood, send nonsense.

One scheduler process over one executor that samples hashes of the tokens so far, so that every
stream's tokens are known. Beside every misbehaving client a neighbour reads its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc
from support.faulty_executor import free_port, serving, until, until_state
from support.hashing_executor import HashingExecutor, expected_output
from support.scheduler_tokenizers import write_tokenizer

from benchmarks.checked_streams import SeededRequest, read_stream
from benchmarks.processes import SchedulerProcess, scheduler_process

NUM_BLOCKS = 64
BLOCK_SIZE = 4
MAX_NUM_SEQS = 4
MAX_QUEUED = 8
MAX_UNREAD_BYTES = 2_000
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
SERVICE = "/stepwire.scheduler.v1.GenerationService"


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def scheduler(port: int, tmp_path_factory: Any) -> Iterator[SchedulerProcess]:
    tmp: Path = tmp_path_factory.mktemp("clients")
    flags = ["--max-queued-requests", str(MAX_QUEUED), "--max-queued-tokens", "400"]
    flags += ["--max-unread-bytes", str(MAX_UNREAD_BYTES), "--unread-timeout-ms", "500"]
    with scheduler_process(
        write_tokenizer(tmp / "tiny"),
        executors=[f"127.0.0.1:{port}"],
        log=tmp / "scheduler.log",
        flags=flags,
    ) as process:
        yield process


@pytest.fixture
async def executor(port: int, scheduler: SchedulerProcess) -> AsyncIterator[HashingExecutor]:
    """Of the scheduler, which is ready; in the end every block must be back."""
    executor = HashingExecutor(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        step_seconds=0.002,
    )
    async with serving(executor, port):
        await until_state(scheduler.address, pb.MODEL_STATE_READY)
        yield executor
        async with connected(scheduler) as stub:
            await generate(stub, 2, prompt=[1])  # the gauge of blocks is set at every step
        assert await asyncio.to_thread(scheduler.metric, "stepwire_kv_blocks_used") == 0
        assert await asyncio.to_thread(scheduler.metric, "stepwire_requests_waiting") == 0
    assert scheduler.process.exit_code() is None
    assert not [record for record in scheduler.new_records() if "exception" in record]


@asynccontextmanager
async def connected(
    scheduler: SchedulerProcess, *options: tuple[str, int]
) -> AsyncIterator[pb_grpc.GenerationServiceAsyncStub]:
    options += (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(scheduler.address, options=options) as channel:
        yield pb_grpc.GenerationServiceStub(channel)


def message(num_tokens: int, *, prompt: list[int], **params: Any) -> pb.GenerationInput:
    sent = pb.GenerationInput(sampling_params=pb.SamplingParams(ignore_eos=True, **params))
    sent.sampling_params.max_tokens = num_tokens
    sent.token_ids.ids.extend(prompt)
    return sent


async def generate(
    stub: pb_grpc.GenerationServiceAsyncStub, num_tokens: int, *, prompt: list[int]
) -> list[int]:
    request = pb.GenerateRequest(input=message(num_tokens, prompt=prompt))
    response = await stub.Generate(request, timeout=100)
    return list(response.choices[0].token_ids)


@asynccontextmanager
async def neighbour(scheduler: SchedulerProcess, num_tokens: int = 120) -> AsyncIterator[None]:
    """Reads beside what happens in the block, and gets its tokens."""
    params = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0)
    request = SeededRequest(name="neighbour", prompt=(9, 8, 7), params=params)
    has_begun = asyncio.Event()
    async with connected(scheduler) as stub:
        reading = asyncio.create_task(
            read_stream(stub, request, timeout_s=30, on_tokens=lambda num: has_begun.set())
        )
        await has_begun.wait()
        yield
        assert (await reading)[0].token_ids == expected_output([9, 8, 7], num_tokens)


async def read_to_the_end(call: Any) -> tuple[grpc.StatusCode, int]:
    """How the call ends, and the tokens that come before."""
    num_tokens = 0
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            num_tokens += len(response.output.token_ids)
    except grpc.aio.AioRpcError as error:
        return error.code(), num_tokens
    return grpc.StatusCode.OK, num_tokens


def ended(scheduler: SchedulerProcess) -> list[dict[str, Any]]:
    """Requests that have ended since the log was last looked at."""
    return [record for record in scheduler.new_records() if record["event"] == "request ended"]


def retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    """What RetryInfo says; None where there is none."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            for packed in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.RetryInfo()
                if packed.Unpack(info):
                    return float(info.retry_delay.ToTimedelta().total_seconds())
    return None


NONSENSE = {
    "no protobuf": b"\xff\xff\xff\xff",
    "cut short": pb.GenerateStreamRequest(
        input=pb.GenerationInput(text="hello")
    ).SerializeToString()[:-3],
    "string that is not UTF-8": b"\x0a\x04\x0a\x02\xff\xfe",
    "empty": b"",
    "nested deeply": b"\x0a\x7f" * 60,
    "unknown fields": b"\xfa\xff\x7f\x02\x01\x01",
}


@pytest.mark.parametrize("name", NONSENSE)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_malformed_request_is_refused_and_ends_nothing_else(
    scheduler: SchedulerProcess, executor: HashingExecutor, method: str, name: str
) -> None:
    async with neighbour(scheduler), grpc.aio.insecure_channel(scheduler.address) as channel:
        kind = channel.unary_unary if method == "Generate" else channel.unary_stream
        call: Any = kind(f"{SERVICE}/{method}")(NONSENSE[name], timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await (call if method == "Generate" else call.read())
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_message_over_the_limit_is_refused(
    scheduler: SchedulerProcess, executor: HashingExecutor
) -> None:
    async with neighbour(scheduler), connected(scheduler) as stub:
        request = pb.GenerateRequest(input=pb.GenerationInput(text="a" * (2 << 20)))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Generate(request, timeout=10)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_what_can_never_fit_is_refused_at_once_and_blocks_nobody(
    scheduler: SchedulerProcess, executor: HashingExecutor
) -> None:
    async with neighbour(scheduler), connected(scheduler) as stub:
        num_fitting = NUM_BLOCKS * BLOCK_SIZE - 1
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await generate(stub, num_fitting + 1, prompt=[1])
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        longest = await generate(stub, num_fitting, prompt=[1])
        assert longest == expected_output([1], num_fitting)


_VANISHING = textwrap.dedent("""
    import sys
    import grpc
    from stepwire.scheduler.v1 import generation_pb2 as pb
    from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc

    stub = pb_grpc.GenerationServiceStub(grpc.insecure_channel(sys.argv[1]))
    calls = []
    for index in range(2):
        message = pb.GenerationInput(request_id=f"vanishing-{index}")
        message.token_ids.ids.extend([index, 1, 2])
        message.sampling_params.max_tokens = 200
        message.sampling_params.ignore_eos = True
        calls.append(stub.GenerateStream(pb.GenerateStreamRequest(input=message)))
    for call in calls:
        while not next(call).HasField("output"):
            pass
    print("reading", flush=True)
    for call in calls:
        for event in call:
            pass
""")


async def test_a_client_killed_under_its_streams_leaves_nothing(
    scheduler: SchedulerProcess, executor: HashingExecutor
) -> None:
    executor.step_seconds = 0.02
    async with neighbour(scheduler, 60):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _VANISHING, scheduler.address),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 30) == b"reading\n"
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        async with connected(scheduler) as stub:
            cancelled = await stub.Cancel(pb.CancelRequest(request_ids=["no-such"]))
            assert not cancelled.cancelled_request_ids
        gone: set[str] = set()

        def both_ended() -> bool:
            gone.update(record["request_id"] for record in ended(scheduler))
            return {"vanishing-0", "vanishing-1"} <= gone

        await until(both_ended)


async def test_a_slow_reader_is_given_up_and_slows_nobody(
    scheduler: SchedulerProcess, executor: HashingExecutor
) -> None:
    async with neighbour(scheduler), connected(scheduler, *SMALL_WINDOW) as stub:
        request = message(200, prompt=[5, 5], n=3, logprobs=20)
        request.request_id = "slow"
        call = stub.GenerateStream(pb.GenerateStreamRequest(input=request), timeout=60)
        scheduler.new_records()
        await call.read()  # and no more

        def given_up() -> bool:
            return any(record.get("request_id") == "slow" for record in ended(scheduler))

        async with neighbour(scheduler):
            await until(given_up)
        code, num_tokens = await read_to_the_end(call)
        assert code is grpc.StatusCode.ABORTED
        assert num_tokens < 600


async def test_the_queue_is_bounded_and_refusals_say_when_to_come_back(
    scheduler: SchedulerProcess, executor: HashingExecutor
) -> None:
    executor.step_seconds = 0.02
    num_sent = 10 * (MAX_NUM_SEQS + MAX_QUEUED)
    async with connected(scheduler) as stub:
        results = await asyncio.gather(
            *(generate(stub, 20, prompt=[i % 250, 1]) for i in range(num_sent)),
            return_exceptions=True,
        )
    errors = [each for each in results if isinstance(each, grpc.aio.AioRpcError)]
    served = {i: each for i, each in enumerate(results) if isinstance(each, list)}
    assert len(errors) + len(served) == num_sent
    assert MAX_QUEUED <= len(served) < num_sent / 2
    assert served == {i: expected_output([i % 250, 1], 20) for i in served}
    for error in errors:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (retry_after_s(error) or 0) > 0


async def test_a_deadline_ends_requests_that_wait_and_that_run(
    scheduler: SchedulerProcess, executor: HashingExecutor
) -> None:
    executor.step_seconds = 0.02
    async with connected(scheduler) as stub:
        requests = [message(200, prompt=[i, 2]) for i in range(MAX_NUM_SEQS + 3)]
        calls = [stub.Generate(pb.GenerateRequest(input=each), timeout=0.5) for each in requests]
        results = await asyncio.gather(*calls, return_exceptions=True)
    codes = {each.code() for each in results if isinstance(each, grpc.aio.AioRpcError)}
    assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert len(results) == MAX_NUM_SEQS + 3
    assert await asyncio.to_thread(_num_running, scheduler) == 0


@pytest.mark.long
async def test_clients_may_ping_as_often_as_the_server_says(
    scheduler: SchedulerProcess, executor: HashingExecutor
) -> None:
    executor.step_seconds = 5.0  # so long nothing but pings crosses the connection
    keepalive = (("grpc.keepalive_time_ms", 10_000), ("grpc.http2.max_pings_without_data", 0))
    async with connected(scheduler, *keepalive) as stub:
        assert await generate(stub, 12, prompt=[6]) == expected_output([6], 12)


def _num_running(scheduler: SchedulerProcess) -> float:
    for _ in range(300):
        if not (num := scheduler.metric("stepwire_requests_running")):
            break
        signal.sigtimedwait([], 0.01)
    return num
