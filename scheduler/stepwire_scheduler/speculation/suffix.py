"""Drafts that the places where a sequence's last tokens occurred vote for."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice
from operator import itemgetter
from typing import TypeAlias

from stepwire_scheduler.sequence import Sequence
from stepwire_scheduler.speculation.history import SEPARATOR, History
from stepwire_scheduler.speculation.lookup import (
    MATCH_GRADES,
    MAX_LINKS,
    NOTHING,
    NUM_MATCH_GRADES,
    Prediction,
    SequenceIndex,
    ngram_lengths,
)
from stepwire_scheduler.speculation.occurrences import match_length

MAX_VOTERS = 12
_MAX_FULL_VOTERS = 3
"""Occurrences in one text that are asked, and those of the longest match among them."""
MAX_MATCH = 16
"""Tokens that are compared."""
_MAX_LAG = 3
_HISTORY_NGRAM_LENGTH = 3
_SHARES = (0.6, 0.95)
"""Bounds between the levels of a token's share of the votes."""
_NUM_LEVELS = len(_SHARES) + 1
_WEIGHTS = tuple(float(4**length) for length in range(MAX_MATCH + 1))
"""Of a vote, by the length of the match."""

Voter: TypeAlias = "tuple[array[int], int, int, bool]"
"""Tokens, the end of the match in them, its length, and whether they are the sequence's own."""


class SuffixLookup:
    """Lets earlier occurrences vote for the next token, and those that agree for the one behind.

    As in SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975) the counts below a suffix of the
    sequence give the likely continuation and its probability, from its own tokens and from the
    tenant's finished sequences. The counts are made when they are asked for, from the most recent
    occurrences, a longer match counting more: no tree has to be kept up to date.
    """

    num_grades = NUM_MATCH_GRADES * _NUM_LEVELS
    prior: tuple[float, ...] = tuple(
        likely * certain
        for likely in (0.1, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
        for certain in (0.5, 0.8, 1.0)
    )

    def __init__(self, *, min_length: int, history_tokens: int) -> None:
        """min_length: fewest tokens that are compared. history_tokens: kept for each tenant."""
        self._lengths = ngram_lengths(min_length, MAX_MATCH)
        self.history = History(
            max_tokens=history_tokens, length=max(min_length, _HISTORY_NGRAM_LENGTH)
        )

    def open(self, sequence: Sequence) -> SequenceIndex:
        return SequenceIndex(sequence, self._lengths)

    def predict(self, index: SequenceIndex, num_tokens: int) -> Prediction:
        voters = self._voters(index)
        if not voters:
            return NOTHING
        return _vote(voters, num_tokens)

    def close(self, sequence: Sequence) -> None:
        self.history.add(
            sequence.request.tenant,
            sequence.token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens,
        )

    def catch_up(self, num_tokens: int) -> None:
        self.history.catch_up(num_tokens)

    def _voters(self, index: SequenceIndex) -> list[Voter]:
        tokens = index.tokens
        voters: list[Voter] = []
        for level in index.levels:
            if _collect(voters, tokens, tokens, level.before_last(), level.length, is_own=True):
                break
        for other in self.history.generations(index.tenant):
            length = other.length
            if len(tokens) >= length:
                ends = other.ends_of(tokens[-length:])
                _collect(voters, tokens, other.tokens, ends, length, is_own=False)
        return voters


def _collect(
    voters: list[Voter],
    tokens: array[int],
    other: array[int],
    ends: Iterator[int],
    least: int,
    *,
    is_own: bool,
) -> bool:
    """Add the occurrences of the last tokens in other that match longest, and say if there are any.

    Those that match by more than _MAX_LAG tokens less than one before them have no say.
    """
    num_tokens = len(tokens)
    num_full = num_added = back = 0
    best = least + _MAX_LAG
    wanted = tokens[-1]
    for end in islice(ends, MAX_LINKS):
        if end <= back or other[end - 1 - back] != wanted:
            continue
        length = match_length(tokens, num_tokens, other, end, MAX_MATCH)
        if length < least or length < best - _MAX_LAG:
            continue
        voters.append((other, end, length, is_own))
        num_added += 1
        if length > best:
            best = length
            back = best - _MAX_LAG - 1
            wanted = tokens[-1 - back]
        num_full += length == MAX_MATCH
        if num_full == _MAX_FULL_VOTERS or num_added == MAX_VOTERS:
            break
    return num_added > 0


def _vote(voters: list[Voter], num_tokens: int) -> Prediction:
    """Follow the heaviest token at every position, with those who voted for it."""
    token_ids: list[int] = []
    grades: list[int] = []
    if _are_unanimous(voters, num_tokens):
        voters = [max(voters, key=itemgetter(2))]
    for i in range(num_tokens):
        if len(voters) == 1:
            _follow(voters[0], num_tokens, token_ids, grades)
            break
        votes: dict[int, float] = {}
        cast: list[tuple[int, Voter]] = []
        for voter in voters:
            tokens, end, length, is_own = voter
            position = end + i
            if position < len(tokens):
                token = tokens[position]
                if token == SEPARATOR:
                    continue
            elif is_own:
                token = token_ids[position - len(tokens)]  # repeats itself
            else:
                continue
            votes[token] = votes.get(token, 0) + _WEIGHTS[length]
            cast.append((token, voter))
        if not cast:
            break
        chosen = max(votes, key=votes.__getitem__)  # of equal ones the first, the most recent
        share = votes[chosen] / sum(votes.values())
        voters = [voter for token, voter in cast if token == chosen]
        length = min(max(voter[2] for voter in voters) + i, len(MATCH_GRADES) - 1)
        level = (share >= _SHARES[0]) + (share >= _SHARES[1])
        token_ids.append(chosen)
        grades.append(MATCH_GRADES[length] * _NUM_LEVELS + level)
    return Prediction(token_ids, grades)


def _are_unanimous(voters: list[Voter], num_tokens: int) -> bool:
    """Whether all go on alike, each for as long as is asked: the usual case in a copy."""
    tokens, end, _, _ = voters[0]
    first = tokens[end : end + num_tokens]
    return len(first) == num_tokens and all(
        tokens[end : end + num_tokens] == first for tokens, end, _, _ in voters
    )


def _follow(voter: Voter, num_tokens: int, token_ids: list[int], grades: list[int]) -> None:
    """Complete a prediction with what the only voter left says."""
    tokens, end, length, is_own = voter
    num_known = len(token_ids)
    found = tokens[end + num_known : end + num_tokens].tolist()
    if is_own:
        token_ids += found
        while len(token_ids) < num_tokens:
            token_ids.append(token_ids[end - len(tokens)])
    else:
        token_ids += found[: found.index(SEPARATOR)] if SEPARATOR in found else found
    grades += [
        MATCH_GRADES[min(length + i, len(MATCH_GRADES) - 1)] * _NUM_LEVELS + _NUM_LEVELS - 1
        for i in range(num_known, len(token_ids))
    ]
