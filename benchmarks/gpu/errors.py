"""How far a result is from its float64 reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROW_ALLOWANCE = 6.0
"""A single row may be that much further off than all together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """‖out − ref‖ / ‖ref‖ over all, and of the worst row."""

    whole: float
    worst_row: float

    def is_within(self, bound: float) -> bool:
        """Whether both are; NaN never is."""
        return self.whole <= bound and self.worst_row <= _ROW_ALLOWANCE * bound


def relative_error(out: Tensor, expected: Tensor) -> Error:
    """Compare tensors of one shape, [..., size]; anything not finite is infinitely wrong.

    A row that is small beside the others is measured against a tenth of their mean norm.
    """
    if out.shape != expected.shape:
        raise ValueError(f"shape {tuple(out.shape)} instead of {tuple(expected.shape)}")
    if out.numel() == 0:
        return Error(whole=0.0, worst_row=0.0)
    if not bool(out.isfinite().all()):
        return Error(whole=float("inf"), worst_row=float("inf"))
    difference = (out.double() - expected).flatten(0, -2)
    expected = expected.flatten(0, -2)
    norms = expected.norm(dim=-1)
    total = float(norms.norm())
    floor = 0.1 * total / len(norms) ** 0.5
    if total == 0.0:
        return Error(whole=float(difference.norm()), worst_row=float(difference.abs().max()))
    worst = difference.norm(dim=-1) / norms.clamp(min=floor)
    return Error(whole=float(difference.norm()) / total, worst_row=float(worst.max()))


def worse(a: Error, b: Error) -> Error:
    """The larger of each."""
    return Error(whole=max(a.whole, b.whole), worst_row=max(a.worst_row, b.worst_row))


NO_ERROR = Error(whole=0.0, worst_row=0.0)

BOUNDS = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 6e-3}
"""By the dtype that is computed in: rounding of operands and of the result, with room."""
