"""Speculation that sends a draft only where it pays."""

from __future__ import annotations

from collections.abc import Sequence as Items

from stepwire_scheduler.sequence import Sequence
from stepwire_scheduler.speculation.acceptance import Acceptance, SharedAcceptance
from stepwire_scheduler.speculation.counters import SpeculationCounters
from stepwire_scheduler.speculation.draft_lengths import Lengths, choose_lengths
from stepwire_scheduler.speculation.interface import Draft
from stepwire_scheduler.speculation.limits import START_GAIN, most_drafts
from stepwire_scheduler.speculation.lookup import NOTHING, Lookup, Prediction, SequenceIndex
from stepwire_scheduler.speculation.round_cost import RoundCost

INDEX_TOKENS_PER_ROUND = 1024
"""Tokens that are indexed while one step is planned, about 0.3 ms; a long prompt takes several."""
_JUDGING_INTERVAL = 8
"""Rounds after which it is asked again whether any draft could pay."""
_SAMPLING_INTERVAL = 16
"""Rounds of which one looks drafts up, where none could pay, so that acceptance stays known."""


class LookupSpeculator:
    """Proposes drafts that a lookup finds, as many as are worth their time.

    Each prediction is compared with the tokens that come, sent or not, so that what a draft is
    worth is known where none are sent. How many go into a step is choose_lengths' decision. The
    same calls give the same drafts.
    """

    def __init__(self, lookup: Lookup, *, num_speculative_tokens: int) -> None:
        """num_speculative_tokens: most for one sequence in one step."""
        self.counters = SpeculationCounters()
        self._lookup = lookup
        self._most = num_speculative_tokens
        self._cost = RoundCost()
        self._shared = SharedAcceptance(lookup.prior)
        self._states: dict[Sequence, _State] = {}
        self._has_sent = False
        """Whether the last round sent drafts."""
        self._num_rounds = 0
        self._num_judged = 0
        """Sequences for which _is_hopeless was judged."""
        self._is_hopeless = False

    def propose(self, sequences: Items[Sequence], *, num_tokens: int, budget: int) -> list[Draft]:
        """Look up drafts and choose; see Speculator."""
        drafts: list[Draft] = [()] * len(sequences)
        if budget <= 0 or not sequences:
            return drafts
        self._num_rounds += 1
        if self._num_rounds % _JUDGING_INTERVAL == 1 or self._num_judged != len(sequences):
            self._num_judged = len(sequences)
            self._is_hopeless = not self._could_pay(len(sequences), num_tokens, budget)
        if self._is_hopeless:
            self._has_sent = False
            if self._num_rounds % _SAMPLING_INTERVAL:
                return drafts
        predictions, probabilities = self._predict(sequences)
        if not any(probabilities):
            return drafts
        chosen = self._choose(probabilities, num_tokens=num_tokens, budget=budget)
        self._has_sent = chosen.gain >= (1.0 if self._has_sent else START_GAIN)
        if not self._has_sent:
            return drafts
        for i, length in enumerate(chosen.by_sequence):
            if length:
                sequence, prediction = sequences[i], predictions[i]
                num_pending = sequence.num_pending_tokens
                drafts[i] = prediction.token_ids[num_pending : num_pending + length]
                self._states[sequence].expect(prediction, len(sequence.token_ids))
        return drafts

    def observe(self, sequence: Sequence, *, num_drafted: int, num_accepted: int) -> None:
        """Compare what was predicted with what came; see Speculator."""
        self.counters.add(num_drafted=num_drafted, num_accepted=num_accepted)
        state = self._states.get(sequence)
        if state is not None:
            state.score(sequence)

    def note_step(
        self, *, num_tokens: int, busy_ms: float, num_drafts: int = 0, idle_ms: float | None = None
    ) -> None:
        """Learn what a step cost; see Speculator."""
        self._cost.note(
            num_tokens=num_tokens, busy_ms=busy_ms, num_drafts=num_drafts, idle_ms=idle_ms
        )

    def forget(self, sequence: Sequence) -> None:
        """Drop the index of a sequence; the lookup may keep its tokens."""
        self._states.pop(sequence, None)
        self._lookup.close(sequence)

    def _predict(self, sequences: Items[Sequence]) -> tuple[list[Prediction], list[list[float]]]:
        predictions: list[Prediction] = []
        probabilities: list[list[float]] = []
        num_left = INDEX_TOKENS_PER_ROUND
        for sequence in sequences:
            prediction = NOTHING
            likely: list[float] = []
            most = most_drafts(sequence, self._most)
            if most > 0:
                state = self._states.get(sequence)
                if state is None:
                    state = _State(self._lookup.open(sequence), Acceptance(self._shared))
                    self._states[sequence] = state
                index = state.index
                num_known = len(sequence.token_ids)
                num_behind = num_known - index.num_tokens
                index.extend(index.num_tokens + min(num_behind, num_left))
                num_left -= min(num_behind, num_left)
                if index.num_tokens == num_known:
                    num_pending = sequence.num_pending_tokens
                    prediction = self._lookup.predict(index, num_pending + most)
                    if len(prediction.token_ids) > num_pending:
                        if not state.is_expecting:
                            state.expect(prediction, num_known)
                        likely = state.acceptance.probabilities(
                            prediction.grades, num_skipped=num_pending
                        )
            predictions.append(prediction)
            probabilities.append(likely)
        self._lookup.catch_up(num_left)
        return predictions, probabilities

    def _choose(
        self, probabilities: Items[Items[float]], *, num_tokens: int, budget: int
    ) -> Lengths:
        cost = self._cost
        return choose_lengths(
            probabilities,
            base_tokens=len(probabilities),
            base_ms=cost.step_ms(len(probabilities)),
            extra_ms=lambda num_drafts, depth: cost.extra_ms(num_tokens, num_drafts),
            budget=budget,
        )

    def _could_pay(self, num_sequences: int, num_tokens: int, budget: int) -> bool:
        """Whether drafts accepted as often as the best ones would pay, for one sequence or all."""
        cost = self._cost
        best = max(self._shared.rates)
        base_ms = cost.step_ms(num_sequences)
        least_gain = 1.0 if self._has_sent else START_GAIN
        for num_drafting in {1, min(num_sequences, max(1, budget // self._most))}:
            expected = 0.0
            for length in range(1, self._most + 1):
                expected += num_drafting * best**length
                extra_ms = cost.extra_ms(num_tokens, num_drafting * length)
                gain = (1 + expected / num_sequences) / (1 + extra_ms / base_ms)
                if gain >= least_gain:
                    return True
        return False


class _State:
    """What is kept for one sequence."""

    __slots__ = ("_begin", "_num_scored", "_prediction", "acceptance", "index")

    def __init__(self, index: SequenceIndex, acceptance: Acceptance) -> None:
        self.index = index
        self.acceptance = acceptance
        self._prediction = NOTHING
        self._begin = 0
        self._num_scored = 0

    @property
    def is_expecting(self) -> bool:
        """Whether a prediction has come true so far and goes on."""
        return self._num_scored < len(self._prediction.token_ids)

    def expect(self, prediction: Prediction, begin: int) -> None:
        """Compare with the tokens from begin on, in the place of what was expected before."""
        self._prediction, self._begin, self._num_scored = prediction, begin, 0

    def score(self, sequence: Sequence) -> None:
        """Learn from the tokens that came, as far as those before them were predicted."""
        predicted, grades = self._prediction
        i, begin, token_ids = self._num_scored, self._begin, sequence.token_ids
        while i < len(predicted) and begin + i < len(token_ids):
            is_accepted = token_ids[begin + i] == predicted[i]
            self.acceptance.score(grades[i], is_accepted=is_accepted)
            if not is_accepted:
                self._prediction = NOTHING
                i = 0
                break
            i += 1
        self._num_scored = i
