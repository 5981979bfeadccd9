"""A scheduler process, clients of ours, and a network between them that breaks."""

from __future__ import annotations

import asyncio
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest
from stepwire.executor.v1 import executor_pb2_grpc
from stepwire_client import AsyncClient, Client, Completed, Event, Output, SamplingParams
from stepwire_client.errors import NotRetainedError
from support.cutting_proxy import proxying
from support.hashing_executor import HashingExecutor, expected_output
from support.scheduler_tokenizers import write_tokenizer

PARAMS = SamplingParams(max_tokens=40)


@dataclass
class Scheduler:
    address: str
    metrics_address: str

    async def metric(self, name: str) -> float:
        def scrape() -> str:
            url = f"http://{self.metrics_address}/metrics"
            with urllib.request.urlopen(url, timeout=5) as response:
                return response.read().decode()

        lines = (await asyncio.to_thread(scrape)).splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))

    async def until(self, name: str, condition: Callable[[float], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition(await self.metric(name)):  # noqa: ASYNC110 - it is scraped
                await asyncio.sleep(0.02)


@asynccontextmanager
async def scheduling(
    model: Path, executor: HashingExecutor, *flags: str
) -> AsyncIterator[Scheduler]:
    """A scheduler process over the executor, ready."""
    server = grpc.aio.server()
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(executor, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "stepwire_scheduler", "--model", str(write_tokenizer(model))),
        *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
        *("--executor", f"127.0.0.1:{port}", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 20)
        address = line.decode().split()[-1]
        async with AsyncClient(address) as client:
            await client.wait_until_ready(20)
        listening = psutil.Process(process.pid).net_connections("tcp4")
        ports = {each.laddr.port for each in listening if each.status == psutil.CONN_LISTEN}
        (metrics_port,) = ports - {int(address.rpartition(":")[2])}
        yield Scheduler(address, f"127.0.0.1:{metrics_port}")
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await server.stop(None)


def tokens_of(events: list[Event], index: int = 0) -> list[int]:
    outputs = [event for event in events if isinstance(event, Output) and event.index == index]
    return [token for output in outputs for token in output.token_ids]


async def test_16_streams_over_connections_cut_at_random_bytes_lose_nothing(
    tmp_path: Path,
) -> None:
    executor = HashingExecutor(step_seconds=0.01, num_blocks=256, max_num_seqs=32)
    prompts = [[i, 2, 3] for i in range(16)]
    async with (
        scheduling(tmp_path, executor) as scheduler,
        proxying(scheduler.address, seed=1) as (proxy, address),
        AsyncClient(address) as client,
    ):
        proxy.max_bytes = 20_000

        async def read(prompt: list[int]) -> list[Event]:
            params = SamplingParams(max_tokens=40, n=1 + prompt[0] % 2)
            async with client.stream(prompt, params, timeout_s=60) as stream:
                return [event async for event in stream]

        answers = await asyncio.gather(*map(read, prompts))
        num_resumed = await scheduler.metric("stepwire_streams_resumed_total")
    for prompt, events in zip(prompts, answers, strict=True):
        for index in range(1 + prompt[0] % 2):
            assert tokens_of(events, index) == expected_output(prompt, 40, index)
        assert isinstance(events[-1], Completed)
    assert proxy.num_cuts > 0
    assert num_resumed > 0


async def test_a_partition_costs_time_and_no_token(tmp_path: Path) -> None:
    """What the server sent into it is sent again."""
    executor = HashingExecutor(step_seconds=0.02)
    async with (
        scheduling(tmp_path, executor) as scheduler,
        proxying(scheduler.address, seed=2) as (proxy, address),
        AsyncClient(address) as client,
    ):
        answer = asyncio.create_task(client.generate([9], PARAMS, timeout_s=60))
        events: list[Event] = []
        async with client.stream([1, 2], PARAMS, timeout_s=60) as stream:
            async for event in stream:
                events.append(event)
                if len(events) in (4, 8):
                    proxy.swallow()
                    seen = executor.num_steps
                    while executor.num_steps < seen + 5:  # noqa: ASYNC110 - it has no event
                        await asyncio.sleep(0.01)
                    proxy.heal()
        assert tokens_of(events) == expected_output([1, 2], 40)
        assert list((await answer).token_ids) == expected_output([9], 40)


async def test_the_blocking_client_resumes_as_well(tmp_path: Path) -> None:
    executor = HashingExecutor(step_seconds=0.01)
    async with (
        scheduling(tmp_path, executor) as scheduler,
        proxying(scheduler.address, seed=3) as (proxy, address),
    ):
        proxy.max_bytes = 6_000

        def work(first: int) -> tuple[list[Event], tuple[int, ...]]:
            with Client(address) as client:
                pending = client.submit([first, 8], PARAMS, timeout_s=60)
                with client.stream([first], PARAMS, timeout_s=60) as stream:
                    events = list(stream)
                return events, pending.result().token_ids

        answers = await asyncio.gather(*(asyncio.to_thread(work, i) for i in range(4)))
        for i, (events, token_ids) in enumerate(answers):
            assert tokens_of(events) == expected_output([i], 40)
            assert list(token_ids) == expected_output([i, 8], 40)
        assert proxy.num_cuts > 0


CLIENT_PROGRAM = """
import sys
from stepwire_client import Client, SamplingParams
client = Client(sys.argv[1], resume_window_s=0.5)
params = SamplingParams(max_tokens=200)
stream = client.stream([1, 2], params, request_id="killed")
for number, event in enumerate(stream):
    if number == 4:
        print("reads", flush=True)
"""


async def test_a_client_that_is_killed_costs_its_window(tmp_path: Path) -> None:
    executor = HashingExecutor(step_seconds=0.02)
    async with scheduling(tmp_path, executor) as scheduler:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CLIENT_PROGRAM, scheduler.address),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 20) == b"reads\n"
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await scheduler.until("stepwire_requests_detached", lambda value: value == 1)
        await scheduler.until("stepwire_requests_running", lambda value: value == 0)
        assert await scheduler.metric("stepwire_requests_detached") == 0
        assert await scheduler.metric("stepwire_retained_output_bytes") == 0
        async with AsyncClient(scheduler.address) as client:
            # Needs every block of the pool.
            whole = await client.generate([1] * 56, SamplingParams(max_tokens=200))
            assert whole.usage.num_output_tokens == 200


