"""Requests that decode side by side, as their client sees them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepwire_client.benchmark.load import RequestRecord
    from stepwire_client.benchmark.workload import WorkItem
    from stepwire_client.events import ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """So many equal requests at once."""

    num_requests: int
    prompt_len: int
    output_len: int
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Decode steps while every request of a load was decoding."""

    step_ms: float
    context: float
    """Mean tokens of a sequence meanwhile."""
    window: tuple[float, float]
    """time.time() at the begin and end."""


def decode_steps(records: Sequence[RequestRecord]) -> Steps:
    """From the moment the last request had its first token to the first request's end.

    Raises ValueError where they never all decoded together.
    """
    begin = max(record.token_times[0] for record in records)
    end = min(record.token_times[-1] for record in records)
    before = [sum(t <= begin for t in record.token_times) for record in records]
    inside = [sum(begin < t <= end for t in record.token_times) for record in records]
    num_steps = sum(inside) / len(records)
    if num_steps < 1:
        raise ValueError("the requests never decoded all together: outputs are too short")
    lengths = [
        record.num_prompt_tokens + first + more / 2
        for record, first, more in zip(records, before, inside, strict=True)
    ]
    offset = time.time() - time.perf_counter()  # records are on perf_counter's clock
    return Steps(
        step_ms=1e3 * (end - begin) / num_steps,
        context=sum(lengths) / len(lengths),
        window=(begin + offset, end + offset),
    )


def run_load(address: str, model: ModelInfo, load: Load, *, seed: int) -> list[Steps]:
    """Send a load so many times; the first time is not counted, and warms up."""
    from stepwire_client.aio import AsyncClient

    from benchmarks.cluster import generate_all

    async def send() -> list[Steps]:
        measured: list[Steps] = []
        async with AsyncClient(address) as client:
            for number in range(load.rounds + 1):
                records, _ = await generate_all(client, _items(model, load, f"{seed} {number}"))
                if number:
                    measured.append(decode_steps(records))
        return measured

    return asyncio.run(send())


def answers(
    address: str, model: ModelInfo, load: Load, *, seed: int, max_concurrency: int
) -> list[list[int]]:
    """Token ids of every request of a load, so many at a time; greedy."""
    from stepwire_client.aio import AsyncClient
    from stepwire_client.events import Output
    from stepwire_client.params import SamplingParams

    params = SamplingParams(max_tokens=load.output_len, temperature=0.0, ignore_eos=True)

    async def send() -> list[list[int]]:
        slots = asyncio.Semaphore(max_concurrency)

        async def one(client: AsyncClient, prompt: Any) -> list[int]:
            token_ids: list[int] = []
            async with slots, client.stream(prompt, params, timeout_s=60.0) as stream:
                async for event in stream:
                    if isinstance(event, Output):
                        token_ids += event.token_ids
            return token_ids

        async with AsyncClient(address) as client:
            items = _items(model, load, f"{seed} answers")
            return await asyncio.gather(*(one(client, item.prompt) for item in items))

    return asyncio.run(send())


def _items(model: ModelInfo, load: Load, seed: str) -> list[WorkItem]:
    from stepwire_client.benchmark.workload import random_workload

    return random_workload(
        num_prompts=load.num_requests,
        input_len=load.prompt_len,
        output_len=load.output_len,
        vocab_size=model.vocab_size,
        excluded_token_ids=model.eos_token_ids,
        seed=seed,
    )
