"""Plans ahead of their results: how long the executor idles between steps, and what that costs.

Run: python -m benchmarks.pipelining [--num-seqs N] [--output-len N] [--rounds N]

Two clusters on one model, one with `max_inflight_steps` 1, which sends a plan when the result of
the one before is booked, one with 2, which keeps a plan waiting at the executor. They run the same
requests in turns; whichever is not measured does nothing. The figures are the scheduler's metrics,
read before and after each run:

- idle share: of the time in which sequences could go on, the part in which the executor had no
  step to compute. On a CPU it counts the executor's own work between steps, done by the thread
  that computes: the plan applied, tensors laid out, the result written.
- a step: from the plan sent to its result booked. With 2 in flight a plan waits at the executor
  for the step before it, so a step takes longer while steps come faster.
- the wire: what of a step the executor did not have it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from stepwire_client.aio import AsyncClient
from stepwire_client.benchmark.workload import WorkItem
from stepwire_client.events import ModelInfo

from benchmarks.cluster import (
    DEFAULT_MODEL,
    free_address,
    generate_all,
    local_cluster,
    read_metrics,
)
from benchmarks.common import Figures, finish, markdown_table, ratios, show, spread

CLAIM = "With two plans in flight the executor idles at most 3% of the time."
INFLIGHT = (1, 2)
PROMPT_LEN = 32

Samples = Mapping[str, float]
"""Values of the scheduler's metrics by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One cluster that is measured."""

    max_inflight_steps: int
    address: str
    metrics_address: str


def step_figures(before: Samples, after: Samples) -> dict[str, float]:
    """What steps were like between two readings."""

    def grown(name: str) -> float:
        return after[f"stepwire_{name}"] - before[f"stepwire_{name}"]

    num_steps = grown("step_seconds_count")
    idle_s, busy_s = grown("executor_idle_seconds_total"), grown("executor_busy_seconds_total")
    return {
        "idle_percent": 100 * idle_s / (idle_s + busy_s),
        "idle_ms": 1e3 * idle_s / num_steps,
        "busy_ms": 1e3 * busy_s / num_steps,
        "step_ms": 1e3 * grown("step_seconds_sum") / num_steps,
        "wire_ms": 1e3 * grown("wire_seconds_sum") / num_steps,
        "schedule_ms": 1e3 * grown("schedule_seconds_sum") / num_steps,
    }


async def run_round(
    variant: Variant, model: ModelInfo, *, num_seqs: int, output_len: int, seed: str
) -> dict[str, float]:
    """Generate with all sequences at once; the prompts are the seed's own."""
    generator = random.Random(seed)
    items = [
        WorkItem(
            prompt=[generator.randrange(3, model.vocab_size) for _ in range(PROMPT_LEN)],
            output_len=output_len,
        )
        for _ in range(num_seqs)
    ]
    async with AsyncClient(variant.address) as client:
        before = await asyncio.to_thread(read_metrics, variant.metrics_address)
        _, duration_s = await generate_all(client, items)
        after = await asyncio.to_thread(read_metrics, variant.metrics_address)
    return {"tokens_per_s": num_seqs * output_len / duration_s, **step_figures(before, after)}


async def measure(
    variants: Sequence[Variant],
    model: ModelInfo,
    *,
    num_seqs: int,
    output_len: int,
    num_rounds: int,
) -> Figures:
    """Take turns; each round has prompts of its own, the same for both."""
    rounds: dict[int, list[dict[str, float]]] = {each.max_inflight_steps: [] for each in variants}
    for number in range(-1, num_rounds):
        for variant in variants:
            measured = await run_round(
                variant,
                model,
                num_seqs=num_seqs,
                output_len=output_len if number >= 0 else 8,
                seed=f"{number} {variant.max_inflight_steps}",
            )
            if number < 0:
                continue  # warm-up
            rounds[variant.max_inflight_steps].append(measured)
            print(
                f"round {number + 1}, {variant.max_inflight_steps} in flight: "
                f"{measured['idle_percent']:.2f}% idle, {measured['tokens_per_s']:.1f} tokens/s"
            )
    spreads = {
        str(inflight): {name: spread([each[name] for each in values]) for name in values[0]}
        for inflight, values in rounds.items()
    }
    one, two = ([each["tokens_per_s"] for each in rounds[inflight]] for inflight in INFLIGHT)
    return {
        "dtype": model.dtype,
        "num_seqs": num_seqs,
        "output_len": output_len,
        "max_inflight_steps": spreads,
        "throughput_ratio": ratios(two, one),
    }


def markdown(figures: Figures) -> str:
    """The figures as a table, and how to read them."""
    header = (
        *("plans in flight", "executor idle", "idle a step, ms", "computing a step, ms"),
        *("wire, ms", "planning, ms", "output tokens/s"),
    )
    rows = [
        (
            inflight,
            show(each["idle_percent"], 2, "%"),
            show(each["idle_ms"], 2),
            show(each["busy_ms"], 1),
            show(each["wire_ms"], 2),
            show(each["schedule_ms"], 3),
            show(each["tokens_per_s"]),
        )
        for inflight, each in figures["max_inflight_steps"].items()
    ]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"{figures['num_seqs']} sequences of {PROMPT_LEN} prompt and {figures['output_len']} "
        f"output tokens, {figures['dtype']}. Output with 2 plans in flight over that with 1: "
        f"{show(figures['throughput_ratio'], 3, ' times')}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipelining")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-seqs", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        variants = []
        for inflight in INFLIGHT:
            metrics_address = free_address()
            cluster, model = stack.enter_context(
                local_cluster(
                    options.model,
                    dtype=options.dtype,
                    max_num_seqs=options.num_seqs,
                    max_inflight_steps=inflight,
                    metrics_listen=metrics_address,
                )
            )
            variants.append(
                Variant(
                    max_inflight_steps=inflight,
                    address=cluster.address,
                    metrics_address=metrics_address,
                )
            )
        figures = asyncio.run(
            measure(
                variants,
                model,
                num_seqs=options.num_seqs,
                output_len=options.output_len,
                num_rounds=options.rounds,
            )
        )
    finish("pipelining", parameters=vars(options), figures=figures, table=markdown(figures))


if __name__ == "__main__":
    main()
