"""Kills executors at random moments under seeded streams and compares every token.

Run: python -m benchmarks.kills [--kills N ...] [--stops N ...] [--tensor-parallel-size N ...]

A local cluster serves the real model in float32. The transcripts of all requests are recorded
undisturbed; then so many streams run all the time while ranks are killed with SIGKILL: some time
after tokens flow again, right after the ranks are ready, when sequences are admitted again, and
while they start and load. Every stream that ends is compared with the undisturbed one: ids, text,
why it ended, and the numbers of its events. Exits with 1 where a request fails or differs.

Then ranks are stopped with SIGSTOP, which nobody is told of: the scheduler notices at the step's
deadline, the supervisor starts the group again.

Requests see many kills, so the scheduler runs with a --max-resumes that none of them reaches.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal
from unittest import mock

import grpc.aio
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc
from stepwire_client import local_cluster as supervision
from stepwire_client.events import ModelInfo
from stepwire_client.local_cluster import LocalCluster

from benchmarks.checked_streams import (
    BrokenStreamError,
    SeededRequest,
    Transcript,
    first_difference,
    read_stream,
    seeded_requests,
)
from benchmarks.cluster import DEFAULT_MODEL, local_cluster
from benchmarks.common import Figures, finish, markdown_table, percentile
from benchmarks.processes import log_records

CLAIM = "kill -9 of any rank at random moments loses, doubles and changes no token."
NUM_REQUESTS = 48
NUM_STREAMS = 16
MAX_RESUMES = 100_000
STREAM_TIMEOUT_S = 600.0
RECOVERY_TIMEOUT_S = 120.0
POLL_S = 0.01

Aim = Literal["serving", "ready", "starting"]
AIMS: tuple[Aim, ...] = ("serving", "serving", "serving", "ready", "starting")
"""When to kill, drawn from these: after tokens flow again, once the ranks are ready, before."""
DELAYS_S: dict[Aim, float] = {"serving": 4.0, "ready": 0.3, "starting": 3.0}
"""The kill comes at a random moment within this time."""


@dataclass(slots=True, kw_only=True)
class Kill:
    """One kill, and what it met."""

    rank: str
    """The process's name in the cluster."""
    aim: Aim
    """When it was meant to come."""
    met: str
    """What the cluster was doing."""
    num_streams: int
    """Streams under way."""
    is_stop: bool = False
    """SIGSTOP instead of SIGKILL."""
    unix_s: float = 0.0
    """When, in seconds since the Unix epoch."""
    outage_s: float | None = None
    """From the kill to the next token of any stream; None where the next kill came first."""


@dataclass(slots=True, kw_only=True)
class KillRun:
    """Streams and kills of one run."""

    kills: list[Kill] = field(default_factory=list)
    num_ended: int = 0
    """Streams that ended as they should."""
    num_tokens: int = 0
    """Of those."""
    kills_survived: list[int] = field(default_factory=list)
    """Of each of those."""
    problems: list[str] = field(default_factory=list)
    """One line for each stream that did not."""

    def figures(self) -> Figures:
        """For the result file."""
        kills = [kill for kill in self.kills if not kill.is_stop]
        outages = [kill.outage_s for kill in kills if kill.outage_s is not None]
        return {
            "num_kills": len(kills),
            "num_stops": len(self.kills) - len(kills),
            "kills_by_rank": dict(Counter(kill.rank for kill in kills)),
            "kills_by_what_they_met": dict(Counter(kill.met for kill in kills)),
            "num_streams_under_way_at_least": min(k.num_streams for k in self.kills),
            "num_requests": self.num_ended + len(self.problems),
            "num_requests_hit": sum(count > 0 for count in self.kills_survived),
            "most_kills_survived": max(self.kills_survived, default=0),
            "num_tokens_compared": self.num_tokens,
            "num_requests_lost_or_changed": len(self.problems),
            "problems": self.problems[:20],
            "outage_s": {
                f"p{percent}": round(percentile(outages, percent), 2) for percent in (50, 90, 100)
            }
            if outages
            else {},
        }