@pytest.mark.parametrize("how", ["cancel", "close the client", "forget it"])
async def test_a_client_that_leaves_ends_its_request_at_once(tmp_path: Path, how: str) -> None:
    """Long before its window has passed."""
    executor = HashingExecutor(step_seconds=0.02)
    async with scheduling(tmp_path, executor) as scheduler:
        client = AsyncClient(scheduler.address, resume_window_s=60)
        stream = client.stream([1, 2], SamplingParams(max_tokens=200))
        for _ in range(4):
            await anext(stream)
        if how == "cancel":
            stream.cancel()
        elif how == "close the client":
            await client.close()
        else:
            del stream
        await scheduler.until("stepwire_requests_running", lambda value: value == 0)
        assert await scheduler.metric("stepwire_requests_detached") == 0
        assert executor.num_steps < 100
        await client.close()


async def test_a_reader_that_pauses_too_long_resumes_and_lost_nothing(tmp_path: Path) -> None:
    executor = HashingExecutor(step_seconds=0.005)
    # Little of the output fits into the connection.
    options = (("grpc.http2.lookahead_bytes", 512), ("grpc.http2.bdp_probe", 0))
    flags = ("--max-unread-bytes", "200", "--unread-timeout-ms", "200")
    async with scheduling(tmp_path, executor, *flags) as scheduler:
        channel = grpc.aio.insecure_channel(scheduler.address, options=options)
        client = AsyncClient(scheduler.address, channel=channel)
        stream = client.stream([1, 2], SamplingParams(max_tokens=200), timeout_s=60)
        events = [await anext(stream)]
        await scheduler.until("stepwire_requests_detached", lambda value: value == 1)
        events += [event async for event in stream]
        assert tokens_of(events) == expected_output([1, 2], 200)
        assert await scheduler.metric("stepwire_streams_resumed_total") > 0
        await channel.close()


async def test_a_client_that_comes_back_too_late_is_told(tmp_path: Path) -> None:
    executor = HashingExecutor(step_seconds=0.02)
    async with (
        scheduling(tmp_path, executor, "--resume-retention-ms", "200") as scheduler,
        proxying(scheduler.address, seed=4) as (proxy, address),
        AsyncClient(address) as client,
    ):
        stream = client.stream([1, 2], SamplingParams(max_tokens=200), timeout_s=60)
        for _ in range(4):
            await anext(stream)
        proxy.swallow()
        proxy.cut()
        await scheduler.until("stepwire_requests_detached", lambda value: value == 1)
        await scheduler.until("stepwire_requests_detached", lambda value: value == 0)
        proxy.heal()
        with pytest.raises(NotRetainedError, match="anew"):
            async for _ in stream:
                pass
