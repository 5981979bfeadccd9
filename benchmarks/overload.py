"""1,000 streams under ten times the load that fits, some of them never read.

Run: python -m benchmarks.overload [--num-streams N] [--rounds N] [--seconds N] [--step-ms N]

A real scheduler over an executor whose steps all take the same time. So many streams run at once
in both of two runs that take turns:

- calm: as many clients as streams fit, each with its next request as soon as one ends; a fifth of
  them want 20 log-probabilities a token, and everybody reads at once.
- loaded: the fifth with log-probabilities do not read for a while, with windows that are full
  after a few messages, until the scheduler gives them up; and ten times the requests that can be
  served come at random moments on top. What is admitted of those reads at once.

Compared are the gaps between tokens of everybody who reads. The queue's length, refusals and the
scheduler's memory are watched meanwhile. Clients run in processes of their own; the processor
time of each process is in the result, so that one sees whether the machine was the bottleneck.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import uvloop
from google.rpc import error_details_pb2, status_pb2
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc
from stepwire_client.models import resolve_model

from benchmarks.cluster import DEFAULT_MODEL
from benchmarks.common import Figures, finish, markdown_table, percentile
from benchmarks.memory import traced_memory
from benchmarks.processes import SchedulerProcess, scheduler_process
from benchmarks.request_storm import StormConnection
from benchmarks.steady_executor import VOCAB_SIZE, steady_executor

CLAIM = "Overload and slow readers cost fast readers less than 10% of their p99 gap."
PROMPT_LEN = 16
OUTPUT_LEN = 48
SLOW_SHARE = 0.2
OVERLOAD = 10
MAX_QUEUED = 256
MAX_UNREAD_BYTES = 4096
UNREAD_TIMEOUT_MS = 3000
UNREAD_S = 12.0
"""How long a slow reader reads nothing."""
STREAMS_A_CHANNEL = 100
SAMPLED_SHARE = 0.05
"""Of the requests on top, sent with a gRPC library, which reads all that a refusal says."""
METHOD = "/stepwire.scheduler.v1.GenerationService/GenerateStream"
_STATUS_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
RAMP_SHARE = 0.3
"""Of a run, in which its clients come one by one: each prompt has to find room in a step."""
WARM_UP_SHARE = 0.4
"""Of a run, not measured."""
LOCAL_POOL = ("grpc.use_local_subchannel_pool", 1)
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0), LOCAL_POOL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPlan:
    """What one process of clients does."""

    address: str
    """Of the scheduler."""
    num_fast: int = 0
    """Clients that ask and read one request after the other."""
    num_logprobs: int = 0
    """As many more, with log-probabilities."""
    num_slow: int = 0
    """As many more, which do not read them."""
    requests_per_s: float = 0.0
    """That come whatever becomes of those before."""
    seconds: float = 60.0
    """How long."""
    seed: int = 0
    """Of the moments."""


@dataclass(slots=True, kw_only=True)
class ClientReport:
    """What its clients saw after the warm-up."""

    gaps_ms: list[float] = field(default_factory=list)
    """Between tokens of those that read."""
    codes: dict[str, int] = field(default_factory=dict)
    """How requests ended."""
    num_without_retry_info: int = 0
    """Refusals that do not say when to come back; there should be none."""
    retry_after_s: list[float] = field(default_factory=list)
    """What the others say, without repetition."""
    cpu_seconds: float = 0.0
    """Of the process."""


class Clients:
    """The clients of one process."""

    def __init__(self, plan: ClientPlan) -> None:
        self._plan = plan
        self._generator = random.Random(plan.seed)
        self._measured_from = time.monotonic() + WARM_UP_SHARE * plan.seconds
        self._codes: Counter[str] = Counter()
        self._channels: list[grpc.aio.Channel] = []
        self.report = ClientReport()

    async def run(self) -> ClientReport:
        """Until the time is over; what still runs is cancelled."""
        plan = self._plan
        # One connection carries many streams, as behind a proxy; a slow one has its own.
        readers = plan.num_fast + plan.num_logprobs
        stubs = [self._stub(LOCAL_POOL) for _ in range(readers // STREAMS_A_CHANNEL + 1)]
        tasks = [self._ask_on(stubs[i % len(stubs)], None) for i in range(plan.num_fast)]
        tasks += [self._ask_on(stubs[i % len(stubs)], 20) for i in range(plan.num_logprobs)]
        tasks += [self._dawdle_on() for _ in range(plan.num_slow)]
        if plan.requests_per_s:
            tasks.append(self._storm())
        try:
            async with asyncio.timeout(plan.seconds):
                await asyncio.gather(*tasks)
        except TimeoutError:
            pass
        for channel in self._channels:
            await channel.close()
        self.report.codes = dict(self._codes)
        self.report.cpu_seconds = time.process_time()
        return self.report

    def _stub(self, *options: tuple[str, int]) -> pb_grpc.GenerationServiceAsyncStub:
        channel = grpc.aio.insecure_channel(self._plan.address, options=options)
        self._channels.append(channel)
        return pb_grpc.GenerationServiceStub(channel)

    async def _ask_on(
        self, stub: pb_grpc.GenerationServiceAsyncStub, num_logprobs: int | None
    ) -> None:
        await asyncio.sleep(self._generator.uniform(0, RAMP_SHARE * self._plan.seconds))
        while True:
            wait_s = await self._read(stub, num_logprobs)
            if wait_s:
                await asyncio.sleep(wait_s * self._generator.uniform(0.5, 1.5))

    async def _dawdle_on(self) -> None:
        stub = self._stub(*SMALL_WINDOW)
        while True:
            call = stub.GenerateStream(self._request(20), timeout=120)
            try:
                async for _ in call:
                    await asyncio.sleep(UNREAD_S)  # then whatever still comes
                    break
                async for _ in call:
                    pass
                self._codes["slow: OK"] += 1
            except grpc.aio.AioRpcError as error:
                self._codes[f"slow: {error.code().name}"] += 1
                await asyncio.sleep(self._retry_after_s(error))
            finally:
                call.cancel()

    async def _storm(self) -> None:
        """Most of it costs its sender next to nothing; a sample reads what refusals say."""
        connections = [await self._connect() for _ in range(4)]
        messages = [self._request(None).SerializeToString() for _ in range(256)]
        stub = self._stub(LOCAL_POOL)
        reading: set[asyncio.Task[float]] = set()
        clock, due = time.monotonic, time.monotonic()
        try:
            while True:
                due += self._generator.expovariate(self._plan.requests_per_s)
                await asyncio.sleep(max(0.0, due - clock()))
                if self._generator.random() >= SAMPLED_SHARE:
                    self._generator.choice(connections).send(self._generator.choice(messages))
                    continue
                task = asyncio.create_task(self._read(stub, None))
                reading.add(task)
                task.add_done_callback(reading.discard)
        finally:
            for task in reading:
                task.cancel()
            for connection in connections:
                for code, count in connection.codes.items():
                    self._codes[_STATUS_NAMES.get(code, "no status")] += count
                connection.close()

    async def _connect(self) -> StormConnection:
        address = self._plan.address
        host, port = address.rsplit(":", 1)
        loop = asyncio.get_running_loop()
        connection = StormConnection(address, METHOD)
        await loop.create_connection(lambda: connection, host, int(port))
        return connection

    async def _read(
        self, stub: pb_grpc.GenerationServiceAsyncStub, num_logprobs: int | None
    ) -> float:
        """One request; returns how long to wait before the next."""
        clock = time.monotonic
        gaps, last = self.report.gaps_ms, 0.0
        call = stub.GenerateStream(self._request(num_logprobs), timeout=120)
        try:
            async for response in call:
                if not response.HasField("output"):
                    continue
                now = clock()
                if last > self._measured_from:
                    gaps.append(round((now - last) * 1e3, 2))
                last = now
            self._codes["OK"] += 1
        except grpc.aio.AioRpcError as error:
            self._codes[error.code().name] += 1
            return self._retry_after_s(error)
        finally:
            call.cancel()
        return 0.0

    def _request(self, num_logprobs: int | None) -> pb.GenerateStreamRequest:
        message = pb.GenerationInput()
        message.token_ids.ids.extend(self._generator.choices(range(3, VOCAB_SIZE), k=PROMPT_LEN))
        # Lengths that differ: streams that began together do not end together.
        length = self._generator.randint(OUTPUT_LEN // 2, OUTPUT_LEN * 3 // 2)
        message.sampling_params.max_tokens = length
        message.sampling_params.ignore_eos = True
        if num_logprobs is not None:
            message.sampling_params.logprobs = num_logprobs
        return pb.GenerateStreamRequest(input=message)

    def _retry_after_s(self, error: grpc.aio.AioRpcError) -> float:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            return 0.5
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin" and isinstance(value, bytes):
                for packed in status_pb2.Status.FromString(value).details:
                    info = error_details_pb2.RetryInfo()
                    if packed.Unpack(info):
                        seconds = float(info.retry_delay.ToTimedelta().total_seconds())
                        if seconds not in self.report.retry_after_s:
                            self.report.retry_after_s.append(seconds)
                        return seconds
        self.report.num_without_retry_info += 1
        return 0.5


def run_clients(plan: ClientPlan) -> dict[str, Any]:
    """In a process of its own."""
    return asdict(uvloop.run(Clients(plan).run()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Sizes of a run."""

    num_streams: int
    """That run at once."""
    seconds: float
    """Of each run."""
    step_ms: float
    """Of the executor."""

    @property
    def served_per_s(self) -> float:
        """Requests that end a second where all streams run."""
        return self.num_streams / (OUTPUT_LEN * self.step_ms / 1e3)

    def plans(self, address: str, *, is_loaded: bool, seed: int) -> list[ClientPlan]:
        """Of each process of clients."""
        num_slow = round(SLOW_SHARE * self.num_streams)
        num_fast = self.num_streams - num_slow
        half = num_fast // 2
        if not is_loaded:
            return [
                ClientPlan(
                    address=address,
                    num_fast=share,
                    num_logprobs=num_slow // 2,
                    seconds=self.seconds,
                    seed=3 * seed + index,
                )
                for index, share in enumerate((half, num_fast - half))
            ]
        # Whoever is measured shares no process with those who are not.
        readers = [
            ClientPlan(address=address, num_fast=share, seconds=self.seconds, seed=3 * seed + index)
            for index, share in enumerate((half, num_fast - half))
        ]
        others = ClientPlan(
            address=address,
            num_slow=num_slow,
            requests_per_s=OVERLOAD * self.served_per_s,
            seconds=self.seconds,
            seed=3 * seed + 2,
        )
        return [*readers, others]


