"""Cuts the network between processes; run inside a network namespace of its own.

    unshare --net -- python -m tests.faults.partitions SCENARIO FOLDER

The namespace has a loopback interface and nothing else, and ends with its last process: rules set
here touch nothing outside. Packets are dropped in silence, as by a broken cable: nobody is told.
Ends with 0 where what the scenario promises holds, else with a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import grpc.aio
import psutil
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc
from support.faulty_executor import free_port, serving, until, until_state
from support.hashing_executor import HashingExecutor, expected_output
from support.scheduler_tokenizers import write_tokenizer

from benchmarks.checked_streams import SeededRequest, read_stream
from benchmarks.processes import SchedulerProcess, scheduler_process

STEP_TIMEOUT_S = 0.5
NUM_TOKENS = 100
NUM_STREAMS = 4
EXPECTED = [expected_output([i, 1, 2], NUM_TOKENS) for i in range(NUM_STREAMS)]

TO_PORT, FROM_PORT = "--dport", "--sport"


def prepare_namespace() -> None:
    """Refuse to work beside any interface but loopback: that is no namespace of ours."""
    listed = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True)
    names = [line.split(":")[1].strip() for line in listed.stdout.splitlines()]
    if names != ["lo"]:
        raise SystemExit(f"not in a namespace of its own: there are {names}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


@contextlib.contextmanager
def cut(*directions: str, port: int) -> Iterator[None]:
    """Drop all packets to the port, from it, or both."""
    rules = [["OUTPUT", "-p", "tcp", each, str(port), "-j", "DROP"] for each in directions]
    for rule in rules:
        subprocess.run(["iptables", "-A", *rule], check=True)
    try:
        yield
    finally:
        for rule in rules:
            subprocess.run(["iptables", "-D", *rule], check=True)


@contextlib.asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[tuple[SchedulerProcess, HashingExecutor, int]]:
    """A scheduler that is ready, its executor and the executor's port."""
    port = free_port()
    executor = HashingExecutor(step_seconds=0.01)
    with scheduler_process(
        write_tokenizer(folder / "tiny"),
        executors=[f"127.0.0.1:{port}"],
        log=folder / "scheduler.log",
        flags=["--step-timeout-ms", str(round(STEP_TIMEOUT_S * 1e3))],
    ) as scheduler:
        async with serving(executor, port):
            await until_state(scheduler.address, pb.MODEL_STATE_READY)
            yield scheduler, executor, port


async def read_all(address: str, *, timeout_s: float) -> list[list[int]]:
    """Read NUM_STREAMS streams; their tokens."""
    params = pb.SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        requests = [
            SeededRequest(name=str(i), prompt=(i, 1, 2), params=params) for i in range(NUM_STREAMS)
        ]
        transcripts = await asyncio.gather(
            *(read_stream(stub, request, timeout_s=timeout_s) for request in requests)
        )
    return [transcript[0].token_ids for transcript in transcripts]


async def executor_cut_off(folder: Path, *, directions: Sequence[str], hold_s: float) -> None:
    """The epoch ends at the step's deadline; once the cut is mended streams go on."""
    async with cluster(folder) as (scheduler, executor, port):
        reading = asyncio.create_task(read_all(scheduler.address, timeout_s=hold_s + 60))
        await until(lambda: executor.num_steps > 5)
        scheduler.new_records()
        with cut(*directions, port=port):
            cut_at = time.monotonic()
            await until(lambda: _epochs_ended(scheduler))
            detected_s = time.monotonic() - cut_at
            assert detected_s < 2 * STEP_TIMEOUT_S + 1, f"noticed after {detected_s:.1f} s"
            await asyncio.sleep(hold_s)
            assert not reading.done()
        mended_at = time.monotonic()
        assert await reading == EXPECTED
        recovered_s = time.monotonic() - mended_at
        print(f"noticed after {detected_s:.2f} s, all read {recovered_s:.2f} s after the mending")
        assert recovered_s < 20, f"streams ended {recovered_s:.1f} s after the cut was mended"


def _epochs_ended(scheduler: SchedulerProcess) -> int:
    return sum(record["event"] == "epoch ended" for record in scheduler.new_records())


_READER = """
import sys
import grpc
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc

stub = pb_grpc.GenerationServiceStub(grpc.insecure_channel(sys.argv[1]))
message = pb.GenerationInput(request_id="cut-off")
message.token_ids.ids.extend([1, 2, 3])
message.sampling_params.max_tokens = 250
message.sampling_params.ignore_eos = True
for event in stub.GenerateStream(pb.GenerateStreamRequest(input=message), timeout=600):
    if event.HasField("output"):
        print("reading", flush=True)
"""


async def client_cut_off(folder: Path, *, directions: Sequence[str]) -> None:
    """A client that cannot be reached is given up; its blocks come back, neighbours read on."""
    async with cluster(folder) as (scheduler, executor, _):
        executor.step_seconds = 0.2  # slow enough that the request cannot just end: 50 s
        reader = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _READER, scheduler.address), stdout=asyncio.subprocess.PIPE
        )
        try:
            assert reader.stdout is not None
            await reader.stdout.readline()
            scheduler_port = int(scheduler.address.rpartition(":")[2])
            port = next(
                each.laddr.port
                for each in psutil.Process(reader.pid).net_connections("tcp")
                if each.raddr and each.raddr.port == scheduler_port
            )
            scheduler.new_records()
            with cut(*directions, port=port):
                cut_at = time.monotonic()
                await until(lambda: _ended(scheduler, "cut-off"), timeout_s=48)
                print(f"given up after {time.monotonic() - cut_at:.1f} s")
                executor.step_seconds = 0.01
                assert await read_all(scheduler.address, timeout_s=60) == EXPECTED
                assert await asyncio.to_thread(scheduler.metric, "stepwire_kv_blocks_used") == 0
        finally:
            reader.kill()
            await reader.wait()


def _ended(scheduler: SchedulerProcess, request_id: str) -> bool:
    return any(
        record["event"] == "request ended" and record["request_id"] == request_id
        for record in scheduler.new_records()
    )


_TO, _FROM, _BOTH = (TO_PORT,), (FROM_PORT,), (TO_PORT, FROM_PORT)
_cut_executor = functools.partial(functools.partial, executor_cut_off)
_cut_client = functools.partial(functools.partial, client_cut_off)
SCENARIOS: dict[str, Callable[[Path], Awaitable[None]]] = {
    "plans-lost": _cut_executor(directions=_TO, hold_s=0.5),
    "results-lost": _cut_executor(directions=_FROM, hold_s=0.5),
    "executor-lost": _cut_executor(directions=_BOTH, hold_s=0.5),
    "executor-lost-for-long": _cut_executor(directions=_BOTH, hold_s=40.0),
    "output-lost": _cut_client(directions=_TO),
    "acknowledgements-lost": _cut_client(directions=_FROM),
    "client-lost": _cut_client(directions=_BOTH),
}


def main() -> None:
    """Run one scenario."""
    prepare_namespace()
    asyncio.run(_run(SCENARIOS[sys.argv[1]], Path(sys.argv[2])))


async def _run(scenario: Callable[[Path], Awaitable[None]], folder: Path) -> None:
    await scenario(folder)


if __name__ == "__main__":
    main()
