"""Memory and disks that run out."""

from __future__ import annotations

import asyncio
import resource
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc
from stepwire_client import AsyncClient, SamplingParams
from stepwire_client.events import Output
from support.faulty_executor import free_port, serving, until, until_state
from support.hashing_executor import HashingExecutor, expected_output
from support.scheduler_tokenizers import write_tokenizer

from benchmarks.checked_streams import SeededRequest, read_stream
from benchmarks.cluster import local_cluster
from benchmarks.processes import SchedulerProcess, scheduler_process

NUM_TOKENS = 200
PARAMS = pb.SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0)
PAGE_BYTES = resource.getpagesize()


def address_space(pid: int) -> int:
    """Bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * PAGE_BYTES


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits another process's memory")
async def test_an_executor_that_gets_no_more_memory_starts_again_and_streams_go_on() -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    long_prompt = [100 + i % 1000 for i in range(600)]
    with local_cluster("smollm2-135m", dtype="float32", num_kv_blocks=200) as (cluster, _):
        async with AsyncClient(cluster.address) as client:
            alone = (await client.generate("The first ten numbers are", greedy)).token_ids
            pid = cluster.pids["executor"]
            token_ids: list[int] = []
            async with client.stream("The first ten numbers are", greedy, timeout_s=240) as stream:
                async for event in stream:
                    if not isinstance(event, Output):
                        continue
                    if not token_ids:
                        limit = address_space(pid)
                        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
                        # Needs more than what the process has at hand.
                        prefill = asyncio.create_task(
                            client.generate(long_prompt, SamplingParams(max_tokens=1))
                        )
                    token_ids += event.token_ids
            assert tuple(token_ids) == alone
            assert (await prefill).usage.num_output_tokens == 1
        assert cluster.pids["executor"] != pid, "the executor had the memory after all"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> str:
    """A shell's words that mount 32 KiB at tmp_path/disk, for it and its children only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=32k tmpfs {disk}"
    command = ["unshare", "--mount", "--", "sh", "-c"]
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed: no file system of its own can be had")
    done = subprocess.run([*command, mount], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system can be mounted by root only: {done.stderr.strip()}")
    return mount


@asynccontextmanager
async def cluster(tmp_path: Path, script: str, *flags: str) -> AsyncIterator[SchedulerProcess]:
    """A scheduler with an executor; script: starts the scheduler, which is "$@"."""
    port = free_port()
    with scheduler_process(
        write_tokenizer(tmp_path / "tiny"),
        executors=[f"127.0.0.1:{port}"],
        log=tmp_path / "scheduler.log",
        flags=flags,
        prefix=[str(shutil.which("unshare")), "--mount", "--", "sh", "-c", script, "sh"],
    ) as scheduler:
        async with serving(HashingExecutor(), port):
            await until_state(scheduler.address, pb.MODEL_STATE_READY)
            yield scheduler


async def read_one(address: str, index: int) -> list[int]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        request = SeededRequest(name=str(index), prompt=(index, 1, 2), params=PARAMS)
        return (await read_stream(stub, request, timeout_s=60))[0].token_ids


def _size(path: str) -> int:
    return Path(path).stat().st_size


async def test_a_full_disk_ends_the_plan_log_and_nothing_else(
    tmp_path: Path, tiny_disk: str
) -> None:
    plan_log = tmp_path / "disk" / "plans"
    script = f'{tiny_disk} && exec "$@"'
    async with cluster(tmp_path, script, "--plan-log", str(plan_log)) as scheduler:
        ended: list[str] = []

        def plan_log_ended() -> list[str]:
            ended.extend(
                record["cause"]
                for record in scheduler.new_records()
                if record["event"] == "the plan log ends"
            )
            return ended

        for index in range(8):  # a request's plans and results take about 14 kB
            assert await read_one(scheduler.address, index) == expected_output(
                [index, 1, 2], NUM_TOKENS
            )
        await until(plan_log_ended)
        assert await read_one(scheduler.address, 9) == expected_output([9, 1, 2], NUM_TOKENS)
    assert ended == ["No space left on device"]


async def test_a_full_disk_under_the_log_ends_nothing(tmp_path: Path, tiny_disk: str) -> None:
    log = tmp_path / "disk" / "log"
    script = f'{tiny_disk} && exec "$@" 2>{log}'
    async with cluster(tmp_path, script, "--log-level", "debug") as scheduler:
        async with grpc.aio.insecure_channel(scheduler.address) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            message = pb.GenerationInput(text="hello")
            message.sampling_params.max_tokens = 1
            for _ in range(100):  # each is logged with about 500 bytes
                await stub.Generate(pb.GenerateRequest(input=message), timeout=30)
        assert _size(f"/proc/{scheduler.pid}/root{log}") == 32 * 1024, "the disk was not full"
        assert await read_one(scheduler.address, 3) == expected_output([3, 1, 2], NUM_TOKENS)
