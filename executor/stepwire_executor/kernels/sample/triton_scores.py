"""Scores, the order of tokens by them, and what is decided for a row before a token is drawn.

A key is the bits of (largest - logit) / temperature: as integers keys rise as tokens become less
likely, and tokens of one key tie.
"""

from __future__ import annotations

import triton
import triton.language as tl

SETTLED = tl.constexpr(0)
"""Route of a row whose token is the likeliest, or that has none."""
CANDIDATES = tl.constexpr(1)
"""Route of a row whose few tokens that the limits can keep are looked at alone."""
SEARCH = tl.constexpr(2)
"""Route of a row with too many of them: its limits are searched among all tokens."""
WHOLE = tl.constexpr(3)
"""Route of a row without limits."""

NEVER_DRAWN = tl.constexpr(0x42D00000)
"""Key of the score -104. Its weight is 0 in float32, and no noise exceeds 18."""
NO_TOKEN = tl.constexpr(0x7FFFFFFF)
"""The key past the vocabulary's end, and an id above every token's."""


@triton.jit
def scores_of(x, largest, inverse_temperature):
    """Return (x - largest) / temperature, rounded as IEEE 754 says.

    inverse_temperature is a float64: no quotient of two float32 is so near to the middle of two
    others that the product's error of 2^-52 could round it to the wrong one. This takes a third of
    a float32 division's instructions, and no branch.
    """
    return ((x - largest).to(tl.float64) * inverse_temperature).to(tl.float32)


@triton.jit
def keys_of(scores):
    """Return the keys, int32, of scores, none of which is above 0."""
    return tl.abs(scores).to(tl.int32, bitcast=True)


@triton.jit
def load_scores(row_ptr, ids, vocab_size, largest, inverse_temperature):
    """Return the scores and keys of tokens of a row; past the vocabulary -inf and NO_TOKEN."""
    mask = ids < vocab_size
    x = tl.load(row_ptr + ids, mask=mask, other=float("-inf"))
    scores = scores_of(x, largest, inverse_temperature)
    return scores, tl.where(mask, keys_of(scores), NO_TOKEN)


@triton.jit
def is_limited_by_rank(top_k, vocab_size):
    """Return whether top_k leaves tokens out."""
    return (top_k > 0) & (top_k < vocab_size)