class KillTest:
    """Streams on a cluster whose executors are killed under them."""

    def __init__(
        self,
        cluster: LocalCluster,
        stub: pb_grpc.GenerationServiceAsyncStub,
        requests: Sequence[SeededRequest],
        *,
        seed: int,
        num_streams: int = NUM_STREAMS,
    ) -> None:
        """seed: of which request runs when, and of the kills' moments and ranks."""
        self._cluster = cluster
        self._stub = stub
        self._requests = requests
        self._expected: list[Transcript] = []
        self._generator = random.Random(seed)
        self._num_streams = num_streams
        self._num_under_way = 0
        self._num_without_token = 0
        self._has_tokens_again = False
        self._next_tokens = asyncio.Event()
        self._outage: tuple[Kill, float] | None = None
        """The last kill and its moment, until tokens flow again."""
        self._is_new_group = True
        self._killed_pids: dict[str, int] = {}
        self._is_over = False
        self.run = KillRun()

    async def record(self) -> None:
        """Learn what every request gives undisturbed."""
        slots = asyncio.Semaphore(self._num_streams)

        async def one(request: SeededRequest) -> Transcript:
            async with slots:
                return await read_stream(self._stub, request, timeout_s=STREAM_TIMEOUT_S)

        self._expected = list(await asyncio.gather(*map(one, self._requests)))

    async def kill(
        self, aims: Sequence[Aim], num_stops: int, on_kill: Callable[[Kill], None]
    ) -> None:
        """Keep the streams running, kill for each aim, then stop; let the streams end."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._num_streams):
                group.create_task(self._stream_on())
            for aim in aims:
                on_kill(await self._kill_once(aim, signal.SIGKILL))
            for _ in range(num_stops):
                on_kill(await self._kill_once("serving", signal.SIGSTOP))
            if num_stops:  # streams that go on by themselves, not at the cluster's end
                await self._wait_for_new_group()
            self._is_over = True

    async def _stream_on(self) -> None:
        while not self._is_over:
            index = self._generator.randrange(len(self._requests))
            num_kills = len(self.run.kills)
            self._num_under_way += 1
            problem = await self._compare(index)
            self._num_under_way -= 1
            if problem is not None:
                self.run.problems.append(f"{self._requests[index].name}: {problem}")
                continue
            self.run.num_ended += 1
            self.run.num_tokens += sum(len(each.token_ids) for each in self._expected[index])
            self.run.kills_survived.append(len(self.run.kills) - num_kills)

    async def _compare(self, index: int) -> str | None:
        has_token = False
        self._num_without_token += 1

        def on_tokens(num_tokens: int) -> None:
            nonlocal has_token
            if not has_token:
                has_token = True
                self._num_without_token -= 1
            self._note_tokens()

        try:
            got = await read_stream(
                self._stub, self._requests[index], timeout_s=STREAM_TIMEOUT_S, on_tokens=on_tokens
            )
        except BrokenStreamError as error:
            return str(error)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        finally:
            if not has_token:
                self._num_without_token -= 1
        return first_difference(self._expected[index], got)

    def _note_tokens(self) -> None:
        self._next_tokens.set()
        if not self._is_new_group:
            return  # what the killed ones had still made
        self._has_tokens_again = True
        if self._outage is not None:
            kill, killed_at = self._outage
            kill.outage_s = round(time.monotonic() - killed_at, 3)
            self._outage = None

    async def _kill_once(self, aim: Aim, signal_number: signal.Signals) -> Kill:
        async with asyncio.timeout(RECOVERY_TIMEOUT_S):
            await self._wait_for_new_group()
            if aim != "starting":
                await self._wait_until_ready()
            if aim == "serving":
                while not self._has_tokens_again:
                    self._next_tokens.clear()
                    await self._next_tokens.wait()
            await asyncio.sleep(self._generator.uniform(0.0, DELAYS_S[aim]))
            model = await self._stub.GetModel(pb.GetModelRequest(), timeout=10)
        pids = self._executor_pids()
        rank = self._generator.choice(sorted(pids))
        kill = Kill(
            rank=rank,
            aim=aim,
            met=self._now_doing(model),
            num_streams=self._num_under_way,
            is_stop=signal_number is signal.SIGSTOP,
            unix_s=time.time(),
        )
        os.kill(pids[rank], signal_number)
        self.run.kills.append(kill)
        self._killed_pids = pids
        self._is_new_group = self._has_tokens_again = False
        self._outage = (kill, time.monotonic())
        return kill

    def _now_doing(self, model: pb.GetModelResponse) -> str:
        if model.state != pb.MODEL_STATE_READY:
            return "start and load"
        if not self._has_tokens_again:
            return "admission after a kill"
        return "prefill and decode" if self._num_without_token else "decode"

    def _executor_pids(self) -> dict[str, int]:
        return {name: pid for name, pid in self._cluster.pids.items() if name != "scheduler"}

    async def _wait_for_new_group(self) -> None:
        """All ranks are others than those of the last kill."""
        while set(self._executor_pids().values()) & set(self._killed_pids.values()):
            self._cluster.raise_if_failed()
            await asyncio.sleep(POLL_S)
        self._is_new_group = True

    async def _wait_until_ready(self) -> None:
        while True:
            self._cluster.raise_if_failed()
            model = await self._stub.GetModel(pb.GetModelRequest(), timeout=10)
            if model.state == pb.MODEL_STATE_READY:
                return
            await asyncio.sleep(POLL_S)


@contextlib.contextmanager
def kill_cluster(
    model: str, *, tensor_parallel_size: int
) -> Iterator[tuple[LocalCluster, ModelInfo]]:
    """A cluster for the test: float32, no bound on resumes, restarts without end."""
    arguments = ("-m", "stepwire_scheduler", "--max-resumes", str(MAX_RESUMES))
    # The supervisor gives up on executors that end five times in a row before they are ready;
    # here they may be killed so.
    without_end = mock.patch.object(supervision, "RESTART_DELAYS_S", (0.1,) * MAX_RESUMES)
    with (
        without_end,
        local_cluster(
            model,
            dtype="float32",
            tensor_parallel_size=tensor_parallel_size,
            max_num_seqs=32,
            num_kv_blocks=600,
            scheduler_command=(sys.executable, *arguments),
        ) as started,
    ):
        yield started


async def kill_under_streams(
    cluster: LocalCluster,
    aims: Sequence[Aim],
    *,
    vocab_size: int,
    seed: int,
    num_requests: int = NUM_REQUESTS,
    num_streams: int = NUM_STREAMS,
    output_lens: tuple[int, int] = (8, 32),
    num_stops: int = 0,
    on_kill: Callable[[Kill], None] = lambda kill: None,
) -> KillRun:
    """Record the requests undisturbed, then kill once for each aim; returns what came of it."""
    requests = seeded_requests(
        num_requests, seed=seed, vocab_size=vocab_size, output_lens=output_lens
    )
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        test = KillTest(cluster, stub, requests, seed=seed, num_streams=num_streams)
        await test.record()
        await test.kill(aims, num_stops, on_kill)
    return test.run


def detection_times(stops: Sequence[Kill], log: Path) -> list[float]:
    """Seconds from each SIGSTOP to the end of the epoch, as the scheduler's log has it."""
    records = log_records(log.read_text(encoding="utf-8"))
    ends = [
        datetime.fromisoformat(record["timestamp"]).timestamp()
        for record in records
        if record["event"] == "epoch ended"
    ]
    return [round(min(end for end in ends if end > stop.unix_s) - stop.unix_s, 2) for stop in stops]


