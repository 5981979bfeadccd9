"""What a stream tells beside its output: the queue that it met, tokens and time that it took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """What the stream's first event tells, whenever it is read."""

    queued_unix_ms: int
    num_prompt_tokens: int
    num_waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    num_prompt_tokens: int
    num_output_tokens: int
    """Over all sequences."""
    num_cached_tokens: int
    """Of the first sequence."""
    num_preemptions: int
    num_draft_tokens: int = 0
    """Proposed by speculation and verified, over all sequences."""
    num_accepted_tokens: int = 0
    """Those of them that the model sampled as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """From the request's arrival, milliseconds; tpot_ms is of the longest sequence."""

    queue_ms: float
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float
