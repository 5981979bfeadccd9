"""Lookups of drafts give what a search of all tokens gives."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_scheduler.speculation.history import SEPARATOR, History
from stepwire_scheduler.speculation.lookup import MATCH_GRADES, MAX_LINKS, ngram_lengths
from stepwire_scheduler.speculation.ngram import NgramLookup
from stepwire_scheduler.speculation.occurrences import OccurrenceIndex
from stepwire_scheduler.speculation.suffix import MAX_MATCH, SuffixLookup
from support.speculation import (
    longest_recent_match,
    make_sequence,
    match_lengths,
    repeat_from,
)

# Fewer than MAX_LINKS, so that no chain is cut.
SHORT = st.lists(st.integers(0, 3), min_size=1, max_size=MAX_LINKS - 1)
LONG = st.lists(st.integers(0, 4), min_size=1, max_size=300)


@given(tokens=SHORT, least=st.integers(1, 5), more=st.integers(0, 11), num=st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_ngram_continues_the_longest_most_recent_match(
    tokens: list[int], least: int, more: int, num: int
) -> None:
    lookup = NgramLookup(min_length=least, max_length=least + more)
    sequence = make_sequence(tokens)
    index = lookup.open(sequence)
    index.extend(len(tokens))
    prediction = lookup.predict(index, num)
    expected = longest_recent_match(tokens, least, least + more)
    if expected is None:
        assert prediction.token_ids == []
    else:
        end, length = expected
        assert prediction.token_ids == repeat_from(tokens, end, num)
        assert prediction.grades == [
            MATCH_GRADES[min(length + i, len(MATCH_GRADES) - 1)] for i in range(num)
        ]


@given(tokens=LONG, cuts=st.lists(st.integers(1, 40), max_size=12), length=st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_chains_hold_every_occurrence_however_the_tokens_arrive(
    tokens: list[int], cuts: list[int], length: int
) -> None:
    known: array[int] = array("I")
    index = OccurrenceIndex(known, length=length, capacity=16)
    for cut in [*cuts, len(tokens)]:
        known.extend(array("I", tokens[len(known) : len(known) + cut]))
        index.extend(len(known))
    ngram = tokens[-length:] if len(tokens) >= length else None
    ends = [
        end
        for end in range(len(tokens) - 1, length - 1, -1)
        if ngram is not None and tokens[end - length : end] == ngram
    ]
    found = list(index.before_last())
    assert found == sorted(found, reverse=True)
    assert [end for end in found if tokens[end - length : end] == ngram] == ends
    if ngram is not None:
        assert [
            end for end in index.ends_of(array("I", ngram)) if tokens[end - length : end] == ngram
        ] == [len(tokens), *ends]


@given(
    own=SHORT,
    past=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=MAX_LINKS // 3), max_size=2),
    num=st.integers(1, 8),
)
@settings(max_examples=300, deadline=None)
def test_suffix_follows_the_weighted_majority(
    own: list[int], past: list[list[int]], num: int
) -> None:
    lookup = SuffixLookup(min_length=1, history_tokens=10_000)
    text: list[int] = []
    for output in past:
        lookup.close(make_sequence([3], output))
        kept = [3, *output]
        text += [*kept, SEPARATOR] if len(kept) > 3 else []
    lookup.catch_up(10_000)
    index = lookup.open(make_sequence(own))
    index.extend(len(own))
    assert lookup.predict(index, num).token_ids == majority(own, text, num)


def majority(own: list[int], past: list[int], num: int) -> list[int]:
    """What SuffixLookup should predict, by brute force."""
    voters: list[tuple[list[int], int]] = []  # what follows, and the match before it
    own_matches = match_lengths(own, own, MAX_MATCH)[1:]
    for least in ngram_lengths(1, MAX_MATCH):
        matches = with_a_say(own_matches, least)
        if matches:
            voters += [(repeat_from(own, end, num), length) for end, length in matches]
            break
    for end, length in with_a_say(match_lengths(own, past, MAX_MATCH), 3):
        following = past[end : end + num]
        if SEPARATOR in following:
            following = following[: following.index(SEPARATOR)]
        voters.append((following, length))
    predicted: list[int] = []
    for i in range(num):
        voters = [voter for voter in voters if len(voter[0]) > i]
        weights: dict[int, int] = {}
        for following, length in voters:
            weights[following[i]] = weights.get(following[i], 0) + 4**length
        if not weights:
            break
        predicted.append(max(weights, key=lambda token: weights[token]))
        voters = [voter for voter in voters if voter[0][i] == predicted[-1]]
    return predicted


def with_a_say(matches: list[tuple[int, int]], least: int) -> list[tuple[int, int]]:
    """Matches of least tokens, at most 3 behind a more recent one; at most 12, or 3 full ones."""
    chosen: list[tuple[int, int]] = []
    for end, length in matches:
        best = max((before for _, before in chosen), default=0)
        if length >= least and length >= best - 3:
            chosen.append((end, length))
        num_full = sum(before == MAX_MATCH for _, before in chosen)
        if len(chosen) == 12 or num_full == 3:
            break
    return chosen


@given(
    added=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 5), st.lists(st.integers(0, 3))),
        max_size=30,
    ),
    max_tokens=st.integers(0, 60),
    step=st.integers(1, 50),
)
@settings(max_examples=200, deadline=None)
def test_history_keeps_the_newest_tokens_of_each_tenant_within_its_bound(
    added: list[tuple[str, int, list[int]]], max_tokens: int, step: int
) -> None:
    history = History(max_tokens=max_tokens, length=2)
    capacity = max_tokens // 2
    said: dict[str, list[int]] = {"a": [], "b": []}
    for tenant, num_prompt, output in added:
        tokens = [9] * num_prompt + output
        history.add(tenant, array("I", tokens), num_prompt_tokens=num_prompt)
        history.catch_up(step)
        piece = tokens[max(0, num_prompt - 8, len(tokens) - capacity + 1) :]
        if output and len(piece) > 2:
            said[tenant] += [*piece, SEPARATOR]
        for name, text in said.items():
            kept = [
                token for index in reversed(history.generations(name)) for token in index.tokens
            ]
            assert kept == text[len(text) - len(kept) :]
            assert len(kept) == history.num_tokens(name) <= max_tokens
            assert kept == text or len(kept) > capacity
    while history.num_behind:
        before = history.num_behind
        history.catch_up(step)
        assert before - history.num_behind == min(step, before)
