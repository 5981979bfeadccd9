"""How it is asked: so many at a time, or at random moments."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stepwire_client.aio import AsyncClient
from stepwire_client.benchmark.workload import WorkItem
from stepwire_client.errors import StepwireError
from stepwire_client.events import Completed, Output
from stepwire_client.params import SamplingParams


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request as its client saw it; times in seconds on one clock."""

    sent_at: float
    """When it was sent."""
    ended_at: float = 0.0
    """When its stream ended."""
    token_times: list[float] = field(default_factory=list)
    """When each output token arrived; tokens of one message arrive together."""
    num_prompt_tokens: int = 0
    """As the server counted them."""
    num_cached_tokens: int = 0
    """Of the prompt, found in the prefix cache."""
    error: str | None = None
    """Why it failed; None: it did not."""


async def run_load(
    client: AsyncClient,
    workload: Sequence[WorkItem],
    *,
    max_concurrency: int | None,
    request_rate: float | None,
    params_of: Callable[[WorkItem], SamplingParams],
    seed: int,
    timeout_s: float,
    on_done: Callable[[int], None],
) -> tuple[list[RequestRecord], float]:
    """Send the workload and record every request; returns the records and the duration in s.

    request_rate: requests a second, with exponential gaps (a Poisson process); None: no gaps.
    max_concurrency: requests under way at once; one that is due earlier is sent when another
    ends; None: no bound. on_done gets the number of requests that have ended.
    """
    slots = asyncio.Semaphore(max_concurrency or len(workload) or 1)
    num_done = 0
    start = time.perf_counter()

    async def one(item: WorkItem, due_s: float) -> RequestRecord:
        nonlocal num_done
        await asyncio.sleep(max(0.0, start + due_s - time.perf_counter()))
        async with slots:
            record = await measure(client, item, params=params_of(item), timeout_s=timeout_s)
        num_done += 1
        on_done(num_done)
        return record

    due = arrival_times(len(workload), request_rate=request_rate, seed=seed)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(*pair)) for pair in zip(workload, due, strict=True)]
    return [task.result() for task in tasks], time.perf_counter() - start


def arrival_times(num_requests: int, *, request_rate: float | None, seed: int) -> list[float]:
    """When each request is due, in seconds from the start; the first at once."""
    if request_rate is None:
        return [0.0] * num_requests
    generator = random.Random(seed)  # noqa: S311  # no secret
    times = [0.0]
    while len(times) < num_requests:
        times.append(times[-1] + generator.expovariate(request_rate))
    return times[:num_requests]


async def measure(
    client: AsyncClient, item: WorkItem, *, params: SamplingParams, timeout_s: float
) -> RequestRecord:
    """Send one request and note when its tokens arrive; an error is part of the record."""
    record = RequestRecord(sent_at=time.perf_counter())
    try:
        async with client.stream(item.prompt, params, timeout_s=timeout_s) as stream:
            async for event in stream:
                if isinstance(event, Output):
                    record.token_times += [time.perf_counter()] * len(event.token_ids)
                elif isinstance(event, Completed):
                    record.num_prompt_tokens = event.usage.num_prompt_tokens
                    record.num_cached_tokens = event.usage.num_cached_tokens
    except StepwireError as error:
        record.error = str(error)
    record.ended_at = time.perf_counter()
    return record
