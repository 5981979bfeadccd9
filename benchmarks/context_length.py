"""What a longer context costs a decoded token at batch 1, against the memory's bandwidth.

Run: python -m benchmarks.context_length [--contexts N ...] [--rounds N]

Two clusters, bfloat16 and fp8 KV, take turns. A context is the beginning of one long prompt and an
output behind it, all prompts within the context's tokens; the time a token is that of the output
less its first token, as the client sees it. With every token of context a step reads that token's
keys and values once more, so the slope over the contexts is bytes of KV a second. Beside it, in the
same run and with the same threads, stand a copy of buffers that no cache holds (bytes read and
written) and a sum over one (bytes read).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch
from stepwire_client.aio import AsyncClient
from stepwire_client.benchmark.workload import WorkItem, random_workload
from stepwire_client.events import ModelInfo

from benchmarks.cluster import DEFAULT_MODEL, generate_all, local_cluster
from benchmarks.common import Figures, finish, markdown_table, ratios, show, spread

CLAIM = "A token's time grows with the context only by the KV bytes that it reads."
CONTEXTS = (256, 1024, 2048, 4096, 8192)
CACHES = {"bfloat16": None, "fp8": "fp8"}
BUFFER_BYTES = 1 << 28
"""Of each buffer that is copied or summed: far more than caches hold."""
NUM_PASSES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A cluster and what a token's keys and values take in it."""

    name: str
    address: str
    bytes_per_token: float


def contexts_of(model: ModelInfo, contexts: Sequence[int], output_len: int) -> list[WorkItem]:
    """Requests whose prompt and output together fill each context."""
    [longest] = random_workload(
        num_prompts=1,
        input_len=max(contexts) - output_len,
        output_len=output_len,
        vocab_size=model.vocab_size,
        excluded_token_ids=model.eos_token_ids,
        seed=0,
    )
    token_ids = cast("list[int]", longest.prompt)
    return [
        WorkItem(prompt=token_ids[: context - output_len], output_len=output_len)
        for context in contexts
    ]


async def tpot_s(client: AsyncClient, item: WorkItem) -> float:
    """Seconds a token after the first."""
    [record], _ = await generate_all(client, [item])
    times = record.token_times
    return (times[-1] - times[0]) / (len(times) - 1)


def bandwidth(run: Callable[[], object], num_bytes: int) -> float:
    """Bytes a second of the fastest pass, after one to warm up."""
    run()
    times: list[float] = []
    for _ in range(NUM_PASSES):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return num_bytes / min(times)


def memory_bandwidths() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and of a sum, read; all threads of torch."""
    source = torch.ones(BUFFER_BYTES // 4)
    target = torch.empty_like(source)
    return {
        "copy": bandwidth(lambda: target.copy_(source), 2 * BUFFER_BYTES),
        "read": bandwidth(source.sum, BUFFER_BYTES),
    }


def fit(
    contexts: Sequence[int], output_len: int, seconds: Sequence[float], bytes_per_token: float
) -> dict[str, float]:
    """The line through a round's times: bytes of KV a second, and what is left at no context.

    A step of the output reads output_len / 2 tokens less than the context, on average.
    """
    num_read = [(context - output_len / 2) * bytes_per_token for context in contexts]
    line = statistics.linear_regression(num_read, seconds)
    errors = [
        abs(second - line.slope * read - line.intercept)
        for read, second in zip(num_read, seconds, strict=True)
    ]
    return {
        "bytes_per_s": 1 / line.slope,
        "intercept_ms": 1e3 * line.intercept,
        "largest_error_ms": 1e3 * max(errors),
    }


async def measure(
    caches: Sequence[Cache],
    items: Sequence[WorkItem],
    *,
    contexts: Sequence[int],
    output_len: int,
    num_rounds: int,
) -> Figures:
    """Interleave the caches; a first pass computes the prompts, which stay in the prefix cache."""
    seconds: dict[str, list[list[float]]] = {cache.name: [] for cache in caches}
    memory: dict[str, list[float]] = {"copy": [], "read": []}
    for number in range(-1, num_rounds):
        turn = max(number, 0) % len(caches)
        for cache in (*caches[turn:], *caches[:turn]):
            async with AsyncClient(cache.address) as client:
                times = [await tpot_s(client, item) for item in items]
            if number >= 0:
                seconds[cache.name].append(times)
                shown = ", ".join(f"{1e3 * second:.2f}" for second in times)
                print(f"round {number + 1}, {cache.name}: {shown} ms a token", flush=True)
        if number >= 0:
            for name, value in (await asyncio.to_thread(memory_bandwidths)).items():
                memory[name].append(value)
    return {
        "contexts": list(contexts),
        "output_len": output_len,
        "memory_bytes_per_s": {name: spread(values) for name, values in memory.items()},
        "by_cache": {
            cache.name: cache_figures(cache, seconds[cache.name], memory, contexts, output_len)
            for cache in caches
        },
    }


def cache_figures(
    cache: Cache,
    rounds: Sequence[Sequence[float]],
    memory: Mapping[str, Sequence[float]],
    contexts: Sequence[int],
    output_len: int,
) -> Figures:
    """Times by context, and the slope of each round beside its round's bandwidths."""
    lines = [fit(contexts, output_len, times, cache.bytes_per_token) for times in rounds]
    slopes = [line["bytes_per_s"] for line in lines]
    return {
        "bytes_per_token": cache.bytes_per_token,
        "tpot_ms": [spread([1e3 * times[i] for times in rounds]) for i in range(len(contexts))],
        "bytes_per_s": spread(slopes),
        "share_of": {name: ratios(slopes, values) for name, values in memory.items()},
        "intercept_ms": spread([line["intercept_ms"] for line in lines]),
        "largest_error_ms": spread([line["largest_error_ms"] for line in lines]),
    }


