"""The rule `sampled`: drafts are accepted as long as they are what the model samples anyway.

It is exact for every sampler option: no token of the output knows that there were drafts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import Sample, SamplingBatch
from stepwire_executor.speculation.interface import DraftRows, DrawnTokens, VerifiedRows


class SampledVerification:
    """Samples every row as if there were no drafts, and compares."""

    def __init__(self, sample: Sample) -> None:
        """Use the sampler of the kernels; a draft model draws with the noise of the same place."""
        self._sample = sample

    def draw(self, logits: Tensor, batch: SamplingBatch) -> DrawnTokens:
        """See VerificationRule."""
        return DrawnTokens(token_ids=self._sample(logits, batch).token_ids)

    def verify(self, logits: Tensor, batch: SamplingBatch, rows: DraftRows) -> VerifiedRows:
        """See VerificationRule."""
        output = self._sample(logits, batch)
        is_accepted = (output.token_ids == rows.next_drafts) & output.is_finite
        return VerifiedRows(
            token_ids=output.token_ids,
            is_finite=output.is_finite,
            num_accepted=count_accepted(is_accepted, rows.first_rows),
        )


def count_accepted(is_accepted: Tensor, first_rows: Tensor) -> Tensor:
    """Length of the longest accepted prefix of each sequence's drafts, [num_sampled] int64.

    is_accepted: [num_rows] bool, whether the draft behind each row is; False in the last row of
    each sequence. first_rows: [num_sampled] int64, rising. Waits for nothing.
    """
    num_rows = is_accepted.shape[0]
    places = torch.arange(num_rows, device=is_accepted.device)
    refusals = torch.where(is_accepted, num_rows, places)
    # For each row the first refusal at or behind it: each sequence has one in its last row.
    next_refusals = refusals.flip(0).cummin(dim=0).values.flip(0)
    return next_refusals[first_rows] - first_rows
