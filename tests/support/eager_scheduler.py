"""The scheduler's process, but a draft is taken to cost nothing: whatever is found is sent.

How many drafts pay depends on how long steps take. A test of what they do to the output wants as
many as there can be, good and bad ones, on any machine.

Run: python tests/support/eager_scheduler.py, with the flags of `python -m stepwire_scheduler`
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as Items

from stepwire_scheduler.__main__ import main
from stepwire_scheduler.speculation import adaptive, draft_model
from stepwire_scheduler.speculation.draft_lengths import ExtraMs, Lengths


def choose_all(
    probabilities: Items[Items[float]],
    *,
    base_tokens: int,
    base_ms: float,
    extra_ms: ExtraMs,
    budget: int,
) -> Lengths:
    """Choose every draft token, as far as the budget goes."""
    by_sequence = []
    for draft in probabilities:
        by_sequence.append(min(len(draft), budget))
        budget -= by_sequence[-1]
    return Lengths(by_sequence=by_sequence, gain=2.0, depth=max(by_sequence, default=0))


class EagerLookupSpeculator(adaptive.LookupSpeculator):
    """Looks drafts up in every round."""

    def _could_pay(self, num_sequences: int, num_tokens: int, budget: int) -> bool:
        return True


if __name__ == "__main__":
    from stepwire_scheduler.speculation import factory

    adaptive.choose_lengths = choose_all
    draft_model.choose_lengths = choose_all
    factory.LookupSpeculator = EagerLookupSpeculator  # type: ignore[misc]
    sys.exit(main())
