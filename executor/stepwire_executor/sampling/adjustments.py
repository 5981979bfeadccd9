"""Changes to single rows of logits before sampling: bias, penalties, suppression."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RowAdjustments:
    """Changes to the logits of one row, in the order they are applied."""

    row: int
    bias_token_ids: Tensor | None = None
    """[num_biases] int64, added to by bias_values."""
    bias_values: Tensor | None = None
    """[num_biases] float32."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seen_token_ids: Tensor | None = None
    """[num_seen] int64, distinct tokens of prompt and output, for the repetition penalty."""
    output_counts: Tensor | None = None
    """[num_seen] float32, how often each was generated, for presence and frequency."""
    suppressed_token_ids: Tensor | None = None
    """[num_suppressed] int64, cannot be sampled."""


def apply_adjustments(logits: Tensor, adjustments: Iterable[RowAdjustments]) -> None:
    """Change rows of logits, [num_rows, vocab_size] float32, in place.

    Repetition penalty: Keskar et al. 2019 (divide positive logits, multiply negative ones);
    presence and frequency penalties are subtracted for tokens that were generated.
    """
    for change in adjustments:
        row = logits[change.row]
        if change.bias_token_ids is not None and change.bias_values is not None:
            row.index_add_(0, change.bias_token_ids, change.bias_values)
        if change.seen_token_ids is not None:
            _penalise(row, change, change.seen_token_ids)
        if change.suppressed_token_ids is not None:
            row[change.suppressed_token_ids] = -torch.inf


def _penalise(row: Tensor, change: RowAdjustments, seen: Tensor) -> None:
    values = row[seen]
    if change.repetition_penalty != 1.0:
        values = torch.where(
            values > 0, values / change.repetition_penalty, values * change.repetition_penalty
        )
    if change.output_counts is not None:
        counts = change.output_counts
        values = values - change.frequency_penalty * counts
        values = values - change.presence_penalty * (counts > 0)
    row[seen] = values
