"""Linear layers in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_ROWS_A_SLICE = 4096
"""Rows of a weight that are widened at a time, so that no second copy of it is ever held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWeight:
    """A weight as it is stored in a checkpoint."""

    values: Tensor
    """[out_features, in_features]."""

    @property
    def out_features(self) -> int:
        """Length of a result's row."""
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        """Length of an input's row."""
        return self.values.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory the weight takes."""
        return self.values.nbytes


def pack_weight(weight: Tensor, sum_unit: int | None = None) -> DenseWeight:
    """Keep weight, [out_features, in_features], as it is; torch knows no units of sums."""
    if weight.ndim != 2:
        raise ValueError(f"weight must be [out_features, in_features], not {tuple(weight.shape)}")
    return DenseWeight(values=weight.contiguous())


def linear(
    x: Tensor,
    weight: DenseWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x @ weight.T + bias; see `interface.Linear`.

    torch may sum in another order for another number of rows, so rows are not bit-equal.
    """
    if x.ndim != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [*, {weight.in_features}]")
    if out_dtype is None or out_dtype == x.dtype:
        return functional.linear(x, weight.values, bias)
    out = torch.empty((x.shape[0], weight.out_features), dtype=out_dtype, device=x.device)
    wide = x.to(out_dtype)
    for start in range(0, weight.out_features, _ROWS_A_SLICE):
        rows = slice(start, start + _ROWS_A_SLICE)
        out[:, rows] = functional.linear(wide, weight.values[rows].to(out_dtype))
    if bias is not None:
        out += bias.to(out_dtype)
    return out
