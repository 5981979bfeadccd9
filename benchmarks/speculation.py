"""Speculative decoding: what each method gains on work that repeats itself, and costs elsewhere.

Run: python -m benchmarks.speculation [--workload NAME ...] [--methods NAME ...] [--batch N ...]
                                      [--result NAME]

One cluster a method, all of the same model and settings, run the same requests in turns; whichever
is not measured does nothing. "copy" drafts with the target itself, which shows the bookkeeping's
ceiling, since every draft is accepted; "truncated" with the target less some of its layers; "held
at 0" is the cluster of ngram with requests that ask for no drafts.

Each batch size of each round has requests of its own, so that nobody finds an answer among those
that it has given before. Their prompts are computed before the clock starts: a conversation's
earlier turns are in the prefix cache. So many requests as the batch size are under way at once, the
next starts when one ends. Whatever is drafted, the ids must be those of "off" for every request, or
there is no figure.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepwire_client.aio import AsyncClient
from stepwire_client.events import Generation, ModelInfo
from stepwire_client.models import resolve_model
from stepwire_client.params import SamplingParams

from benchmarks.cluster import (
    DEFAULT_MODEL,
    REQUEST_TIMEOUT_S,
    free_address,
    local_cluster,
    read_metrics,
)
from benchmarks.common import Figures, finish, markdown_table, ratios, show, spread
from benchmarks.speculation_prompts import SHARED_NGRAM, WORKLOADS, Task, shared_ngrams

CLAIM = "Edits are at least twice as fast with drafts looked up, and no other work is slower."
OFF, HELD_AT_0 = "off", "held at 0"
METHODS = (OFF, "ngram", "suffix", "copy", "truncated", HELD_AT_0)
NUM_REQUESTS = {1: 4, 4: 8, 16: 16}
"""Of one round, by batch size."""
RESULTS = ("speculation", "speculation_held_at_0", "speculation_draft_models")
TRUNCATED_LAYERS = "0-19,28-29"
"""Of smollm2-135m's 30; without training, a copy with fewer is hardly ever right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A cluster and how its requests are sent."""

    name: str
    address: str
    metrics_address: str
    num_speculative_tokens: int | None = None
    """As every request says; None: the server's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a variant made of some tasks."""

    seconds: float
    token_ids: list[tuple[int, ...]]
    """By task."""
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int

    @property
    def num_tokens(self) -> int:
        """Generated in all."""
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_s(self) -> float:
        """From the first request sent to the last answer."""
        return self.num_tokens / self.seconds


class IdsDifferError(Exception):
    """Speculation changed what was generated."""


def check_ids(expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]], what: str) -> None:
    """Raise IdsDifferError, which names the first token that differs; what: the run, in words."""
    for number, (one, other) in enumerate(zip(expected, got, strict=True)):
        for position, (a, b) in enumerate(itertools.zip_longest(one, other)):
            if a != b:
                raise IdsDifferError(
                    f"{what}: request {number} has token {b} at {position}, and {a} without drafts"
                )


async def run_tasks(variant: Variant, tasks: Sequence[Task], *, batch: int) -> Run:
    """Compute the prompts, then answer them, so many at a time, and take the time of that."""
    slots = asyncio.Semaphore(batch)

    async with AsyncClient(variant.address) as client:

        async def one(task: Task, max_tokens: int) -> Generation:
            params = SamplingParams(
                max_tokens=max_tokens,
                temperature=task.temperature,
                seed=task.seed,
                num_speculative_tokens=variant.num_speculative_tokens,
            )
            async with slots:
                return await client.generate(task.prompt, params, timeout_s=REQUEST_TIMEOUT_S)

        await asyncio.gather(*(one(task, 1) for task in tasks))
        before = await asyncio.to_thread(read_metrics, variant.metrics_address)
        start = time.perf_counter()
        answers = await asyncio.gather(*(one(task, task.max_tokens) for task in tasks))
        seconds = time.perf_counter() - start
        after = await asyncio.to_thread(read_metrics, variant.metrics_address)
    return Run(
        seconds=seconds,
        token_ids=[answer.token_ids for answer in answers],
        num_drafts=int(after["stepwire_spec_drafts_total"] - before["stepwire_spec_drafts_total"]),
        num_draft_tokens=sum(answer.usage.num_draft_tokens for answer in answers),
        num_accepted_tokens=sum(answer.usage.num_accepted_tokens for answer in answers),
    )


