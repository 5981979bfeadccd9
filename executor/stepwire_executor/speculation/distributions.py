"""The distributions that tokens are drawn from, once temperature and limits are applied."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import SamplingBatch
from stepwire_executor.kernels.sample.reference import scaled_scores

_CHUNK_ELEMENTS = 1 << 22
"""Most elements that are computed in float64 at a time."""


def probabilities_of(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Return what `interface.Sample` draws from, in its order: temperature, top-k, min-p, top-p.

    logits: [num_rows, vocab_size] after adjustments, only read; the result has their shape and
    dtype and was normalised in float64. Temperature 0 is all on the likeliest token, of equals the
    one of smaller id. A row that is not finite is NaN throughout. A row depends on itself alone,
    bit for bit.
    """
    vocab_size = logits.shape[1]
    is_finite = logits.amax(dim=-1).isfinite()
    is_greedy = batch.temperature == 0
    is_limited = (
        ((batch.top_k > 0) & (batch.top_k < vocab_size)) | (batch.top_p < 1) | (batch.min_p > 0)
    )
    probabilities = torch.full_like(logits, torch.nan)
    greedy = torch.nonzero(is_finite & is_greedy).squeeze(1)
    probabilities[greedy] = 0.0
    probabilities[greedy, logits[greedy].argmax(dim=-1)] = 1.0
    # Only rows with limits are sorted.
    for kind in (is_limited, ~is_limited):
        chosen = torch.nonzero(is_finite & ~is_greedy & kind).squeeze(1)
        for rows in torch.split(chosen, max(1, _CHUNK_ELEMENTS // vocab_size)):
            weights = scaled_scores(logits[rows], batch, rows).double().exp()
            weights /= cumulative(weights)[:, -1:]
            probabilities[rows] = weights.to(logits.dtype)
    return probabilities


def cumulative(weights: Tensor) -> Tensor:
    """Sum weights, [num_rows, vocab_size] float64, from the first token on, one after the other.

    A sum may be split by how many rows there are; this is not.
    """
    return weights.cumsum(dim=-1)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return token ids, [num_rows] int64, each with a probability in proportion to its weight.

    weights: [num_rows, vocab_size], none negative; uniforms: [num_rows] float64 in (0, 1). A token
    without weight is never drawn; a row without any, or of NaN, gives an id that means nothing.
    """
    sums = cumulative(weights.double())
    targets = uniforms.unsqueeze(1) * sums[:, -1:]
    token_ids = torch.searchsorted(sums, targets, right=True).squeeze(1)
    return token_ids.clamp(max=weights.shape[1] - 1)
