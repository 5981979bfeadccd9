"""How many drafts a sequence may have, and from which gain on they are sent."""

from __future__ import annotations

from stepwire_scheduler.sequence import Sequence

START_GAIN = 1.05
"""Ratio of expected tokens a millisecond from which on drafts are sent again after none were."""


def most_drafts(sequence: Sequence, most: int) -> int:
    """Draft tokens that a sequence may have: as its request and what is left to generate allow.

    The token sampled behind the last draft is at most the sequence's last one; below 1: none.
    """
    asked = sequence.request.sampling_params.num_speculative_tokens
    if asked is not None and asked < most:
        most = asked
    num_known = len(sequence.token_ids) + sequence.num_pending_tokens
    return min(most, sequence.max_num_tokens - num_known - 1)
