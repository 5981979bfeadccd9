"""Log-probabilities of sampled tokens and their likeliest rivals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLogprobs:
    """Log-probabilities of one row under the unadjusted logits at temperature 1."""

    logprob: float
    """Of the sampled token."""
    rank: int
    """1 is the likeliest."""
    top_token_ids: tuple[int, ...]
    """Likeliest first; ties by smaller id."""
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobTensors:
    """RowLogprobs of several rows, where they were computed."""

    logprobs: Tensor
    """[num_rows] float32, of the sampled tokens."""
    ranks: Tensor
    """[num_rows] int64."""
    top_token_ids: Tensor
    """[num_rows, num_top] int64."""
    top_logprobs: Tensor
    """[num_rows, num_top] float32."""

    def to_host(self) -> LogprobTensors:
        """Start copies to the host; whoever reads them waits for the device first."""
        return LogprobTensors(
            **{
                name: getattr(self, name).to("cpu", non_blocking=True)
                for name in ("logprobs", "ranks", "top_token_ids", "top_logprobs")
            }
        )

    def rows(self, num_top: Sequence[int]) -> list[RowLogprobs]:
        """Read tensors of the host; num_top: likeliest tokens that each row wants."""
        return [
            RowLogprobs(
                logprob=logprob,
                rank=rank,
                top_token_ids=tuple(token_ids[:num]),
                top_logprobs=tuple(logprobs[:num]),
            )
            for logprob, rank, token_ids, logprobs, num in zip(
                self.logprobs.tolist(),
                self.ranks.tolist(),
                self.top_token_ids.tolist(),
                self.top_logprobs.tolist(),
                num_top,
                strict=True,
            )
        ]


def describe_rows(logits: Tensor, token_ids: Tensor, num_top: int) -> LogprobTensors:
    """Describe the sampled token and the num_top likeliest of each row, without a wait.

    logits: [num_rows, vocab_size] float32; token_ids: [num_rows] int64.
    """
    vocab_size = logits.shape[1]
    num_top = min(num_top, vocab_size)
    log_totals = torch.logsumexp(logits.double(), dim=1, keepdim=True)
    ids = torch.arange(vocab_size, device=logits.device)
    # One integer a token that sorts by logit, then by smaller id: topk alone leaves ties open.
    bits = (logits + 0.0).view(torch.int32)  # -0 and 0 are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.long() << 32) + (vocab_size - 1 - ids)
    chosen = token_ids.unsqueeze(1)
    ranks = 1 + (keys > keys.gather(1, chosen)).sum(dim=1)
    top_keys = torch.topk(keys, num_top, dim=1).values
    top_token_ids = vocab_size - 1 - (top_keys & 0xFFFFFFFF)

    def logprobs(of: Tensor) -> Tensor:
        # float32 is all the precision the logits have, and hides the order of the float64 sum.
        return (logits.gather(1, of).double() - log_totals).float()

    return LogprobTensors(
        logprobs=logprobs(chosen).squeeze(1),
        ranks=ranks,
        top_token_ids=top_token_ids,
        top_logprobs=logprobs(top_token_ids),
    )