def markdown(figures: Figures) -> str:
    """Times by context, then the slopes."""
    by_cache: Mapping[str, Figures] = figures["by_cache"]
    times = markdown_table(
        ("context, tokens", *(f"{name} KV, ms a token" for name in by_cache)),
        [
            (f"{context:,}", *(show(of_cache["tpot_ms"][i], 2) for of_cache in by_cache.values()))
            for i, context in enumerate(figures["contexts"])
        ],
    )
    slopes = markdown_table(
        (
            *("KV cache", "bytes a token", "KV read, GB/s", "of a copy", "of a sum"),
            *("at no context, ms", "farthest from the line, ms"),
        ),
        [
            (
                name,
                f"{of_cache['bytes_per_token']:,.0f}",
                show(_scaled(of_cache["bytes_per_s"], 1e-9)),
                *(show(_scaled(of_cache["share_of"][way], 100), 0, "%") for way in _WAYS),
                show(of_cache["intercept_ms"], 2),
                show(of_cache["largest_error_ms"], 2),
            )
            for name, of_cache in by_cache.items()
        ],
    )
    memory = figures["memory_bytes_per_s"]
    copy, read = (show(_scaled(memory[way], 1e-9), 1, " GB/s") for way in _WAYS)
    return (
        f"{times}\n\n{slopes}\n\nMemory in the same run: a copy reads and writes {copy}, a sum "
        f"reads {read}. Weights: {figures['weights']}; {figures['output_len']} tokens out."
    )


_WAYS = ("copy", "read")


def _scaled(measured: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: measured[name] * factor for name in ("median", "min", "max")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context_length")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    if len(options.contexts) < 2 or min(options.contexts) <= options.output_len:
        parser.error("--contexts: a line needs two or more, each longer than --output-len")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with ExitStack() as stack:
        caches: list[Cache] = []
        for name, kv_cache_dtype in CACHES.items():
            cluster, model = stack.enter_context(
                local_cluster(
                    options.model,
                    kv_cache_dtype=kv_cache_dtype,
                    max_num_seqs=1,
                    num_kv_blocks=2 * -(-max(options.contexts) // 16),
                )
            )
            num_tokens = model.num_blocks * model.block_size
            caches.append(
                Cache(
                    name=name,
                    address=cluster.address,
                    bytes_per_token=model.kv_cache_bytes / num_tokens,
                )
            )
        figures = asyncio.run(
            measure(
                caches,
                contexts_of(model, options.contexts, options.output_len),
                contexts=options.contexts,
                output_len=options.output_len,
                num_rounds=options.rounds,
            )
        )
    figures["weights"] = f"{model.weight_bytes / 1e6:.0f} MB, {model.dtype}"
    finish("context_length", parameters=vars(options), figures=figures, table=markdown(figures))


if __name__ == "__main__":
    main()
