"""What drafts add to the time of a step."""

from __future__ import annotations

from stepwire_scheduler.speculation.step_cost import StepCost

_DEFAULT_BARRIER_MS = 0.7
"""Of an executor that waits until the scheduler has planned with what was accepted."""
_IDLE_WEIGHT = 0.1


class RoundCost:
    """Cost of steps with and without drafts: their query tokens, and the wait behind drafts.

    No further step is planned while one with drafts is in flight, so the executor has nothing to
    do until its result has come and the next plan is back. That wait shows as the idle time
    before the next step.
    """

    def __init__(self) -> None:
        self._steps = StepCost()
        self._barrier_ms = _DEFAULT_BARRIER_MS
        self._plain_idle_ms = 0.0
        self._had_drafts = False

    def note(
        self, *, num_tokens: int, busy_ms: float, num_drafts: int, idle_ms: float | None
    ) -> None:
        """Learn of one step; idle_ms: see Speculator.note_step."""
        self._steps.note(num_tokens, busy_ms)
        self.note_idle(num_drafts=num_drafts, idle_ms=idle_ms)

    def note_idle(self, *, num_drafts: int, idle_ms: float | None) -> None:
        """Learn of the idle time before a step whose own time says nothing of other ones."""
        if idle_ms is not None:
            if self._had_drafts:
                self._barrier_ms += _IDLE_WEIGHT * (idle_ms - self._barrier_ms)
            else:
                self._plain_idle_ms += _IDLE_WEIGHT * (idle_ms - self._plain_idle_ms)
        self._had_drafts = num_drafts > 0

    def busy_ms(self, num_tokens: int) -> float:
        """Return how long the executor computes a step without drafts."""
        return self._steps.estimate_ms(num_tokens)

    def step_ms(self, num_tokens: int) -> float:
        """Return what a step without drafts takes."""
        return self._steps.estimate_ms(num_tokens) + self._plain_idle_ms

    def extra_ms(self, num_tokens: int, num_drafts: int) -> float:
        """Return what drafts add to a step of num_tokens other query tokens."""
        estimate_ms = self._steps.estimate_ms
        barrier_ms = max(0.0, self._barrier_ms - self._plain_idle_ms)
        return estimate_ms(num_tokens + num_drafts) - estimate_ms(num_tokens) + barrier_ms
