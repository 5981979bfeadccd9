"""Changes to single rows of logits before sampling: bias, penalties, suppression."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.kernels.interface import RowAdjustments


def apply_adjustments(logits: Tensor, adjustments: tuple[RowAdjustments, ...]) -> None:
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
