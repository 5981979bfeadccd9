"""What the lookups of drafts have in common."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol

from stepwire_scheduler.sequence import Sequence
from stepwire_scheduler.speculation.occurrences import OccurrenceIndex

MAX_LINKS = 16
"""Links of a chain that one lookup follows, those of other n-grams in the slot included."""
_INDEXED_LENGTHS = (3,)
MATCH_GRADES = tuple(
    sum(length >= least for least in (2, 3, 4, 5, 6, 8, 12, 16, 24)) for length in range(33)
)
"""Grade of a match of so many tokens: those in one grade are about as good."""
NUM_MATCH_GRADES = MATCH_GRADES[-1] + 1


class Prediction(NamedTuple):
    """Tokens that may follow a sequence's, and how good each is."""

    token_ids: list[int]
    grades: list[int]
    """One for each token: tokens of one grade are accepted about as often, given that those
    before them are."""


NOTHING = Prediction([], [])


class Lookup(Protocol):
    """A way to continue a sequence from tokens that were seen."""

    num_grades: int
    prior: tuple[float, ...]
    """Acceptance of each grade before anything is known."""

    def open(self, sequence: Sequence) -> SequenceIndex:
        """Return an empty index of a sequence's own tokens."""
        ...

    def predict(self, index: SequenceIndex, num_tokens: int) -> Prediction:
        """Continue the tokens of an index that is complete, by at most num_tokens."""
        ...

    def close(self, sequence: Sequence) -> None:
        """Learn that a sequence has ended."""
        ...

    def catch_up(self, num_tokens: int) -> None:
        """Do work that was put off, for about so many tokens."""
        ...


class SequenceIndex:
    """Where n-grams of some lengths occurred in a sequence."""

    __slots__ = ("followed_end", "followed_from", "levels", "tenant", "tokens")

    def __init__(self, sequence: Sequence, lengths: Items[int]) -> None:
        """lengths: of the n-grams, longest first."""
        self.tokens = sequence.token_ids
        self.tenant = sequence.request.tenant
        self.levels = tuple(
            OccurrenceIndex(sequence.token_ids, length=length, capacity=sequence.max_num_tokens)
            for length in lengths
        )
        self.followed_end = 0
        """Where the occurrence ended that the last prediction continued; 0: there was none."""
        self.followed_from = 0
        """Tokens that there were then."""

    @property
    def num_tokens(self) -> int:
        """Leading tokens that are indexed."""
        return self.levels[0].num_tokens

    @property
    def num_bytes(self) -> int:
        """Memory of the index, the tokens left out."""
        return sum(level.num_bytes for level in self.levels)

    def extend(self, stop: int) -> None:
        """Index the tokens before stop that are not indexed yet."""
        for level in self.levels:
            level.extend(stop)


def ngram_lengths(shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths to index so that matches of shortest to longest tokens are found, longest first.

    Few occurrences of a long n-gram are others than those that match longest, and a short one
    finds something where the long one does not.
    """
    return tuple(
        sorted({shortest, *(n for n in _INDEXED_LENGTHS if shortest < n <= longest)}, reverse=True)
    )


def continuation(tokens: array[int], end: int, num_tokens: int) -> list[int]:
    """Return what followed end; past the last token it is taken to repeat from end on."""
    found = tokens[end : end + num_tokens].tolist()
    period = len(tokens) - end
    while len(found) < num_tokens:
        found.append(found[-period])
    return found
