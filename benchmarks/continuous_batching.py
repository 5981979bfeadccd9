"""Continuous against static batching: output tokens a second of one engine on one mix.

Run: python -m benchmarks.continuous_batching [--num-requests N] [--max-num-seqs N] [--rounds N]

The mix is heavy-tailed: most outputs are short, a few are long. Three ways to run it on one
cluster, interleaved:

- continuous: every request is sent at once; the scheduler fills each slot that becomes free.
- static: requests go in batches of max_num_seqs, and every row of a batch is computed until its
  longest output ends; what a row makes beyond its own length is thrown away. This is static
  batching as in Orca's comparison (Yu et al. 2022, section 2) and as `generate` of transformers
  does it.
- static, rows leave: the same batches, but a row that has ended is not computed any more; the
  next batch still waits for the longest. Only an engine that could batch continuously can do it;
  it shows what admission at every step gains alone.

With steps of equal cost the gain over static is bounded by the longest output of a batch over
the mean one. Prefill costs the same in all three and draws the ratio towards 1; on a CPU it costs
as much a token as decode at full batch, and a step of few rows is cheaper than a full one.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

from stepwire_client.aio import AsyncClient
from stepwire_client.benchmark.workload import WorkItem
from stepwire_client.events import ModelInfo

from benchmarks.cluster import DEFAULT_MODEL, generate_all, local_cluster
from benchmarks.common import Figures, finish, markdown_table, ratios, show, spread
from benchmarks.mixes import Lengths, describe, heavy_tailed, summary

CLAIM = "Continuous batching gives at least 3 times the output of static batching."
CONTINUOUS, STATIC, STATIC_LEAVING = "continuous", "static", "static, rows leave"


def batches(mix: Sequence[Lengths], size: int) -> list[list[Lengths]]:
    """The mix in its order, so many at a time."""
    return [list(mix[i : i + size]) for i in range(0, len(mix), size)]


def padded(batch: Sequence[Lengths]) -> list[Lengths]:
    """Every row as long as the longest output of the batch."""
    longest = max(lengths.output_len for lengths in batch)
    return [replace(lengths, output_len=longest) for lengths in batch]


def step_bound(mix: Sequence[Lengths], max_num_seqs: int) -> float:
    """Steps of static batching over those of full batches, prefill left out."""
    num_static = sum(max(x.output_len for x in batch) for batch in batches(mix, max_num_seqs))
    return num_static * max_num_seqs / sum(lengths.output_len for lengths in mix)


async def run_variant(
    client: AsyncClient, model: ModelInfo, variant: str, mix: Sequence[Lengths], seed: str
) -> float:
    """Run the mix; returns the seconds until its last token."""
    size = len(mix) if variant == CONTINUOUS else model.max_num_seqs
    generator = random.Random(seed)
    duration_s = 0.0
    for batch in batches(mix, size):
        rows = padded(batch) if variant == STATIC else batch
        items = [
            WorkItem(
                prompt=[generator.randrange(3, model.vocab_size) for _ in range(row.prompt_len)],
                output_len=row.output_len,
            )
            for row in rows
        ]
        duration_s += (await generate_all(client, items))[1]
    return duration_s


async def measure(
    address: str, model: ModelInfo, mix: Sequence[Lengths], num_rounds: int
) -> Figures:
    """Interleave the variants; each run has prompts of its own, so the prefix cache is no help."""
    num_output_tokens = sum(lengths.output_len for lengths in mix)
    rates: dict[str, list[float]] = {CONTINUOUS: [], STATIC: [], STATIC_LEAVING: []}
    async with AsyncClient(address) as client:
        warm_up = [Lengths(prompt_len=32, output_len=8)] * model.max_num_seqs
        await run_variant(client, model, CONTINUOUS, warm_up, "warm-up")
        for number in range(num_rounds):
            for variant, values in rates.items():
                seed = f"{number} {variant}"
                duration_s = await run_variant(client, model, variant, mix, seed)
                values.append(num_output_tokens / duration_s)
                print(f"round {number + 1}, {variant}: {values[-1]:.1f} output tokens/s")
    return {
        "mix": describe(mix),
        "dtype": model.dtype,
        "max_num_seqs": model.max_num_seqs,
        "step_bound": step_bound(mix, model.max_num_seqs),
        "output_tokens_per_s": {variant: spread(values) for variant, values in rates.items()},
        "ratio": {
            variant: ratios(rates[CONTINUOUS], values)
            for variant, values in rates.items()
            if variant != CONTINUOUS
        },
    }


def markdown(figures: Figures) -> str:
    """The figures as a table, and how to read them."""
    rows = []
    for variant, rate in figures["output_tokens_per_s"].items():
        ratio = figures["ratio"].get(variant)
        rows.append((variant, show(rate), show(ratio, 2, " times") if ratio else "1"))
    table = markdown_table(("batching", "useful output tokens/s", "continuous is faster by"), rows)
    return (
        f"{table}\n\n"
        f"The mix: {summary(figures['mix'])}; {figures['dtype']}, at most "
        f"{figures['max_num_seqs']} sequences at once. A batch's longest output is "
        f"{figures['step_bound']:.1f} times the mean one, which bounds the gain over static where "
        "prefill is free and every step costs the same."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.continuous_batching")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-requests", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-output-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    mix = heavy_tailed(
        options.num_requests,
        seed=options.seed,
        output_lens=(4, options.max_output_len),
        prompt_lens=(16, 48),
    )
    settings = {"dtype": options.dtype, "max_num_seqs": options.max_num_seqs}
    with local_cluster(options.model, **settings) as (cluster, model):
        figures = asyncio.run(measure(cluster.address, model, mix, options.rounds))
    finish(
        "continuous_batching",
        parameters=vars(options),
        figures=figures,
        table=markdown(figures),
    )


if __name__ == "__main__":
    main()