async def measure_once(
    scheduler: SchedulerProcess,
    executor_pid: int,
    pool: ProcessPoolExecutor,
    load: Load,
    *,
    is_loaded: bool,
    seed: int,
) -> Figures:
    """One run; figures of all clients together."""
    loop = asyncio.get_running_loop()
    started = time.monotonic()
    waiting: list[float] = []
    running: list[float] = []

    async def watch() -> None:
        while True:
            waiting.append(await asyncio.to_thread(scheduler.metric, "stepwire_requests_waiting"))
            running.append(await asyncio.to_thread(scheduler.metric, "stepwire_requests_running"))
            await asyncio.sleep(1.0)

    processes = {"scheduler": scheduler.pid, "executor": executor_pid}
    before = {name: _cpu_seconds(pid) for name, pid in processes.items()}
    async with traced_memory(scheduler.pid, lambda: time.monotonic() - started) as trace:
        watching = asyncio.create_task(watch())
        plans = load.plans(scheduler.address, is_loaded=is_loaded, seed=seed)
        reports = await asyncio.gather(
            *(loop.run_in_executor(pool, run_clients, plan) for plan in plans)
        )
        watching.cancel()
    codes: Counter[str] = Counter()
    for report in reports:
        codes.update(report["codes"])
    gaps = [gap for report in reports for gap in report["gaps_ms"]]
    cpu = {name: _cpu_seconds(pid) - before[name] for name, pid in processes.items()}
    cpu["clients"] = sum(report["cpu_seconds"] for report in reports)
    return {
        "num_gaps": len(gaps),
        "gap_ms": {f"p{percent}": round(percentile(gaps, percent), 2) for percent in (50, 90, 99)}
        | {"max": max(gaps), "mean": round(statistics.fmean(gaps), 2)},
        "codes": dict(codes),
        "num_refusals_without_retry_info": sum(r["num_without_retry_info"] for r in reports),
        "retry_after_s": sorted({s for r in reports for s in r["retry_after_s"]}),
        "waiting_max": max(waiting),
        "running_median": statistics.median(running[len(running) // 3 :]),
        "cpu_share": {name: round(used / load.seconds, 2) for name, used in cpu.items()},
        "memory": trace.figures(skipped=WARM_UP_SHARE),
    }


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def measure(
    scheduler: SchedulerProcess, executor_pid: int, load: Load, num_rounds: int
) -> Figures:
    """Calm and loaded in turns."""
    runs: dict[str, list[Figures]] = {"calm": [], "loaded": []}
    # Processes of their own for every run: what one leaves behind is not the next one's.
    for number in range(num_rounds):
        for name, of_this in runs.items():
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(3, mp_context=context) as pool:
                run = await measure_once(
                    scheduler,
                    executor_pid,
                    pool,
                    load,
                    is_loaded=name == "loaded",
                    seed=number,
                )
            of_this.append(run)
            print(name, json.dumps(run["gap_ms"]), json.dumps(run["cpu_share"]), flush=True)
    p99s = {name: [run["gap_ms"]["p99"] for run in of_this] for name, of_this in runs.items()}
    pairs = zip(p99s["loaded"], p99s["calm"], strict=True)
    return runs | {
        "p99_ratio": statistics.median(loaded / calm for loaded, calm in pairs),
        "queue_bound": MAX_QUEUED,
        "offered_over_served": OVERLOAD,
    }


def markdown(figures: Figures) -> str:
    """One row a run."""
    rows = [
        (
            name,
            int(run["running_median"]),
            f"{run['gap_ms']['p50']:.0f} / {run['gap_ms']['p99']:.0f}",
            int(run["waiting_max"]),
            f"{run['codes'].get('RESOURCE_EXHAUSTED', 0):,}",
            run["codes"].get("slow: ABORTED", 0),
            f"{run['memory']['slope_bytes'] / 1e3:.0f}",
            " / ".join(f"{run['cpu_share'][part]:.2f}" for part in ("scheduler", "clients")),
        )
        for name in ("calm", "loaded")
        for run in figures[name]
    ]
    header = (
        "run",
        "sequences that run, median",
        "gap between tokens of those who read, ms, p50 / p99",
        f"most that waited (bound {figures['queue_bound']})",
        "refused",
        "slow readers given up",
        "scheduler's memory, kB a second",
        "cores that scheduler / clients used",
    )
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"p99 loaded over calm: {figures['p99_ratio']:.3f}, median over the rounds."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="only its tokenizer is used")
    parser.add_argument("--num-streams", type=int, default=1000)
    parser.add_argument("--step-ms", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=90.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    load = Load(num_streams=options.num_streams, seconds=options.seconds, step_ms=options.step_ms)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with (
            steady_executor(
                log=scratch / "executor.log",
                step_ms=options.step_ms,
                num_blocks=8 * options.num_streams,
                max_num_seqs=options.num_streams,
            ) as executor,
            scheduler_process(
                resolve_model(options.model),
                executors=[executor.address],
                log=scratch / "scheduler.log",
                flags=[
                    *("--max-queued-requests", str(MAX_QUEUED)),
                    *("--max-unread-bytes", str(MAX_UNREAD_BYTES)),
                    *("--unread-timeout-ms", str(UNREAD_TIMEOUT_MS)),
                ],
            ) as scheduler,
        ):
            figures = asyncio.run(measure(scheduler, executor.pid, load, options.rounds))
    finish("overload", parameters=vars(options), figures=figures, table=markdown(figures))


if __name__ == "__main__":
    main()
