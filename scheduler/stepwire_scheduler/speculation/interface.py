"""What the planner asks of speculation."""

from __future__ import annotations

import collections.abc
from collections.abc import Sequence as Items
from typing import Protocol, TypeAlias

from stepwire_scheduler.sequence import Sequence
from stepwire_scheduler.speculation.counters import SpeculationCounters

Draft: TypeAlias = collections.abc.Sequence[int]
"""Token ids that may follow a sequence's known and pending ones. Where the executor's draft model
proposes them, only its length counts."""


class Speculator(Protocol):
    """Proposes drafts and learns from what became of them; no I/O, no clock, no randomness.

    The planner calls it for sequences that are about to decode: their next token is sampled
    behind the last known one, or behind the last of `num_pending_tokens` that are still on their
    way. A draft then begins behind the pending ones.
    """

    @property
    def counters(self) -> SpeculationCounters:
        """What became of drafts since the start; observe counts it."""
        ...

    def propose(self, sequences: Items[Sequence], *, num_tokens: int, budget: int) -> list[Draft]:
        """One draft for each of sequences, most of them empty.

        num_tokens: query tokens that the step has beside drafts, those of sequences included.
        budget: most draft tokens in all. No draft is longer than the sequence's request and
        max_num_tokens allow: the token sampled behind the last draft is at most its last one.
        """
        ...

    def observe(self, sequence: Sequence, *, num_drafted: int, num_accepted: int) -> None:
        """Learn of new tokens of a sequence, which token_ids has; num_drafted may be 0."""
        ...

    def note_step(
        self, *, num_tokens: int, busy_ms: float, num_drafts: int = 0, idle_ms: float | None = None
    ) -> None:
        """Learn how long the executor took over a step of num_tokens query tokens, drafts too.

        num_drafts: draft tokens that its plan asked for, verified or not.
        idle_ms: how long the executor had nothing to do before it; None where that does not count
        because there was nothing to plan.
        """
        ...

    def forget(self, sequence: Sequence) -> None:
        """Drop what was kept for a sequence that has ended; its tokens may help later ones."""
        ...
