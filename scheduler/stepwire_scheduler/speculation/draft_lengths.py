"""How many drafts pay: those whose expected tokens are worth the time they add to a step."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TypeAlias

MIN_PROBABILITY = 0.02
"""A draft token that is less likely is not considered."""
_FINE_STEPS = 32
"""Numbers of drafts that are all compared; above that, every 16th part more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """A choice of drafts."""

    by_sequence: list[int]
    gain: float
    """Expected tokens a millisecond, as a ratio to those without drafts; 1 where there are none."""
    depth: int
    """The longest draft."""


ExtraMs: TypeAlias = Callable[[int, int], float]
"""From the number of draft tokens and the longest draft to the milliseconds that they add."""


def choose_lengths(
    probabilities: Items[Items[float]],
    *,
    base_tokens: int,
    base_ms: float,
    extra_ms: ExtraMs,
    budget: int,
) -> Lengths:
    """Take draft tokens in the order of probability as far as tokens a millisecond rise most.

    probabilities: for each sequence and position that the draft is accepted up to there; not
    rising along a draft, so that a token comes after those before it.
    base_tokens, base_ms: what the sequences' step yields and costs without drafts.
    """
    ranked = sorted(
        (-probability, i, j)
        for i, draft in enumerate(probabilities)
        for j, probability in enumerate(draft)
        if probability >= MIN_PROBABILITY
    )[:budget]
    base_rate = base_tokens / base_ms
    best_rate, best_count, best_depth = base_rate, 0, 0
    expected, depth = float(base_tokens), 0
    looked_at = 0
    for count, (negative, _, j) in enumerate(ranked, 1):
        expected -= negative
        if j >= depth:
            depth = j + 1
        if count > looked_at or count == len(ranked):
            looked_at = count if count < _FINE_STEPS else count + (count >> 4)
            rate = expected / (base_ms + extra_ms(count, depth))
            if rate > best_rate:
                best_rate, best_count, best_depth = rate, count, depth
    by_sequence = [0] * len(probabilities)
    for _, i, _ in ranked[:best_count]:
        by_sequence[i] += 1
    return Lengths(by_sequence=by_sequence, gain=best_rate / base_rate, depth=best_depth)
