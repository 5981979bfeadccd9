"""What looking up drafts costs the scheduler: time a token and memory, by context and sequences.

Run: python -m benchmarks.speculation_cost [--rounds N] [--profile METHOD]

Each round proposes for every sequence, appends what was "sampled" and observes, as the planner
does. A miss samples random tokens; a hit repeats a random text, whose drafts are all right. The
time of a context's first indexing is apart. No executor.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import statistics
import time
import tracemalloc
from array import array
from collections.abc import Sequence
from typing import Literal, get_args

from stepwire_scheduler import garbage
from stepwire_scheduler.sequence import Request, SamplingParams
from stepwire_scheduler.sequence import Sequence as Generated
from stepwire_scheduler.speculation import SpeculationConfig, Speculator, make_speculator

from benchmarks.common import Figures, finish, markdown_table, percentile

CLAIM = "A token for which no draft is found takes at most 10 µs."
CONTEXTS = (100, 2_000, 8_000)
SIZES = (1, 16, 64)
METHODS: tuple[Literal["ngram", "suffix"], ...] = ("ngram", "suffix")
VOCAB_SIZE = 49_152
NUM_SPECULATIVE_TOKENS = 5
FINISHED_TOKENS = 65_536
"""Tokens of finished sequences that the suffix method has kept."""
STEP_MS, TOKEN_MS = 10.0, 0.1
Kind = Literal["miss", "hit", "overload"]


class Decode:
    """Sequences of one length that decode, and their speculator."""

    def __init__(self, method: str, kind: Kind, context: int, num_sequences: int) -> None:
        self._generator = random.Random(0)
        self._kind = kind
        self.speculator = _speculator(method)
        if method == "suffix":
            for _ in range(FINISHED_TOKENS // 1_000):
                self.speculator.forget(self._sequence(self._random_tokens(1_000), num_prompt=1))
        self._texts: dict[Generated, list[int]] = {}
        for _ in range(num_sequences):
            text = self._random_tokens(context // 2)
            tokens = self._random_tokens(context) if kind == "miss" else text * 2
            self._texts[self._sequence(tokens, num_prompt=context)] = text
        self.sequences = list(self._texts)
        self.indexing_s = 0.0
        started = time.perf_counter()
        for _ in range(2 + num_sequences * context // 512):
            self.speculator.propose(self.sequences, num_tokens=num_sequences, budget=10_000)
        self.indexing_s = time.perf_counter() - started
        for _ in range(FINISHED_TOKENS // 512):  # until the history is indexed as well
            self.speculator.propose(self.sequences, num_tokens=num_sequences, budget=10_000)
        token_ms = 1_000.0 if kind == "overload" else TOKEN_MS
        for _ in range(8):
            for num_tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
                self.speculator.note_step(
                    num_tokens=num_tokens, busy_ms=STEP_MS + token_ms * num_tokens, idle_ms=0.0
                )

    def _random_tokens(self, num_tokens: int) -> list[int]:
        return [self._generator.randrange(VOCAB_SIZE) for _ in range(num_tokens)]

    def _sequence(self, tokens: Sequence[int], *, num_prompt: int) -> Generated:
        sequence = Generated(
            Request(
                request_id="r",
                prompt_token_ids=array("I", tokens[:num_prompt]),
                sampling_params=SamplingParams(max_tokens=4_096),
            ),
            0,
            order_key=(0, 0),
            stop_ids=frozenset(),
        )
        sequence.token_ids.extend(array("I", tokens[num_prompt:]))
        return sequence

    def round(self) -> tuple[float, int]:
        """Propose, append and observe; returns the seconds and the tokens that were appended."""
        clock = time.perf_counter
        sequences = self.sequences
        started = clock()
        drafts = self.speculator.propose(sequences, num_tokens=len(sequences), budget=10_000)
        seconds = clock() - started
        num_tokens = 0
        for sequence, draft in zip(sequences, drafts, strict=True):
            if self._kind == "miss":
                sampled, num_accepted = self._random_tokens(1), 0
            else:
                text = self._texts[sequence]
                offset = len(sequence.token_ids) % len(text)
                sampled = (text[offset:] + text)[: len(draft) + 1]
                num_accepted = len(draft)
            sequence.token_ids.extend(array("I", sampled))
            num_tokens += len(sampled)
            started = clock()
            self.speculator.observe(sequence, num_drafted=len(draft), num_accepted=num_accepted)
            seconds += clock() - started
        return seconds, num_tokens


def measure(method: str, kind: Kind, context: int, num_sequences: int, rounds: int) -> Figures:
    """Microseconds a sequence and step, and a token, after as many steps as it takes to settle."""
    garbage.settle()  # as the scheduler's process does before its first request
    decode = Decode(method, kind, context, num_sequences)
    for _ in range(20):
        decode.round()
    samples = [decode.round() for _ in range(rounds)]
    num_tokens = sum(sample[1] for sample in samples)
    per_step = [seconds / num_sequences * 1e6 for seconds, _ in samples]
    return {
        "us_per_sequence_and_step": {
            "p50": percentile(per_step, 50),
            "p99": percentile(per_step, 99),
        },
        "us_per_token": sum(sample[0] for sample in samples) / num_tokens * 1e6,
        "tokens_per_sequence_and_step": num_tokens / rounds / num_sequences,
        "us_per_indexed_token": decode.indexing_s / (num_sequences * context) * 1e6,
    }


def bytes_per_token(method: str, context: int) -> float:
    """Memory that a sequence's index and state take for each token of its context."""
    decode = Decode(method, "miss", context, 1)
    tokens = decode._random_tokens(context)
    sequences = [decode._sequence(tokens, num_prompt=context) for _ in range(4)]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(2 + 4 * context // 512):
        decode.speculator.propose(sequences, num_tokens=4, budget=10_000)
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return taken / (4 * context)


def profile(method: str, rounds: int) -> None:
    """Print where the time goes, for hits."""
    decode = Decode(method, "hit", 2_000, 16)
    with cProfile.Profile() as profiler:
        for _ in range(rounds):
            decode.round()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


def markdown(figures: Figures) -> str:
    """Microseconds by method, kind, context and sequences."""
    rows = [
        (
            f"{figure['method']}, {figure['kind']}",
            f"{figure['context']:,}",
            figure["num_sequences"],
            f"{figure['us_per_sequence_and_step']['p50']:.1f} / "
            f"{figure['us_per_sequence_and_step']['p99']:.1f}",
            f"{figure['us_per_token']:.1f}",
            f"{figure['us_per_indexed_token']:.2f}",
        )
        for figure in figures["times"]
    ]
    header = (
        "method",
        "context",
        "sequences",
        "µs a sequence and step, p50 / p99",
        "µs a token",
        "µs an indexed token",
    )
    memory = [
        (f"{figure['method']}", f"{figure['context']:,}", f"{figure['bytes_per_token']:.0f}")
        for figure in figures["memory"]
    ]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"{markdown_table(('method', 'context', 'bytes a token'), memory)}\n\n"
        f"A miss takes at most {figures['worst_miss_us']:.1f} µs a token (median of steps)."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation_cost")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--profile", choices=METHODS, help="profile a method's hits instead")
    options = parser.parse_args(arguments)
    if options.profile is not None:
        profile(options.profile, options.rounds)
        return
    times: list[Figures] = [
        {
            "method": method,
            "kind": kind,
            "context": context,
            "num_sequences": num_sequences,
            **measure(method, kind, context, num_sequences, options.rounds),
        }
        for method in METHODS
        for kind in get_args(Kind)
        for context in CONTEXTS
        for num_sequences in SIZES
    ]
    misses = [
        figure["us_per_sequence_and_step"]["p50"] for figure in times if figure["kind"] == "miss"
    ]
    figures: Figures = {
        "times": times,
        "memory": [
            {
                "method": method,
                "context": context,
                "bytes_per_token": bytes_per_token(method, context),
            }
            for method in METHODS
            for context in CONTEXTS
        ],
        "worst_miss_us": max(misses),
        "mean_miss_us": statistics.fmean(misses),
    }
    finish("speculation_cost", parameters=vars(options), figures=figures, table=markdown(figures))


def _speculator(method: str) -> Speculator:
    config = SpeculationConfig(
        method="ngram" if method == "ngram" else "suffix",
        num_speculative_tokens=NUM_SPECULATIVE_TOKENS,
    )
    speculator = make_speculator(config)
    assert speculator is not None
    return speculator


if __name__ == "__main__":
    main()
