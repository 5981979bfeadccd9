"""The same prompts through stepwire, llama.cpp, vLLM's CPU build and transformers, in turns.

Run: python -m benchmarks.peers [--systems NAME ...] [--batch N ...] [--rounds N]
                                [--llama-cpp-python PYTHON] [--vllm-python PYTHON] [--server URL]

All systems are loaded, compiled and warm before the first round; a peer that is not measured is
stopped. Every cell of every round has prompts of its own, random token ids, so that no prefix
cache helps anybody, and so many requests at a time as the batch size; all choose greedily and make
exactly the tokens asked for. stepwire is measured from its client, over gRPC and with a stream for
each request; the peers by a clock inside their own process: llama.cpp with all sequences in one
call of `llama_decode`, vLLM by offline `LLM.generate`, transformers with one static batch. Their
bfloat16 weights are dequantised from the GGUF file.

A server that is running already, llama.cpp's or vLLM's, is measured beside them: --server URL.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from typing import cast

from stepwire_client.aio import AsyncClient
from stepwire_client.benchmark.workload import random_workload
from stepwire_client.events import ModelInfo
from stepwire_client.models import resolve_model
from stepwire_client.params import ChatMessage

from benchmarks.cluster import DEFAULT_MODEL, STORED, local_cluster, weight_settings
from benchmarks.common import Figures, finish, markdown_table, ratios, show, spread
from benchmarks.peer_start import LLAMA_CPP, PEERS, VLLM, start_peers
from benchmarks.peer_systems import (
    PeerError,
    Run,
    ServerSystem,
    StepwireSystem,
    System,
    same_start,
)

CLAIM = (
    "Over gRPC at least 1.2 times llama.cpp at batch 1, 1.5 times the best peer at 8 and 1.4 times "
    "at 16 and 32."
)
STEPWIRE = "stepwire"
SYSTEMS = (STEPWIRE, *PEERS)
MIN_TOKENS_OF_A_CELL = 512
"""Smaller batches are repeated within a round until they have made as many."""
PREFILL_BATCH, PREFILL_LEN = 8, 512

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "What is 17 + 25?",
    "Name the planets of the solar system in order.",
    "Explain why the sky is blue to a child.",
    "List three uses of copper.",
    "How do vaccines work?",
    "Write a Python function that reverses a string.",
)
"""Every system must begin to answer them as stepwire does."""
NUM_CHECKED_TOKENS = 16
MIN_SAME_START = 0.25
"""Share of the checked tokens, over all questions, that come before the first other one. Weights
and activations are rounded in other ways, so some answers part at their first word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row of the comparison."""

    batch: int
    """Prompts at a time."""
    input_len: int
    output_len: int

    @property
    def is_prefill(self) -> bool:
        """Whether the prompts are what counts."""
        return self.output_len == 1

    @property
    def title(self) -> str:
        """As the table has it."""
        if self.is_prefill:
            return f"{self.batch} prompts of {self.input_len} tokens, 1 token out"
        return f"batch {self.batch}, {self.input_len} tokens in, {self.output_len} out"

    @property
    def num_repeats(self) -> int:
        """Batches of a round, one after the other."""
        num_tokens = self.batch * max(self.output_len, self.input_len if self.is_prefill else 0)
        return -(-MIN_TOKENS_OF_A_CELL // num_tokens)

    @property
    def num_counted_tokens(self) -> int:
        """Of one batch: of the prompts for prefill, else of the outputs."""
        return self.batch * (self.input_len if self.is_prefill else self.output_len)

    def prompts(self, model: ModelInfo, seed: str) -> list[list[int]]:
        """Of one batch."""
        items = random_workload(
            num_prompts=self.batch,
            input_len=self.input_len,
            output_len=self.output_len,
            vocab_size=model.vocab_size,
            excluded_token_ids=model.eos_token_ids,
            seed=f"{self.title}, {seed}",
        )
        return [cast("list[int]", item.prompt) for item in items]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """What a system reached in a cell of a round."""

    tokens_per_s: float
    """End to end, of the tokens that the cell counts."""
    decode_tokens_per_s: float | None
    """After the first tokens; None where the system does not tell."""


async def run_checked(system: System, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
    """Run and raise PeerError where an output is shorter or longer than asked for."""
    run = await system.run(prompts, output_len)
    lengths = {len(output) for output in run.token_ids}
    if len(run.token_ids) != len(prompts) or lengths != {output_len}:
        raise PeerError(
            f"{system.name}: {len(run.token_ids)} outputs of {sorted(lengths)} tokens instead of "
            f"{len(prompts)} of {output_len}"
        )
    return run


async def run_cell(system: System, cell: Cell, batches: Sequence[Sequence[Sequence[int]]]) -> Rate:
    """One batch after the other; the rate over all."""
    runs = [await run_checked(system, prompts, cell.output_len) for prompts in batches]
    decode = [run.decode_tokens_per_s for run in runs if run.decode_tokens_per_s is not None]
    return Rate(
        tokens_per_s=len(runs) * cell.num_counted_tokens / sum(run.seconds for run in runs),
        decode_tokens_per_s=statistics.harmonic_mean(decode) if len(decode) == len(runs) else None,
    )


async def check_same_start(
    systems: Sequence[System], prompts: Sequence[Sequence[int]]
) -> dict[str, list[int]]:
    """Tokens by prompt that each system has in common with the first one.

    Raises PeerError for a system that computes something else: then its speed says nothing.
    """
    expected = [await run_checked(systems[0], [p], NUM_CHECKED_TOKENS) for p in prompts]
    found: dict[str, list[int]] = {}
    for system in systems[1:]:
        runs = [await run_checked(system, [p], NUM_CHECKED_TOKENS) for p in prompts]
        found[system.name] = [
            same_start(a.token_ids[0], b.token_ids[0]) for a, b in zip(expected, runs, strict=True)
        ]
        if sum(found[system.name]) < MIN_SAME_START * NUM_CHECKED_TOKENS * len(prompts):
            raise PeerError(
                f"{system.name} computes something else than {systems[0].name}: of "
                f"{NUM_CHECKED_TOKENS} greedy tokens, {found[system.name]} are the same"
            )
    return found


async def measure(
    systems: Sequence[System], model: ModelInfo, cells: Sequence[Cell], num_rounds: int
) -> list[Figures]:
    """Rounds of all cells; the systems take turns within a cell, each round another one first.

    A round before the first does not count.
    """
    rates: dict[tuple[Cell, str], list[Rate]] = {
        (cell, system.name): [] for cell in cells for system in systems
    }
    for number in range(-1, num_rounds):
        for cell in cells:
            repeats = range(cell.num_repeats if number >= 0 else 1)
            batches = [cell.prompts(model, f"round {number}, {i}") for i in repeats]
            turn = max(number, 0) % len(systems)
            shown: list[str] = []
            for system in (*systems[turn:], *systems[:turn]):
                rate = await run_cell(system, cell, batches)
                shown.append(f"{system.name} {rate.tokens_per_s:.1f}")
                if number >= 0:
                    rates[cell, system.name].append(rate)
            what = f"round {number + 1}" if number >= 0 else "warm-up"
            print(f"{what}, {cell.title}: {', '.join(shown)} tokens/s", flush=True)
    names = [system.name for system in systems]
    return [cell_figures(cell, {name: rates[cell, name] for name in names}) for cell in cells]


def cell_figures(cell: Cell, rates: Mapping[str, Sequence[Rate]]) -> Figures:
    """Spreads, and stepwire's ratios to each system and to the fastest peer of each round."""
    by_name = {name: [rate.tokens_per_s for rate in of_name] for name, of_name in rates.items()}
    ours = by_name[STEPWIRE]
    systems: Figures = {}
    for name, values in by_name.items():
        decode = [
            rate.decode_tokens_per_s for rate in rates[name] if rate.decode_tokens_per_s is not None
        ]
        systems[name] = {
            "tokens_per_s": spread(values),
            "decode_tokens_per_s": spread(decode) if decode else None,
            "ratio": ratios(ours, values),
        }
    peers = [values for name, values in by_name.items() if not name.startswith(STEPWIRE)]
    best = [max(of_round) for of_round in zip(*peers, strict=True)]
    return {
        "title": cell.title,
        "batch": cell.batch,
        "input_len": cell.input_len,
        "output_len": cell.output_len,
        "num_requests": cell.batch * cell.num_repeats,
        "systems": systems,
        "ratio_to_best_peer": ratios(ours, best) if best else None,
    }


