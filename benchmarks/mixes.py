"""Synthetic mixes of prompt and output lengths, the same for the same seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of one request, in tokens."""

    prompt_len: int
    """Of the prompt."""
    output_len: int
    """To generate."""


def heavy_tailed(
    num_requests: int,
    *,
    seed: int,
    output_lens: tuple[int, int] = (4, 512),
    prompt_lens: tuple[int, int] = (32, 128),
    shape: float = 0.8,
) -> list[Lengths]:
    """Outputs of a Pareto law cut to output_lens, most of them short; prompts uniform.

    shape: the law's exponent; the smaller, the heavier the tail.
    """
    generator = random.Random(seed)
    low, high = output_lens
    share = (low / high) ** shape

    def output_len() -> int:
        return int(low * (1 - generator.random() * (1 - share)) ** (-1 / shape))

    return [
        Lengths(prompt_len=generator.randint(*prompt_lens), output_len=output_len())
        for _ in range(num_requests)
    ]


def conversations(num_requests: int, *, seed: int) -> list[Lengths]:
    """Log-normal lengths with the means that are reported of ShareGPT, cut to 4 to 1,024.

    The cut lowers the means to about 150 in and 200 out. No text of that set is used.
    """
    generator = random.Random(seed)

    def length(mean: float, sigma: float) -> int:
        drawn = generator.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
        return min(1024, max(4, round(drawn)))

    return [
        Lengths(prompt_len=length(160, 1.2), output_len=length(210, 1.0))
        for _ in range(num_requests)
    ]


def describe(mix: Sequence[Lengths]) -> dict[str, Any]:
    """Mean and percentiles of both lengths."""
    parts: dict[str, Callable[[Lengths], int]] = {
        "prompt_len": lambda lengths: lengths.prompt_len,
        "output_len": lambda lengths: lengths.output_len,
    }
    described: dict[str, Any] = {"num_requests": len(mix)}
    for name, part in parts.items():
        values = [part(lengths) for lengths in mix]
        described[name] = {
            "mean": sum(values) / len(values),
            **{f"p{p}": percentile(values, p) for p in (50, 90, 99)},
            "max": max(values),
        }
    return described


def summary(described: dict[str, Any]) -> str:
    """One line about a mix."""
    parts = [f"{described['num_requests']} requests"]
    for name, words in (("prompt_len", "prompts"), ("output_len", "outputs")):
        values = described[name]
        parts.append(
            f"{words} of {values['mean']:.0f} tokens on average (p50 {values['p50']:.0f}, "
            f"p90 {values['p90']:.0f}, p99 {values['p99']:.0f}, at most {values['max']})"
        )
    return ", ".join(parts)