async def run_round(
    variants: Sequence[Variant], tasks: Sequence[Task], *, batch: int, first: int, what: str
) -> dict[str, Run]:
    """One run of each variant, beginning with the one at first; raises IdsDifferError."""
    turn = first % len(variants)
    runs = {
        variant.name: await run_tasks(variant, tasks, batch=batch)
        for variant in (*variants[turn:], *variants[:turn])
    }
    for name, run in runs.items():
        check_ids(runs[OFF].token_ids, run.token_ids, f"{what}, {name}")
    return {variant.name: runs[variant.name] for variant in variants}


async def repeated_share(
    variant: Variant, tasks: Sequence[Task], answers: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """N-grams of the answers that stand in their prompts, and all; as shared_ngrams."""
    counts = (0, 0)
    async with AsyncClient(variant.address) as client:
        for task, answer in zip(tasks, answers, strict=True):
            shared, asked = shared_ngrams(await client.tokenize(task.prompt), answer)
            counts = counts[0] + shared, counts[1] + asked
    return counts


async def measure(
    variants: Sequence[Variant],
    *,
    workloads: Mapping[str, Sequence[Task]],
    batches: Sequence[int],
    num_rounds: int,
) -> list[Figures]:
    """A cell for each workload and batch size; the first requests of each warm up."""
    cells: list[Figures] = []
    for workload, tasks in workloads.items():
        supply = iter(tasks)
        warm_up = list(itertools.islice(supply, max(batches)))
        await run_round(variants, warm_up, batch=max(batches), first=0, what=f"{workload}, warm-up")
        for batch in batches:
            rounds: list[dict[str, Run]] = []
            shared = asked = 0
            for number in range(num_rounds):
                chosen = list(itertools.islice(supply, NUM_REQUESTS[batch]))
                what = f"{workload}, batch {batch}, round {number + 1}"
                if len(chosen) < NUM_REQUESTS[batch]:
                    raise ValueError(f"{what}: no prompts are left; run fewer rounds")
                runs = await run_round(variants, chosen, batch=batch, first=number, what=what)
                rounds.append(runs)
                counts = await repeated_share(variants[0], chosen, runs[OFF].token_ids)
                shared, asked = shared + counts[0], asked + counts[1]
                shown = ", ".join(f"{name} {run.tokens_per_s:.1f}" for name, run in runs.items())
                print(f"{what}: {shown} tokens/s", flush=True)
            cells.append(
                {
                    "workload": workload,
                    "batch": batch,
                    "num_requests": sum(len(each[OFF].token_ids) for each in rounds),
                    "num_output_tokens": sum(each[OFF].num_tokens for each in rounds),
                    "repeated_percent": 100 * shared / max(1, asked),
                    "methods": {each.name: method_figures(rounds, each.name) for each in variants},
                }
            )
    return cells


def method_figures(rounds: Sequence[Mapping[str, Run]], name: str) -> Figures:
    """One method in one cell, over its rounds."""
    runs = [each[name] for each in rounds]
    rates = [run.tokens_per_s for run in runs]
    drafts, drafted, accepted = (
        sum(getattr(run, count) for run in runs)
        for count in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    )
    return {
        "tokens_per_s": spread(rates),
        "ratio": ratios(rates, [each[OFF].tokens_per_s for each in rounds]),
        "num_drafts": drafts,
        "num_draft_tokens": drafted,
        "num_accepted_tokens": accepted,
        "acceptance_length": 1 + accepted / drafts if drafts else None,
        "wasted_percent": 100 * (1 - accepted / drafted) if drafted else None,
    }


def markdown(figures: Figures) -> str:
    """A table for each workload."""
    header = (
        *("batch, method", "output tokens/s", "against off", "tokens a draft's step"),
        *("drafted a generated token", "of them wasted"),
    )
    parts: list[str] = []
    for workload, cells in itertools.groupby(figures["cells"], key=lambda cell: cell["workload"]):
        rows: list[tuple[str, ...]] = []
        counts: list[tuple[int, int, float]] = []
        for cell in cells:
            counts.append(
                (cell["num_requests"], cell["num_output_tokens"], cell["repeated_percent"])
            )
            rows += [
                (f"{cell['batch']}, {name}", *_row(measured, cell["num_output_tokens"]))
                for name, measured in cell["methods"].items()
            ]
        num_requests, num_tokens = (sum(count[i] for count in counts) for i in (0, 1))
        repeated = sum(count[1] * count[2] for count in counts) / num_tokens
        parts.append(
            f"{workload}: {num_requests} requests, {num_tokens / num_requests:.0f} tokens each on "
            f"average; of their {SHARED_NGRAM}-grams {repeated:.0f}% stand in the prompt.\n\n"
            + markdown_table(header, rows)
        )
    kept = figures["truncated_layers"]
    layers = f' "truncated" has layers {kept} of the model.' if kept else ""
    return "\n\n".join(parts) + (
        f"\n\n{figures['dtype']}, at most {figures['num_speculative_tokens']} draft tokens a step; "
        f"ids as with speculation off in every run.{layers}"
    )


def _row(measured: Figures, num_output_tokens: int) -> tuple[str, ...]:
    length, wasted = measured["acceptance_length"], measured["wasted_percent"]
    drafted = measured["num_draft_tokens"] / num_output_tokens
    return (
        show(measured["tokens_per_s"]),
        show(measured["ratio"], 2, " times"),
        f"{length:.2f}" if length is not None else "",
        f"{drafted:.2f}" if drafted else "",
        f"{wasted:.0f}%" if wasted is not None else "",
    )


def write_truncated(model: str, layers: str, folder: Path) -> Path:
    """Write the model with some of its layers; in a process of its own, which loads torch."""
    command = [sys.executable, "-m", "benchmarks.truncated_model"]
    subprocess.run(
        [*command, str(resolve_model(model)), str(folder), "--layers", layers], check=True
    )
    return folder


def start_variants(
    stack: ExitStack, options: argparse.Namespace, draft_models: Mapping[str, Path]
) -> tuple[list[Variant], ModelInfo]:
    """A cluster for each method; stopped with the stack."""
    variants: dict[str, Variant] = {}
    info: ModelInfo | None = None
    for name in (method for method in METHODS if method in options.methods):
        if name == HELD_AT_0 and "ngram" in variants:
            variants[name] = replace(variants["ngram"], name=name, num_speculative_tokens=0)
            continue
        settings: dict[str, Any] = {}
        if name in draft_models:
            settings["speculative_model"] = draft_models[name]
        elif name != OFF:
            settings["speculative_method"] = "ngram" if name == HELD_AT_0 else name
        if name != OFF:
            settings["num_speculative_tokens"] = options.num_speculative_tokens
        metrics_address = free_address()
        cluster, info = stack.enter_context(
            local_cluster(
                options.model,
                dtype=options.dtype,
                max_num_seqs=max(NUM_REQUESTS),
                num_kv_blocks=options.num_kv_blocks,
                metrics_listen=metrics_address,
                **settings,
            )
        )
        variants[name] = Variant(
            name=name,
            address=cluster.address,
            metrics_address=metrics_address,
            num_speculative_tokens=0 if name == HELD_AT_0 else None,
        )
    assert info is not None
    return list(variants.values()), info


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", nargs="+", type=int, choices=NUM_REQUESTS, default=[1, 4, 16])
    parser.add_argument("--num-speculative-tokens", type=int, default=7)
    parser.add_argument("--num-kv-blocks", type=int, default=2_048)
    parser.add_argument("--truncated-layers", default=TRUNCATED_LAYERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--result", choices=RESULTS, default=RESULTS[0], help="file to write")
    options = parser.parse_args(arguments)
    if OFF not in options.methods:
        options.methods = [OFF, *options.methods]  # what all others are compared with
    print("choosing prompts", flush=True)
    workloads = {name: WORKLOADS[name]() for name in options.workload}
    with ExitStack() as stack:
        draft_models: dict[str, Path] = {}
        if "copy" in options.methods:
            draft_models["copy"] = resolve_model(options.model)
        if "truncated" in options.methods:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            draft_models["truncated"] = write_truncated(
                options.model, options.truncated_layers, folder
            )
        variants, model = start_variants(stack, options, draft_models)
        cells = asyncio.run(
            measure(
                variants,
                workloads=workloads,
                batches=options.batch,
                num_rounds=options.rounds,
            )
        )
    figures: Figures = {
        "dtype": model.dtype,
        "num_speculative_tokens": options.num_speculative_tokens,
        "truncated_layers": options.truncated_layers if "truncated" in options.methods else None,
        "cells": cells,
    }
    finish(options.result, parameters=vars(options), figures=figures, table=markdown(figures))


if __name__ == "__main__":
    main()
