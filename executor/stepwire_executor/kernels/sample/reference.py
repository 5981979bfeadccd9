"""Sampling in torch: the definition that other devices' kernels are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import SampleOutput, SamplingBatch
from stepwire_executor.kernels.sample.noise import gumbel_noise


def sample(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
    """Choose a token a row by greedy or Gumbel-max sampling; see `interface.Sample`."""
    maximum = logits.amax(dim=-1)  # NaN if any is
    is_finite = maximum.isfinite()
    token_ids = torch.where(is_finite, logits.argmax(dim=-1), 0)
    rows = torch.nonzero((batch.temperature > 0) & is_finite).squeeze(1)
    if rows.numel():
        scores = scaled_scores(logits[rows], batch, rows)
        scores += gumbel_noise(
            batch.seeds[rows], batch.positions[rows], batch.streams[rows], logits.shape[1]
        )
        token_ids[rows] = scores.argmax(dim=-1)
    return SampleOutput(token_ids=token_ids, is_finite=is_finite)


def scaled_scores(logits: Tensor, batch: SamplingBatch, rows: Tensor) -> Tensor:
    """Return (logit - largest) / temperature, and -inf for tokens that may not be sampled.

    logits: [num_rows, vocab_size], those of rows of batch. Subtracting first keeps tiny
    temperatures from overflowing. Ties at a limit are kept by smaller id.
    """
    temperature = batch.temperature[rows].unsqueeze(1)
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    vocab_size = logits.shape[1]
    top_k, top_p, min_p = (x[rows].unsqueeze(1) for x in (batch.top_k, batch.top_p, batch.min_p))
    top_k = torch.where(top_k <= 0, vocab_size, top_k)
    if not bool(((top_k < vocab_size) | (top_p < 1) | (min_p > 0)).any()):
        return scores
    ordered, token_ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    ranks = torch.arange(vocab_size, device=logits.device)
    weights = torch.exp(ordered)
    is_kept = (ranks < top_k) & (weights >= min_p)
    mass = torch.where(is_kept, weights, 0.0).double()
    # A token stays if the likelier ones before it do not reach top_p already.
    before = mass.cumsum(dim=-1) - mass
    is_kept &= (before < top_p.double() * mass.sum(dim=-1, keepdim=True)) | (top_p >= 1)
    is_kept[:, 0] = True
    return scores.masked_fill(~is_kept.gather(1, token_ids.argsort(dim=-1)), -torch.inf)
