"""What became of drafts, counted for metrics."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class SpeculationCounters:
    """Totals since the start; they only grow."""

    num_drafts: int = 0
    """Drafts of one sequence in one step that were verified."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list[int])
    """Of the tokens at each position of a draft, those that were accepted; grows on demand."""

    def add(self, *, num_drafted: int, num_accepted: int) -> None:
        """Count one draft that was verified; one of no tokens is none."""
        assert 0 <= num_accepted <= num_drafted, (num_accepted, num_drafted)
        if not num_drafted:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        per_position = self.accepted_per_position
        per_position.extend([0] * (num_drafted - len(per_position)))
        for i in range(num_accepted):
            per_position[i] += 1
