"""Creates requests and cancels them at random: whether a block or memory is lost.

Run: python -m benchmarks.cancel_leak [--num-requests N] [--concurrency N] [--seed N]

A real scheduler over an executor that computes nothing. Each request leaves in one of the ways in
which a client can, at a random moment: it ends, it is cancelled by the call, by the Cancel method,
by its deadline, or with its connection; or it may be resumed for a while, and is or is not. Most
ask for more tokens than they stay for; some are several sequences. At the end no block may be in
use; resident memory is fitted by a line over the last 80% of the requests.

The same clients then do the same to a server that is nothing but grpc.aio, as a control: a call
whose client has left before it is written to grows that one as well. grpc.aio 1.85 forgets what
it allocated for a batch of operations that fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc
from stepwire_client.models import resolve_model

from benchmarks.cluster import DEFAULT_MODEL
from benchmarks.common import Figures, finish, markdown_table
from benchmarks.memory import traced_memory
from benchmarks.plain_server import plain_server
from benchmarks.processes import SchedulerProcess, scheduler_process
from benchmarks.steady_executor import VOCAB_SIZE, SteadyProcess, steady_executor

CLAIM = "100,000 requests that are created and cancelled at random leave no block and no memory."
WAYS = (
    "end",
    "cancel the call",
    "Cancel method",
    "deadline",
    "close the connection",
    "come back",
    "not come back",
)
WEIGHTS = (20, 30, 25, 14, 1, 5, 5)
RESUME_WINDOW_MS = 200
NUM_BLOCKS = 512
MAX_NUM_SEQS = 64
STEP_MS = 2.0


class CancelTest:
    """Workers that send and leave."""

    def __init__(self, address: str, num_requests: int, seed: int) -> None:
        self._address = address
        self._num_left = num_requests
        self._generator = random.Random(seed)
        self.num_done = 0
        self.ways: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()

    async def work(self) -> None:
        """Send one request after the other."""
        channel = self._connect()
        try:
            while self._num_left:
                self._num_left -= 1
                way = self._generator.choices(WAYS, WEIGHTS)[0]
                self.codes[await self._leave(channel, way)] += 1
                self.ways[way] += 1
                self.num_done += 1
                if way == "close the connection":
                    channel = self._connect()
        finally:
            await channel.close()

    def _connect(self) -> grpc.aio.Channel:
        # Connections of their own: by default equal channels share one.
        options = (("grpc.use_local_subchannel_pool", 1),)
        return grpc.aio.insecure_channel(self._address, options=options)

    async def _leave(self, channel: grpc.aio.Channel, way: str) -> str:
        generator = self._generator
        stub = pb_grpc.GenerationServiceStub(channel)
        message = pb.GenerationInput(request_id=f"{generator.getrandbits(64):x}")
        prompt_len = generator.choice((3, 20, 60))
        message.token_ids.ids.extend(generator.choices(range(3, VOCAB_SIZE), k=prompt_len))
        params = message.sampling_params
        params.max_tokens = generator.choice((1, 8)) if way == "end" else generator.choice((8, 200))
        params.n = generator.choice((1, 1, 1, 2, 4))
        params.ignore_eos = True
        if generator.random() < 0.1:
            params.logprobs = 2
        num_events = generator.choice((0, 0, 1, 2, 5, 10))
        timeout_s = generator.uniform(0.001, 0.1) if way == "deadline" else 60.0
        request = pb.GenerateStreamRequest(input=message)
        if way in ("come back", "not come back"):
            request.resume_window_ms = RESUME_WINDOW_MS
        call = stub.GenerateStream(request, timeout=timeout_s)
        try:
            num_read = await _read(call, None if way in ("end", "deadline") else num_events)
            if way == "Cancel method":
                await stub.Cancel(pb.CancelRequest(request_ids=[message.request_id]), timeout=60)
                await _read(call, None)
            elif way == "close the connection":
                await channel.close()
            elif way == "come back":
                call.cancel()
                request.from_seq, request.resume_window_ms = num_read, 0
                call = stub.GenerateStream(request, timeout=timeout_s)
                await _read(call, num_events)
                call.cancel()
            else:
                call.cancel()
        except (grpc.aio.AioRpcError, asyncio.CancelledError, asyncio.InvalidStateError):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
        finally:
            call.cancel()
        code = await call.code()
        return str(code.name)


async def measure(
    scheduler: SchedulerProcess, *, num_requests: int, concurrency: int, seed: int
) -> Figures:
    """Send all; returns what was left behind."""
    test = CancelTest(scheduler.address, num_requests, seed)
    started = time.monotonic()
    async with traced_memory(scheduler.pid, lambda: test.num_done) as trace:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(test.work())
        elapsed_s = time.monotonic() - started
    await asyncio.sleep(2 * RESUME_WINDOW_MS / 1e3)  # those that did not come back are given up
    await _end_one_request(scheduler.address)
    return {
        "num_requests": num_requests,
        "requests_per_s": round(num_requests / elapsed_s),
        "ways": dict(test.ways),
        "codes": dict(test.codes),
        "finished_as_the_scheduler_counts": _finished(scheduler),
        "left": {
            name: await asyncio.to_thread(scheduler.metric, f"stepwire_{name}")
            for name in ("kv_blocks_used", "requests_running", "requests_waiting")
        },
        "log_lines_above_info": [
            record for record in scheduler.records() if record["level"] != "info"
        ][:20],
        "memory": trace.figures(),
    }


async def _read(call: Any, num_events: int | None) -> int:
    """Read so many events, or to the end; how many there were."""
    num_read = 0
    while num_events is None or num_read < num_events:
        if await call.read() is grpc.aio.EOF:
            break
        num_read += 1
    return num_read


async def _end_one_request(address: str) -> None:
    """The gauges of blocks are set at every step: this makes some after the last cancellation."""
    async with grpc.aio.insecure_channel(address) as channel:
        message = pb.GenerationInput()
        message.token_ids.ids.extend([3, 4, 5])
        message.sampling_params.max_tokens = 4
        stub = pb_grpc.GenerationServiceStub(channel)
        await stub.Generate(pb.GenerateRequest(input=message), timeout=60)


def _finished(scheduler: SchedulerProcess) -> dict[str, float]:
    reasons = ("stop", "length", "cancelled", "deadline", "error")
    name = "stepwire_requests_finished_total"
    return {reason: scheduler.metric(name, finished_reason=reason) for reason in reasons}


@contextlib.contextmanager
def serving(model: Path, scratch: Path) -> Iterator[SchedulerProcess]:
    """The scheduler and its executor."""
    with (
        steady_executor(
            log=scratch / "executor.log",
            step_ms=STEP_MS,
            num_blocks=NUM_BLOCKS,
            max_num_seqs=MAX_NUM_SEQS,
        ) as executor,
        scheduler_process(
            model, executors=[executor.address], log=scratch / "scheduler.log"
        ) as scheduler,
    ):
        yield scheduler


async def measure_control(
    server: SteadyProcess, *, num_requests: int, concurrency: int, seed: int
) -> Figures:
    """Send as many to a server without stepwire; how its memory develops."""
    test = CancelTest(server.address, num_requests, seed)
    async with (
        traced_memory(server.pid, lambda: test.num_done) as trace,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(concurrency):
            group.create_task(test.work())
    return {"codes": dict(test.codes), "memory": trace.figures()}


def markdown(figures: Figures) -> str:
    """What was left behind."""
    left, memory = figures["left"], figures["memory"]
    control = figures["control"]["memory"]
    rows = [
        (
            f"{figures['num_requests']:,}",
            figures["requests_per_s"],
            int(left["kv_blocks_used"]),
            int(left["requests_running"] + left["requests_waiting"]),
            f"{memory['first_mb']} / {memory['last_mb']}",
            f"{memory['slope_bytes']:.1f}",
        )
    ]
    header = (
        "requests",
        "a second",
        "blocks in use at the end",
        "sequences at the end",
        "resident, MB, first and last",
        "slope over the last 80%, bytes a request",
    )
    ways = ", ".join(f"{count:,} {way}" for way, count in figures["ways"].items())
    return (
        f"{markdown_table(header, rows)}\n\nHow they left: {ways}.\n\n"
        "The control, a server of nothing but grpc.aio under the same clients: "
        f"{control['first_mb']} / {control['last_mb']} MB, "
        f"{control['slope_bytes']:.1f} bytes a request."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cancel_leak")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="only its tokenizer is used")
    parser.add_argument("--num-requests", type=int, default=100_000)
    parser.add_argument("--concurrency", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    load = {
        "num_requests": options.num_requests,
        "concurrency": options.concurrency,
        "seed": options.seed,
    }
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with serving(resolve_model(options.model), scratch) as scheduler:
            figures = uvloop.run(measure(scheduler, **load))
        with plain_server(log=scratch / "control.log", token_ms=STEP_MS) as control:
            figures["control"] = uvloop.run(measure_control(control, **load))
    finish("cancel_leak", parameters=vars(options), figures=figures, table=markdown(figures))


if __name__ == "__main__":
    main()
