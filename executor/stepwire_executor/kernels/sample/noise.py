"""Gumbel noise that is a pure function of (seed, stream, position, token id).

The definition is a contract between devices: Philox4x32-10 with
key = (low word of seed, high word of seed) and
counter = (token_id // 4, position, stream, 0), all 32-bit words, gives four words, one for each
of four neighbouring tokens. With bits the word of token_id % 4:
u = ((bits >> 8) + 0.5) / 2^24 and noise = -log(-log(u)).

The counter's fourth word is 0 where the target model's token is sampled. Other draws at the same
position, which must be independent of it, have other values: see `Purpose`.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


class Purpose(IntEnum):
    """What is drawn: the fourth word of the counter."""

    TARGET = 0
    """The target model's token; noise for every token of the vocabulary."""
    DRAFT = 1
    """A token of the draft model."""
    ACCEPT = 2
    """Whether a draft is accepted."""
    RESIDUAL = 3
    """The token in a rejected draft's place."""


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the four words of Philox4x32-10 for each counter.

    counter: four int64 tensors that hold 32-bit words; key: two of them; all broadcast.
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit products wrap around as signed numbers; their bits are the unsigned ones.
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((p1 >> 32) & _MASK) ^ x1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ x3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def noise_bits(seeds: Tensor, positions: Tensor, streams: Tensor, vocab_size: int) -> Tensor:
    """Return the random word of every token: [num_rows, vocab_size] int64, 32 bits each.

    seeds, positions, streams: [num_rows] int64.
    """
    seed, position, stream = (x.unsqueeze(1) for x in (seeds, positions, streams))
    quads = torch.arange((vocab_size + 3) // 4, device=seeds.device).unsqueeze(0)
    words = philox4x32(
        (quads, position & _MASK, stream & _MASK, torch.zeros_like(quads)),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    return torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]


def gumbel_noise(seeds: Tensor, positions: Tensor, streams: Tensor, vocab_size: int) -> Tensor:
    """Return standard Gumbel noise for every token: [num_rows, vocab_size] float32."""
    bits = noise_bits(seeds, positions, streams, vocab_size)
    uniform = ((bits >> 8).double() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(uniform)).float()


def uniforms(seeds: Tensor, positions: Tensor, streams: Tensor, purpose: Purpose) -> Tensor:
    """Return one number of (0, 1) a row: [num_rows] float64, a multiple of 2^-53.

    With the first two words of counter (0, position, stream, purpose):
    u = ((word 0 << 20 | word 1 >> 12) + 0.5) / 2^52. u < 1 holds after rounding, too, and
    u * total < total for every normal float64 total > 0.
    """
    zeros = torch.zeros_like(positions)
    high, low, _, _ = philox4x32(
        (zeros, positions & _MASK, streams & _MASK, zeros + int(purpose)),
        (seeds & _MASK, (seeds >> 32) & _MASK),
    )
    return ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52
