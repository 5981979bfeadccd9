"""Speculation with drafts of the executor's own model: only their lengths are chosen here."""

from __future__ import annotations

from collections.abc import Sequence as Items

from stepwire_scheduler.sequence import Sequence
from stepwire_scheduler.speculation.acceptance import Acceptance, SharedAcceptance
from stepwire_scheduler.speculation.counters import SpeculationCounters
from stepwire_scheduler.speculation.draft_lengths import choose_lengths
from stepwire_scheduler.speculation.interface import Draft
from stepwire_scheduler.speculation.limits import START_GAIN, most_drafts
from stepwire_scheduler.speculation.round_cost import RoundCost

_PRIOR = 0.7
_MIN_PROBE_INTERVAL = 32
_MAX_PROBE_INTERVAL = 1024
"""Rounds without drafts between two probes; doubles while they bring nothing."""
_PROBE_ROUNDS = 4
"""Most rounds of one probe: the draft model first computes what it has missed."""
_PROBE_TOKENS = 2
_COST_WEIGHT = 0.1
_DEFAULT_SHARE = 0.25
"""Guess: a token of the draft model takes this part of a step of the model itself."""


class DraftModelSpeculator:
    """Asks the executor's draft model for as many tokens as are worth their time.

    Without drafts nothing is learned of their acceptance: what is known of a sequence fades
    towards the average of all, and where nobody drafts a probe is sent now and then. All positions
    of a draft count alike: one that fails at once says as much about the later ones, which are
    hardly seen then.
    """

    def __init__(self, *, num_speculative_tokens: int) -> None:
        """num_speculative_tokens: most for one sequence in one step."""
        self.counters = SpeculationCounters()
        self._most = num_speculative_tokens
        self._grades = [0] * num_speculative_tokens
        self._cost = RoundCost()
        self._shared = SharedAcceptance([_PRIOR])
        self._acceptances: dict[Sequence, Acceptance] = {}
        self._draft_ms: float | None = None
        """Of one token of every draft."""
        self._depth = 0
        """Of the drafts that were sent last."""
        self._has_sent = False
        self._num_rounds_without = 0
        self._probe_interval = _MIN_PROBE_INTERVAL

    def propose(self, sequences: Items[Sequence], *, num_tokens: int, budget: int) -> list[Draft]:
        """Choose the lengths of drafts; see Speculator."""
        most = [max(0, most_drafts(sequence, self._most)) for sequence in sequences]
        if budget <= 0 or not any(most):
            return [()] * len(sequences)
        lengths = self._lengths(sequences, most, num_tokens=num_tokens, budget=budget)
        if any(lengths):
            self._has_sent = True
            self._num_rounds_without = 0
            self._probe_interval = _MIN_PROBE_INTERVAL
        else:
            self._has_sent = False
            self._num_rounds_without += 1
            if self._num_rounds_without >= self._probe_interval:
                lengths = _shared_out([min(length, _PROBE_TOKENS) for length in most], budget)
                if self._num_rounds_without >= self._probe_interval + _PROBE_ROUNDS:
                    self._end_probe()
        self._depth = max(lengths)
        return [(0,) * length for length in lengths]

    def observe(self, sequence: Sequence, *, num_drafted: int, num_accepted: int) -> None:
        """Learn which drafts were accepted; see Speculator."""
        self.counters.add(num_drafted=num_drafted, num_accepted=num_accepted)
        acceptance = self._acceptances.get(sequence)
        if acceptance is None:
            return
        if not num_drafted:
            acceptance.fade()
            return
        for position in range(min(num_accepted + 1, num_drafted)):
            acceptance.score(0, is_accepted=position < num_accepted)
        if not self._has_sent and self._num_rounds_without:
            self._end_probe()

    def note_step(
        self, *, num_tokens: int, busy_ms: float, num_drafts: int = 0, idle_ms: float | None = None
    ) -> None:
        """Learn what a step cost, and what of it the draft model did; see Speculator."""
        if num_drafts and self._depth:
            draft_ms = max(0.0, busy_ms - self._cost.busy_ms(num_tokens)) / self._depth
            if self._draft_ms is None:
                self._draft_ms = draft_ms
            self._draft_ms += _COST_WEIGHT * (draft_ms - self._draft_ms)
            self._cost.note_idle(num_drafts=num_drafts, idle_ms=idle_ms)
        else:
            self._cost.note(
                num_tokens=num_tokens, busy_ms=busy_ms, num_drafts=num_drafts, idle_ms=idle_ms
            )

    def forget(self, sequence: Sequence) -> None:
        """Drop what was learned of a sequence."""
        self._acceptances.pop(sequence, None)

    def _lengths(
        self, sequences: Items[Sequence], most: list[int], *, num_tokens: int, budget: int
    ) -> list[int]:
        cost = self._cost
        draft_ms = self._draft_ms
        if draft_ms is None:
            draft_ms = _DEFAULT_SHARE * cost.busy_ms(len(sequences))
        chosen = choose_lengths(
            [
                self._acceptance(sequence).probabilities(self._grades[:length])
                for sequence, length in zip(sequences, most, strict=True)
            ],
            base_tokens=len(sequences),
            base_ms=cost.step_ms(len(sequences)),
            extra_ms=lambda count, depth: cost.extra_ms(num_tokens, count) + depth * draft_ms,
            budget=budget,
        )
        pays = chosen.gain >= (1.0 if self._has_sent else START_GAIN)
        return chosen.by_sequence if pays else [0] * len(sequences)

    def _acceptance(self, sequence: Sequence) -> Acceptance:
        acceptance = self._acceptances.get(sequence)
        if acceptance is None:
            acceptance = self._acceptances[sequence] = Acceptance(self._shared)
        return acceptance

    def _end_probe(self) -> None:
        self._num_rounds_without = 0
        self._probe_interval = min(2 * self._probe_interval, _MAX_PROBE_INTERVAL)


def _shared_out(lengths: list[int], budget: int) -> list[int]:
    """Cut lengths, the last ones first, to a sum of budget."""
    shares: list[int] = []
    for length in lengths:
        shares.append(min(length, budget))
        budget -= shares[-1]
    return shares
