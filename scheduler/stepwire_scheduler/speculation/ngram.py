"""Drafts that continue the longest recent repetition of a sequence's last tokens."""

from __future__ import annotations

from itertools import islice

from stepwire_scheduler.sequence import Sequence
from stepwire_scheduler.speculation.lookup import (
    MATCH_GRADES,
    MAX_LINKS,
    NOTHING,
    NUM_MATCH_GRADES,
    Prediction,
    SequenceIndex,
    continuation,
    ngram_lengths,
)
from stepwire_scheduler.speculation.occurrences import match_length


class NgramLookup:
    """Finds the last n tokens again, n as large as it goes; of equal ones, the most recent.

    Prompt lookup decoding (Saxena 2023), with an index in the place of a search.
    """

    num_grades = NUM_MATCH_GRADES
    prior: tuple[float, ...] = (0.1, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)

    def __init__(self, *, min_length: int, max_length: int) -> None:
        """min_length, max_length: fewest and most tokens that are compared."""
        self._max_length = max_length
        self._lengths = ngram_lengths(min_length, max_length)

    def open(self, sequence: Sequence) -> SequenceIndex:
        return SequenceIndex(sequence, self._lengths)

    def predict(self, index: SequenceIndex, num_tokens: int) -> Prediction:
        length, end = self._longest_match(index)
        if not length:
            return NOTHING
        return Prediction(
            continuation(index.tokens, end, num_tokens), match_grades(length, num_tokens)
        )

    def _longest_match(self, index: SequenceIndex) -> tuple[int, int]:
        """Return the length of the longest match and where it ends; 0: there is none."""
        tokens, num_tokens, most = index.tokens, len(index.tokens), self._max_length
        for level in index.levels:
            best, best_end = level.length - 1, 0
            wanted = tokens[-1 - best] if best < num_tokens else -1
            for end in islice(level.before_last(), MAX_LINKS):
                # Only what agrees one token further back can be longer.
                if end > best and tokens[end - 1 - best] == wanted:
                    length = match_length(tokens, num_tokens, tokens, end, most)
                    if length > best:
                        best, best_end = length, end
                        if best == most:
                            break
                        wanted = tokens[-1 - best]
            if best_end:
                return best, best_end
        return 0, 0

    def close(self, sequence: Sequence) -> None:
        """Keep nothing."""

    def catch_up(self, num_tokens: int) -> None:
        """Nothing is put off."""


def match_grades(length: int, num_tokens: int) -> list[int]:
    """Of tokens behind a match: each that is accepted makes it longer for the next."""
    return [MATCH_GRADES[min(length + i, len(MATCH_GRADES) - 1)] for i in range(num_tokens)]