def markdown(figures: Figures) -> str:
    """A table for each cell."""
    parts: list[str] = []
    for cell in figures["cells"]:
        of = "prompt" if cell["output_len"] == 1 else "output"
        rows = [
            (
                name,
                show(measured["tokens_per_s"]),
                show(measured["decode_tokens_per_s"]) if measured["decode_tokens_per_s"] else "",
                show(measured["ratio"], 2, " times"),
            )
            for name, measured in cell["systems"].items()
        ]
        best = cell["ratio_to_best_peer"]
        versus = f" stepwire over the fastest peer: {show(best, 2, ' times')}." if best else ""
        header = ("system", f"{of} tokens/s, end to end", "decode only", "stepwire is faster by")
        parts.append(f"{cell['title'].capitalize()}.{versus}\n\n{markdown_table(header, rows)}")
    versions = [
        f"{name} ({', '.join(f'{p} {v}' for p, v in described['versions'].items())})"
        for name, described in figures["systems"].items()
        if described.get("versions")
    ]
    starts = [f"{name} {'/'.join(map(str, same))}" for name, same in figures["same_start"].items()]
    notes = [
        f"{figures['num_threads']} threads; peers: {', '.join(versions) or 'none'}.",
        f"Of the first {NUM_CHECKED_TOKENS} greedy tokens of {len(QUESTIONS)} answers the same as "
        f"stepwire's before the first other one: {', '.join(starts) or 'none compared'}.",
    ]
    return "\n\n".join([*parts, " ".join(notes)])


