"""Whether a request's ids depend on its neighbours: chat prompts alone, then all at once.

Run: python -m benchmarks.batch_invariance [--num-prompts N] [--max-tokens N]

In the model's default dtype, with weights as the file stores them and with dense ones, greedily and
sampled with seeds. Nothing ends an output early, and no prompt finds another's keys and values: the
prefix cache is off.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import replace

from stepwire_client.aio import AsyncClient
from stepwire_client.params import Prompt, SamplingParams

from benchmarks.cluster import (
    DEFAULT_MODEL,
    REQUEST_TIMEOUT_S,
    local_cluster,
    weight_settings,
)
from benchmarks.common import Figures, finish, markdown_table
from benchmarks.peer_systems import same_start
from benchmarks.speculation_prompts import chats

CLAIM = "All of 24 chat prompts give the same ids alone and batched, in the default dtype."
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
WAYS = {"greedy": GREEDY, "seeded": replace(GREEDY, temperature=0.8, top_p=0.95)}


async def generate(
    client: AsyncClient, prompts: Sequence[Prompt], params: SamplingParams, *, concurrency: int
) -> list[tuple[int, ...]]:
    """Ids by prompt, so many requests at a time; each prompt has a seed of its own."""
    slots = asyncio.Semaphore(concurrency)

    async def one(seed: int, prompt: Prompt) -> tuple[int, ...]:
        async with slots:
            answer = await client.generate(
                prompt, replace(params, seed=seed), timeout_s=REQUEST_TIMEOUT_S
            )
        return answer.token_ids

    return list(await asyncio.gather(*(one(*numbered) for numbered in enumerate(prompts))))


async def compare(address: str, prompts: Sequence[Prompt], max_tokens: int) -> Figures:
    """For each way to choose: how many outputs are the same, and where the others part."""
    found: Figures = {}
    async with AsyncClient(address) as client:
        for way, params in WAYS.items():
            asked = replace(params, max_tokens=max_tokens)
            alone = await generate(client, prompts, asked, concurrency=1)
            batched = await generate(client, prompts, asked, concurrency=len(prompts))
            if any(len(ids) != max_tokens for ids in (*alone, *batched)):
                raise RuntimeError(f"{way}: an output ended before its {max_tokens} tokens")
            found[way] = {
                "num_identical": sum(a == b for a, b in zip(alone, batched, strict=True)),
                "same_start": [same_start(a, b) for a, b in zip(alone, batched, strict=True)],
            }
            print(f"{way}: {found[way]['num_identical']} of {len(prompts)} identical", flush=True)
    return found


def markdown(figures: Figures) -> str:
    """A row for each kind of weights and way to choose."""
    rows = [
        (
            f"{weights}, {way}",
            f"{of_way['num_identical']} of {figures['num_prompts']}",
            f"{min(of_way['same_start'])} of {figures['max_tokens']}",
        )
        for weights, of_weights in figures["by_weights"].items()
        for way, of_way in of_weights.items()
    ]
    header = ("weights, choice", "same ids alone and batched", "earliest difference, token")
    return (
        f"{markdown_table(header, rows)}\n\n{figures['num_prompts']} chat prompts, "
        f"{figures['max_tokens']} tokens each, batched all at once, {figures['dtype']}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_invariance")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=96)
    options = parser.parse_args(arguments)
    prompts: list[Prompt] = [task.prompt for task in chats()[: options.num_prompts]]
    by_weights: Figures = {}
    for weights, settings in weight_settings().items():
        print(weights, flush=True)
        with local_cluster(
            options.model,
            max_num_seqs=len(prompts),
            enable_prefix_caching=False,
            **settings,
        ) as (cluster, model):
            by_weights[weights] = asyncio.run(compare(cluster.address, prompts, options.max_tokens))
    figures: Figures = {
        "dtype": model.dtype,
        "num_prompts": len(prompts),
        "max_tokens": options.max_tokens,
        "by_weights": by_weights,
    }
    finish("batch_invariance", parameters=vars(options), figures=figures, table=markdown(figures))


if __name__ == "__main__":
    main()
