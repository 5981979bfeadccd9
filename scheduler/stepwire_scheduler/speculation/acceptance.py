"""How often draft tokens are accepted, learned from those that were scored."""

from __future__ import annotations

from collections.abc import Sequence as Items

_SHARED_MEMORY = 100
_SEQUENCE_MEMORY = 20
"""Scores of one grade after which an older one counts 1/e."""
_PRIOR_WEIGHT = 8.0
_SHARED_WEIGHT = 4.0
"""Scores that the more general estimate is worth."""
_UNSEEN_MEMORY = 256
"""Tokens without a score after which a sequence's own ones count 1/e."""


class SharedAcceptance:
    """Acceptance of each grade over all sequences: what is known of one that begins."""

    __slots__ = ("_num_accepted", "_num_scored", "_prior", "rates")

    def __init__(self, prior: Items[float]) -> None:
        """prior: acceptance by grade before any score."""
        self._prior = tuple(prior)
        self._num_scored = [0.0] * len(prior)
        self._num_accepted = [0.0] * len(prior)
        self.rates = list(prior)
        """By grade, 0 to 1."""

    def score(self, grade: int, *, is_accepted: bool) -> None:
        keep = 1 - 1 / _SHARED_MEMORY
        scored = self._num_scored[grade] = self._num_scored[grade] * keep + 1
        accepted = self._num_accepted[grade] = self._num_accepted[grade] * keep + is_accepted
        self.rates[grade] = (accepted + self._prior[grade] * _PRIOR_WEIGHT) / (
            scored + _PRIOR_WEIGHT
        )


class Acceptance:
    """Acceptance of each grade for one sequence: its own recent scores, then everybody's."""

    __slots__ = ("_num_accepted", "_num_scored", "_num_unseen", "_shared")

    def __init__(self, shared: SharedAcceptance) -> None:
        self._shared = shared
        self._num_scored = [0.0] * len(shared.rates)
        self._num_accepted = [0.0] * len(shared.rates)
        self._num_unseen = 0

    def score(self, grade: int, *, is_accepted: bool) -> None:
        """Learn what became of a draft token all of whose predecessors were accepted."""
        self._settle()
        keep = 1 - 1 / _SEQUENCE_MEMORY
        self._num_scored[grade] = self._num_scored[grade] * keep + 1
        self._num_accepted[grade] = self._num_accepted[grade] * keep + is_accepted
        self._shared.score(grade, is_accepted=is_accepted)

    def fade(self) -> None:
        """Say that a token came about which nothing was predicted: what is known ages."""
        self._num_unseen += 1

    def probabilities(self, grades: Items[int], *, num_skipped: int = 0) -> list[float]:
        """Probability that each token of a draft is accepted along with all those before it.

        num_skipped: leading tokens that must come true as well but are none of the draft.
        """
        self._settle()
        scored, accepted, rates = self._num_scored, self._num_accepted, self._shared.rates
        probability = 1.0
        found: list[float] = []
        for grade in grades:
            probability *= (accepted[grade] + _SHARED_WEIGHT * rates[grade]) / (
                scored[grade] + _SHARED_WEIGHT
            )
            found.append(probability)
        return found[num_skipped:]

    def _settle(self) -> None:
        if not self._num_unseen:
            return
        keep = (1 - 1 / _UNSEEN_MEMORY) ** self._num_unseen
        self._num_unseen = 0
        self._num_scored = [count * keep for count in self._num_scored]
        self._num_accepted = [count * keep for count in self._num_accepted]
