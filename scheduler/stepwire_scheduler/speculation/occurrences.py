"""Where the n-grams of a growing array of tokens occurred."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

_KEY_BITS = 30
"""Of a rolling hash: one digit of a Python integer."""
_MULTIPLIER = 0x9E3779B1
"""2^32 over the golden ratio: Fibonacci hashing, Knuth 6.4."""
_MIN_SLOTS_LOG2 = 6
_MAX_SLOTS_LOG2 = 16


class OccurrenceIndex:
    """Chains of the places where equal n-grams end, most recent first.

    An array of slots by hash holds the latest end, and each end the distance to the one before
    it, as in deflate's window: 4 bytes a token and 4 a slot, no objects, and a few operations for
    each token. N-grams that share a slot share a chain, so callers compare the tokens.
    """

    __slots__ = (
        "_distances",
        "_heads",
        "_key",
        "_key_bits",
        "_key_mask",
        "_shift",
        "_slot_mask",
        "_slots_shift",
        "length",
        "tokens",
    )

    def __init__(self, tokens: array[int], *, length: int, capacity: int) -> None:
        """Index nothing yet.

        tokens: type code "I"; may grow at its end. length: tokens of an n-gram.
        capacity: tokens that are expected at most; more only make chains longer.
        """
        self.tokens = tokens
        self.length = length
        slots_log2 = min(max((capacity - 1).bit_length(), _MIN_SLOTS_LOG2), _MAX_SLOTS_LOG2)
        self._heads = array("I", bytes(4 << slots_log2))
        self._distances = array("I")
        self._shift = _KEY_BITS // length
        self._key_mask = (1 << self._shift * length) - 1
        self._slots_shift = 32 - slots_log2
        self._slot_mask = (1 << slots_log2) - 1
        self._key = 0

    @property
    def num_tokens(self) -> int:
        """Leading tokens that are indexed."""
        return len(self._distances)

    @property
    def num_bytes(self) -> int:
        """Memory of the index, the tokens left out."""
        return self._heads.itemsize * len(self._heads) + self._distances.itemsize * len(
            self._distances
        )

    def extend(self, stop: int) -> None:
        """Index the tokens before stop that are not indexed yet."""
        begin = len(self._distances)
        heads, append = self._heads, self._distances.append
        key, shift, key_mask = self._key, self._shift, self._key_mask
        slots_shift, slot_mask = self._slots_shift, self._slot_mask
        for end, token in enumerate(self.tokens[begin:stop], begin + 1):
            key = (key << shift ^ token) & key_mask
            slot = key * _MULTIPLIER >> slots_shift & slot_mask
            head = heads[slot]
            append(end - head if head else 0)
            heads[slot] = end
        self._key = key

    def before_last(self) -> Iterator[int]:
        """Ends before the last indexed one that may close the same n-gram, latest first."""
        distances = self._distances
        end = len(distances)
        if end < self.length:
            return
        distance = distances[-1]
        while distance:
            end -= distance
            if end < self.length:
                return
            yield end
            distance = distances[end - 1]

    def ends_of(self, ngram: array[int]) -> Iterator[int]:
        """Ends that may close ngram, which has `length` tokens, latest first."""
        key = 0
        for token in ngram:
            key = (key << self._shift ^ token) & self._key_mask
        end = self._heads[key * _MULTIPLIER >> self._slots_shift & self._slot_mask]
        distances = self._distances
        while end >= self.length:
            yield end
            distance = distances[end - 1]
            if not distance:
                return
            end -= distance


def match_length(tokens: array[int], end: int, other: array[int], other_end: int, most: int) -> int:
    """How many tokens before end and before other_end are equal, counted up to most."""
    if end >= most <= other_end and tokens[end - most : end] == other[other_end - most : other_end]:
        return most
    limit = min(end, other_end, most)
    length = 0
    while length < limit and tokens[end - length - 1] == other[other_end - length - 1]:
        length += 1
    return length