async def compare(options: argparse.Namespace, stack: ExitStack) -> Figures:
    """Start everything, check it, measure it; ends early, and in order, on SIGTERM."""
    this = asyncio.current_task()
    assert this is not None
    # A stopped worker would outlive a process that just ends.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    workers, left_out = start_peers(
        stack,
        [name for name in options.systems if name in PEERS],
        model=resolve_model(options.model),
        pythons={LLAMA_CPP: options.llama_cpp_python, VLLM: options.vllm_python},
        num_threads=options.num_threads,
    )
    for name, why in left_out.items():
        print(f"{name} is left out: {why}", flush=True)
    for worker in workers:  # one at a time: some compile
        print(f"waiting for {worker.name}", flush=True)
        await worker.wait_until_ready()
    systems: list[System] = []
    async with AsyncExitStack() as clients:
        client: AsyncClient | None = None
        for weights, settings in weight_settings().items():
            name = STEPWIRE if weights == STORED else f"{STEPWIRE}, {weights} weights"
            cluster, model = stack.enter_context(
                local_cluster(
                    options.model,
                    num_threads=options.num_threads,
                    max_num_seqs=max(PREFILL_BATCH, *options.batch),
                    **settings,
                )
            )
            connected = await clients.enter_async_context(AsyncClient(cluster.address))
            described = {"settings": {"dtype": model.dtype, "weight_bytes": model.weight_bytes}}
            systems.append(StepwireSystem(name, connected, described))
            client = client or connected
        assert client is not None
        systems += workers
        if options.server:
            systems.append(ServerSystem(options.server, client.tokenize))
        prompts = [await client.tokenize([ChatMessage("user", text)]) for text in QUESTIONS]
        starts = await check_same_start(systems, prompts)
        cells = [Cell(batch=batch, input_len=128, output_len=128) for batch in options.batch]
        cells.append(Cell(batch=PREFILL_BATCH, input_len=PREFILL_LEN, output_len=1))
        return {
            "num_threads": options.num_threads,
            "systems": {system.name: dict(system.described) for system in systems},
            "left_out": left_out,
            "same_start": starts,
            "cells": await measure(systems, model, cells, options.rounds),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--llama-cpp-python", default=sys.executable, help="an interpreter with llama-cpp-python"
    )
    parser.add_argument("--vllm-python", default=sys.executable, help="an interpreter with vLLM")
    parser.add_argument("--server", metavar="URL", help="of a server with OpenAI's completions")
    options = parser.parse_args(arguments)
    try:
        with ExitStack() as stack:
            figures = asyncio.run(compare(options, stack))
    except PeerError as error:
        sys.exit(str(error))
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    # What names a place on this machine is no part of a result.
    parameters = {
        name: value
        for name, value in vars(options).items()
        if name not in ("llama_cpp_python", "vllm_python", "server")
    }
    finish("peers", parameters=parameters, figures=figures, table=markdown(figures))


if __name__ == "__main__":
    main()
