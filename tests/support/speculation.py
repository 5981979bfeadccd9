"""Sequences for speculation, and lookups by brute force."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items

from stepwire_scheduler.sequence import Request, SamplingParams, Sequence
from stepwire_scheduler.speculation.interface import Speculator


def make_sequence(
    prompt: Items[int] = (1,),
    output: Items[int] = (),
    *,
    max_tokens: int = 1_000,
    tenant: str = "",
    num_speculative_tokens: int | None = None,
) -> Sequence:
    """A sequence that decodes, with a prompt and what it has generated."""
    sequence = Sequence(
        Request(
            request_id="r",
            prompt_token_ids=array("I", prompt),
            sampling_params=SamplingParams(
                max_tokens=max_tokens, num_speculative_tokens=num_speculative_tokens
            ),
            tenant=tenant,
        ),
        0,
        order_key=(0, 0),
        stop_ids=frozenset(),
    )
    sequence.token_ids.extend(array("I", output))
    return sequence


def match_lengths(tokens: Items[int], other: Items[int], most: int) -> list[tuple[int, int]]:
    """Of each end in other, latest first, how many tokens before it tokens ends with."""
    found: list[tuple[int, int]] = []
    for end in range(len(other), 0, -1):
        length = 0
        while (
            length < min(most, end, len(tokens))
            and other[end - 1 - length] == tokens[len(tokens) - 1 - length]
        ):
            length += 1
        found.append((end, length))
    return found


def repeat_from(tokens: Items[int], end: int, num_tokens: int) -> list[int]:
    """What follows end if the tokens behind it repeat for ever."""
    period = list(tokens[end:])
    return [period[i % len(period)] for i in range(num_tokens)]


def longest_recent_match(tokens: Items[int], least: int, most: int) -> tuple[int, int] | None:
    """End and length of the longest earlier match of the last tokens, the latest of equal ones."""
    matches = [
        (length, end) for end, length in match_lengths(tokens, tokens, most)[1:] if length >= least
    ]
    if not matches:
        return None
    length, end = max(matches)
    return end, length


def teach_cost(speculator: Speculator, *, step_ms: float, token_ms: float) -> None:
    """Let a speculator see steps of a constant part and one for each query token."""
    for _ in range(4):
        for num_tokens in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128):
            speculator.note_step(
                num_tokens=num_tokens, busy_ms=step_ms + token_ms * num_tokens, idle_ms=0.0
            )