def log_events(log: Path) -> dict[str, int]:
    """How often the scheduler's log says what, below informational lines."""
    counted: Counter[str] = Counter()
    for record in log_records(log.read_text(encoding="utf-8")):
        if record["level"] != "info":
            counted[record["event"]] += 1
    return dict(counted)


def markdown(figures: Figures) -> str:
    """One row a group size."""
    rows = []
    for size, run in figures.items():
        met = ", ".join(
            f"{count} in {name}" for name, count in run["kills_by_what_they_met"].items()
        )
        outage = run["outage_s"]
        rows.append(
            (
                f"{size}: {met}",
                run["num_kills"],
                f"{run['num_requests']} ({run['num_requests_hit']})",
                f"{run['num_tokens_compared']:,}",
                run["num_requests_lost_or_changed"],
                run["most_kills_survived"],
                f"{outage['p50']:.1f} / {outage['p100']:.1f}",
                ", ".join(f"{seconds:.1f}" for seconds in run["stops_detected_s"]),
            )
        )
    header = (
        "ranks, and what the kills met",
        "kills",
        "requests (under at least one kill)",
        "tokens compared",
        "requests lost or changed",
        "most kills one request saw",
        "outage, s, p50 / longest",
        "SIGSTOP noticed after, s, each",
    )
    return markdown_table(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, print, write; returns 1 where a request failed or differed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--kills", type=int, nargs="+", default=[100, 200], help="for each size")
    parser.add_argument("--stops", type=int, nargs="+", default=[3, 3], help="for each size")
    parser.add_argument("--tensor-parallel-size", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    figures: Figures = {}
    sizes = zip(options.tensor_parallel_size, options.kills, options.stops, strict=True)
    for size, num_kills, num_stops in sizes:
        figures[str(size)] = _measure(options.model, size, num_kills, num_stops, options.seed)
    finish("kills", parameters=vars(options), figures=figures, table=markdown(figures))
    return 1 if any(run["problems"] for run in figures.values()) else 0


def _measure(model: str, size: int, num_kills: int, num_stops: int, seed: int) -> Figures:
    generator = random.Random(f"aims {seed}")
    aims = [generator.choice(AIMS) for _ in range(num_kills)]
    num_done = 0

    def show(kill: Kill) -> None:
        nonlocal num_done
        num_done += 1
        verb = "stopped" if kill.is_stop else "killed"
        print(f"{num_done:4} {kill.rank} {verb} in {kill.met}", flush=True)

    started = time.monotonic()
    with kill_cluster(model, tensor_parallel_size=size) as (cluster, info):
        run = asyncio.run(
            kill_under_streams(
                cluster,
                aims,
                vocab_size=info.vocab_size,
                seed=seed,
                num_stops=num_stops,
                on_kill=show,
            )
        )
        scheduler_log = cluster.log_dir / "scheduler.log"
        stops = [kill for kill in run.kills if kill.is_stop]
        detected_s = detection_times(stops, scheduler_log)
    for problem in run.problems:
        print(problem)
    return run.figures() | {
        "seconds": round(time.monotonic() - started),
        "scheduler_log": log_events(scheduler_log),
        "stops_detected_s": detected_s,
        "stops_outage_s": [stop.outage_s for stop in stops],
    }


if __name__ == "__main__":
    sys.exit(main())
