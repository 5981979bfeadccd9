"""How many tokens a step lookups of drafts would bring, with texts in the place of a model.

Run: python -m benchmarks.speculation_lookup [--model PATH] [--texts N]

Teacher forcing: the model's output is taken to be a given text, so that a draft is accepted as
far as it agrees with it. Steps cost what they took on this machine's CPU, which says when a draft
pays: 10.4 ms up to 8 query tokens, 20 ms for 16, 33 ms for 32. No executor.
"""

from __future__ import annotations

import argparse
import itertools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tokenizers
from stepwire_client.models import resolve_model
from stepwire_scheduler.sequence import Request, SamplingParams
from stepwire_scheduler.sequence import Sequence as Generated
from stepwire_scheduler.speculation import SpeculationConfig, Speculator, make_speculator

from benchmarks.common import Figures, finish, markdown_table
from benchmarks.speculation_workloads import WORKLOADS

CLAIM = "Lookups triple the tokens of a step where a text is edited, and take nothing from chat."
NUM_SPECULATIVE_TOKENS = 5
_COSTS = ((1, 10.4), (8, 10.4), (16, 20.0), (32, 33.0), (64, 60.0))
_BARRIER_MS = 0.7
_WARM_UP = 20

Variants = tuple[tuple[str, Literal["ngram", "suffix"], int, int], ...]
VARIANTS: Variants = (
    ("ngram 2 to 5", "ngram", 2, 5),
    ("ngram 3 to 16", "ngram", 3, 16),
    ("ngram 2 to 16", "ngram", 2, 16),
    ("ngram 1 to 16", "ngram", 1, 16),
    ("suffix from 2", "suffix", 2, 16),
    ("suffix from 1", "suffix", 1, 16),
)
"""Name, method, ngram_min, ngram_max."""


def step_ms(num_tokens: int) -> float:
    """Of a step, by lines between the measured sizes."""
    for (below, before_ms), (above, after_ms) in itertools.pairwise(_COSTS):
        if num_tokens <= above:
            part = max(0, num_tokens - below) / (above - below)
            return before_ms + part * (after_ms - before_ms)
    return _COSTS[-1][1] * num_tokens / _COSTS[-1][0]


def replay(
    speculator: Speculator, texts: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> Figures:
    """Generate every text, batch_size at a time; returns what steps and drafts brought."""
    waiting = [_sequence(prompt, output) for prompt, output in reversed(texts)]
    running: list[tuple[Generated, list[int]]] = []
    num_sequence_steps = num_hits = num_tokens = 0
    spent_ms = plain_ms = idle_ms = 0.0
    counters = speculator.counters
    before = (counters.num_drafts, counters.num_draft_tokens, counters.num_accepted_tokens)
    while waiting or running:
        while waiting and len(running) < batch_size:
            running.append(waiting.pop())
        sequences = [sequence for sequence, _ in running]
        drafts = speculator.propose(sequences, num_tokens=len(running), budget=2_048)
        num_drafts = sum(map(len, drafts))
        busy_ms = step_ms(len(running) + num_drafts)
        spent_ms += busy_ms + (_BARRIER_MS if num_drafts else 0.0)
        for (sequence, output), draft in zip(running, drafts, strict=True):
            rest = output[len(sequence.token_ids) - sequence.num_prompt_tokens :]
            num_accepted = 0
            while num_accepted < len(draft) and draft[num_accepted] == rest[num_accepted]:
                num_accepted += 1
            sequence.token_ids.extend(array("I", rest[: num_accepted + 1]))
            speculator.observe(sequence, num_drafted=len(draft), num_accepted=num_accepted)
            num_sequence_steps += 1
            num_hits += bool(draft)
            num_tokens += num_accepted + 1
            plain_ms += (num_accepted + 1) * step_ms(len(running)) / len(running)
        speculator.note_step(
            num_tokens=len(running) + num_drafts,
            busy_ms=busy_ms,
            num_drafts=num_drafts,
            idle_ms=idle_ms,
        )
        idle_ms = _BARRIER_MS if num_drafts else 0.0
        for sequence, output in list(running):
            if sequence.num_output_tokens == len(output):
                running.remove((sequence, output))
                speculator.forget(sequence)
    num_drafts, num_drafted, num_accepted = (
        after - earlier
        for after, earlier in zip(
            (counters.num_drafts, counters.num_draft_tokens, counters.num_accepted_tokens),
            before,
            strict=True,
        )
    )
    return {
        "tokens_per_sequence_and_step": num_tokens / num_sequence_steps,
        "share_of_steps_with_draft": num_hits / num_sequence_steps,
        "mean_draft_len": num_drafted / max(1, num_drafts),
        "mean_accepted_len": num_accepted / max(1, num_drafts),
        "share_wasted": 1 - num_accepted / num_drafted if num_drafted else 0.0,
        "modelled_speedup": plain_ms / spent_ms,
        "num_tokens": num_tokens,
    }


def markdown(figures: Figures) -> str:
    """Tokens a step by method and workload."""
    rows = [
        (
            figure["variant"],
            figure["batch_size"],
            figure["workload"],
            f"{figure['tokens_per_sequence_and_step']:.2f}",
            f"{figure['share_of_steps_with_draft']:.0%}",
            f"{figure['mean_draft_len']:.1f}",
            f"{figure['mean_accepted_len']:.1f}",
            f"{figure['share_wasted']:.0%}",
            f"{figure['modelled_speedup']:.2f}",
        )
        for figure in figures["replays"]
    ]
    header = (
        "method",
        "batch",
        "workload",
        "tokens a step",
        "steps with draft",
        "draft",
        "accepted",
        "wasted",
        "modelled speed-up",
    )
    return markdown_table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Replay, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation_lookup")
    parser.add_argument(
        "--model", default="smollm2-135m", help="name in the cache, or directory, of a tokenizer"
    )
    parser.add_argument("--texts", type=int, default=8, help="of each workload")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args(arguments)
    tokenizer = _tokenizer(options.model)
    replays: list[Figures] = []
    for workload, make in WORKLOADS.items():
        texts = [
            (_encode(tokenizer, text.prompt), _encode(tokenizer, text.output))
            for text in make(options.texts)
        ]
        for batch_size in options.batch_sizes:
            for name, method, shortest, longest in VARIANTS:
                speculator = make_speculator(
                    SpeculationConfig(
                        method=method,
                        num_speculative_tokens=NUM_SPECULATIVE_TOKENS,
                        ngram_min=shortest,
                        ngram_max=longest,
                    )
                )
                assert speculator is not None
                for size, busy_ms in _COSTS * _WARM_UP:
                    speculator.note_step(num_tokens=size, busy_ms=busy_ms, idle_ms=0.0)
                replays.append(
                    {
                        "variant": name,
                        "workload": workload,
                        "batch_size": batch_size,
                        **replay(speculator, texts, batch_size),
                    }
                )
    figures: Figures = {"replays": replays}
    finish(
        "speculation_lookup",
        parameters={**vars(options), "model": Path(options.model).name},
        figures=figures,
        table=markdown(figures),
    )


def _sequence(prompt: list[int], output: list[int]) -> tuple[Generated, list[int]]:
    request = Request(
        request_id="r",
        prompt_token_ids=array("I", prompt),
        sampling_params=SamplingParams(max_tokens=len(output)),
    )
    return Generated(request, 0, order_key=(0, 0), stop_ids=frozenset()), output


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _tokenizer(model: str) -> tokenizers.Tokenizer:
    path = Path(resolve_model(model))
    directory = path if path.is_dir() else path.parent
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


if __name__ == "__main__":
    main()
