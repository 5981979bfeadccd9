"""Log-probabilities of sampled tokens and their likeliest rivals."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import RowLogprobs, SamplingBatch


def unadjusted_rows(logits: Tensor, batch: SamplingBatch) -> dict[int, Tensor]:
    """Copy the rows that will be adjusted and whose log-probabilities are wanted."""
    return {
        change.row: logits[change.row].clone()
        for change in batch.adjustments
        if batch.num_logprobs[change.row] >= 0
    }


def row_logprobs(
    logits: Tensor, unadjusted: dict[int, Tensor], token_ids: Tensor, batch: SamplingBatch
) -> tuple[RowLogprobs | None, ...]:
    """Return the log-probabilities each row asked for, None for the others."""
    return tuple(
        None
        if num_top < 0
        else _describe(unadjusted.get(row, logits[row]), int(token_ids[row]), num_top)
        for row, num_top in enumerate(batch.num_logprobs)
    )


def _describe(row: Tensor, token_id: int, num_top: int) -> RowLogprobs:
    """Describe token_id and the num_top likeliest tokens of row, [vocab_size] float32."""
    log_total = torch.logsumexp(row.double(), dim=0)

    def logprobs(token_ids: Tensor) -> list[float]:
        # float32 is all the precision the logits have, and hides the order of the float64 sum.
        return [float(x) for x in (row[token_ids].double() - log_total).float()]

    num_top = min(num_top, row.shape[0])
    top_token_ids = _top(row, num_top)
    chosen = row[token_id]
    is_ahead = row > chosen
    is_ahead[:token_id] |= row[:token_id] == chosen
    return RowLogprobs(
        logprob=logprobs(torch.tensor([token_id], device=row.device))[0],
        rank=1 + int(is_ahead.sum()),
        top_token_ids=tuple(top_token_ids.tolist()),
        top_logprobs=tuple(logprobs(top_token_ids)),
    )


def _top(row: Tensor, num_top: int) -> Tensor:
    """Return the ids of the num_top largest values, largest first, ties by smaller id."""
    if num_top == 0:
        return torch.empty(0, dtype=torch.int64, device=row.device)
    threshold = torch.topk(row, num_top).values[-1]
    candidates = torch.nonzero(row >= threshold).squeeze(1)
    order = torch.sort(row[candidates], descending=True, stable=True).indices
    return candidates[order[:num_top]]
